"""What the conditions say of a window of your recording, for `provenn inspect`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.denoiser import EventAttention
from provenn.papers.temporal_residual_diffusion.model import Regression, TemporalResidualDiffusion, frame_noise


def inspect(model: nn.Module, x: Float[Tensor, "1 bins height width"]) -> dict[str, Float[Tensor, "rows columns"]]:
    """After a grey frame: the low-frequency estimate, the sampled residual, and where events are let in at two scales.

    Raises:
        UserError: the model has no conditions to look at.
    """
    if isinstance(model, Regression):
        with torch.no_grad():
            return {"frame": model(x)[0, 0]}
    if not isinstance(model, TemporalResidualDiffusion):
        raise UserError("only systems of temporal residual diffusion can be looked into")
    gates: list[Tensor] = []
    attending = [part for part in model.denoiser.high if isinstance(part, EventAttention)]
    hooks = [
        part.gate.register_forward_hook(lambda _, __, out: gates.append(out.sigmoid().mean(1)[0])) for part in attending
    ]
    voxel = nn.functional.pad(x, model.design.padding(x))
    grey = torch.full_like(voxel[:, :1], 0.5)
    try:
        with torch.no_grad():
            estimate, joined, maps, memory = model.conditioned(voxel, model.begin(grey))
            clean = model.sampled(frame_noise(grey, 0, (0,)), joined, maps, voxel)
            frame = model.framed(clean, memory.frame, estimate)
    finally:
        for hook in hooks:
            hook.remove()
    drawn = {"low": estimate, "residual": frame - grey, "frame": frame}
    shown = {name: made[0, 0, : x.shape[-2], : x.shape[-1]] for name, made in drawn.items()}
    return shown | {f"gate.{i}": gates[i] for i in range(len(attending))}
