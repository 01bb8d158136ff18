"""Linear attention by its plain definitions (Katharopoulos et al., 2020, arXiv:2006.16236).

Features φ(q_i), φ(k_j) and values v_j come in; with weights a_ij = φ(q_i)·φ(k_j) / Σ_j' φ(q_i)·φ(k_j') the outputs
y_i = Σ_j a_ij v_j go out, over all tokens or over those up to i. No ε is added to the sum: it would be a weight on
nothing, large where the features are spiky and small. A row whose weights are all zero gives 0.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class LinearState(NamedTuple):
    """What linear attention remembers of a set of tokens: S = Σ φ(k) vᵀ and z = Σ φ(k). States of disjoint sets add."""

    s: Float[Tensor, "*batch features dim"]
    z: Float[Tensor, "*batch features"]

    @classmethod
    def empty(
        cls, *batch: int, features: int, dim: int, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> "LinearState":
        """The state of no tokens."""
        s = torch.zeros(*batch, features, dim, dtype=dtype, device=device)
        return cls(s, s.new_zeros(*batch, features))

    @property
    def nbytes(self) -> int:
        """Bytes held; they do not depend on how many tokens were seen."""
        return self.s.nbytes + self.z.nbytes

    def add(
        self,
        keys: Float[Tensor, "*batch tokens features"],
        values: Float[Tensor, "*batch tokens dim"],
    ) -> "LinearState":
        """The state with more tokens, in the precision of the state."""
        keys, values = keys.to(self.s.dtype), values.to(self.s.dtype)
        return LinearState(self.s + keys.mT @ values, self.z + keys.sum(dim=-2))

    def read(
        self, queries: Float[Tensor, "*batch queries features"], *, floor: float = 0.0
    ) -> Float[Tensor, "*batch queries dim"]:
        """y = φ(q)ᵀS / max(φ(q)·z, floor): attention of each query to all tokens of the state."""
        q = queries.to(self.s.dtype)
        return normalised(q @ self.s, (q @ self.z.unsqueeze(-1)).squeeze(-1), floor).to(queries.dtype)


def normalised(
    sums: Float[Tensor, "*batch dim"], total: Float[Tensor, "*batch"], floor: float = 0.0
) -> Float[Tensor, "*batch dim"]:
    """sums / max(total, floor), and 0 where nothing may be attended."""
    total = total.clamp_min(floor) if floor > 0 else total.masked_fill(total == 0, 1)
    return sums / total.unsqueeze(-1)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The type in which sums over tokens are held: float32 at least, since in bfloat16 they stop growing at 256."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def masked(mask: Bool[Tensor, "..."] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keys or values that are zero where they may not be attended, whatever they held there."""
    return tensors if mask is None else tuple(tensor.masked_fill(~mask.unsqueeze(-1), 0) for tensor in tensors)


def linear_attention_weights(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
    floor: float = 0.0,
) -> Float[Tensor, "*batch queries tokens"]:
    """a_ij = φ(q_i)·φ(k_j) / Σ_j' φ(q_i)·φ(k_j'): the tokens × tokens matrix that linear attention never forms.

    Args:
        queries, keys: φ(q) and φ(k), features already mapped.
        causal: query i sees tokens up to i only; where there are fewer queries than tokens, they are the last ones.
        mask: True where a token may be attended; broadcasts to (*batch, tokens).
        floor: the least number that a row is divided by, as L²ViT has it (arXiv:2501.16182).

    Each row sums to 1, to less where the floor is above its sum, or is 0 where nothing may be attended. In float32 at
    least.
    """
    dtype = accumulator(queries, keys)
    (keys,) = masked(mask, keys.to(dtype))
    weights = queries.to(dtype) @ keys.mT
    if causal:
        weights = weights.tril(weights.shape[-1] - weights.shape[-2])
    return normalised(weights, weights.sum(dim=-1), floor)


def quadratic_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
    floor: float = 0.0,
) -> Float[Tensor, "*batch queries dim"]:
    """The definition: a matrix of weights, times the values. Arguments as in `linear_attention_weights`."""
    weights = linear_attention_weights(queries, keys, causal=causal, mask=mask, floor=floor)
    (visible,) = masked(mask, values.to(weights.dtype))
    return (weights @ visible).to(values.dtype)


def recurrent_attention(
    queries: Float[Tensor, "*batch tokens features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: LinearState | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], LinearState]:
    """Causal linear attention as an RNN, one token after another: S_i = S_{i−1} + φ(k_i) v_iᵀ, z_i = z_{i−1} + φ(k_i).

    Args:
        queries, keys: φ(q) and φ(k), features already mapped.
        values: v.
        mask: True where a token may be attended; broadcasts to (*batch, tokens).
        state: what came before; by default nothing.

    Returns the output at every token and the state after the last.
    """
    dtype = accumulator(queries, keys, values)
    k, v = masked(mask, keys.to(dtype), values.to(dtype))
    if state is None:
        state = LinearState.empty(
            *k.shape[:-2], features=k.shape[-1], dim=v.shape[-1], dtype=dtype, device=values.device
        )
    outputs = []
    for i in range(k.shape[-2]):
        state = state.add(k[..., i : i + 1, :], v[..., i : i + 1, :])
        outputs.append(state.read(queries[..., i : i + 1, :].to(dtype)))
    return torch.cat(outputs, dim=-2).to(values.dtype), state
