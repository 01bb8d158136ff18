"""Where a training of FreeEdit begins: Stable Diffusion or InstructPix2Pix, and CLIP, as their folders hold them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.names import in_a_line
from provenn.nn.contrastive import text_from_huggingface, vision_from_huggingface
from provenn.papers.freeedit.model import FreeEdit

PARTS = ("unet", "vae", "text_encoder")  # folders of diffusers' layout
ENTRY = "conv_in.weight"


def take_stable_diffusion(system: FreeEdit, folder: str | Path, image: str | Path | None = None) -> FreeEdit:
    """Give an editor the weights of Stable Diffusion or of InstructPix2Pix; its branches begin anew.

    The denoiser and the extractor get the U-Net. Where that reads a latent alone, the denoiser's channels of the source
    begin at zero; where it reads the source too, the extractor is left without these channels.

    Args:
        system: of a `vae`, such as `freeedit_sd15`.
        folder: in diffusers' layout, with unet, vae and text_encoder.
        image: a folder of CLIP for the reference's encoder. Default: that stays as it is.

    Raises:
        UserError: a folder or a part that is missing or cannot be read, or that is another network.
    """
    folder = Path(folder)
    lacking = [part for part in PARTS if not (folder / part / "config.json").is_file()]
    if lacking:
        raise UserError(
            f"{folder}: expected Stable Diffusion in diffusers' layout, with {', '.join(PARTS)}; "
            f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"
        )
    if system.vae is None:
        raise UserError("this editor works on pixels and has no autoencoder: Stable Diffusion begins freeedit_sd15")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = _read(UNet2DConditionModel, folder / "unet")
    _take(system.extractor, _of_width(unet, system.extractor), folder / "unet")
    branch = set() if system.refer is None else set(system.refer.parameters())
    own = {name for name, parameter in system.denoiser.named_parameters() if parameter in branch}
    _take(system.denoiser, _of_width(unet, system.denoiser), folder / "unet", own)
    _take(system.vae, _read(AutoencoderKL, folder / "vae"), folder / "vae")
    _take(system.instruction.text, text_from_huggingface(folder / "text_encoder").state_dict(), folder / "text_encoder")
    if image is not None:
        _take(system.instruction.image, vision_from_huggingface(image).state_dict(), Path(image))
    if system.refer is not None:
        system.refer.reset()
    return system


def _read(kind: Any, folder: Path) -> dict[str, Tensor]:
    """Weights of a part, read by diffusers, which knows the older names of some."""
    try:
        return kind.from_pretrained(folder, local_files_only=True).state_dict()
    except Exception as error:  # diffusers raises what it comes upon
        raise UserError(f"{folder} cannot be read: {in_a_line(error)}") from None


def _of_width(state: dict[str, Tensor], into: nn.Module) -> dict[str, Tensor]:
    """Weights whose first convolution reads as many channels as a U-Net's: zeros are added, or the last left out."""
    there, wanted = state.get(ENTRY), into.state_dict()[ENTRY].shape[1]
    if there is None:
        return state
    added = torch.zeros(there.shape[0], max(0, wanted - there.shape[1]), *there.shape[2:])
    return {**state, ENTRY: torch.cat([there[:, :wanted], added], 1)}


def _take(into: nn.Module, state: dict[str, Tensor], where: Path, own: Collection[str] = ()) -> None:
    """Load weights, all but those of `own`.

    Raises:
        UserError: they are of another network.
    """
    here = into.state_dict()
    kept = {name: value for name, value in here.items() if name in own}
    other = sorted((here.keys() - set(own)) ^ state.keys())
    other = other or [name for name in state if here[name].shape != state[name].shape]
    if other:
        sizes = [str(list(some[other[0]].shape)) if other[0] in some else "nothing" for some in (state, here)]
        raise UserError(f"{where} is of another network: it has {sizes[0]} at {other[0]}, expected {sizes[1]}")
    into.load_state_dict({**state, **kept})
