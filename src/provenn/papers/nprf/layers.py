"""Kernelized attention with relative positions (Luo et al., 2021, arXiv:2106.12566), section 3."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, check_tokens, hide_tokens, split_heads
from provenn.nn.random_features import elu_features, gaussian, orthogonal_gaussian, positive_exponents, spherical
from provenn.ops.linear_attention import LinearState, attention_outputs, linear_attention
from provenn.ops.log_kernel import LogState, log_attention
from provenn.ops.toeplitz import dense_matrix, resolved, toeplitz_sums, without_autocast

# The paper compares four ways to draw (Figure 3b); "prf" is its own.
DRAWS = {"prf": gaussian, "trf": gaussian, "sphere": spherical, "orf": orthogonal_gaussian}


class RelativeBias(nn.Module):
    """b_{j−i}: one learned number a head and an offset, on a line or on a grid of tokens (T5's, without its buckets).

    Args:
        heads: each with biases of its own.
        sides: n of a line, or (height, width) of a grid: how far the table reaches.
        causal: keep the n offsets of keys that are not later, instead of 2n − 1.
        class_token: one token stands before the grid, with three biases of its own a head: from it, to it, and itself.
        beyond: what longer inputs get: "clip", the bias of the farthest offset, or "interpolate", the table stretched.

    Parameters, a head: n causal, 2n − 1 on a line, (2H−1)·(2W−1) on a grid; they start at 0.
    """

    def __init__(
        self,
        heads: int,
        sides: tuple[int, ...],
        *,
        causal: bool = False,
        class_token: bool = False,
        beyond: str = "clip",
    ):
        super().__init__()
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise ValueError(f"a bias table is for tokens on a line or a grid with sides of at least 1, got {sides}")
        if causal and (len(sides) != 1 or class_token):
            raise ValueError("a grid of tokens has no order: causal must be False, got True")
        if beyond not in ("clip", "interpolate"):
            raise ValueError(f"beyond must be clip or interpolate, got {beyond!r}")
        self.causal, self.beyond = causal, beyond
        self.table = nn.Parameter(torch.zeros(heads, *self._sizes(sides)))
        self.of_class = nn.Parameter(torch.zeros(heads, 3)) if class_token else None

    def _sizes(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        return sides if self.causal else tuple(2 * side - 1 for side in sides)

    def forward(self, sides: tuple[int, ...]) -> Float[Tensor, " heads *offsets"]:
        """The biases of an input with these sides, the offset 0 last where causal, else in the middle."""
        table: Tensor = self.table
        wanted = self._sizes(sides)
        longer = [max(size, held) for size, held in zip(wanted, table.shape[1:])]
        if self.beyond == "interpolate" and tuple(longer) != table.shape[1:]:
            mode = "linear" if len(sides) == 1 else "bilinear"
            table = F.interpolate(table[None], size=longer, mode=mode, align_corners=True)[0]
        for dim, size in enumerate(wanted, start=1):
            missing = size - table.shape[dim]
            if missing > 0:  # as `F.pad` with replication, whose gradient is not deterministic on a GPU
                ends = missing if self.causal else missing // 2
                before, after = table.narrow(dim, 0, 1), table.narrow(dim, table.shape[dim] - 1, 1)
                table = torch.cat([before] * ends + [table] + [after] * (0 if self.causal else ends), dim=dim)
            elif missing < 0:
                table = table.narrow(dim, -missing if self.causal else -missing // 2, size)
        return table

    def matrix(self, sides: tuple[int, ...]) -> Float[Tensor, "heads tokens tokens"]:
        """b_{j−i} for all i and j, with −∞ where causal and j > i; the class token first, where there is one."""
        matrix = dense_matrix(self(sides), causal=self.causal)
        if self.causal:
            later = torch.ones(matrix.shape[1:], dtype=torch.bool, device=matrix.device).triu(1)
            return matrix.masked_fill(later, -torch.inf)
        if self.of_class is None:
            return matrix
        away, to, own = self.of_class[:, :, None, None].unbind(1)
        n = matrix.shape[1]
        first = torch.cat([own, away.expand(-1, 1, n)], dim=2)
        return torch.cat([first, torch.cat([to.expand(-1, n, 1), matrix], dim=2)], dim=1)


def make_biases(
    rpe: str,
    heads: int,
    *,
    max_length: int,
    grid: tuple[int, int] | None,
    causal: bool,
    class_token: bool,
    beyond: str,
) -> RelativeBias | None:
    """The biases of a layer, None of one without; its kind, its grid and its class token must go together."""
    if rpe not in ("1d", "2d", "none"):
        raise ValueError(f"rpe must be 1d, 2d or none, got {rpe!r}")
    if (rpe == "2d") != (grid is not None and len(grid) == 2):
        raise ValueError(f"rpe='2d' and grid=(height, width) go together, got rpe={rpe!r} and grid={grid}")
    if class_token and rpe != "2d":
        raise ValueError(f"a class token has biases of its own with rpe='2d' only, got rpe={rpe!r}")
    if rpe == "none":
        return None
    sides = (max_length,) if grid is None else grid
    return RelativeBias(heads, sides, causal=causal, class_token=class_token, beyond=beyond)


def tokens_on(
    grid: tuple[int, int] | None, tokens: int, class_token: bool, given: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """How an input's tokens lie: on a line, or on the layer's grid or the one that the call gives."""
    if grid is None:
        if given is not None:
            raise ValueError(f"tokens lie on a grid with rpe='2d' only, got grid={given}")
        return (tokens,)
    sides = grid if given is None else given
    if min(sides) < 1:
        raise ValueError(f"a grid has at least one row and one column, got {sides}")
    expected = math.prod(sides) + class_token
    if tokens != expected:
        raise ValueError(f"a grid of {sides[0]}×{sides[1]} has {expected} tokens here, got {tokens}")
    return sides


class KernelCache(NamedTuple):
    """φ(k), or its logarithm, and v of all tokens so far: Toeplitz weights have no low rank, nothing less is enough."""

    features: Float[Tensor, "batch heads tokens features"]
    values: Float[Tensor, "batch heads tokens head_dim"]


State = KernelCache | LinearState | LogState


class KernelAttentionRPE(nn.Module):
    """Kernelized attention with relative positions, by FFT: NPRF with RPE where all is left as it is (section 3).

    z_i = Σ_j e^{b_{j−i}} φ(q_i)·φ(k_j) v_j / Σ_j e^{b_{j−i}} φ(q_i)·φ(k_j)   (Algorithm 1)

    with q and k of norm 1. The matrix of e^{b_{j−i}} is Toeplitz, so both sums over j are Toeplitz
    products, of φ(k_j) v_jᵀ and of φ(k_j), and take O(n log n) by FFT.

    Args:
        dim: D, width of a token.
        heads: must divide `dim`; d = dim / heads.
        features: m, random vectors a head; "trf" makes two numbers of each, "elu" has none.
        feature_map: φ: "prf", positive random features of independent N(0, I) (equation 4); "sphere", of vectors on the
            sphere of radius √d; "orf", of orthogonal ones; "trf", trigonometric features (equation 5); "elu",
            elu(x) + 1.
        normalize: q and k of ℓ2 norm 1 for each token and head; else the kernel is e^{q·k/√d}.
        scale: multiplies q·k.
        rpe: "1d", "2d" for tokens on a grid, or "none": kernelized attention as in the Performer.
        max_length: how far the biases of "1d" reach.
        grid: (height, width) that the biases of "2d" reach; tokens come row by row.
        class_token: of "2d": one token stands before the grid.
        beyond: "clip" or "interpolate": the biases of inputs that are longer (see `RelativeBias`).
        causal: token i sees tokens 1..i only.
        bias: of the four linear maps.
        form: "fft", "quadratic" through n × n weights, or "auto", the faster for the number of tokens (see `resolved`).
            Causal attention by positive features that are not normalised has one form, through the logarithms of its
            features: an FFT shares its error among outputs whose sizes differ without bound.
        precision: of the FFT. Its error is shared by all outputs, so that "single" is good for biases within about ±4,
            "double" within ±12.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D, and heads · (2 · max_length − 1), or heads ·
    max_length causal. Slot: token-mixer. Streams: with `rpe="none"` in a constant state; with RPE there is none such,
    the state is a cache of φ(k) and v, and a token takes time O(tokens so far), as in softmax attention.
    """

    draws: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        features: int = 32,
        feature_map: str = "prf",
        normalize: bool = True,
        scale: float | int = 1.0,
        rpe: str = "1d",
        max_length: int = 512,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        beyond: str = "clip",
        causal: bool = True,
        bias: bool = True,
        form: str = "auto",
        precision: str = "double",
    ):
        check_whole(dim=dim, heads=heads, features=features, max_length=max_length)
        check_finite(scale=scale)
        super().__init__()
        check_heads(dim, heads)
        if feature_map not in (*DRAWS, "elu"):
            raise ValueError(f"feature_map must be one of {', '.join(DRAWS)} and elu, got {feature_map!r}")
        self.in_logs = causal and not normalize and feature_map not in ("trf", "elu")
        if causal and not normalize and feature_map == "trf":
            raise ValueError("causal sums of feature_map='trf' have no bound where normalize=False: use normalize=True")
        if self.in_logs and rpe != "none" and form == "fft":
            raise ValueError("form='fft' cannot hold causal sums where normalize=False: use form='auto', or normalize")
        if features < 1 or scale <= 0:
            raise ValueError(f"features must be at least 1 and scale positive, got {features} and {scale}")
        if precision not in ("single", "double"):
            raise ValueError(f"precision must be single or double, got {precision!r}")
        resolved(form, (1,))
        self.dim, self.heads, self.causal, self.grid = dim, heads, causal, grid
        self.feature_map, self.normalize, self.scale = feature_map, normalize, scale
        self.form, self.precision = form, precision
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        w = None
        if feature_map != "elu":
            w = torch.stack([DRAWS[feature_map](features, dim // heads) for _ in range(heads)])
        self.register_buffer("draws", w)
        self.rpe = make_biases(
            rpe, heads, max_length=max_length, grid=grid, causal=causal, class_token=class_token, beyond=beyond
        )

    def _project(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        check_tokens(x, self.dim, mask)
        seen = hide_tokens(x, mask)
        q, k, v = (split_heads(m(y), self.heads) for m, y in ((self.query, x), (self.key, seen), (self.value, seen)))
        return q, k, v

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Other random features, in place."""
        if self.draws is not None:
            for w in self.draws:
                w.copy_(DRAWS[self.feature_map](*w.shape, generator=generator))

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k whose product the kernel is of, in float32 at least: normalised, or divided by d^¼."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        root = math.sqrt(self.scale)
        if self.normalize:
            return F.normalize(q.to(dtype), dim=-1, eps=1e-6) * root, F.normalize(k.to(dtype), dim=-1, eps=1e-6) * root
        if self.feature_map != "elu":
            root /= q.shape[-1] ** 0.25
        return q.to(dtype) * root, k.to(dtype) * root

    def log_features_of(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log φ(q), up to a number for each query, and log φ(k) of positive random features; −∞ where hidden."""
        q, k = self.scaled(q, k)
        w = present(self.draws, "draws").to(q.dtype)
        exponents = positive_exponents(k, w)
        return q @ w.mT, exponents if mask is None else exponents.masked_fill(~mask[:, None, :, None], -torch.inf)

    def features_of(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """φ(q) and φ(k) up to factors that cancel; φ(k) is 0 where `mask` is False."""
        hidden = None if mask is None else ~mask[:, None, :, None]
        if self.feature_map == "elu" or self.feature_map == "trf":
            q, k = self.scaled(q, k)
            fq, fk = self._elu(q, k) if self.draws is None else self._trigonometric(q, k, hidden)
            return fq, fk if hidden is None else fk.masked_fill(hidden, 0)
        fq, fk = self.log_features_of(q, k, mask)
        if not self.normalize:
            # A factor that all keys share in one feature cancels against the queries' in that feature. With the largest
            # key's no exponential overflows, and no query's denominator vanishes.
            peak = fk.detach().amax(dim=-2, keepdim=True).clamp_min(torch.finfo(fk.dtype).min)
            fq, fk = fq + peak, fk - peak
        return (fq - fq.detach().amax(dim=-1, keepdim=True)).exp(), fk.exp()

    def _elu(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return elu_features(q.contiguous()), elu_features(k.contiguous())

    def _trigonometric(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """sin and cos, the keys' times e^{‖k‖²/2} relative to the longest; the queries' factor cancels."""
        w = present(self.draws, "draws").to(q.dtype)
        half = k.square().sum(dim=-1, keepdim=True) / 2
        half = half if hidden is None else half.masked_fill(hidden, -torch.inf)
        if not self.normalize:
            half = half - half.detach().amax(dim=-2, keepdim=True).clamp_min(0)
        fq, fk = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (q @ w.mT, k @ w.mT))
        return fq, fk * half.exp()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended, `grid` (height, width) of tokens other than at construction.

        A token that may attend to nothing gets W_o's bias.
        """
        q, k, v = self._project(x, mask)
        class_token = self.rpe is not None and self.rpe.of_class is not None
        sides = tokens_on(self.grid, x.shape[1], class_token, grid)
        with without_autocast(x):
            if self.in_logs:
                y = self._by_logs(*self.log_features_of(q, k, mask), v, None)[0]
                return self._join(y, x)
            fq, fk = self.features_of(q, k, mask)
            if self.rpe is None:
                y = attention_outputs(fq, fk, v.to(fk.dtype), causal=self.causal)
            else:
                y = self._with_rpe(fq, fk, v, sides)
        return self._join(y, x)

    def _join(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))

    def _by_logs(self, a: Tensor, e: Tensor, v: Tensor, state: LogState | None) -> tuple[Tensor, LogState | None]:
        """Causal attention from log φ(q) of the last tokens and log φ(k) of all."""
        v = v.to(e.dtype)
        if self.rpe is None:
            return log_attention(a, e, v, state=state)
        b = self.rpe((e.shape[2],)).to(e.dtype)
        c = (b - b.detach().amax(dim=-1, keepdim=True)).exp()
        # One query at the end needs a row of the matrix, which is c itself.
        factors = c.unsqueeze(1) if a.shape[2] == 1 else dense_matrix(c, causal=True)[:, -a.shape[2] :]
        return log_attention(a, e, v, factors=factors)

    def form_for(self, sides: tuple[int, ...]) -> str:
        """Which form the layer takes for tokens on these sides: "fft", "quadratic" or, alone, "logs"."""
        if self.in_logs:
            return "logs"
        head_dim = self.dim // self.heads
        width = head_dim if self.draws is None else self.draws.shape[1] * (2 if self.feature_map == "trf" else 1)
        return resolved(
            self.form, sides, features=width, channels=head_dim + 1, causal=self.causal, precision=self.precision
        )

    def _with_rpe(self, fq: Tensor, fk: Tensor, v: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Both sums, with a column of ones for the denominator, and their ratio."""
        rpe = present(self.rpe, "rpe")
        v = torch.cat([v.to(fk.dtype), torch.ones_like(fk[..., :1])], dim=-1)
        b = rpe(sides).to(fk.dtype)
        form = self.form_for(sides)
        of_class = rpe.of_class
        highest = b.detach().flatten(1).amax(dim=1)
        if of_class is not None:
            highest = torch.maximum(highest, of_class.detach().to(b.dtype).amax(dim=1))
        c = (b - highest.view(-1, *[1] * (b.dim() - 1))).exp()
        if of_class is None:
            sums = toeplitz_sums(c, fq, fk, v, causal=self.causal, form=form, precision=self.precision)
        else:
            away, to, own = (of_class.to(b.dtype) - highest[:, None]).exp()[:, :, None, None].unbind(1)
            sums = toeplitz_sums(c, fq[:, :, 1:], fk[:, :, 1:], v[:, :, 1:], form=form, precision=self.precision)
            sums = sums + to * (fq[:, :, 1:] @ fk[:, :, :1].mT) @ v[:, :, :1]
            weights = fq[:, :, :1] @ fk.mT * torch.cat([own, away.expand(-1, 1, fk.shape[2] - 1)], dim=2)
            sums = torch.cat([weights @ v, sums], dim=2)
        return self._ratio(sums, fq, fk, form)

    def _ratio(self, sums: Tensor, fq: Tensor, fk: Tensor, form: str) -> Tensor:
        """Numerator over denominator, held above the FFT's own error, and above 0 where φ is."""
        top, bottom = sums[..., :-1], sums[..., -1:]
        least = torch.full_like(bottom, 1e-30)  # of which a gradient is still finite
        if form == "fft":
            double = self.precision == "double" or bottom.dtype == torch.float64
            error = torch.finfo(torch.float64 if double else torch.float32).eps
            total = fk.detach().abs().sum(dim=2, keepdim=True)
            least = torch.maximum(least, error * (fq.detach().abs() @ total.mT))
        safe = bottom.abs() > least if self.feature_map == "trf" else bottom > least
        return top / torch.where(safe, bottom, least)

    def _streams(self, state: State | None, batch: int) -> None:
        if not self.causal:
            raise ValueError("attention that sees later tokens cannot stream; build it with causal=True")
        expected = KernelCache if self.rpe is not None else LogState if self.in_logs else LinearState
        if state is not None and not isinstance(state, expected):
            raise TypeError(f"expected the {expected.__name__} of this layer's init_state, got {type(state).__name__}")
        if state is not None and len(state[0]) != batch:
            raise ValueError(f"the state is of {len(state[0])} streams, got tokens of {batch}")

    def init_state(self, batch: int) -> State:
        """The state of `batch` streams before their first token, in float32 at least."""
        self._streams(None, batch)
        weight = self.out.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        d = self.dim // self.heads
        m = d if self.draws is None else self.draws.shape[1] * (2 if self.feature_map == "trf" else 1)
        if self.rpe is None and self.in_logs:
            return LogState.empty(batch, self.heads, features=m, dim=d, like=weight.new_empty(0, dtype=dtype))
        if self.rpe is None:
            s = weight.new_zeros(batch, self.heads, m, d, dtype=dtype)
            return LinearState(s, s[..., 0].clone())
        features = weight.new_zeros(batch, self.heads, 0, m, dtype=dtype)
        return KernelCache(features, weight.new_zeros(batch, self.heads, 0, d, dtype=dtype))

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:
        """Many tokens at once: the outputs, and the state from which `step` or another `prefill` goes on."""
        self._streams(state, x.shape[0])
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v = self._project(x)
        with without_autocast(x):
            fq, fk = self.log_features_of(q, k) if self.in_logs else self.features_of(q, k)
            if isinstance(state, LogState):
                y, after = self._by_logs(fq, fk, v, state)
                return self._join(y, x), present(after, "state")
            if isinstance(state, LinearState):
                y, state = linear_attention(fq, fk, v.to(fk.dtype), state=state)
                return self._join(y, x), state
            old = state.features.shape[2]
            self._reaches(old + x.shape[1])
            fk, v = torch.cat([state.features, fk], dim=2), torch.cat([state.values, v.to(fk.dtype)], dim=2)
            state = KernelCache(fk, v)
            if self.in_logs:
                y = self._by_logs(fq, fk, v, None)[0]
            elif x.shape[1] == 1:
                y = self._last(fq, fk, v)
            else:  # tokens that were read ask again, with a query of 0
                y = self._with_rpe(F.pad(fq, (0, 0, old, 0)), fk, v, (fk.shape[2],))[:, :, old:]
        return self._join(y, x), state

    def _reaches(self, tokens: int) -> None:
        rpe = present(self.rpe, "rpe")
        if rpe.beyond == "interpolate" and tokens > rpe.table.shape[1]:
            raise ValueError(
                f"a stream cannot be longer than its biases where beyond='interpolate': they reach "
                f"{rpe.table.shape[1]} tokens, got {tokens}; use beyond='clip'"
            )

    def _last(self, fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
        """One query at the end of all keys: a row of the weights."""
        b = present(self.rpe, "rpe")((fk.shape[2],)).to(fk.dtype)
        weights = fq @ fk.mT * (b - b.amax(dim=-1, keepdim=True)).exp().unsqueeze(-2)
        ones = torch.ones_like(v[..., :1])
        return self._ratio(weights @ torch.cat([v, ones], dim=-1), fq, fk, "quadratic")

    def step(self, x_t: Float[Tensor, "batch dim"], state: State) -> tuple[Float[Tensor, "batch dim"], State]:
        """One token more; with RPE in time and memory that grow with the tokens so far."""
        y, state = self.prefill(x_t.unsqueeze(1), state)
        return y.squeeze(1), state
