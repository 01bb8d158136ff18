"""The checks, one function each."""

import copy
import inspect
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_leaves

from provenn.catalog import COUNTING_UNITS
from provenn.core.cost import count_parameters
from provenn.nn.backbone import check_backbone
from provenn.testing.elsewhere import DEVICE, elsewhere, move
from provenn.testing.subject import WIDTH, Subject


@dataclass(frozen=True)
class Check:
    """A property that can be asked of a mechanism or a preset: `check` raises AssertionError where it does not hold."""

    name: str
    says: str
    check: Callable[[Subject], None]
    slots: frozenset[str] | None

    def concerns(self, slot: str | None) -> bool:
        """Whether it is asked of mechanisms of this slot; None stands for presets."""
        return self.slots is None or (slot or "preset") in self.slots


CHECKS: dict[str, Check] = {}


def _check(name: str, *where: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a check under a name that reads well after "cannot"; `where` limits it to some slots, or to "preset"."""

    def register(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[name] = Check(name, inspect.getdoc(check) or "", check, frozenset(where) or None)
        return check

    return register


# What is traced with open sizes sees several windows and chunks of a mechanism, then others. No window's side divides
# them: where nothing is filled up, torch.export keeps that as a condition.
TRACED = {"batch": 3, "tokens": 37, "other": 5, "height": 17, "width": 23}
OTHER = {"batch": 2, "tokens": 50, "other": 9, "height": 26, "width": 19}
EQUAL = 1e-6  # of two runs of the same arithmetic: how memory is aligned may change the order of a sum
KEY_BIASES = ("key.bias", "k_proj.bias")
MECHANISMS = ("token-mixer", "channel-gate", "map-mixer", "batch-mixer", "cross-mixer", "residual")
MIXERS = ("token-mixer", "map-mixer", "batch-mixer", "cross-mixer")
APART = ("token-mixer", "channel-gate", "map-mixer", "cross-mixer", "residual", "preset")


def _close(actual: Any, expected: Any, message: str, tolerance: float = 1e-4) -> None:
    """All tensors of two outputs agree to `tolerance`, relative to the largest value of each."""
    pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
    for a, b in pairs:
        if not isinstance(a, Tensor):
            continue
        assert a.shape == b.shape, f"{message}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
        scale = max(b.detach().abs().max().item(), 1e-3) if b.numel() else 1.0
        worst = (a.detach() - b.detach()).abs().max().item() if b.numel() else 0.0
        assert worst <= tolerance * scale, f"{message}: differs by {worst:.3g} where values reach {scale:.3g}"


def _cast(inputs: list[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The inputs with a change to the real ones; integers are indices and stay what they are."""
    return [change(x) if x.is_floating_point() else x for x in inputs]


def _first(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _silence(module: nn.Module) -> nn.Module:
    """Training mode, but for the layers that are known and seen to depend on it: dropout and batch norm."""
    visible = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    module.train()
    for part in module.modules():
        if isinstance(part, visible):
            part.eval()
    return module


@contextmanager
def unchecked() -> Iterator[None]:
    """Switch run-time shape checks off, which no tracer can follow."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _stacked_steps(module: Any, x: Tensor) -> Tensor:
    state = module.init_state(len(x))
    outputs = []
    for t in range(x.shape[1]):
        y, state = module.step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


@_check("keep-shape", *MECHANISMS)
def _keep_shape(subject: Subject) -> None:
    """At odd sizes and for a batch of one, the output has the shape and type of the first input, and is finite."""
    assert subject.slot is not None
    for dim in (WIDTH, 2 * WIDTH):
        module = subject.build(dim=dim)
        for batch, sizes in [(1, subject.slot.sizes[-1]), *((3, sizes) for sizes in subject.slot.sizes)]:
            inputs = subject.inputs(**sizes | {"dim": dim, "batch": sizes.get("batch", batch)})
            with torch.no_grad():
                output = module(*inputs)
            assert isinstance(output, Tensor), f"gives {type(output).__name__}, not a tensor"
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            assert output.shape == inputs[0].shape, f"{shapes} gives {tuple(output.shape)}"
            assert output.dtype == inputs[0].dtype, f"{inputs[0].dtype} gives {output.dtype}"
            assert output.isfinite().all(), f"{shapes} gives values that are not finite"


@_check("keep-examples-apart", *APART)
def _keep_examples_apart(subject: Subject) -> None:
    """The order and the size of the batch change no example's output, in training too (batch norms put aside)."""
    for mode in ("evaluating", "training"):
        module, inputs, order = subject.build(), subject.inputs(batch=4), torch.tensor([2, 0, 3, 1])
        module = _silence(module) if mode == "training" else module
        with torch.no_grad():
            torch.manual_seed(0)
            together = tree_leaves(module(*inputs))
            shuffled = tree_leaves(module(*(x[order] for x in inputs)))
            alone = tree_leaves(module(*(x[1:2] for x in inputs)))
        _close(shuffled, [y[order] for y in together], f"{mode}, the order of the batch changes outputs")
        _close(alone, [y[1:2] for y in together], f"{mode}, an example's company changes its output")


@_check("mix", *MIXERS)
def _mix(subject: Subject) -> None:
    """What the slot mixes is mixed: other noise at one position reaches another."""
    assert subject.slot is not None
    position: tuple[Any, ...]
    reached: tuple[Any, ...]
    if subject.slot.mixes == "other":
        which, position, reached = 1, (slice(None), 0), (slice(None),)
    elif subject.slot.mixes == "space":
        which, position, reached = 0, (..., 2, 2), (slice(None), slice(None), slice(3, None))
    elif subject.slot.mixes == "tokens":
        which, position, reached = 0, (slice(None), 0), (slice(None), slice(1, None))
    else:
        which, position, reached = 0, (0,), (slice(1, None),)
    assert _reaches(subject.build(), subject, which, position, reached), f"nothing passes along: {subject.slot.mixes}"


def _reaches(
    module: nn.Module, subject: Subject, which: int, position: tuple[Any, ...], reached: tuple[Any, ...]
) -> bool:
    """Whether other noise at a position of an input changes the outputs at others.

    Noise that differs by channel, since a layer norm cancels a constant; and float64, where rounding is far below what
    counts as a change, on every processor.
    """
    inputs, other = ([x.double() for x in subject.inputs(seed=seed)] for seed in (0, 1))
    changed = [x.clone() for x in inputs]
    changed[which][position] = other[which][position]
    module = module.double()
    with torch.no_grad():
        before, after = module(*inputs)[reached], module(*changed)[reached]
    return bool((after - before).abs().max() > 1e-9 * before.abs().max())


@_check("be-causal", "token-mixer")
def _be_causal(subject: Subject) -> None:
    """With causal=True a change at token t moves no output before t."""
    module = subject.build(causal=True)
    (x,) = subject.inputs(tokens=9)
    with torch.no_grad():
        before = module(x)
        for t in (1, 4, 8):
            changed = x.clone()
            changed[:, t:] = 10 * torch.randn(changed[:, t:].shape, generator=torch.Generator().manual_seed(t))
            _close(module(changed)[:, :t], before[:, :t], f"tokens from {t} on change outputs before {t}", 1e-5)


@_check("see-both-ways", "token-mixer")
def _see_both_ways(subject: Subject) -> None:
    """With causal=False the last token reaches the first output."""
    module = subject.build(causal=False)
    reaches = _reaches(module, subject, 0, (slice(None), -1), (slice(None), 0))
    assert reaches, "the first output does not see the last token"


@_check("heed-mask", "token-mixer")
def _heed_mask(subject: Subject) -> None:
    """A token that mask says may not be attended changes no other token's output, whatever it holds.

    It may hold other noise, NaN or an infinity. A mask of True changes nothing.
    """
    module = subject.build()
    (x,) = subject.inputs()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        _close(module(x, mask=mask), module(x), "a mask that allows everything changes outputs")
        mask[:, 2] = mask[1, 4] = False
        before = module(x, mask=mask)
        assert before.isfinite().all(), "a mask gives values that are not finite"
        for what, hidden in (("", 7 * subject.inputs(seed=1)[0]), (" of NaN", torch.nan), (" of ∞", torch.inf)):
            after = module(torch.where(mask[..., None], x, hidden), mask=mask)[mask]
            message = f"a token{what} that may not be attended changes other outputs"
            assert after.isfinite().all(), message
            _close(after, before[mask], message)


@_check("stream", "token-mixer")
def _stream(subject: Subject) -> None:
    """Where there is a step, forward is the fold of step, and each example's state is its own."""
    module: Any = subject.build()
    if not hasattr(module, "step"):
        return
    (x,) = subject.inputs(tokens=9)
    with torch.no_grad():
        streamed = _stacked_steps(module, x)
        _close(streamed, module(x), "forward is not the fold of step")
        _close(_stacked_steps(module, x[1:2]), streamed[1:2], "an example's company changes how it streams")


@_check("reach-parameters")
def _reach_parameters(subject: Subject) -> None:
    """A gradient well above rounding reaches every parameter that is trained, but the biases of keys, and the input.

    A bias of all keys adds one number to all scores of a query, which a softmax cancels: rounding alone reaches it. Up
    to 2^24 parameters it is asked in float64, where that is seen; beyond, any gradient counts, and none is asked of
    single numbers, where rounding may come to nothing.
    """
    module, inputs = subject.build().train(), subject.inputs()
    small = count_parameters(module) <= 2**24
    if small:
        module, inputs = module.double(), _cast(inputs, Tensor.double)
    _backward(module, inputs)
    trained: list[tuple[str, Tensor]] = [("the input", x) for x in inputs if x.is_floating_point()]
    trained += [(n, p) for n, p in module.named_parameters() if p.requires_grad and not n.endswith(KEY_BIASES)]
    sizes = {
        name: 0.0 if x.grad is None else x.grad.abs().max().item() for name, x in trained if x.numel() > (not small)
    }
    least = 1e-12 * max(sizes.values(), default=0.0) if small else 0.0
    missed = [name for name, size in sizes.items() if size <= least]
    assert not missed, f"no gradient reaches {', '.join(missed[:6])}{' and others' if len(missed) > 6 else ''}"


@_check("keep-gradients-finite")
def _keep_gradients_finite(subject: Subject) -> None:
    """Output and gradients are finite for usual, for zero and (of a mechanism) for large inputs."""
    for scale in (1.0, 0.0, *([1e3] if subject.slot else [])):
        module, factor = subject.build().train(), torch.tensor(scale)
        inputs = _cast(subject.inputs(), factor.mul)
        _backward(module, inputs)
        bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        bad += ["the input" for x in inputs if x.grad is not None and not x.grad.isfinite().all()]
        assert not bad, f"for inputs of size {scale:g} the gradient of {', '.join(bad[:6])} is not finite"


def _backward(module: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Run it forward and back; the gradients are left with inputs and parameters."""
    _cast(inputs, Tensor.requires_grad_)
    torch.manual_seed(0)
    outputs = module(*inputs)
    _weighted_sum(outputs).backward()
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _weighted_sum(output: Any) -> Tensor:
    """All outputs in a random direction: the plain sum of a normalised one has no gradient."""
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    assert outputs, "the output depends on nothing that can be trained"
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(y.shape, generator=generator).to(y.device) for y in outputs)
    return torch.stack([(y * weight).sum() for y, weight in zip(outputs, weights)]).sum()


@_check("pass-gradcheck", *MECHANISMS)
def _pass_gradcheck(subject: Subject) -> None:
    """In float64 the gradients of input and parameters equal finite differences."""
    module = subject.build().double()
    inputs = [x.double() for x in subject.inputs(batch=2, tokens=4, other=3, height=4, width=5)]
    names, parameters = zip(*module.named_parameters()) if list(module.parameters()) else ((), ())

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors[len(inputs) :]))
        return torch.func.functional_call(module, given, tensors[: len(inputs)])

    given = [x.requires_grad_() for x in inputs] + [p.detach().clone().requires_grad_() for p in parameters]
    _follow_the_slope(function, given)
    torch.manual_seed(0)
    try:
        torch.autograd.gradcheck(function, given, fast_mode=True, atol=1e-4)
    except GradcheckError as error:
        raise AssertionError(str(error)) from error


def _follow_the_slope(function: Callable[..., Tensor], given: list[Tensor]) -> None:
    """Refuse what is far off along one direction: gradcheck, once it fails, tries each number of each input again."""
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in given]
    output = function(*given)
    if not output.requires_grad:
        return
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((output * weights).sum(), given, allow_unused=True)
    slope = sum(float((g * direction).sum()) for g, direction in zip(grads, along) if g is not None)
    step = 1e-6
    with torch.no_grad():
        ends = [function(*(x + s * d for x, d in zip(given, along))) for s in (step, -step)]
    difference = float(((ends[0] - ends[1]) * weights).sum()) / (2 * step)
    far = abs(slope - difference) > 0.01 * max(abs(slope), abs(difference)) + 1e-2
    assert not far, f"along one direction the gradient gives {slope:.6g}, finite differences {difference:.6g}"


@_check("differentiate-twice", *MECHANISMS)
def _differentiate_twice(subject: Subject) -> None:
    """In float64 the second derivatives equal finite differences of the gradient."""
    module = subject.build().double()
    inputs = [x.double() for x in subject.inputs(batch=2, tokens=4, other=3, height=4, width=5)]
    names = [name for name, _ in module.named_parameters()]
    start = [*inputs, *(p.detach() for p in module.parameters())]
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in start]

    def gradients(step: float, again: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        at = [(x + step * direction).requires_grad_() for x, direction in zip(start, along)]
        output = torch.func.functional_call(module, dict(zip(names, at[len(inputs) :])), tuple(at[: len(inputs)]))
        # A plain weighted sum: the gradient that comes back in is a constant, as most losses make it look at first.
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).cos().view(output.shape)
        grads = torch.autograd.grad((output * weights).sum(), at, create_graph=again, allow_unused=True)
        return at, [torch.zeros_like(x) if g is None else g for x, g in zip(at, grads)]

    at, grads = gradients(0.0, again=True)
    slope = torch.stack([(g * direction).sum() for g, direction in zip(grads, along)]).sum()
    second = torch.autograd.grad(slope, at, allow_unused=True) if slope.requires_grad else [None] * len(at)
    step = 1e-6
    differences = [(g - h) / (2 * step) for g, h in zip(gradients(step)[1], gradients(-step)[1])]
    actual = [torch.zeros_like(x) if s is None else s for x, s in zip(at, second)]
    _close(actual, differences, "the second derivative is not that of the gradient")


@_check("differentiate-forward", *MECHANISMS)
def _differentiate_forward(subject: Subject) -> None:
    """In float64 `torch.func.jvp` and forward mode give the derivative that finite differences give."""
    module = subject.build().double()
    inputs = [x.double() for x in subject.inputs(batch=2, tokens=4, other=3, height=4, width=5)]
    names = [name for name, _ in module.named_parameters()]
    start = (*inputs, *(p.detach() for p in module.parameters()))
    generator = torch.Generator().manual_seed(0)
    along = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in start)

    def function(*at: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, at[len(inputs) :])), at[: len(inputs)])

    step = 1e-6
    with torch.no_grad():
        ends = [function(*(x + s * direction for x, direction in zip(start, along))) for s in (step, -step)]
    difference = (ends[0] - ends[1]) / (2 * step)
    _close(torch.func.jvp(function, start, along)[1], difference, "the derivative of torch.func.jvp is another")
    with forward_ad.dual_level():
        output = function(*(forward_ad.make_dual(x, direction) for x, direction in zip(start, along)))
        tangent = forward_ad.unpack_dual(output).tangent
    assert tangent is not None, "forward mode loses the derivative"
    _close(tangent, difference, "the derivative of forward mode is another")


@_check("train-in-mixed-precision")
def _train_in_mixed_precision(subject: Subject) -> None:
    """Forward under autocast and backward outside, as trainers do it, gives gradients within half of float32's.

    In bfloat16, and in float16 with a gradient scaler, which then takes the step.
    """
    gradients = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module, inputs = _silence(subject.build()), _cast(subject.inputs(), Tensor.requires_grad_)
        trained = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = _weighted_sum(module(*inputs))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(
            torch.cat([torch.zeros_like(x).flatten() if x.grad is None else x.grad.flatten() for x in trained])
        )
        scaler.step(optimizer)
    expected = gradients[0]
    for name, actual in zip(("bfloat16", "float16"), gradients[1:]):
        error = ((actual - expected).norm() / expected.norm()).item()
        assert error <= 0.5, f"under autocast to {name} the gradient is off by {100 * error:.1f} %"


@_check("take-an-empty-batch", *APART)
def _take_an_empty_batch(subject: Subject) -> None:
    """A batch of no example gives an output of none, as the last piece of a data set that is divided may be.

    A mechanism also passes gradients back through it, in training.
    """
    module, inputs = subject.build(), subject.inputs(batch=0)
    with torch.no_grad():
        empty, one = tree_leaves(module(*inputs)), tree_leaves(module(*subject.inputs(batch=1)))
    for y, expected in zip(empty, one, strict=True):
        if isinstance(y, Tensor) and expected.dim():
            assert y.shape == (0, *expected.shape[1:]), (
                f"no example gives {tuple(y.shape)}, one {tuple(expected.shape)}"
            )
    if subject.slot:
        inputs = _cast(inputs, Tensor.requires_grad_)
        module.train()(*inputs).sum().backward()
        bad = [name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()]
        assert not bad, f"no example gives {', '.join(bad)} a gradient"


@_check("run-in-bfloat16")
def _run_in_bfloat16(subject: Subject) -> None:
    """In bfloat16 the output stays within 15 % of float32's, of which choosing another head takes the most."""
    module, inputs = subject.build(), subject.inputs()
    low = copy.deepcopy(module).bfloat16()
    module.load_state_dict(low.state_dict())  # the same rounded weights
    with torch.no_grad():
        expected = _first(module(*_cast(inputs, lambda x: x.bfloat16().float())))
        actual = _first(low(*_cast(inputs, Tensor.bfloat16)))
    assert actual.dtype == torch.bfloat16, f"bfloat16 gives {actual.dtype}"
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    assert error <= 0.15, f"the output is off by {100 * error:.1f} %"


@_check("repeat")
def _repeat(subject: Subject) -> None:
    """The same seed gives the same weights, and building does not touch the seed."""
    first, again = subject.build(stir=False).state_dict(), subject.build(stir=False).state_dict()
    different = [name for name, value in first.items() if not torch.equal(value, again[name])]
    assert not different, f"the same seed gives another {', '.join(different[:6])}"
    assert torch.initial_seed() == 0, "building it sets torch's seed"


@_check("be-deterministic")
def _be_deterministic(subject: Subject) -> None:
    """In eval mode the same input gives the same output twice, and nothing in the module changes."""
    module, inputs = subject.build(), subject.inputs()
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        first, again = tree_leaves(module(*inputs)), tree_leaves(module(*inputs))
    _close(again, first, "the second call differs from the first", EQUAL)
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert not moved, f"evaluating changes {', '.join(moved)}"


@_check("train-as-it-evaluates")
def _train_as_it_evaluates(subject: Subject) -> None:
    """Training and evaluating differ by dropout and batch norm layers alone."""
    module, inputs = subject.build(), subject.inputs()
    with torch.no_grad():
        evaluated = module(*inputs)
        _close(_silence(module)(*inputs), evaluated, "training differs from evaluating, dropout and batch norm aside")


@_check("load-state")
def _load_state(subject: Subject) -> None:
    """After training steps, the state dict carries all that another instance needs to give the same output."""
    module, inputs = _trained(subject), subject.inputs()
    other = subject.build(seed=1)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    with torch.no_grad():
        _close(other(*inputs), module(*inputs), "with the state loaded, another instance differs", EQUAL)


@_check("load-safetensors")
def _load_safetensors(subject: Subject) -> None:
    """The same through a safetensors file."""
    from safetensors.torch import load_model, save_model

    module, inputs = _trained(subject), subject.inputs()
    other = subject.build(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_model(module, str(file))
        load_model(other, str(file))
    with torch.no_grad():
        _close(other(*inputs), module(*inputs), "with the file loaded, another instance differs", EQUAL)


def _trained(subject: Subject) -> nn.Module:
    """An instance whose buffers have seen data."""
    module = subject.build().train()
    with torch.no_grad():
        for seed in (1, 2):
            module(*subject.inputs(seed=seed))
    return module.eval()


@_check("copy")
def _copy(subject: Subject) -> None:
    """A deep copy and an unpickled one give the same output, and share nothing with the original."""
    module, inputs = subject.build(), subject.inputs()
    with torch.no_grad():
        expected = module(*inputs)
        for way, twin in (("deepcopy", copy.deepcopy(module)), ("pickle", pickle.loads(pickle.dumps(module)))):
            _close(twin(*inputs), expected, f"{way} gives another output", EQUAL)
            own = {p.data_ptr() for p in module.parameters() if p.numel()}
            assert not any(p.data_ptr() in own for p in twin.parameters()), f"{way} shares weights with the original"


@_check("compile")
def _compile(subject: Subject) -> None:
    """torch.compile takes it whole, as one graph, and gives the same output and gradients.

    A mechanism's backward pass is traced too (the backend aot_eager). A preset is made of mechanisms and of torch's own
    parts, and large: that its code can be captured is what is left to ask of it.
    """
    module = subject.build()
    backend = "aot_eager" if subject.slot else "eager"
    torch._dynamo.reset()
    results = []
    with unchecked():
        for run in (module, torch.compile(module, backend=backend, fullgraph=True)):
            inputs = subject.inputs()
            output = _backward(run, inputs)
            results.append((output, [x.grad for x in inputs]))
    torch._dynamo.reset()
    _close(results[1][0], results[0][0], "compiled, it gives another output")
    _close(results[1][1], results[0][1], "compiled, it gives another gradient", 1e-3)


@_check("export-open-sizes", *MECHANISMS)
def _export_open_sizes(subject: Subject) -> None:
    """torch.export takes it with every axis open but its width, and at other sizes it gives the same output.

    It asks more than "export" does, which is left out where this one is kept. A loop that is unrolled over tokens
    cannot keep it, nor can what refuses an open number of them.
    """
    assert subject.slot is not None
    axes = [{i for i, axis in enumerate(of.split()) if axis != subject.slot.width} for of in subject.slot.inputs]
    module, inputs = subject.build(), subject.inputs(**_open(subject, TRACED))
    with unchecked(), torch.no_grad():
        shapes = tuple(dict.fromkeys(of, torch.export.Dim.DYNAMIC) for of in axes)
        exported = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes).module()
        for sizes in (TRACED, OTHER):
            inputs = subject.inputs(**_open(subject, sizes))
            given = " and ".join(str(tuple(x.shape)) for x in inputs)
            _close(exported(*inputs), module(*inputs), f"exported, of {given} it gives another output")


@_check("export")
def _export(subject: Subject) -> None:
    """torch.export takes it and gives the same output: a network with its batch open, and of another batch."""
    module, inputs = subject.build(), subject.inputs()
    with unchecked(), torch.no_grad():
        if subject.slot is not None and subject.slot.name != "backbone":
            exported = torch.export.export(module, tuple(inputs)).module()
            _close(exported(*inputs), module(*inputs), "exported, it gives another output")
            return
        shapes: Any = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
        takes = inspect.signature(module.forward).parameters.values()
        shapes = (shapes,) if any(each.kind == each.VAR_POSITIONAL for each in takes) else shapes
        exported = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes).module()
        other = subject.inputs(batch=len(inputs[0]) - 1)
        message = f"exported of a batch of {len(inputs[0])}, of one of {len(other[0])} it gives another output"
        _close(exported(*other), module(*other), message)


def _open(subject: Subject, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of some sizes that a mechanism's slot has, but its width."""
    assert subject.slot is not None
    axes = {axis for shape in subject.slot.inputs for axis in shape.split()} - {subject.slot.width}
    return {axis: size for axis, size in sizes.items() if axis in axes}


@_check("feed-heads", "preset", "backbone")
def _feed_heads(subject: Subject) -> None:
    """A network that has `features` gives its pyramid as `provenn.nn.backbone.Backbone` says, at odd sizes too."""
    module = subject.build()
    if subject.slot is None and not hasattr(module, "features"):
        return
    channels = subject.inputs()[0].shape[1]
    largest = max(getattr(module, "strides", [32]))
    check_backbone(module, channels, [(2 * largest, 3 * largest), (2 * largest - 3, largest + 5)])


@_check("tell-classes", "backbone")
def _tell_classes(subject: Subject) -> None:
    """It has as many logits as it is asked for, of images with any channels; asked for none, it has no classifier."""
    assert subject.slot is not None
    for channels, classes in ((1, 2), (3, 7)):
        module = subject.build(dim=channels, num_classes=classes)
        for sizes in subject.slot.sizes:
            with torch.no_grad():
                logits = module(*subject.inputs(dim=channels, batch=2, **sizes))
            assert logits.shape == (2, classes), f"num_classes={classes} gives {tuple(logits.shape)} of two images"
    count, bare = (sum(p.numel() for p in subject.build(num_classes=n).parameters()) for n in (7, 0))
    assert bare < count, f"num_classes=0 has {bare} parameters, num_classes=7 has {count}: the classifier is left in"


@_check("build-on-meta")
def _build_on_meta(subject: Subject) -> None:
    """It can be built and called on the meta device, where nothing is computed, and gives the true shape there."""
    with torch.device("meta"):
        module = subject.make().eval()
    real = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if not t.is_meta]
    assert not real, f"not on the meta device: {', '.join(real[:6])}"
    with torch.no_grad():
        output = _first(module(*(x.to("meta") for x in subject.inputs())))
    assert output.is_meta, "gives a real tensor on the meta device"


@_check("run-on-another-device")
def _run_on_another_device(subject: Subject) -> None:
    """Moved to another device with its inputs, it runs forward and back there.

    A mechanism gives the outputs and the gradients that it gave before, in float64: rounding could turn a neuron off. A
    token mixer is also asked with a mask, and step by step. A preset is made of mechanisms, and large: it only has to
    run. The device is emulated (`provenn.testing.elsewhere`), so what stays on the CPU is found without a GPU.
    """
    if subject.slot is None:
        with elsewhere():
            _results(move(subject.build()), subject, [x.to(DEVICE) for x in subject.inputs(batch=2)])
        return
    module, inputs = subject.build().double(), _cast(subject.inputs(batch=2, tokens=5), Tensor.double)
    before = _results(module, subject, [x.clone() for x in inputs])
    module.zero_grad()
    with elsewhere():
        after = _results(move(module), subject, [x.to(DEVICE) for x in inputs])
    _close(after[0], before[0], "there it gives another output")
    _close(after[1], before[1], "there it gives another gradient", 1e-3)


def _results(module: Any, subject: Subject, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a module gives in training and then in evaluation, and the gradients of its inputs and parameters."""
    outputs = _backward(_silence(module), inputs)
    slopes = [x.grad for x in (*inputs, *module.parameters()) if x.grad is not None]
    module.eval()
    with torch.no_grad():
        if subject.slot is None or subject.slot.name != "token-mixer":
            outputs += tree_leaves(module(*inputs))
        else:
            mask = torch.ones(inputs[0].shape[:2], dtype=torch.bool, device=inputs[0].device)
            mask[:, 2] = False
            outputs.append(module(*inputs, mask=mask))
            with suppress(ValueError):  # one that looks both ways refuses to stream
                outputs += [_stacked_steps(module, inputs[0][:, :4])] if hasattr(module, "step") else []
    return [y.detach().cpu() for y in outputs if isinstance(y, Tensor)], [slope.cpu() for slope in slopes]


@_check("leave-its-input")
def _leave_its_input(subject: Subject) -> None:
    """What it is given is not changed."""
    module, inputs = subject.build(), subject.inputs()
    before = [x.clone() for x in inputs]
    with torch.no_grad():
        module(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before)), "the input is changed in place"


@_check("take-any-layout", *MECHANISMS)
def _take_any_layout(subject: Subject) -> None:
    """How the input lies in memory (transposed, channels last) does not matter."""
    module, inputs = subject.build(), subject.inputs()
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    with torch.no_grad():
        expected = module(*inputs)
        _close(module(*strided), expected, "a transposed input gives another output")
        if inputs[0].dim() == 4:
            last = [x.to(memory_format=torch.channels_last) for x in inputs]
            _close(module(*last), expected, "an input with its channels last gives another output")


@_check("refuse-bad-arguments", *MECHANISMS)
def _refuse_bad_arguments(subject: Subject) -> None:
    """Impossible arguments raise a ValueError that says what came."""
    assert subject.slot is not None
    for bad in (0, -1):
        _refused(f"{subject.slot.width}={bad}", bad, partial(subject.make, dim=bad))
    try:
        subject.make(heads=1)
        has_heads = True
    except TypeError:
        has_heads = False
    except ValueError:
        has_heads = True  # and needs more than one
    if has_heads:
        for bad in (0, WIDTH - 1):
            _refused(f"heads={bad} of {subject.slot.width}={WIDTH}", bad, partial(subject.make, heads=bad))
    if subject.slot.name == "residual":
        join: Any = subject.build()
        _refused("depth=0", 0, lambda: join.join(*subject.inputs(), join.branch, 0))


def _refused(what: str, value: int, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except ValueError as error:
        assert str(value) in str(error), f"{what} must raise ValueError that names it, its message is {str(error)!r}"
        return
    except Exception as error:
        raise AssertionError(
            f"{what} must raise ValueError that names it, {type(error).__name__} was raised"
        ) from error
    raise AssertionError(f"{what} must raise ValueError that names it, nothing was raised")


def parameters_on_meta(subject: Subject) -> int:
    with torch.device("meta"):
        return count_parameters(subject.make())


@_check("match-published-counts", "preset")
def _match_published_counts(subject: Subject) -> None:
    """Its parameters number what was published, to the last digit printed."""
    figures = [figure for figure in subject.published if figure.what == "parameters"]
    counted = parameters_on_meta(subject)
    for figure in figures:
        units = ", ".join(COUNTING_UNITS)
        assert figure.unit in COUNTING_UNITS, f"{figure.source}: unit {figure.unit!r} is none of {units}"
        ours = counted / COUNTING_UNITS[figure.unit]
        assert figure.is_count(counted), f"{figure.source} says {figure.value} {figure.unit}, we count {ours:.6g}"
