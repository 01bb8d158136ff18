"""LSceneLLM: sparse tokens of a scene in a decoder's text, and a scene magnifier that opens dense ones (figure 2)."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.decoder import Decoder, DecoderState, Reading
from provenn.nn.language import init_narrow
from provenn.papers.lscenellm.layers import Form, MagnifiedBlock, Scene, SceneMagnifier, Select
from provenn.papers.lscenellm.tokens import SceneTokens, build_tokens

COORDINATES = 3


class FourierPositions(nn.Module):
    """[sin 2πGp ; cos 2πGp] of places p in a scene, whose sides are 0 to 1 (Tancik et al., 2020, arXiv:2006.10739).

    Args:
        dim: width of what comes out, even. G, 3 × dim/2, is drawn once and never learned.

    Shapes: places (batch, places, 3), and least and largest coordinates (batch, 3), to (batch, places, dim).
    """

    gauss: Tensor

    def __init__(self, dim: int):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        self.register_buffer("gauss", torch.randn(COORDINATES, dim // 2))

    def forward(
        self, places: Float[Tensor, "batch places 3"], low: Float[Tensor, "batch 3"], high: Float[Tensor, "batch 3"]
    ) -> Float[Tensor, "batch places dim"]:
        size = (high - low)[:, None]
        scaled = torch.where(size > 0, (places - low[:, None]) / torch.where(size > 0, size, 1), 0)  # a flat scene
        angles = 2 * torch.pi * scaled @ self.gauss
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Prompts(NamedTuple):
    """What a reader points at, besides the question.

    Args:
        click: a place in each scene, in its coordinates.
        box: mean features of the points in a box of each scene.
    """

    click: Float[Tensor, "batch 3"] | None = None
    box: Float[Tensor, "batch features"] | None = None


class LSceneLLM(nn.Module):
    """A language model that reads a scene by V sparse tokens, and by dense ones where its own attention says.

    The text is [sparse tokens ; what a reader points at ; tokens]. Where the tokens have a placeholder of the scene, it
    stands there; what a reader points at likewise. The scene's tokens are mapped by one projector, sparse and dense:
    W₃ ReLU(W₂ ReLU(W₁ x)). Positions of what a reader points at are kept free where nothing is pointed at.

    Args:
        decoder: of the text.
        features: numbers of a point besides its coordinates.
        parents, group, children, neighbourhood, sparse_points: of `build_tokens`.
        start_layer, threshold, form, select, block: of `SceneMagnifier.attach`.
        magnify: whether there is a magnifier; without it dense tokens are not read.
        use_xyz: whether a map of Fourier positions is added to sparse and dense features. The authors' code does so
            without a magnifier alone.
        prompt_tokens: of a click, and of a box; 0 leaves both out.
        scene_token, prompt_token: placeholders; None puts the scene first, and then what a reader points at.

    Shapes: tokens (batch, tokens) and scenes (batch, points, 3 + features) to logits (batch, tokens, vocab). Those at a
    placeholder are after its last token. In place of points there may be `SceneTokens`, or the features of sparse
    tokens (batch, V, features) with `dense` (batch, V, T, features).

    >>> model = lscenellm_rooms(vocab_size=11, features=4)
    >>> model(torch.tensor([[1, 2, 3]]), torch.randn(1, 100, 7)).shape
    torch.Size([1, 3, 11])
    """

    def __init__(
        self,
        decoder: Decoder,
        features: int,
        *,
        parents: int = 128,
        group: int = 384,
        children: int = 4,
        neighbourhood: int = 1500,
        sparse_points: int = 40_000,
        start_layer: int = 8,
        threshold: float | int = 96,
        magnify: bool = True,
        use_xyz: bool = False,
        prompt_tokens: int = 8,
        scene_token: int | None = None,
        prompt_token: int | None = None,
        form: Form = "gathered",
        select: Select | None = None,
        block: type[MagnifiedBlock] = MagnifiedBlock,
    ):
        check_whole(features=features, parents=parents, group=group, children=children, prompt_tokens=prompt_tokens)
        super().__init__()
        if features < 1 or prompt_tokens < 0:
            raise ValueError(
                f"features must be at least 1 and prompt_tokens at least 0, got {features} and {prompt_tokens}"
            )
        self.decoder, self.numbers, self.prompt_tokens = decoder, features, prompt_tokens
        self.scene_token, self.prompt_token = scene_token, prompt_token
        self.sizes = {
            "parents": parents,
            "group": group,
            "children": children,
            "neighbourhood": neighbourhood,
            "sparse_points": sparse_points,
        }
        self.magnifier: SceneMagnifier | None = None
        if magnify:
            self.magnifier = SceneMagnifier.attach(
                decoder, start_layer, threshold, children, select=select, form=form, block=block
            )
        dim = decoder.norm.weight.shape[0]
        self.projector = nn.Sequential(
            nn.Linear(features, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.positions = FourierPositions(features) if use_xyz or prompt_tokens else None
        self.xyz = _two_maps(features, features, features) if use_xyz else None
        self.box = _two_maps(features, dim, prompt_tokens * dim) if prompt_tokens else None
        self.click = _two_maps(features, dim, prompt_tokens * dim) if prompt_tokens else None

    def tokenise(self, scenes: Float[Tensor, "batch points channels"]) -> SceneTokens:
        """`build_tokens` of points with features, in the model's numbers.

        Raises:
            UserError: other features, or fewer points than tokens.
        """
        if scenes.shape[-1] != COORDINATES + self.numbers:
            raise UserError(
                f"a point has {scenes.shape[-1]} numbers: expected 3 coordinates and {self.numbers} features"
            )
        try:
            return build_tokens(scenes[..., :COORDINATES], scenes[..., COORDINATES:], **self.sizes)
        except ValueError as error:
            raise UserError(f"the scene is too small: {error}") from None

    def project(self, tokens: SceneTokens) -> tuple[Float[Tensor, "batch parents dim"], Tensor]:
        """Sparse and dense tokens in the decoder's width."""
        sparse, dense = tokens.sparse, tokens.dense
        if self.xyz is not None and self.positions is not None:
            sparse = sparse + self.xyz(self.positions(tokens.centres, tokens.low, tokens.high))
            places = self.positions(tokens.dense_centres.flatten(1, 2), tokens.low, tokens.high)
            dense = dense + self.xyz(places).unflatten(1, dense.shape[1:3])
        return self.projector(sparse), self.projector(dense)

    def fixed(
        self,
        tokens: Int[Tensor, "batch tokens"],
        sparse: Float[Tensor, "batch parents dim"],
        dense: Float[Tensor, "batch places children dim"],
    ) -> tuple[Bool[Tensor, "batch parents"] | None, Float[Tensor, "batch places children dim"]]:
        """`Scene.fixed`, and the dense tokens: None here, since the decoder's own attention selects."""
        return None, dense

    def read(
        self,
        tokens: Int[Tensor, "batch tokens"],
        scenes: Float[Tensor, "scenes points channels"] | SceneTokens,
        dense: Float[Tensor, "scenes parents children features"] | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        prompts: Prompts | None = None,
        alpha: float | int = 1.0,
        state: DecoderState | None = None,
        layers: bool = False,
    ) -> tuple[Reading, Int[Tensor, "batch tokens"]]:
        """Read scenes and texts, and say where each token stands in what was read; a placeholder's is its last.

        Args:
            tokens, scenes, dense: as of the class.
            mask: True where a token is no padding.
            prompts: what a reader points at.
            alpha: of `Scene`.
            state, layers: of `Decoder.read`.

        Raises:
            UserError: placeholders at other places in each row, a click or a box that the model cannot read, or what
                `Decoder.read` refuses.
        """
        if isinstance(scenes, Tensor):
            given = self.tokenise(scenes) if dense is None else _bare(scenes, dense)
        else:
            given = scenes
        texts, there = tokens.shape[0], given.sparse.shape[0]
        if texts != there:
            raise UserError(f"there are {texts} texts and {there} scenes: expected one for each")
        sparse, fine = self.project(given)
        fixed, fine = self.fixed(tokens, sparse, fine)
        pointed = self._pointed(given, prompts)
        at, pointed_at = self._placeholders(tokens)
        parents, free, shown = sparse.shape[1], 2 * self.prompt_tokens, pointed.shape[1]
        count = tokens.shape[1]
        # Tokens before the scene, between scene and prompts, and after; a placeholder is in none of them.
        own_scene, own_prompt = int(self.scene_token is not None), int(self.prompt_token is not None)
        parts = [
            self.decoder.embed(tokens[:, :at]),
            sparse,
            self.decoder.embed(tokens[:, at + own_scene : pointed_at]),
            pointed,
            self.decoder.embed(tokens[:, pointed_at + own_prompt :]),
        ]
        x = torch.cat([part.to(parts[0].dtype) for part in parts], dim=1)
        numbers = torch.arange(count, device=x.device)
        places = numbers.clone()
        places[at:] += parents - own_scene
        places[pointed_at:] += shown - own_prompt
        before = at + parents + pointed_at - at - own_scene  # tokens before what is pointed at
        known = self._known(mask, x, places, at, own_scene, pointed_at, own_prompt)
        # A click keeps its place behind that of a box, given or not.
        ahead = self.prompt_tokens if prompts is not None and prompts.box is None else 0
        positions = torch.arange(x.shape[1], device=x.device)
        positions = positions + ahead * ((positions >= before) & (positions < before + shown))
        positions[before + shown :] += free - shown
        positions = positions.expand(x.shape[0], -1)
        images = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        images[:, at : at + parents] = True
        start = before + shown
        first = torch.full((x.shape[0],), start, device=x.device) if known is None else known[:, :start].sum(1)
        if known is not None:
            # Padding takes no position: a row gets what it gets alone.
            positions = positions - (~known).cumsum(1)
            positions = positions.clamp_min(0)
        reading: dict[str, Any] = {
            "mask": known,
            "positions": positions,
            "images": images,
            "state": state,
            "layers": layers,
        }
        if self.magnifier is None:
            return self.decoder.read(x, **reading), places.expand(x.shape[0], -1)
        return self.magnifier.read(x, Scene(fine, first, alpha, fixed), **reading), places.expand(x.shape[0], -1)

    def _known(
        self, mask: Tensor | None, x: Tensor, places: Tensor, at: int, own_scene: int, pointed_at: int, own_prompt: int
    ) -> Bool[Tensor, "batch tokens"] | None:
        """Where what is read is no padding: a scene never is."""
        if mask is None:
            return None
        known = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        kept = torch.ones_like(places, dtype=torch.bool)
        kept[at : at + own_scene] = False
        kept[pointed_at : pointed_at + own_prompt] = False
        known[:, places[kept]] = mask[:, kept]
        return known

    def _placeholders(self, tokens: Tensor) -> tuple[int, int]:
        """Where the scene stands among the tokens, and what is pointed at."""
        if tokens.is_meta and self.scene_token is not None:
            raise UserError("placeholders are looked for in the tokens, which the meta device does not hold")
        found: list[int] = []
        for name, token in (("scene", self.scene_token), ("prompts", self.prompt_token)):
            if token is None:
                found.append(0 if not found else found[0] + int(self.scene_token is not None))
                continue
            named = tokens == token
            place = named.int().argmax(1)
            if not bool((named.sum(1) == 1).all()) or bool((place != place[0]).any()):
                raise UserError(f"expected one placeholder of the {name} (token {token}) at one place in all texts")
            found.append(int(place[0]))
        if found[1] < found[0]:
            raise UserError("the placeholder of prompts stands before that of the scene: expected it behind")
        return found[0], found[1]

    def _pointed(self, tokens: SceneTokens, prompts: Prompts | None) -> Float[Tensor, "batch shown dim"]:
        """Tokens of a box and of a click, those that are given."""
        width = self.decoder.norm.weight.shape[0]
        shown = [tokens.sparse.new_zeros(tokens.sparse.shape[0], 0, width)]
        if prompts is not None and (prompts.click is not None or prompts.box is not None):
            if self.box is None or self.click is None or self.positions is None:
                raise UserError("the model reads no clicks and boxes: build it with prompt_tokens=8")
            if prompts.box is not None:
                shown.append(self.box(prompts.box).unflatten(1, (self.prompt_tokens, width)))
            if prompts.click is not None:
                seen = self.positions(prompts.click[:, None], tokens.low, tokens.high)[:, 0]
                shown.append(self.click(seen).unflatten(1, (self.prompt_tokens, width)))
        return torch.cat(shown, dim=1)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        scenes: Float[Tensor, "scenes points channels"] | SceneTokens,
        dense: Float[Tensor, "scenes parents children features"] | None = None,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        prompts: Prompts | None = None,
        alpha: float | int = 1.0,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The arguments are those of `read`."""
        reading, place = self.read(tokens, scenes, dense, mask=mask, prompts=prompts, alpha=alpha)
        hidden = reading.hidden.gather(1, place[..., None].expand(-1, -1, reading.hidden.shape[-1]))
        return self.decoder.logits(hidden)

    def generate(
        self,
        tokens: Int[Tensor, "batch tokens"],
        count: int,
        scenes: Float[Tensor, "scenes points channels"] | SceneTokens,
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        prompts: Prompts | None = None,
        ends: Collection[int] = (),
        **draw: Any,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow each row's text, one at a time as they come. Each selects with its own attention.

        Args:
            tokens, scenes, mask, prompts: as of `read`.
            count, ends, draw: as in `Decoder.continue_reading`.
        """
        with torch.no_grad():
            state = self.decoder.init_state(len(tokens))
            reading, _ = self.read(tokens, scenes, mask=mask, prompts=prompts, state=state)
        return self.decoder.continue_reading(reading, count, ends=ends, **draw)


def _two_maps(width: int, inner: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, out))


def _bare(sparse: Tensor, dense: Tensor) -> SceneTokens:
    """Features without places."""
    nowhere = sparse.new_zeros(*sparse.shape[:2], COORDINATES)
    return SceneTokens(
        sparse, nowhere, dense, dense.new_zeros(*dense.shape[:3], COORDINATES), nowhere[:, 0], nowhere[:, 0] + 1
    )


def lscenellm_7b(
    vocab_size: int = 32_006,
    *,
    features: int = 768,
    dim: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    hidden: int = 11_008,
    eps: float = 1e-5,
    checkpointing: bool = False,
    parents: int = 128,
    group: int = 384,
    children: int = 4,
    neighbourhood: int = 1500,
    sparse_points: int = 40_000,
    start_layer: int = 8,
    threshold: float | int = 96,
    magnify: bool = True,
    use_xyz: bool | None = None,
    prompt_tokens: int = 8,
    scene_token: int | None = None,
    prompt_token: int | None = None,
    form: Form = "gathered",
) -> LSceneLLM:
    """LSceneLLM on LLaMA-2-7B, with features of OpenScene.

    Args:
        vocab_size: of LLaMA-2, and six tokens more.
        features: of a point.
        dim, layers, heads, kv_heads, hidden, eps, checkpointing: of the decoder.
        parents, group, children, neighbourhood, sparse_points: of `build_tokens`.
        start_layer, threshold, magnify, prompt_tokens, scene_token, prompt_token, form: of `LSceneLLM`.
        use_xyz: likewise. Default: without a magnifier alone, as in the authors' code.
    """
    decoder = Decoder(
        vocab_size,
        dim,
        layers,
        heads,
        kv_heads=kv_heads,
        hidden=hidden,
        eps=eps,
        tied=False,
        max_length=4096,
        checkpointing=checkpointing,
    )
    return LSceneLLM(
        decoder,
        features,
        parents=parents,
        group=group,
        children=children,
        neighbourhood=neighbourhood,
        sparse_points=sparse_points,
        start_layer=start_layer,
        threshold=threshold,
        magnify=magnify,
        use_xyz=not magnify if use_xyz is None else use_xyz,
        prompt_tokens=prompt_tokens,
        scene_token=scene_token,
        prompt_token=prompt_token,
        form=form,
    )


def lscenellm_rooms(
    vocab_size: int,
    features: int,
    *,
    dim: int = 64,
    layers: int = 3,
    heads: int = 4,
    parents: int = 18,
    group: int = 32,
    children: int = 4,
    neighbourhood: int = 64,
    sparse_points: int = 512,
    start_layer: int = 1,
    threshold: float | int = 96,
    magnify: bool = True,
    use_xyz: bool = False,
    form: Form = "gathered",
) -> LSceneLLM:
    """A small LSceneLLM for composed rooms; ours, what trains in minutes.

    Args:
        vocab_size, features: of the data.
        dim, layers, heads: of the decoder.
        parents, group, children, neighbourhood, sparse_points: of `build_tokens`.
        start_layer, threshold, magnify, use_xyz, form: of `LSceneLLM`.
    """
    model = LSceneLLM(
        Decoder(vocab_size, dim, layers, heads),
        features,
        parents=parents,
        group=group,
        children=children,
        neighbourhood=neighbourhood,
        sparse_points=sparse_points,
        start_layer=start_layer,
        threshold=threshold,
        magnify=magnify,
        use_xyz=use_xyz,
        prompt_tokens=0,
        form=form,
    )
    return start_narrow(model)


M = TypeVar("M", bound=LSceneLLM)


def start_narrow(model: M) -> M:
    """`init_narrow`, and a projector that keeps the size of what it maps: torch's own start shrinks it threefold a map.

    What tokens of a scene differ by would else be a hundredth of what they share.
    """
    init_narrow(model)
    for part in model.projector:
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)
    return model
