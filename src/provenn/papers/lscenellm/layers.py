"""The scene magnifier: a dense token selector and adaptive self-attention (section 3.2).

A scene is V sparse tokens in the text, each with T dense tokens, its children, outside of it. In a layer each text
token opens the children of those sparse tokens that it attends to most, for the layer after. Nothing of a reading is
kept in a module: what layers tell each other lies in a `Look`, one for each reading.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.attention import KVCache, split_heads
from provenn.nn.decoder import Context, Decoder, DecoderBlock, Reading, visible_keys
from provenn.nn.positions import turn
from provenn.nn.streaming import MixerState

Form = Literal["gathered", "masked"]
FORMS = ("gathered", "masked")
LEVELS = 255  # of an attention weight from 0 to 1, as the authors count them
Opened = Bool[Tensor, "batch rows parents"]
Select = Callable[[Float[Tensor, "batch rows parents"]], Opened]


def open_regions(weights: Float[Tensor, "*rows parents"], threshold: float | int = 96) -> Bool[Tensor, "*rows parents"]:
    """Which sparse tokens each text token opens: 255 (w − min w) / (max w − min w) > τ (section 3.2.1).

    Where all weights of a row are alike the authors' quotient is 0 / 0, and nothing opens; so it is here, without NaN.
    Otherwise the largest always opens below τ = 255, and the smallest never does.

    Args:
        weights: w, attention of text tokens to sparse tokens, summed over heads.
        threshold: τ, from 0 to 255.

    >>> open_regions(torch.tensor([[0.1, 0.5, 0.2, 0.3], [0.2, 0.2, 0.2, 0.2]])).int().tolist()
    [[0, 1, 0, 1], [0, 0, 0, 0]]
    """
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    # As a product: a quotient by 0 never comes up.
    return (weights - low) * LEVELS > threshold * (high - low)


def joint_attention(
    q: Float[Tensor, "batch heads rows head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys width"],
    dense_k: Float[Tensor, "batch heads dense head_dim"],
    dense_v: Float[Tensor, "batch heads dense width"],
    *,
    visible: Bool[Tensor, "#batch #heads rows keys"],
    opened: Bool[Tensor, "batch rows dense"],
    scale: float,
) -> Float[Tensor, "batch heads rows width"]:
    """softmax([A, A_d]) [V; V_d], one softmax over the text's keys and the opened dense ones.

    A = s·Q Kᵀ where keys are visible, A_d = s·Q K_dᵀ where they are opened. Closed ones add nothing.

    Args:
        q, k, v: of rows and of the text up to them.
        dense_k, dense_v: of dense tokens.
        visible: which keys of the text a row sees; at least one.
        opened: which dense tokens a row has opened.
        scale: s of the scores.
    """
    return _joint(_scores(q, k, visible, scale), q, v, dense_k, dense_v, opened, scale)


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    return scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~visible, -torch.inf)


def _joint(
    scores: Tensor, q: Tensor, v: Tensor, dense_k: Tensor, dense_v: Tensor, opened: Tensor, scale: float
) -> Tensor:
    keys = scores.shape[-1]
    weights = torch.cat([scores, _scores(q, dense_k, opened[:, None], scale)], dim=-1).softmax(-1).to(v.dtype)
    # Two products in place of one over joined values, which would be copied.
    return weights[..., :keys] @ v + weights[..., keys:] @ dense_v


class Scene(NamedTuple):
    """What a reading knows of a scene besides the sparse tokens in its text.

    Args:
        dense: vectors of the dense tokens, T for each sparse token, in the decoder's width.
        first: of each row how many tokens stand before its first text token, padding left out. Default: those up to
            the last sparse token.
        alpha: share of the magnified output of a text token; below 1 the rest is the plain output (warm-up).
        fixed: which sparse tokens are open to every text token in every layer, whatever their attention says.
    """

    dense: Float[Tensor, "batch parents children dim"]
    first: Int[Tensor, " batch"] | None = None
    alpha: float | int = 1.0
    fixed: Bool[Tensor, "batch parents"] | None = None


class Look(NamedTuple):
    """What the layers of one reading tell each other.

    Args:
        opened: by the number of a layer, which sparse tokens each token of this reading opened there; layers fill it.
        scene: None in a reading that goes on from a state.
        places: where the sparse tokens stand in the text.
        first: of each row the number of its first text token in this reading.
    """

    opened: dict[int, Opened]
    scene: Scene | None = None
    places: Int[Tensor, "batch parents"] | None = None
    first: Int[Tensor, " batch"] | None = None


def _look(context: Context, scene: Scene | None = None) -> Look:
    """What a reading begins with."""
    if scene is None:
        return Look({})
    batch, parents = scene.dense.shape[:2]
    if context.images is None or context.seen:
        raise UserError("a scene's sparse tokens must be in the text that is read first: give images, where they stand")
    if context.images.shape[0] != batch:
        raise UserError(f"the scenes are {batch} and the texts {context.images.shape[0]}: expected one for each text")
    if not _traced(context.images) and bool((context.images.sum(1) != parents).any()):
        raise UserError(
            f"texts have {context.images.sum(1).tolist()} sparse tokens, and the scene has dense tokens of {parents}"
        )
    places = context.images.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :parents]
    return Look({}, scene, places, places[:, -1] + 1 if scene.first is None else scene.first)


def _traced(x: Tensor) -> bool:
    """Whether numbers in it cannot be asked for."""
    return x.is_meta or torch.compiler.is_compiling()


class MagnifiedState(NamedTuple):
    """What a layer keeps of a text with a scene. Written in place: for inference.

    Args:
        cache: of the text's keys and values.
        places: of the sparse tokens in the cache; None where there is no scene.
        keys, values: of all dense tokens; None in a layer that only selects.
        fixed: of `Scene`.
    """

    cache: KVCache
    places: Int[Tensor, "batch parents"] | None = None
    keys: Float[Tensor, "batch kv_heads dense head_dim"] | None = None
    values: Float[Tensor, "batch kv_heads dense head_dim"] | None = None
    fixed: Bool[Tensor, "batch parents"] | None = None


class MagnifiedBlock(nn.Module):
    """A decoder's block whose self-attention magnifies (equations 2 to 4), and selects for the block after it.

        A = Q Kᵀ/√p + mask,  A_d = Q K_dᵀ/√p + what the block before opened,  K_d = Z W'_K,  V_d = Z W'_V
        o = softmax([A, A_d]) [V; V_d] of text tokens,  softmax(A) V of others
        opened for the next: `open_regions` of Σ_heads softmax(A) at the sparse tokens, of text tokens

    A dense key is turned as its sparse token. Without a scene the block is what it was.

    Args:
        block: whose modules it takes over; the same objects, under the same names.
        number: of the block, from 0.
        magnifies: whether it has W'_K and W'_V; the first block of a magnifier only selects.
        select: which sparse tokens open, from w.
        form: "gathered" computes what is open in some row alone, "masked" everything; the outputs are equal.

    Parameters: those of the block, and 2 · D · G · p where it magnifies.
    """

    def __init__(
        self, block: DecoderBlock, number: int, *, magnifies: bool, select: Select, form: Form = "gathered"
    ) -> None:
        super().__init__()
        self.norm1, self.attention = block.norm1, block.attention
        self.norm2, self.feedforward = block.norm2, block.feedforward
        self._plain = [block]  # in a list, so that its parameters do not count twice
        self.number, self.select, self.form = number, select, form
        self.dense_key: nn.Linear | None = None
        self.dense_value: nn.Linear | None = None
        if magnifies:
            key = block.attention.key
            like: dict[str, Any] = {"device": key.weight.device, "dtype": key.weight.dtype}
            self.dense_key, self.dense_value = (
                nn.Linear(key.in_features, key.out_features, bias=False, **like) for _ in range(2)
            )
            for linear in (self.dense_key, self.dense_value):
                nn.init.normal_(linear.weight, std=0.02)
        self.train(block.training)

    @property
    def plain(self) -> DecoderBlock:
        """The block without the magnifier."""
        return self._plain[0]

    def init_state(self, batch: int) -> MixerState:
        """An empty cache for `batch` streams, without a scene."""
        return MagnifiedState(cast(KVCache, self.plain.init_state(batch)))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], context: Context, state: MixerState = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], MixerState]:
        """The outputs, and the state with these tokens read; None for None."""
        attended, state = self._attend(self.norm1(x), context, cast("MagnifiedState | None", state))
        x = x + self.attention.out(attended.transpose(1, 2).flatten(2))
        return x + self.feedforward(self.norm2(x)), state

    def _attend(
        self, x: Tensor, context: Context, state: MagnifiedState | None
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], MagnifiedState | None]:
        attention, look = self.attention, _look_of(context)
        q, k, v = attention.project(x, context)
        if state is not None:
            state = state._replace(cache=state.cache.append(k, v))
            k, v = (part[:, :, : state.cache.length] for part in state.cache[:2])
        places = look.places if state is None or state.places is None else state.places
        if places is None:
            return attention.attend(q, k, v, context), state
        fixed = state.fixed if look.scene is None and state is not None else look.scene and look.scene.fixed
        opened, masked = look.opened.get(self.number - 1), self.form == "masked" or _traced(x)
        dense = self._dense(look, context, state, opened, masked)
        if state is not None:
            known = dense if dense is not None and state.keys is None else None
            state = state._replace(places=places, fixed=fixed)
            if known is not None:
                state = state._replace(keys=known.keys, values=known.values)
        # No token up to the last sparse one is text; of those, the fused kernel needs no matrix of weights.
        tokens = x.shape[1]
        start = 0 if context.seen else min(places.shape[1], tokens)
        groups = attention.heads // attention.kv_heads
        k_all, v_all = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        scale = attention.head_dim**-0.5
        scores = _scores(q[:, :, start:], k_all, visible_keys(context, start, tokens), scale)
        numbers = torch.arange(start, tokens, device=x.device)
        first = torch.zeros_like(places[:, 0]) if look.first is None else look.first
        text = numbers >= first[:, None]
        with torch.no_grad():
            at = places[:, None, None].expand(-1, attention.heads, scores.shape[2], -1)
            weights = (scores.gather(-1, at) - scores.logsumexp(-1, keepdim=True)).exp().sum(1)
            chosen = (self.select(weights) if fixed is None else fixed[:, None]) & text[..., None]
            unread = chosen.new_zeros(chosen.shape[0], start, places.shape[1])
            look.opened[self.number] = torch.cat([unread, chosen], dim=1)
        if dense is None or opened is None:
            return attention.attend(q, k, v, context), state
        dense_k, dense_v, allowed = self._chosen(dense, opened[:, start:], masked)
        if not dense_k.shape[2]:
            return attention.attend(q, k, v, context), state  # nothing is open: to the bit what it is without
        dense_k, dense_v = (part.repeat_interleave(groups, dim=1) for part in (dense_k, dense_v))
        y = self.fuse(scores, q[:, :, start:], v_all, dense_k, dense_v, allowed)
        alpha = 1.0 if look.scene is None else look.scene.alpha
        if alpha != 1:
            plain = scores.softmax(-1).to(v.dtype) @ v_all
            y = torch.where(text[:, None, :, None], torch.lerp(plain, y, alpha), y)
        if start:
            before = context._replace(inputs=context.inputs[:, :start])
            y = torch.cat([attention.attend(q[:, :, :start], k[:, :, :start], v[:, :, :start], before), y], dim=2)
        return y, state

    def fuse(
        self,
        scores: Float[Tensor, "batch heads rows keys"],
        q: Float[Tensor, "batch heads rows head_dim"],
        v: Float[Tensor, "batch heads keys head_dim"],
        dense_k: Float[Tensor, "batch heads dense head_dim"],
        dense_v: Float[Tensor, "batch heads dense head_dim"],
        opened: Bool[Tensor, "batch rows dense"],
    ) -> Float[Tensor, "batch heads rows head_dim"]:
        """Adaptive self-attention: `joint_attention` of rows whose scores of the text's keys are there."""
        return _joint(scores, q, v, dense_k, dense_v, opened, self.attention.head_dim**-0.5)

    def _dense(
        self, look: Look, context: Context, state: MagnifiedState | None, opened: Tensor | None, masked: bool
    ) -> "Dense | None":
        """Keys and values of dense tokens; without a state, in the gathered form, of those that are open alone."""
        if self.dense_key is None or self.dense_value is None or (opened is None and state is None):
            return None
        if state is not None and state.keys is not None and state.values is not None and state.places is not None:
            return Dense(state.keys, state.values, state.keys.shape[2] // state.places.shape[1])
        if look.scene is None or look.places is None:
            return None
        z, places, index = look.scene.dense, look.places, None
        children = z.shape[2]
        if state is None and not masked and opened is not None:
            index = union(opened)
            z = z.gather(1, index[..., None, None].expand(-1, -1, *z.shape[2:]))
            places = places.gather(1, index)
        z = z.flatten(1, 2).to(self.dense_key.weight.dtype)
        cos, sin = (
            angles[:, 0]
            .gather(1, places[..., None].expand(-1, -1, angles.shape[-1]))
            .repeat_interleave(children, dim=1)[:, None]
            for angles in (part.expand(z.shape[0], -1, -1, -1) for part in context.angles)
        )
        heads = self.attention.kv_heads
        return Dense(
            turn(split_heads(self.dense_key(z), heads), cos, sin),
            split_heads(self.dense_value(z), heads),
            children,
            index,
        )

    def _chosen(self, dense: "Dense", opened: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and which rows have them open: of all dense tokens, or of those that are open somewhere."""
        keys, values, index = dense.keys, dense.values, dense.chosen
        if not masked and index is None:
            index = union(opened)
            at = (index[..., None] * dense.children + torch.arange(dense.children, device=index.device)).flatten(1)
            at = at[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys, values = keys.gather(2, at), values.gather(2, at)
        if index is not None:
            opened = opened.gather(2, index[:, None].expand(-1, opened.shape[1], -1))
        return keys, values, opened.repeat_interleave(dense.children, dim=2)


class Dense(NamedTuple):
    """Keys and values of dense tokens, children of a sparse token one after the other.

    Args:
        keys, values: of the children of all sparse tokens, or of those in `chosen`.
        children: T.
        chosen: numbers of sparse tokens; None where it is all of them.
    """

    keys: Tensor
    values: Tensor
    children: int
    chosen: Int[Tensor, "batch chosen"] | None = None


def union(opened: Opened) -> Int[Tensor, "batch chosen"]:
    """Numbers of the sparse tokens that some row of an example has open, those first; as many as the most have.

    >>> union(torch.tensor([[[False, True, False, True], [False, True, False, False]]])).tolist()
    [[1, 3]]
    """
    some = opened.any(1)
    count = int(some.sum(1).max()) if some.numel() else 0
    return some.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def _look_of(context: Context) -> Look:
    return context.shared if isinstance(context.shared, Look) else Look({})


class SceneMagnifier:
    """A scene magnifier in a decoder with rotary positions, whatever its heads, biases and wave lengths.

    The blocks from `start_layer` on select; those after it magnify what the one before selected. Texts without a scene
    are read as before. What is attached lies in the decoder; this object only reads with it and takes it off.

    >>> decoder = Decoder(vocab=9, dim=32, layers=4, heads=4)
    >>> magnifier = SceneMagnifier.attach(decoder, start_layer=1, children=2)
    >>> x, sparse = torch.randn(1, 7, 32), torch.tensor([[False, True, True, True, False, False, False]])
    >>> reading = magnifier.read(x, Scene(torch.randn(1, 3, 2, 32)), images=sparse)
    >>> reading.hidden.shape, list(magnifier.opened(reading))
    (torch.Size([1, 7, 32]), [1, 2, 3])
    """

    def __init__(self, decoder: Decoder, start_layer: int, children: int):
        self.decoder, self.start_layer, self.children = decoder, start_layer, children

    @classmethod
    def attach(
        cls,
        decoder: Decoder,
        start_layer: int = 8,
        threshold: float | int = 96,
        children: int = 4,
        *,
        select: Select | None = None,
        form: Form = "gathered",
        block: type[MagnifiedBlock] = MagnifiedBlock,
    ) -> "SceneMagnifier":
        """Put a magnifier into a decoder; its own weights stay.

        Args:
            decoder: is changed: its blocks from `start_layer` on get W'_K and W'_V, with deviation .02.
            start_layer: number of the block that only selects, from 0.
            threshold: τ of `open_regions`.
            children: T, dense tokens of a sparse one.
            select: another rule in place of `open_regions`.
            form: as of `MagnifiedBlock`.
            block: another kind of it.

        Raises:
            ValueError: no block is left to magnify, a threshold beyond 0 to 255, or another form.
            UserError: the decoder has a magnifier already.
        """
        check_whole(start_layer=start_layer, children=children)
        layers = len(decoder.blocks)
        if not 0 <= start_layer < layers - 1:
            raise ValueError(f"start_layer must lie between 0 and {layers - 2}, of {layers} layers, got {start_layer}")
        if not 0 <= threshold <= LEVELS:
            raise ValueError(f"threshold must lie between 0 and {LEVELS}, got {threshold}")
        if children < 1:
            raise ValueError(f"children must be at least 1, got {children}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if any(isinstance(block, MagnifiedBlock) for block in decoder.blocks):
            raise UserError("the decoder has a magnifier already: detach it first")
        chosen = partial(open_regions, threshold=threshold) if select is None else select
        for number in range(start_layer, layers):
            decoder.blocks[number] = block(
                decoder.blocks[number], number, magnifies=number > start_layer, select=chosen, form=form
            )
        decoder.sharing = _look
        return cls(decoder, start_layer, children)

    def detach(self) -> Decoder:
        """The decoder as it was before; W'_K and W'_V are gone."""
        for number, block in enumerate(self.decoder.blocks):
            if isinstance(block, MagnifiedBlock):
                self.decoder.blocks[number] = block.plain
        self.decoder.sharing = None
        return self.decoder

    def read(self, x: Float[Tensor, "batch tokens dim"], scene: Scene | None = None, **reading: Any) -> Reading:
        """`Decoder.read` with a scene, whose sparse tokens stand where `images` is True.

        Args:
            x: vectors of the text and of the sparse tokens in it.
            scene: their dense tokens; None of a text without one, or that goes on.
            reading: of `Decoder.read`.

        Raises:
            UserError: other numbers of scenes or of sparse tokens, or what `Decoder.read` refuses.
        """
        if scene is not None and scene.dense.shape[2] != self.children:
            raise UserError(f"the scene has {scene.dense.shape[2]} children a token, and {self.children} were named")
        return self.decoder.read(x, sharing=partial(_look, scene=scene), **reading)

    @staticmethod
    def opened(reading: Reading) -> dict[int, Bool[Tensor, "batch tokens parents"]]:
        """By the number of a layer, which sparse tokens each token opened, in the order of `reading.hidden`."""
        order, look = reading.order, _look_of(reading.context)
        if order is None:
            return look.opened
        return {
            number: mask.gather(1, order[..., None].expand(-1, -1, mask.shape[2]))
            for number, mask in look.opened.items()
        }
