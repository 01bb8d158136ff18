"""Where FreeEdit begins: folders of Stable Diffusion, InstructPix2Pix and CLIP."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset

from provenn.core.errors import UserError
from provenn.nn.contrastive import ContrastivePair
from provenn.nn.towers import TextConfig, TextTower, VisionConfig, VisionTower
from provenn.papers.freeedit import FreeEdit, InstructionEncoder, QFormer, freeedit_small, take_stable_diffusion
from provenn.papers.freeedit.training import SHARES, phases
from provenn.tasks import get_task
from provenn.training import Recipe, fit_stages

autoencoders = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl")
unets = pytest.importorskip("diffusers.models.unets.unet_2d_condition")
TEXT = TextConfig("clip", 16, 1, 2, vocab=45, max_length=24, end_of_text=3, pad=0)
VISION = VisionConfig("clip", 16, 1, 2, image=16, patch=8)


def unet(channels, width=8):
    return unets.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(width, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def vae():
    return autoencoders.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, sample_size=16, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def editor():
    text, image = TextTower(TEXT), VisionTower(VISION)
    qformer = QFormer(45, 16, 16, queries=2, dim=16, depth=1, heads=2)
    instruction = InstructionEncoder(
        text, image, qformer, placeholder=5, end=3, pad=0, length=24, mean=(0.5,) * 3, std=(0.5,) * 3, size=16
    )
    return FreeEdit(unet(8), unet(4), instruction, vae())


def folder_of(path, channels=4, width=8):
    """A folder in diffusers' layout, and its parts."""
    torch.manual_seed(7)
    parts = unet(channels, width), vae()
    parts[0].save_pretrained(path / "unet")
    parts[1].save_pretrained(path / "vae")
    pair = ContrastivePair(VISION, TEXT, 8)
    pair.save_huggingface(path / "clip")
    pair.save_huggingface(path / "text_encoder")
    return *parts, pair


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, 8])
def test_a_training_begins_as_the_folder_says(tmp_path, channels):
    theirs, theirs_vae, pair = folder_of(tmp_path, channels)
    torch.manual_seed(0)
    system = take_stable_diffusion(editor(), tmp_path, tmp_path / "clip").eval()
    noisy, source, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([20, 700])
    text = torch.randn(2, 5, 16)
    nothing = torch.zeros_like(source)

    def said(seen):
        return theirs.eval()(noisy if channels == 4 else torch.cat([noisy, seen], 1), t, text)[0]

    torch.testing.assert_close(system.denoiser(torch.cat([noisy, source], 1), t, text)[0], said(source))
    torch.testing.assert_close(system.extractor(noisy, t, text)[0], said(nothing))
    pixels = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(system.vae.encode(pixels)[0].mean, theirs_vae.eval().encode(pixels)[0].mean)
    for ours, other in ((system.instruction.text, pair.text_model), (system.instruction.image, pair.vision_model)):
        for name, value in other.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    site, layer = next(iter(system.refer.layers.items()))  # the branches begin as copies of what was taken
    wanted = next(value for name, value in theirs.state_dict().items() if name.endswith("attn1.to_q.weight"))
    assert torch.equal(layer.to_q.weight, wanted), site


def test_what_is_no_folder_of_stable_diffusion_is_refused_in_a_line(tmp_path):
    folder_of(tmp_path / "wide", width=12)
    with pytest.raises(UserError, match=r"unet is of another network: it has \[12, 4, 3, 3\] at conv_in.weight"):
        take_stable_diffusion(editor(), tmp_path / "wide")
    with pytest.raises(UserError, match="unet, vae, text_encoder are missing"):
        take_stable_diffusion(editor(), tmp_path)
    with pytest.raises(UserError, match="has no autoencoder"):
        take_stable_diffusion(freeedit_small(45, 5), tmp_path / "wide")
    (tmp_path / "wide" / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    folder_of(tmp_path / "fits")
    (tmp_path / "fits" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="unet cannot be read"):
        take_stable_diffusion(editor(), tmp_path / "fits")


def test_a_training_that_starts_so_has_no_phase_for_the_prior(tmp_path):
    folder_of(tmp_path)
    data = get_task("image-editing").load("tiles", seed=701, examples=40)
    system = editor()
    system.start = str(tmp_path)
    recipe = Recipe(epochs=1, max_steps=70, batch_size=4, lr=1e-3)
    stages = phases(system, get_task("image-editing"), data, recipe)
    assert [stage.name for stage in stages] == ["instruction", "details", "quality"]
    assert sum(stage.recipe.max_steps for stage in stages) == 70
    assert stages[0].recipe.max_steps == round(70 * SHARES["instruction"] / (1 - SHARES["prior"]))
    before = {name: value.clone() for name, value in system.denoiser.state_dict().items()}
    with stages[0].learning(system):  # which begins nothing anew
        assert all(torch.equal(value, before[name]) for name, value in system.denoiser.state_dict().items())
    assert not torch.equal(system.extractor.state_dict()["conv_out.weight"], editor().extractor.conv_out.weight)


def test_it_trains_from_there(tmp_path):
    folder_of(tmp_path)
    drawn = get_task("image-editing").load("tiles", seed=701, examples=12)
    data = replace(drawn, val=Subset(drawn.val, range(2)), test=Subset(drawn.test, range(2)))

    def build():
        system = editor()
        system.start = str(tmp_path)
        return system

    recipe = Recipe(epochs=1, max_steps=3, batch_size=2, lr=1e-3)
    done = fit_stages(build, phases, get_task("image-editing"), data, recipe, seed=700)
    assert done.steps == 3 and all(torch.isfinite(p).all() for p in done.model.parameters())
