"""Mamba's own layer (Gu & Dao, 2023, arXiv:2312.00752): one causal selective scan over a sequence."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.attention import check_mask
from provenn.ops.selective_scan import selective_scan
from provenn.papers.res_vmamba.layers import first_steps


class MambaState(NamedTuple):
    """What a stream keeps: the last inputs of the convolution, and the states."""

    window: Float[Tensor, "batch inner kernel-1"]
    states: Float[Tensor, "batch inner state"]

    @property
    def nbytes(self) -> int:
        """Bytes held, whatever the length of the stream."""
        return sum(x.numel() * x.element_size() for x in self)


class Mamba(nn.Module):
    """A causal token mixer: gate, convolution over the last tokens, selective scan.

    [u, z] = W_in x;  u ← SiLU(conv_k(u));  [δ, B, C] = W^x u, Δ = softplus(W^dt δ + b);  h_t = exp(Δ_t A) ⊙ h_{t−1} +
    Δ_t B_t u_t, y_t = ⟨C_t, h_t⟩ + D u_t;  W_out (y ⊙ SiLU(z)).

    Args:
        dim: width of a token.
        state: N, states a channel.
        expand: inner width over `dim`.
        kernel: of the convolution, tokens.
        rank: of Δ's projection; by default a sixteenth of `dim`, rounded up.
        selective: whether Δ, B and C follow from the token; else they are learned numbers, and the layer is a fixed
            convolution, as state space models were before.
        causal: must be True: a state knows of no later token.

    Shapes: (batch, tokens, dim) to the same. Slot: token-mixer. Streams with a state of constant size.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 16,
        expand: int = 2,
        kernel: int = 4,
        rank: int | None = None,
        selective: bool = True,
        causal: bool = True,
    ):
        super().__init__()
        check_whole(dim=dim, state=state, expand=expand, kernel=kernel, rank=rank)
        rank = math.ceil(dim / 16) if rank is None else rank
        if min(dim, state, expand, kernel, rank) < 1:
            raise ValueError(
                "dim, state, expand, kernel and rank must be at least 1, "
                f"got {dim}, {state}, {expand}, {kernel} and {rank}"
            )
        if not causal:
            raise ValueError("Mamba is causal: its state knows of no later token; causal must be True")
        inner = expand * dim
        self.state, self.rank, self.selective = state, rank, selective
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner)
        if selective:
            self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
            self.dt_proj = nn.Linear(rank, inner, bias=False)
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        else:
            self.read_and_write = nn.Parameter(torch.randn(2, state))
        self.dt_bias = nn.Parameter(first_steps((inner,)))
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def _scan(self, u: Tensor, states: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.selective:
            delta, B, C = self.x_proj(u.mT).mT.split([self.rank, self.state, self.state], dim=1)
            delta = self.dt_proj(delta.mT).mT
        else:
            B, C = self.read_and_write[:, :, None].expand(-1, -1, u.shape[2]).expand(u.shape[0], -1, -1, -1).unbind(1)
            delta = torch.zeros_like(u)
        wide = torch.promote_types(delta.dtype, torch.float32)
        step = F.softplus(delta.to(wide) + self.dt_bias.to(wide)[:, None])
        if mask is not None:
            step = step.masked_fill(~mask[:, None], 0)  # the state passes a token by that may not be seen
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        return selective_scan(u, step, A, B, C, self.D, state=states)

    def _run(self, x: Tensor, state: MambaState | None, mask: Tensor | None) -> tuple[Tensor, MambaState]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if mask is not None:
            u = u.masked_fill(~mask[..., None], 0)
        before = self.conv1d.kernel_size[0] - 1
        u = u.mT
        u = F.pad(u, (before, 0)) if state is None else torch.cat([state.window.to(u), u], dim=-1)
        window = u[..., u.shape[-1] - before :]
        y, states = self._scan(F.silu(self.conv1d(u)), None if state is None else state.states, mask)
        return self.out_proj(y.mT * F.silu(z)), MambaState(window, states)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        check_mask(mask, x)
        return self._run(x, None, mask)[0]

    def init_state(self, batch: int) -> MambaState:
        """Of streams that have not begun."""
        inner, kernel = self.conv1d.out_channels, self.conv1d.kernel_size[0]
        zeros = self.A_log.new_zeros
        return MambaState(zeros(batch, inner, kernel - 1), zeros(batch, inner, self.state))

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], MambaState]:
        """Many tokens at once: the outputs, and the state from which `step` goes on."""
        return self._run(x, state, None)

    def step(self, x: Float[Tensor, "batch dim"], state: MambaState) -> tuple[Float[Tensor, "batch dim"], MambaState]:
        """One token more."""
        y, state = self._run(x.unsqueeze(1), state, None)
        return y[:, 0], state
