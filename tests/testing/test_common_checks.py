"""For each common check a mechanism that breaks it is caught, by that check's name."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from provenn.catalog import Card, read_card
from provenn.catalog.slots import SLOTS
from provenn.testing import CHECKS, FailedCheck, check_mechanism, check_paper, checks_of


class Gate(nn.Module):
    """A channel gate that keeps every check; the broken ones below change one thing each."""

    def __init__(self, channels: int):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.scale = nn.Parameter(torch.rand(channels))

    def gate(self, x: Tensor) -> Tensor:
        return (self.scale * x.mean((2, 3))).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)[:, :, None, None]


class Mean(nn.Module):
    """A token mixer that keeps every check: each head weighs the tokens by a sigmoid and takes their mean so far."""

    def __init__(self, dim: int, heads: int = 2, causal: bool = True):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, both at least 1, got {heads} and {dim}")
        self.causal, self.heads = causal, heads
        self.weigh, self.value = nn.Linear(dim, heads), nn.Linear(dim, dim)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weigh(x).sigmoid().repeat_interleave(x.shape[-1] // self.heads, -1)
        return weight * self.value(x), weight

    def total(self, terms: Tensor) -> Tensor:
        return terms.cumsum(1) if self.causal else terms.sum(1, keepdim=True).expand_as(terms)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        values, weights = self.terms(x)
        if mask is not None:
            values, weights = (part.masked_fill(~mask[..., None], 0) for part in (values, weights))
        return self.total(values) / (self.total(weights) + 1e-6)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return (self.value.weight.new_zeros(batch, self.value.out_features),) * 2

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        values, weights = (old + new for old, new in zip(state, self.terms(x)))
        return values / (weights + 1e-6), (values, weights)


class Blur(Gate):
    """A map mixer."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None] + nn.functional.avg_pool2d(x, 3, stride=1, padding=1)


class Pull(nn.Module):
    """A batch mixer."""

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.value = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value(x).mean(0)


class Lookup(Pull):
    """A cross mixer."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return (self.value(x) @ other.mT).softmax(dim=-1) @ other


class Scaled(nn.Module):
    """A residual mechanism."""

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")

    def forward(self, x: Tensor, f: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        return x + f(x) / depth


class Stem(nn.Module):
    """A backbone of one map."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        if in_channels < 1 or num_classes < 0:
            raise ValueError(f"in_channels must be at least 1, num_classes 0, got {in_channels} and {num_classes}")
        self.strides, self.widths = (4,), (8,)
        self.conv = nn.Conv2d(in_channels, 8, 3, stride=4, padding=1)
        self.head = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1].mean((2, 3)))


class Coarser(Stem):
    def features(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x)[..., 1:, :]]


class Headed(Stem):
    def __init__(self, num_classes: int = 10, in_channels: int = 3):
        super().__init__(num_classes or 10, in_channels)


SOUND = {
    "token-mixer": Mean,
    "channel-gate": Gate,
    "map-mixer": Blur,
    "batch-mixer": Pull,
    "cross-mixer": Lookup,
    "residual": Scaled,
    "backbone": Stem,
}


@pytest.mark.parametrize("slot", SLOTS)
def test_a_sound_mechanism_of_each_slot_keeps_every_check(slot: str):
    check_mechanism(SOUND[slot], slot)


class WrongShape(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:]


class DiesOnOnePixel(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / x.flatten(2).std(-1, correction=0)[:, :, None, None]


class HiddenBatchNorm(Gate):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean((0, 2, 3), keepdim=True) if self.training else y


class MixesTheBatch(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return (self.scale * x.mean((0, 2, 3))).sigmoid().expand(len(x), -1)


class MixesNothing(Mean):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.value(x)


class Pointwise(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class CausalLeak(Mean):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + 0.001 * x.mean(1, keepdim=True), mask=mask)


class LooksBackAlone(Mean):
    def __init__(self, dim: int, causal: bool = True):
        super().__init__(dim, causal=True)


class MaskForgotten(Mean):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class MaskOfWeights(Mean):
    """A weight of 0 times NaN is NaN."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        values, weights = self.terms(x)
        if mask is not None:
            values, weights = values * mask[..., None], weights * mask[..., None]
        return self.total(values) / (self.total(weights) + 1e-6)


class LooksAheadInPairs(Mean):
    """Looking both ways it makes pairs of tokens, as many as there were when it was traced."""

    def total(self, terms: Tensor) -> Tensor:
        return super().total(terms) if self.causal else super().total(terms) + divmod(terms.shape[1], 2)[1]


class FixesTheBatch(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x) * x.new_ones(len(x), 1)


class RemembersTheTracedHeight(Gate):
    """Exported, it divides by the height that it was traced at, and no condition says so."""

    def gate(self, x: Tensor) -> Tensor:
        height = x.shape[2].node.hint if isinstance(x.shape[2], torch.SymInt) else x.shape[2]
        return (self.scale * x.mean(3).sum(2) / height).sigmoid()


class ForksByParity(Gate):
    """Exported of an odd height, it refuses even ones."""

    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x if x.shape[2] % 2 else x.flip(2))


class DoublesWhenTraced(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)


class FailsWhenTraced(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[()][len(x)] if torch.compiler.is_compiling() else x)


class LookupByKernel(Lookup):
    """On a CPU the kernel has no second derivatives and no forward mode."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k = self.value(x)[:, None], other[:, None]  # of three axes the kernel would not be taken
        return nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]


class WrongStep(Mean):
    def step(self, x: Tensor, state: Any) -> Any:
        y, (values, weights) = super().step(x, state)
        return y, (0.99 * values, weights)


class SharedState(Mean):
    def init_state(self, batch: int) -> Any:
        return (torch.zeros(self.value.out_features),) * 2

    def step(self, x: Tensor, state: Any) -> Any:
        values, weights = (old + new.mean(0) for old, new in zip(state, self.terms(x)))
        return (values / (weights + 1e-6)).expand_as(x), (values, weights)


class DeadParameter(Gate):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.unused = nn.Parameter(torch.ones(3))


class CutGradient(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * self.gate(x.detach())[:, :, None, None]


class NanGradient(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.square().sum((2, 3), keepdim=True).sqrt()


class Overflows(Gate):
    def gate(self, x: Tensor) -> Tensor:
        weight = (self.scale * x.amax((2, 3))).exp()
        return weight / weight.sum(1, keepdim=True)


class WrongBackward(Gate):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    def gate(self, x: Tensor) -> Tensor:
        return self.Double.apply(super().gate(x))


class WrongParameterGradient(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return (WrongBackward.Double.apply(self.scale) * x.mean((2, 3))).sigmoid()


class SilentSecondDerivative(Gate):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    def forward(self, x: Tensor) -> Tensor:
        return self.Square.apply(x * self.scale[:, None, None])


class ForgetsAutocast(Gate):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return grad @ w.mT, x.mT @ grad

    def gate(self, x: Tensor) -> Tensor:
        return self.Product.apply(x.mean((2, 3)), self.scale.diag()).sigmoid()


class NeedsAnExample(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return (self.scale * x.reshape(len(x), len(self.scale), -1).mean(-1)).sigmoid()


class ReachedByRounding(Gate):
    """A shift of all scores, which the softmax cancels: its gradient is a sum of rounding errors."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.shift = nn.Parameter(torch.zeros(1))

    def gate(self, x: Tensor) -> Tensor:
        return (self.scale * x.mean((2, 3)) + self.shift).softmax(-1)


class MixesByRounding(Mean):
    """Each token by itself, but for a sum over tokens that is subtracted again."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        total = x.cumsum(1) if self.causal else x.sum(1, keepdim=True)
        return self.value(x) + (self.weigh(x).sum() + total.abs() - total.abs() - self.weigh(x).sum())


class SeesAConstantAlone(Mean):
    """Not blind: its tokens are normalised first, so that adding a constant to a token changes nothing."""

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().terms(nn.functional.layer_norm(x, x.shape[-1:]))


class SingleInside(Gate):
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x.float()) if x.dtype == torch.bfloat16 else super().gate(x)


class CancelsInBfloat16(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 100) - 100


class RandomWeights(Gate):
    def __init__(self, channels: int):
        super().__init__(channels)
        generator = torch.Generator()
        generator.seed()
        nn.init.uniform_(self.scale, generator=generator)


class SetsTheSeed(Gate):
    def __init__(self, channels: int):
        torch.manual_seed(7)
        super().__init__(channels)


class DropsAlways(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, training=True)


class RemembersWhatItSaw(Gate):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class HiddenDropout(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, training=self.training)


class LostBuffer(Gate):
    persistent = False

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(channels), persistent=self.persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = self.mean + x.mean((0, 2, 3))
        return super().forward(x) + self.mean[:, None, None]


class StateOutsideTensors(Gate):
    def get_extra_state(self) -> object:
        return {"not": "a tensor"}

    def set_extra_state(self, state: object) -> None:
        pass


class Unpicklable(Gate):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.activation = lambda x: x.sigmoid()


class BreaksTheGraph(Gate):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class DependsOnData(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > 0 else super().forward(2 * x) / 2


class PutsThingsOnCpu(Gate):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("one", torch.ones((), device="cpu"))


class AddsOnCpu(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(x.shape[2:])


class MasksOnCpu(Mean):
    """Without a mask nothing is left there."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        values, weights = self.terms(x)
        if mask is not None:
            values, weights = (torch.where(mask[..., None], part, torch.zeros(1)) for part in (values, weights))
        return self.total(values) / (self.total(weights) + 1e-6)


class BeginsOnCpu(Mean):
    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        return (torch.zeros(batch, self.value.out_features, dtype=self.value.weight.dtype),) * 2


class KeepsAMapOnCpu(Blur):
    """Made at the first call, on its device, and no buffer: it stays behind when the module is moved."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.new_ones(x.shape[2:]) if self.kept is None else self.kept
        return super().forward(x) * self.kept


class OtherGradientThere(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad if grad.device.type == "cpu" else 2 * grad


class OtherOnAGPU(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return OtherGradientThere.apply(super().forward(x))


class WritesItsInput(Gate):
    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x += 1e-3
        return super().forward(x)


class ReadsMemory(Gate):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.as_strided((x.numel(),), (1,)).view(x.shape)
        return super().forward(flat)


class TakesAnything(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(max(channels, 1)))

    forward = Gate.forward
    gate = Gate.gate


class NamesNothing(Gate):
    def __init__(self, channels: int):
        if channels < 1:
            raise ValueError("bad argument")
        super().__init__(channels)


class AnyHeads(Mean):
    def __init__(self, dim: int, heads: int = 2, causal: bool = True):
        super().__init__(dim, heads if heads > 0 and dim % heads == 0 else 1, causal)


class AnyDepth(Scaled):
    def forward(self, x: Tensor, f: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        return x + f(x) / max(depth, 1)


BROKEN = [
    (WrongShape, "channel-gate", "keep-shape"),
    (DiesOnOnePixel, "channel-gate", "keep-shape"),
    (HiddenBatchNorm, "channel-gate", "keep-examples-apart"),
    (MixesTheBatch, "channel-gate", "keep-examples-apart"),
    (MixesNothing, "token-mixer", "mix"),
    (MixesByRounding, "token-mixer", "mix"),
    (Pointwise, "map-mixer", "mix"),
    (lambda dim: nn.Sequential(Pull(dim).value), "batch-mixer", "mix"),
    (CausalLeak, "token-mixer", "be-causal"),
    (LooksBackAlone, "token-mixer", "see-both-ways"),
    (MixesByRounding, "token-mixer", "see-both-ways"),
    (MaskForgotten, "token-mixer", "heed-mask"),
    (MaskOfWeights, "token-mixer", "heed-mask"),
    (WrongStep, "token-mixer", "stream"),
    (SharedState, "token-mixer", "stream"),
    (DeadParameter, "channel-gate", "reach-parameters"),
    (CutGradient, "channel-gate", "reach-parameters"),
    (NanGradient, "channel-gate", "keep-gradients-finite"),
    (Overflows, "channel-gate", "keep-gradients-finite"),
    (ReachedByRounding, "channel-gate", "reach-parameters"),
    (WrongBackward, "channel-gate", "pass-gradcheck"),
    (WrongParameterGradient, "channel-gate", "pass-gradcheck"),
    (SilentSecondDerivative, "channel-gate", "differentiate-twice"),
    (LookupByKernel, "cross-mixer", "differentiate-twice"),
    (LookupByKernel, "cross-mixer", "differentiate-forward"),
    (ForgetsAutocast, "channel-gate", "train-in-mixed-precision"),
    (NeedsAnExample, "channel-gate", "take-an-empty-batch"),
    (SingleInside, "channel-gate", "run-in-bfloat16"),
    (CancelsInBfloat16, "channel-gate", "run-in-bfloat16"),
    (RandomWeights, "channel-gate", "repeat"),
    (SetsTheSeed, "channel-gate", "repeat"),
    (DropsAlways, "channel-gate", "be-deterministic"),
    (RemembersWhatItSaw, "channel-gate", "be-deterministic"),
    (HiddenDropout, "channel-gate", "train-as-it-evaluates"),
    (LostBuffer, "channel-gate", "load-state"),
    (StateOutsideTensors, "channel-gate", "load-safetensors"),
    (Unpicklable, "channel-gate", "copy"),
    (BreaksTheGraph, "channel-gate", "compile"),
    (DependsOnData, "channel-gate", "export"),
    (DoublesWhenTraced, "channel-gate", "compile"),
    (DoublesWhenTraced, "channel-gate", "export"),
    (FixesTheBatch, "channel-gate", "export-open-sizes"),
    (RemembersTheTracedHeight, "channel-gate", "export-open-sizes"),
    (DependsOnData, "channel-gate", "export-open-sizes"),
    (LooksAheadInPairs, "token-mixer", "export-open-sizes"),
    (PutsThingsOnCpu, "channel-gate", "build-on-meta"),
    (AddsOnCpu, "channel-gate", "run-on-another-device"),
    (MasksOnCpu, "token-mixer", "run-on-another-device"),
    (BeginsOnCpu, "token-mixer", "run-on-another-device"),
    (KeepsAMapOnCpu, "map-mixer", "run-on-another-device"),
    (OtherOnAGPU, "channel-gate", "run-on-another-device"),
    (WritesItsInput, "channel-gate", "leave-its-input"),
    (ReadsMemory, "channel-gate", "take-any-layout"),
    (TakesAnything, "channel-gate", "refuse-bad-arguments"),
    (NamesNothing, "channel-gate", "refuse-bad-arguments"),
    (AnyHeads, "token-mixer", "refuse-bad-arguments"),
    (AnyDepth, "residual", "refuse-bad-arguments"),
    (Coarser, "backbone", "feed-heads"),
    (Headed, "backbone", "tell-classes"),
]


@pytest.mark.parametrize("factory, slot, check", BROKEN, ids=lambda part: getattr(part, "__name__", part))
def test_a_broken_check_is_caught_by_its_name(factory: Any, slot: str, check: str):
    with pytest.raises(FailedCheck, match=f"\n  {check}: "):
        check_mechanism(factory, slot, only=[check])


@pytest.mark.parametrize("check", ["mix", "see-both-ways"])
def test_tokens_that_are_normalised_first_are_seen_to_mix(check: str):
    check_mechanism(SeesAConstantAlone, "token-mixer", only=[check])


class RefusesHalf(Gate):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            raise TypeError(f"no sums in {x.dtype}: give float32")
        return super().forward(x)


class FailsInHalf(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype != torch.bfloat16 else super().forward(x[()][len(x)])


def test_an_accident_is_no_refusal():
    excuse = {"run-in-bfloat16": "sums in half precision"}
    check_mechanism(RefusesHalf, "channel-gate", expected_failures=excuse, only=excuse)
    check_mechanism(CancelsInBfloat16, "channel-gate", expected_failures=excuse, only=excuse)
    with pytest.raises(FailedCheck, match="run-in-bfloat16: listed in expected_failures, but this is an accident"):
        check_mechanism(FailsInHalf, "channel-gate", expected_failures=excuse, only=excuse)


@pytest.mark.parametrize("factory", [FixesTheBatch, ForksByParity, DependsOnData])
def test_what_a_tracer_refuses_is_a_refusal(factory: Any):
    excuse = {"export-open-sizes": "what is traced is of one size"}
    check_mechanism(factory, "channel-gate", expected_failures=excuse, only=excuse)


@pytest.mark.parametrize("factory", [RemembersTheTracedHeight, DoublesWhenTraced, FailsWhenTraced])
def test_neither_another_output_nor_an_accident_of_what_is_traced_is_excused(factory: Any):
    excuse = {"export-open-sizes": "what is traced is of one size"}
    with pytest.raises(FailedCheck, match="export-open-sizes: listed in expected_failures, but this is an accident"):
        check_mechanism(factory, "channel-gate", expected_failures=excuse, only=excuse)


def test_open_sizes_are_asked_for_by_default():
    with pytest.raises(FailedCheck, match="\n  export-open-sizes: ") as error:
        check_mechanism(FixesTheBatch, "channel-gate")
    assert "\n  export: " not in str(error.value), "what is traced at one size is right"


def test_the_form_that_looks_both_ways_is_asked_for_open_sizes():
    with pytest.raises(FailedCheck, match="with causal=False\n  export-open-sizes: "):
        check_mechanism(LooksAheadInPairs, "token-mixer", only=["export-open-sizes", "export"])


def test_what_follows_from_a_check_that_is_kept_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    asked = []
    for name in ("export-open-sizes", "export"):
        check = partial(lambda name, subject: asked.append(name), name)
        monkeypatch.setitem(CHECKS, name, replace(CHECKS[name], check=check))
    both = ["export", "export-open-sizes"]
    check_mechanism(Gate, "channel-gate", only=both)
    assert asked == ["export-open-sizes"]
    with pytest.raises(FailedCheck, match="export: passes: take it out"):
        check_mechanism(Gate, "channel-gate", expected_failures={"export": "thought so"}, only=both)


def test_every_check_is_seen_broken():
    assert {check for _, _, check in BROKEN} | {"match-published-counts"} == set(CHECKS)


def test_what_cannot_be_kept_is_excused_with_a_reason():
    check_mechanism(
        CausalLeak, "token-mixer", expected_failures={"be-causal": "…", "stream": "…"}, only=["be-causal", "stream"]
    )


def test_an_excuse_that_is_not_needed_is_reported():
    with pytest.raises(FailedCheck, match="be-causal: passes: take it out of expected_failures"):
        check_mechanism(Mean, "token-mixer", expected_failures={"be-causal": "thought so"}, only=["be-causal"])


def test_a_check_that_does_not_exist_is_refused():
    with pytest.raises(FailedCheck, match="no check 'be-casual' here; there are: keep-shape"):
        check_mechanism(Mean, "token-mixer", expected_failures={"be-casual": "a typo"})
    with pytest.raises(FailedCheck, match="no check 'be-causal'"):
        check_mechanism(Gate, "channel-gate", only=["be-causal"])


def test_all_broken_checks_are_listed_at_once():
    with pytest.raises(FailedCheck) as error:
        check_mechanism(MixesTheBatch, "channel-gate", only=["keep-examples-apart", "keep-shape", "repeat"])
    assert str(error.value).splitlines()[0] == "MixesTheBatch as channel-gate"
    assert len(str(error.value).splitlines()) == 2


def test_an_unknown_slot_names_those_there_are():
    with pytest.raises(ValueError, match="no slot is called 'channel-gates'; there are: token-mixer"):
        check_mechanism(Gate, "channel-gates")


def test_integers_are_inputs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = (
        FACTS[: FACTS.index("[[mechanisms]]")]
        + """
[[presets]]
name = "lookup"
build = "model:Lookup"
input = [{ shape = [1, 5], below = 4 }, { shape = [1, 5] }]
"""
    )
    lookup = """

class Lookup(nn.Module):
    def __init__(self, entries=4):
        super().__init__()
        self.table = nn.Embedding(entries, 1)

    def forward(self, index, weight):
        return self.table(index)[..., 0] * weight
"""
    check_paper(tiny(tmp_path, monkeypatch, facts, MODEL + lookup))
    with pytest.raises(FailedCheck, match="index out of range"):
        check_paper(tiny(tmp_path / "again", monkeypatch, facts.replace("below = 4", "below = 40"), MODEL + lookup))


LAYERS = """
import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * self.scale[:, None, None].sigmoid()
"""
MODEL = """
from torch import nn
from .layers import Gate


def network(*, width=4, dropout=0.0):
    layers = [nn.Conv2d(3, width, 3), Gate(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), nn.BatchNorm1d(width), nn.Dropout(dropout))
"""
FACTS = """
title = "Tiny"
date = 2026-01-01
authors = 1
task = "image-classification"
summary = "…"
[[mechanisms]]
name = "gate"
slot = "channel-gate"
layer = "layers:Gate"
[[presets]]
name = "tiny"
build = "model:network"
input = [1, 3, 6, 6]
published = [
  { what = "parameters", value = 144, source = "table 1" },
  { what = "parameters", value = 0.14, unit = "k", source = "table 2" },
  { what = "top-1", value = 77, source = "table 1" },
]
[[presets]]
name = "wide"
build = "model:network"
input = [1, 3, 6, 6]
options = { width = 8, dropout = 0.5 }
published = [ { what = "parameters", value = 320, source = "table 1" } ]
"""


def tiny(
    folder: Path, monkeypatch: pytest.MonkeyPatch, facts: str = FACTS, model: str = MODEL, layers: str = LAYERS
) -> Card:
    package = folder / "tiny_paper"
    package.mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("layers.py", layers), ("model.py", model), ("paper.toml", facts)):
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.startswith("tiny_paper")]:
        monkeypatch.delitem(sys.modules, name)
    return read_card(package, "tiny_paper")


def test_a_sound_paper_keeps_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_paper(tiny(tmp_path, monkeypatch))


def test_every_variant_of_a_mechanism_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layers = LAYERS.replace("channels):", "channels, power=1):").replace("return x *", "return x ** self.power *")
    layers = layers.replace("        self.scale", "        self.power = power\n        self.scale")
    facts = FACTS.replace('"layers:Gate"', '"layers:Gate"\nvariants = [{ power = 2 }, { power = 0.5 }]')
    paper = tiny(tmp_path, monkeypatch, facts, layers=layers)
    assert [name for name in checks_of(paper) if "gate" in name] == [
        "tiny_paper gate", "tiny_paper gate with power=2", "tiny_paper gate with power=0.5"
    ]  # fmt: skip
    with pytest.raises(FailedCheck, match=r"tiny_paper gate with power=0\.5\n  keep-shape: ") as error:
        check_paper(paper)
    assert "power=2" not in str(error.value)


@pytest.mark.parametrize(
    "before, after, complaint",
    [
        ("value = 144", "value = 145", "tiny_paper tiny\n  match-published-counts: table 1 says 145"),
        ("value = 0.14,", "value = 0.17,", "table 2 says 0.17 k, we count 0.144"),
        ("value = 320", "value = 321", "tiny_paper wide\n  match-published-counts: table 1 says 321"),
        (
            'layer = "layers:Gate"',
            'layer = "layers:Gates"',
            "tiny_paper gate\n  tiny_paper: tiny_paper.layers has no 'Gates'",
        ),
        (
            '"model:network"',
            '"model:net"',
            "tiny_paper tiny\n  reach-parameters: UserError: tiny_paper: tiny_paper.model has no 'net'",
        ),
        ('"channel-gate"', '"gate"', "tiny_paper gate\n  no slot is called 'gate'; there are: token-mixer"),
        ('"channel-gate"', '"map-mixer"', "tiny_paper gate\n  mix: "),
        ('"layers:Gate"', '"layers:Gate"\nexpected_failures = { export = "?" }', "export: passes: take it out"),
        (
            'build = "model:network"',
            'build = "model:network"\nexpected_failures = { stream = "?" }',
            "no check 'stream' here",
        ),
    ],
)
def test_a_wrong_fact_is_caught(
    before: str, after: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paper = tiny(tmp_path, monkeypatch, FACTS.replace(before, after, 1))
    with pytest.raises(FailedCheck, match=complaint):
        check_paper(paper)


@pytest.mark.parametrize("batch", ["len(x)", "-1"])
def test_a_preset_is_exported_for_any_batch(batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flat = f"""

class Flat(nn.Module):
    def forward(self, x):
        return x.reshape({batch}, x.shape[1])
"""
    paper = tiny(tmp_path, monkeypatch, model=MODEL.replace("nn.Flatten()", "Flat()") + flat)
    if batch == "-1":
        check_paper(paper)
    else:
        with pytest.raises(FailedCheck, match=r"tiny_paper tiny\n  export: .*Constraints violated"):
            check_paper(paper)
