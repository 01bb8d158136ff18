"""Refer-attention inside any U-Net of diffusers: put in, used, and taken out again.

A U-Net of diffusers asks a *processor* for the result of each attention. The one of every self-attention is exchanged
for a `ReferAttention`, which asks the old one for the self-attention itself and adds the reference's branch to it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.attention import split_heads
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.freeedit.layers import drra, merged_drra, rasa, reference_only

Mode = Literal["drra", "rasa", "ref_only", "self"]
MODES = ("drra", "rasa", "ref_only", "self")
FORMS = ("merged", "plain")
PLAIN = ("AttnProcessor", "AttnProcessor2_0")  # processors of diffusers that attend as the formula says


class Features(NamedTuple):
    """Keys and values of one self-attention of the extractor, for each reference of a batch."""

    key: Float[Tensor, "batch references dim"]
    value: Float[Tensor, "batch references dim"]


References = Mapping[str, Features]


class _State:
    """What all layers of one U-Net are told: K_R, V_R by the name of their site, and λ."""

    def __init__(self) -> None:
        self.features: References | None = None
        self.scale: float | Tensor = 1.0


class ReferAttention(nn.Module):
    """A self-attention of diffusers with a reference beside it, as a processor.

    - drra, separate: W_O SA + λ W_O' softmax(Q' [K', K_R]ᵀ/√d) [V', V_R]. Q', K' and V' begin as copies and W_O' as
      zero: 4C² + C new parameters.
    - drra, shared: W_O (SA + λ softmax(Q [K, K_R]ᵀ/√d) [V, V_R]). No new parameters.
    - rasa: W_O softmax(Q [K, K_R]ᵀ/√d) [V, V_R]. No new parameters.
    - ref_only: W_O SA + λ W_O' softmax(Q' K_Rᵀ/√d) V_R.
    - self: W_O SA + λ W_O' softmax(Q' K'ᵀ/√d) V', as large as drra and blind to the reference (to compare).

    Where projections are separate, W_O SA is what the old processor gives. With λ = 0 or without a reference all is, to
    the bit. The bias of W_O is added once. RASA takes the place of SA and shares its weights always. It has no λ; 0
    means no reference.

    Args:
        attention: the layer.
        host: its old processor.
        state: what is shared with the other layers.
        site: name of the layer, which the features are found by.
        mode, share, form: as of `attach_refer_attention`.
    """

    to_out: nn.Module

    def __init__(
        self, attention: Any, host: Any, state: _State, *, site: str, mode: str, share: bool, form: str = "merged"
    ):
        super().__init__()
        self.host, self.state, self.site = host, state, site
        self.mode, self.share, self.form = mode, share or mode == "rasa", form
        if not self.share:
            wide = attention.to_q.weight
            like: dict[str, Any] = {"device": wide.device, "dtype": wide.dtype}
            names = ("to_q",) if mode == "ref_only" else ("to_q", "to_k", "to_v")
            for name in names:
                theirs = getattr(attention, name)
                linear = nn.Linear(theirs.in_features, theirs.out_features, theirs.bias is not None, **like)
                setattr(self, name, linear)
            theirs = attention.to_out[0]
            self.to_out = nn.Linear(theirs.in_features, theirs.out_features, **like)
            self.reset(attention)

    @torch.no_grad()
    def reset(self, attention: Any) -> None:
        """Begin anew: the branch's projections are those of the layer as it is now, and its output is zero."""
        if self.share:
            return
        parts: list[tuple[str, Any]] = list(self.named_children())
        for name, part in parts:
            if name == "to_out":
                part.weight.zero_()
                part.bias.zero_()
            else:
                part.load_state_dict(getattr(attention, name).state_dict())

    @no_type_check  # diffusers asks for its signature, which a compiler does not read through run-time checks
    def forward(
        self,
        attention: Any,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """As diffusers calls a processor.

        Raises:
            UserError: a mask, or features of another batch.
        """
        x, features, scale = hidden_states, self.state.features, self.state.scale

        def own() -> Tensor:
            return self.host(attention, x, encoder_hidden_states, attention_mask, temb)

        if features is None or (not isinstance(scale, Tensor) and scale == 0):
            return own()
        k_r, v_r = (part.to(x.dtype) for part in features[self.site])
        if attention_mask is not None or encoder_hidden_states is not None:
            raise UserError(f"refer-attention at {self.site} takes neither a mask nor tokens of a text: leave them out")
        if k_r.shape[0] != x.shape[0]:
            raise UserError(
                f"{k_r.shape[0]} references for a batch of {x.shape[0]}: repeat them in the order of the batch, and "
                "give λ = 0 to examples without one"
            )
        heads = attention.heads
        k_r, v_r = split_heads(k_r, heads), split_heads(v_r, heads)
        factor = scale.view(-1, 1, 1).to(x.dtype) if isinstance(scale, Tensor) else scale
        projections: Any = attention if self.share else self
        q = split_heads(projections.to_q(x), heads)
        if self.mode == "ref_only":
            return own() + factor * self._out(attention, reference_only(q, k_r, v_r))
        k, v = split_heads(projections.to_k(x), heads), split_heads(projections.to_v(x), heads)
        if self.mode == "self":
            return own() + factor * self._out(attention, softmax_attention(q, k, v))
        if self.mode == "rasa":
            joined = attention.to_out[0](_joined(rasa(q, k, v, k_r, v_r)))
            return torch.where(factor != 0, joined, own()) if isinstance(factor, Tensor) else joined
        if not self.share:
            return own() + factor * self._out(attention, rasa(q, k, v, k_r, v_r))
        wide = factor[..., None] if isinstance(factor, Tensor) else factor
        form = merged_drra if self.form == "merged" else drra
        return attention.to_out[0](_joined(form(q, k, v, k_r, v_r, wide)))

    def _out(self, attention: Any, x: Tensor) -> Tensor:
        """The output projection of the branch; the layer's own without its bias, which its own part has already."""
        if self.share:
            return nn.functional.linear(_joined(x), attention.to_out[0].weight)
        return self.to_out(_joined(x))


def _joined(x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "batch tokens dim"]:
    return x.transpose(1, 2).flatten(2)


def self_attentions(unet: nn.Module) -> dict[str, Any]:
    """The self-attention layers of a U-Net of diffusers by name, in its order: 16 in Stable Diffusion 1.5.

    Args:
        unet: with transformer blocks, whose self-attention diffusers calls `attn1`.
    """
    found = {name: part for name, part in unet.named_modules() if name.split(".")[-1] == "attn1"}
    return {name: part for name, part in found.items() if not getattr(part, "is_cross_attention", False)}


class _Kept:
    """Keys and values of a pass of the extractor, by the name of their projection, while that is asked for."""

    def __init__(self) -> None:
        self.asked = False
        self.parts: dict[str, Tensor] = {}


class _Keep:
    """A hook that keeps what a projection gives; an object, so that a copy of the U-Net keeps in a copy of its own."""

    def __init__(self, kept: _Kept, name: str):
        self.kept, self.name = kept, name

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.kept.asked:
            self.kept.parts[self.name] = output


class Attached:
    """Refer-attention in a U-Net.

    Args:
        unet: the denoiser.
        extractor: the detail extractor, whose layers of the same names give K_R and V_R.
        layers: the processors that were put in, by site.
    """

    def __init__(self, unet: nn.Module, extractor: nn.Module, layers: Mapping[str, ReferAttention], state: _State):
        self.unet, self.extractor, self.layers, self.state = unet, extractor, dict(layers), state
        self.kept = _Kept()
        sites = self_attentions(extractor)
        # Put in once: a hook that comes and goes with each pass could not be compiled.
        self.hooks = [
            getattr(sites[name], part).register_forward_hook(_Keep(self.kept, f"{name}.{part}"))
            for name in layers
            for part in ("to_k", "to_v")
        ]

    def parameters(self) -> list[nn.Parameter]:
        """The new parameters alone, which are to train; none where projections are shared."""
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    def reset(self) -> None:
        """The branches begin anew as copies of the self-attentions as they are now."""
        sites = self_attentions(self.unet)
        for name, layer in self.layers.items():
            layer.reset(sites[name])

    @torch.no_grad()
    def extract(
        self,
        latents: Float[Tensor, "batch channels height width"],
        text: Float[Tensor, "batch tokens dim"],
        timestep: int = 0,
        **more: Any,
    ) -> dict[str, Features]:
        """K_R and V_R of references, by one pass of the extractor, without gradients.

        They depend on no step of the denoising: compute them once an edit and give them to every step.

        Args:
            latents: of the references, without noise.
            text: what the extractor's cross-attention is told; the paper does not say, here the empty text.
            timestep: t, inferred to be 0.
            more: of the extractor's own call, such as `added_cond_kwargs` of Stable Diffusion XL.
        """
        steps = torch.full((latents.shape[0],), timestep, device=latents.device)
        self.kept.asked = True
        try:
            self.extractor(latents, steps, encoder_hidden_states=text, **more)
        finally:
            kept, self.kept.parts, self.kept.asked = self.kept.parts, {}, False
        return {name: Features(kept[f"{name}.to_k"], kept[f"{name}.to_v"]) for name in self.layers}

    @contextmanager
    @no_type_check  # run-time shape checks around a generator keep a compiler from tracing it
    def using(self, features: References | None, scale: float | int | Tensor = 1.0) -> Iterator[None]:
        """Inside, the U-Net attends to these references.

        Args:
            features: of `extract`, in the order of the batch; None for no reference.
            scale: λ, or a tensor with that of each example, 0 where it has no reference.
        """
        before = self.state.features, self.state.scale
        self.state.features, self.state.scale = features, scale if isinstance(scale, Tensor) else float(scale)
        try:
            yield
        finally:
            self.state.features, self.state.scale = before

    def detach(self) -> None:
        """Take it out: the U-Net then has the processors and the state dict that it had before, to the bit."""
        for name, attention in self_attentions(self.unet).items():
            if name in self.layers and attention.processor is self.layers[name]:
                attention.set_processor(self.layers[name].host)
        for hook in self.hooks:
            hook.remove()
        self.layers, self.hooks = {}, []


def attach_refer_attention(
    unet: nn.Module,
    extractor: nn.Module,
    mode: str = "drra",
    *,
    share: bool = False,
    form: str = "merged",
) -> Attached:
    """Put refer-attention into every self-attention of a U-Net of diffusers; without a reference nothing changes.

    Args:
        unet: the denoiser, such as that of Stable Diffusion 1.5, 2.1 or XL.
        extractor: another U-Net with self-attentions of the same names and widths. It is not changed; freeze it.
        mode: "drra"; "rasa", which replaces self-attention; "ref_only", whose branch sees the reference alone; or
            "self", whose branch sees the denoiser alone.
        share: whether the branch has the projections of the self-attention (the formula) or its own, which begin as
            copies with a zero output (the figure; our default).
        form: of shared DRRA, "merged" in two attentions or "plain" in three. They differ by rounding alone.

    Raises:
        UserError: another mode or form, U-Nets that do not match, one module for both, or an attention that is fused,
            sliced, of xformers, or has norms of its own.
    """
    if mode not in MODES or form not in FORMS:
        raise UserError(f"mode is one of {', '.join(MODES)} and form of {', '.join(FORMS)}, got {mode!r} and {form!r}")
    if unet is extractor:
        raise UserError("the denoiser and the extractor are one module: give a frozen copy, or training changes both")
    sites, theirs = self_attentions(unet), self_attentions(extractor)
    if not sites:
        raise UserError(
            f"{type(unet).__name__} has no self-attention of diffusers: give a U-Net with transformer blocks"
        )
    for name, attention in sites.items():
        other = theirs.get(name)
        if other is None or other.to_k.out_features != attention.to_k.out_features:
            had = "none" if other is None else f"{other.to_k.out_features} wide"
            wide = attention.to_k.out_features
            raise UserError(f"the extractor's {name} is {had}, the denoiser's {wide} wide: give U-Nets of one layout")
        _check_plain(name, attention)
        _check_plain(f"the extractor's {name}", other)
    state, layers = _State(), dict[str, ReferAttention]()
    for name, attention in sites.items():
        layer = ReferAttention(attention, attention.processor, state, site=name, mode=mode, share=share, form=form)
        layer.train(attention.training)
        attention.set_processor(layer)
        layers[name] = layer
    return Attached(unet, extractor, layers, state)


def _check_plain(name: str, attention: Any) -> None:
    kind = type(attention.processor).__name__
    if isinstance(attention.processor, ReferAttention):
        raise UserError(f"{name} has refer-attention already: detach it first")
    if getattr(attention, "fused_projections", False):
        raise UserError(f"{name} has fused projections: call unfuse_qkv_projections() first")
    if kind not in PLAIN:
        raise UserError(
            f"{name} has the processor {kind}; expected one of {', '.join(PLAIN)}: set_attn_processor first"
        )
    odd = [
        part
        for part in ("group_norm", "spatial_norm", "norm_q", "norm_k")
        if getattr(attention, part, None) is not None
    ]
    if odd or attention.residual_connection or attention.rescale_output_factor != 1:
        raise UserError(f"{name} has {', '.join(odd) or 'a residual'} of its own, which refer-attention does not know")


def attention_to_reference(
    q: Float[Tensor, "batch heads tokens head_dim"], k: Tensor, k_r: Tensor
) -> Float[Tensor, "batch tokens references"]:
    """Weights of the reference's tokens in the refer branch, mean over heads; a row sums to their share of the softmax.

    Args:
        q, k: of the denoiser's branch.
        k_r: of the reference.
    """
    scores = q @ torch.cat([k, k_r], dim=2).mT * q.shape[-1] ** -0.5
    return scores.softmax(-1)[..., k.shape[2] :].mean(1)
