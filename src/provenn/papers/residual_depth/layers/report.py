"""What a tower does to its signal, at one look."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .expansion import path_lengths, residual_expansion
from .tower import ResidualTower


@dataclass(frozen=True)
class TowerReport:
    """One tower at one batch; `str()` of it is a table.

    Attributes:
        name: of the tower inside its model.
        depth: n.
        shares: ‖level k‖/‖T(x) − x‖ for k = 1, 2, …; far from 1 in sum where levels cancel.
        growth: root mean square of the stream before each block and after the last.
        scales: the size of each module's scale.
        path_mean: mean length of the paths, weighted by the scales.
        path_std: its standard deviation.
        branch_gain: σ, the root mean square over the modules of ‖F_i(x)‖/‖x‖ without its scale.
        suggested_scale: 1/(σ√n), at which independent modules let the stream's energy grow by about e.
    """

    name: str
    depth: int
    shares: list[float]
    growth: list[float]
    scales: list[float]
    path_mean: float
    path_std: float
    branch_gain: float
    suggested_scale: float

    def __str__(self) -> str:
        levels = ", ".join(f"{k}: {share:.3g}" for k, share in enumerate(self.shares, 1))
        return "\n".join([
            f"{self.name or 'tower'}: {len(self.growth) - 1} blocks, n = {self.depth}",
            f"  signal (rms)      {self.growth[0]:.3g} in, {self.growth[-1]:.3g} out",
            f"  level norms       {levels} of what the tower adds",
            f"  path length       {self.path_mean:.3g} ± {self.path_std:.2g} modules",
            f"  scale             {min(self.scales):.3g} to {max(self.scales):.3g}",
            f"  suggested         {self.suggested_scale:.3g}",
        ])  # fmt: skip


def expansion_report(model: nn.Module, x: Float[Tensor, "..."], order: int = 3) -> list[TowerReport]:
    """Level norms, path lengths, signal growth and a suggested scale of every `ResidualTower` in a model.

    Args:
        model: a tower or a model that has some; it runs once on x in evaluation mode.
        x: what the model is called with.
        order: the highest level.

    Raises:
        ValueError: there is no tower in the model.
    """
    towers = {name: m for name, m in model.named_modules() if isinstance(m, ResidualTower)}
    if not towers:
        raise ValueError(f"no ResidualTower in {type(model).__name__}; build its blocks into one first")
    entering: dict[str, Tensor] = {}
    hooks = [
        tower.register_forward_pre_hook(lambda _, inputs, name=name: entering.update({name: inputs[0]}))
        for name, tower in towers.items()
    ]
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        return [_report(name, tower, entering[name], order) for name, tower in towers.items() if name in entering]
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True


@torch.no_grad()
def _report(name: str, tower: ResidualTower, x: Tensor, order: int) -> TowerReport:
    expansion = residual_expansion(tower, x, order)
    scales = [float(torch.as_tensor(join.scale(tower.depth)).abs().mean()) for join, _ in tower.pairs()]
    lengths = path_lengths(scales)
    # Blocks are asked without their scales, so that a tower that starts at 0 still says how large its branches are.
    gains = [block(join.prepare(x)).square().sum() / x.square().sum() for join, block in tower.pairs()]
    gain = float(torch.stack(gains).mean()) ** 0.5
    return TowerReport(
        name=name,
        depth=tower.depth,
        shares=expansion.shares(),
        growth=[state.square().mean().sqrt().item() for state in tower.stream(x)],
        scales=scales,
        path_mean=lengths.mean,
        path_std=lengths.std,
        branch_gain=gain,
        # (1 + s²σ²)^n ≈ e for s = 1/(σ√n).
        suggested_scale=1 / (gain * tower.depth**0.5) if gain else float("inf"),
    )
