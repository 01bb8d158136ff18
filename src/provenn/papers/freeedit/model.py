"""FreeEdit (He et al., 2024, arXiv:2409.18071): an instruction with a picture in it edits an image.

No code was released and the paper's tables were not read. U-Nets, the autoencoder and the schedulers are those of
diffusers, towers are ours in CLIP's layout. What is inferred is named in the README.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.nn.contrastive import ContrastivePair
from provenn.nn.shipped import about, pretrained
from provenn.nn.towers import TextConfig, TextTower, VisionConfig, VisionTower
from provenn.papers.freeedit.attaching import Features, Mode, attach_refer_attention
from provenn.papers.freeedit.instruction import InstructionEncoder, QFormer

PHASES = ("prior", "instruction", "details")
STEPS = 1000  # of the noise schedule
SD_SCALING = 0.18215  # of Stable Diffusion's latents
Images = Float[Tensor, "batch 3 height width"]


class Guidance(NamedTuple):
    """ε = ε(∅,∅) + s_I [ε(I,∅) − ε(∅,∅)] + s_T [ε(I,c,r) − ε(I,∅)], as InstructPix2Pix is guided (inferred here).

    Args:
        text: s_T, of instruction and reference.
        image: s_I, of the source. With 1 and 1 nothing is guided.
    """

    text: float | int = 7.5
    image: float | int = 1.5


class Design(NamedTuple):
    """What of a system is no network.

    Args:
        predicts: "epsilon", as Stable Diffusion, or "sample", the clean image.
        schedule: of diffusers' β.
        scaling: factor of latents of target and reference; 1 in pixel space.
        source_scaling: that of the source's latent, which InstructPix2Pix leaves at 1.
        reference_step: t that the extractor is told.
        drop: share of examples whose text, source and reference are hidden in training, each by itself.
        ref_scale: λ where none is asked for.
        guidance: where none is asked for.
        steps: of sampling, likewise.
        freeze: whether the denoiser stays as stage 1 left it, and stage 2 trains the branches and the Q-Former alone.
    """

    predicts: Literal["epsilon", "sample"] = "epsilon"
    schedule: str = "scaled_linear"
    scaling: float | int = SD_SCALING
    source_scaling: float | int = SD_SCALING
    reference_step: int = 0
    drop: float | int = 0.05
    ref_scale: float | int = 1.0
    guidance: Guidance = Guidance()
    steps: int = 50
    freeze: bool = False


class Reference(NamedTuple):
    """What one edit takes from its reference, computed once: c_m, K_R and V_R, and which examples have one."""

    text: Tensor
    features: dict[str, Features] | None
    present: Float[Tensor, " batch"]


class FreeEdit(nn.Module):
    """An editor: source, instruction and reference to the edited image.

    Args:
        denoiser: diffusers' U-Net whose input is the noisy latent and the source's.
        extractor: the detail extractor, a frozen U-Net of the same layout whose input is a latent alone.
        instruction: c_m.
        vae: diffusers' autoencoder, frozen; None works on pixels from −1 to 1.
        mode, share, form: of refer-attention, as in `attach_refer_attention`; "none" has no branch.
        design: the rest.

    Shapes: images (batch, 3, H, W) from 0 to 1, tokens (batch, words).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        extractor: nn.Module,
        instruction: InstructionEncoder,
        vae: nn.Module | None = None,
        *,
        mode: Mode | Literal["none"] = "drra",
        share: bool = False,
        form: str = "merged",
        design: Design = Design(),  # noqa: B008  # a tuple
    ):
        super().__init__()
        self.denoiser, self.extractor, self.instruction, self.vae = denoiser, extractor, instruction, vae
        extractor.requires_grad_(False)
        if vae is not None:
            vae.requires_grad_(False)
        self.design, self.mode, self.phase = design, mode, "details"
        self.detailed = False  # whether the branches have begun to learn: see `training.phases`
        self.refer = (
            None if mode == "none" else attach_refer_attention(denoiser, extractor, mode, share=share, form=form)
        )
        self._schedulers: dict[str, Any] = {}
        self.start: str | None = None  # folders that a training in phases begins with
        self.start_image: str | None = None

    def train(self, mode: bool = True) -> "FreeEdit":
        """As of any module; what is frozen stays in eval mode."""
        super().train(mode)
        for part in (self.extractor, self.vae, self.instruction.text, self.instruction.image):
            if part is not None:
                part.eval()
        return self

    @property
    def branch(self) -> bool:
        """Whether there is a branch for the reference that λ = 0 switches off."""
        return self.refer is not None

    @property
    def placeholder(self) -> int:
        """The token of S*."""
        return self.instruction.placeholder

    def scheduler(self, kind: str = "ddim") -> Any:
        """A scheduler of diffusers for this system's noise: "ddim" or "euler".

        Raises:
            UserError: another kind.
        """
        if kind not in ("ddim", "euler"):
            raise UserError(f"the sampler is one of ddim, euler, got {kind!r}")
        if kind not in self._schedulers:
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler
            from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

            noise: dict[str, Any] = {
                "num_train_timesteps": STEPS, "beta_schedule": self.design.schedule, "beta_start": 0.00085,
                "beta_end": 0.012, "prediction_type": self.design.predicts, "steps_offset": 1,
            }  # fmt: skip
            with torch.device("cpu"):
                self._schedulers[kind] = (
                    DDIMScheduler(**noise, clip_sample=self.vae is None, set_alpha_to_one=False)
                    if kind == "ddim"
                    else EulerDiscreteScheduler(**noise)
                )
        return self._schedulers[kind]

    def latents(self, images: Images, scaling: float | int) -> Float[Tensor, "batch channels rows columns"]:
        """Of images from 0 to 1: the mode of the autoencoder's posterior times the scaling, or pixels from −1 to 1."""
        x = 2 * images - 1
        if self.vae is None:
            return x
        with torch.no_grad():
            return cast(Any, self.vae).encode(x).latent_dist.mode() * scaling

    def images(self, latents: Tensor) -> Images:
        """Back to 0…1."""
        x = latents if self.vae is None else cast(Any, self.vae).decode(latents / self.design.scaling).sample
        return ((x + 1) / 2).clamp(0, 1)

    def read(self, tokens: Int[Tensor, "batch words"], reference: Images | None, noun: Tensor | None) -> Reference:
        """What instructions and references say, which no step of the denoising changes.

        Args:
            tokens: of instructions; those without S* have no reference, whatever stands in `reference`.
            reference: pictures, from 0 to 1; None where no instruction has one.
            noun: tokens of what they show.
        """
        text = self.instruction(tokens, reference, noun)
        present = (tokens == self.placeholder).any(1).to(text.dtype)
        features = None
        if reference is not None and self.refer is not None and self.phase == "details":
            features = self.refer.extract(
                self.latents(reference, self.design.scaling), self.nothing(tokens.shape[0]), self.design.reference_step
            )
        return Reference(text, features, present)

    def nothing(self, count: int) -> Tensor:
        """c_m of the empty text."""
        pad, end = self.instruction.pad, self.instruction.end
        empty = torch.full((count, 2), pad, device=self.instruction.text.embeddings.token_embedding.weight.device)
        empty[:, 1] = end
        return self.instruction(empty)

    def predict_noise(
        self,
        noisy: Tensor,
        t: Shaped[Tensor, " batch"],
        source: Tensor,
        told: Reference,
        scale: float | int | Tensor | None,
    ) -> Tensor:
        """What the denoiser says of z_t: ε, or the clean latent.

        Args:
            noisy, t: z_t and its step.
            source: the source's latent.
            told: of `read`.
            scale: λ, also of each example. Default: the design's.
        """
        joined = torch.cat([noisy, source], dim=1)
        if self.refer is None or told.features is None or (isinstance(scale, (int, float)) and scale == 0):
            return self.denoiser(joined, t, encoder_hidden_states=told.text)[0]
        factor = told.present * (self.design.ref_scale if scale is None else scale)
        with self.refer.using(told.features, factor):
            return self.denoiser(joined, t, encoder_hidden_states=told.text)[0]

    def forward(
        self,
        noisy: Tensor,
        t: Shaped[Tensor, " batch"],
        source: Images,
        tokens: Int[Tensor, "batch words"],
        reference: Images | None = None,
        noun: Int[Tensor, "batch nouns"] | None = None,
        scale: float | int | Tensor | None = None,
    ) -> Tensor:
        """What the denoiser says of z_t, from all that a user gives; the arguments are those of `read` and its step."""
        if noisy.shape[0] == 0:  # which diffusers' U-Net does not take
            return noisy.clone()
        told = self.read(tokens, reference, noun)
        return self.predict_noise(noisy, t, self.latents(source, self.design.source_scaling), told, scale)

    @contextmanager
    def in_phase(self, phase: str) -> Iterator["FreeEdit"]:
        """Inside, the system trains as in a phase: "prior", "instruction" (no refer-attention) or "details".

        Raises:
            ValueError: another phase.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        before, self.phase = self.phase, phase
        try:
            yield self
        finally:
            self.phase = before

    @torch.no_grad()
    def take_prior(self) -> None:
        """The denoiser begins as the extractor: the same weights, and zero for the channels of the source."""
        theirs = self.extractor.state_dict()
        state = self.denoiser.state_dict()
        for name, value in theirs.items():
            if name == "conv_in.weight":
                wide = torch.zeros_like(state[name])
                wide[:, : value.shape[1]] = value
                value = wide
            state[name] = value.clone()
        self.denoiser.load_state_dict(state)
        if self.refer is not None:
            self.refer.reset()

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """The mean squared error of what is predicted at a random step.

        Args:
            batch: `provenn.data.edits.Edit`, batched.
        """
        draw = lambda: torch.rand(len(batch.source), device=batch.source.device) < self.design.drop  # noqa: E731
        if self.phase == "prior":
            return self._prior_loss(batch)
        clean = self.latents(batch.target, self.design.scaling)
        source = self.latents(batch.source, self.design.source_scaling)
        told = self.read(batch.tokens, batch.reference, batch.noun)
        without_text, without_source, without_reference = draw(), draw(), draw()
        text = torch.where(without_text[:, None, None], self.nothing(len(source)), told.text)
        present = told.present * ~(without_text | without_reference)
        source = torch.where(without_source[:, None, None, None], torch.zeros_like(source), source)
        return self._error(clean, lambda noisy, t: self.predict_noise(
            noisy, t, source, Reference(text, told.features, present), None))  # fmt: skip

    def _prior_loss(self, batch: Any) -> Tensor:
        """Of the extractor as a model of pictures: edited ones with their descriptions, references with their nouns."""
        pictures = torch.where(torch.rand(len(batch.source), 1, 1, 1, device=batch.source.device) < 0.5, batch.target,
                               batch.reference)  # fmt: skip
        clean = self.latents(pictures, self.design.scaling)
        text = self.instruction(batch.described)
        hidden = torch.rand(len(text), 1, 1, device=text.device) < 0.5
        text = torch.where(hidden | (pictures == batch.reference).flatten(1).all(1)[:, None, None],
                           self.nothing(len(text)), text)  # fmt: skip
        return self._error(clean, lambda noisy, t: self.extractor(noisy, t, encoder_hidden_states=text)[0])

    def _error(self, clean: Tensor, said: Any) -> Tensor:
        t = torch.randint(STEPS, (len(clean),), device=clean.device)
        noise = torch.randn_like(clean)
        noisy = self.scheduler().add_noise(clean, noise, t)
        return F.mse_loss(said(noisy, t), clean if self.design.predicts == "sample" else noise)

    @torch.no_grad()
    def edit(
        self,
        source: Images,
        tokens: Int[Tensor, "batch words"],
        reference: Images | None = None,
        noun: Int[Tensor, "batch nouns"] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        scale: float | int | None = None,
        guidance: tuple[float | int, float | int] | None = None,
        steps: int | None = None,
        sampler: str = "ddim",
        cached: bool = True,
    ) -> Images:
        """Edited images.

        Args:
            source, tokens, reference, noun: as of `forward`.
            seeds: of the noise that each example begins from, whatever else is in the batch. Default: 0, 1, 2, …
            scale: λ. Default: the design's.
            guidance: s_T and s_I. Default: the design's. With 1 and 1 each step is one pass of the denoiser.
            steps: of sampling. Default: the design's.
            sampler: "ddim" or "euler" of diffusers.
            cached: read the reference once, or at every step, which gives the same (to compare).

        Raises:
            UserError: steps out of range, or another sampler.
        """
        count = self.design.steps if steps is None else steps
        s_t, s_i = self.design.guidance if guidance is None else guidance
        if not 1 <= count <= STEPS:
            raise UserError(f"steps must lie between 1 and {STEPS}, got {count}")
        if not (tokens == self.placeholder).any():
            reference = None
        scheduler = self.scheduler(sampler)
        if source.shape[0] == 0:  # which neither diffusers' U-Net nor the resizing of references takes
            return source.clone()
        scheduler.set_timesteps(count, device=source.device)
        seen = self.latents(source, self.design.source_scaling)
        told = self.read(tokens, reference, noun)
        guided = not s_t == s_i == 1
        empty = self.nothing(len(source)) if guided else None
        x = draw_noise(seen, range(len(seen)) if seeds is None else seeds) * scheduler.init_noise_sigma
        for step in progress.track(scheduler.timesteps, "editing", total=count):
            if not cached:
                told = self.read(tokens, reference, noun)
            given, t = scheduler.scale_model_input(x, step), step.expand(len(x))
            said = self.predict_noise(given, t, seen, told, scale)
            if empty is not None:
                # Without text there is no reference: both at once, without refer-attention.
                twice = Reference(torch.cat([empty, empty]), None, told.present)
                both = torch.cat([torch.zeros_like(seen), seen])
                nothing, only_image = self.predict_noise(
                    torch.cat([given, given]), torch.cat([t, t]), both, twice, 0
                ).chunk(2)
                said = nothing + s_i * (only_image - nothing) + s_t * (said - only_image)
            x = scheduler.step(said, step, x).prev_sample
        return self.images(x)


def draw_noise(like: Float[Tensor, "batch channels rows columns"], seeds: Sequence[int]) -> Tensor:
    """Noise of a latent's shape, of each example by its own seed."""
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(like) if drawn else torch.zeros_like(like)


def _unet(**sizes: Any) -> nn.Module:
    try:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError:
        raise UserError("FreeEdit's U-Nets are of diffusers: pip install 'provenn[hf]'") from None
    return UNet2DConditionModel(**sizes)


def freeedit_small(
    vocab_size: int = 64,
    image_token: int = 5,
    *,
    size: int = 16,
    widths: tuple[int, ...] = (24, 32),
    heads: int = 2,
    text_dim: int = 32,
    text_depth: int = 2,
    length: int = 24,
    queries: int = 4,
    depth: int = 2,
    mode: Literal["drra", "rasa", "ref_only", "self", "none"] = "drra",
    share: bool = False,
    freeze: bool = False,
) -> FreeEdit:
    """A small editor in pixel space, which trains in minutes on a laptop; ours.

    Its image encoder is the tower of "tiny-clip". Its text transformer and its extractor learn in a phase of their own
    and are frozen then, as Stable Diffusion's are.

    Args:
        vocab_size, image_token: of the words, and the one that stands for S*.
        size: side of the images, in pixels.
        widths: of the U-Net's levels, each with attention.
        heads: of all attention.
        text_dim, text_depth, length: of the text transformer.
        queries, depth: of the Q-Former.
        mode, share, freeze: of refer-attention and of stage 2.
    """
    levels = len(widths)
    layout: dict[str, Any] = {
        "sample_size": size, "out_channels": 3, "block_out_channels": tuple(widths), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * levels, "up_block_types": ("CrossAttnUpBlock2D",) * levels,
        "cross_attention_dim": text_dim, "attention_head_dim": heads, "norm_num_groups": 8,
    }  # fmt: skip
    text = TextTower(TextConfig("clip", text_dim, text_depth, heads, vocab=vocab_size, max_length=length,
                                end_of_text=2, pad=0))  # fmt: skip
    told, pair = about("tiny-clip"), cast(ContrastivePair, pretrained("tiny-clip"))
    # Weights that ship are read even where a model is laid out on the meta device.
    on_meta = torch.get_default_device().type == "meta"
    tower = VisionTower(pair.vision_model.config) if on_meta else pair.vision_model
    qformer = QFormer(vocab_size, tower.config.dim, text_dim, queries=queries, dim=text_dim, depth=depth,
                      heads=heads)  # fmt: skip
    instruction = InstructionEncoder(
        text, tower, qformer, placeholder=image_token, end=2, pad=0, length=length,
        mean=told["mean"], std=told["std"], size=told["size"],
    )  # fmt: skip
    design = Design(predicts="sample", schedule="scaled_linear", scaling=1.0, source_scaling=1.0, steps=10,
                    guidance=Guidance(1.0, 1.0), freeze=freeze)  # fmt: skip
    denoiser, extractor = _unet(in_channels=6, **layout), _unet(in_channels=3, **layout)
    return FreeEdit(denoiser, extractor, instruction, mode=mode, share=share, design=design)


CLIP_VOCAB = 49408
SD15: Mapping[str, Any] = {
    "sample_size": 64, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip


def freeedit_sd15(
    vocab_size: int = CLIP_VOCAB,
    image_token: int = -200,
    *,
    size: int = 512,
    mode: Literal["drra", "rasa", "ref_only", "self", "none"] = "drra",
    share: bool = False,
    queries: int = 16,
    every: int = 1,
    own: bool = False,
    source_scaling: float | int = SD_SCALING,
    start: str | None = None,
    start_image: str | None = None,
) -> FreeEdit:
    """The paper's size: two U-Nets and the autoencoder of Stable Diffusion 1.5, CLIP-L for text and images.

    Args:
        vocab_size, image_token: of CLIP's tokenizer, and a number that stands for S*.
        size: side of the images, in pixels: a multiple of 64.
        mode, share: of refer-attention.
        queries, every, own: of the Q-Former, of 12 layers and 768 wide.
        source_scaling: of the source's latent; 1 where a training starts from InstructPix2Pix.
        start: a folder of Stable Diffusion or InstructPix2Pix in diffusers' layout that a training in phases begins
            with; its first phase is left out then. Default: none, all is drawn.
        start_image: a folder of CLIP that the reference's encoder begins with then. Default: it is drawn.
    """
    if size < 64 or size % 64:
        raise ValueError(f"size must be a multiple of 64 pixels, got {size}")
    if vocab_size != CLIP_VOCAB:
        raise ValueError(
            f"Stable Diffusion's text transformer knows {CLIP_VOCAB} pieces, got vocab_size={vocab_size}: read the "
            "edits with --set tokenizer=FOLDER, the folder of Stable Diffusion or of its tokenizer"
        )
    if start_image is not None and start is None:
        raise ValueError("start_image is of a training that starts from Stable Diffusion: give start, its folder, too")
    layout = {**SD15, "sample_size": size // 8}
    denoiser, extractor = _unet(in_channels=8, **layout), _unet(in_channels=4, **layout)
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text = TextTower(TextConfig("clip", 768, 12, 12))
    image = VisionTower(VisionConfig("clip", 1024, 24, 16, image=224, patch=14))
    qformer = QFormer(vocab_size, 1024, 768, queries=queries, every=every, own=own, pad=CLIP_VOCAB - 1)
    instruction = InstructionEncoder(
        text, image, qformer, placeholder=image_token, end=CLIP_VOCAB - 1, pad=CLIP_VOCAB - 1,
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip
    design = Design(source_scaling=source_scaling)
    system = FreeEdit(denoiser, extractor, instruction, vae, mode=mode, share=share, design=design)
    system.start, system.start_image = start, start_image
    return system


def parts_of(system: FreeEdit) -> dict[str, int]:
    """Parameters by part."""
    branch = {id(p) for p in (system.refer.parameters() if system.refer is not None else [])}
    parts: dict[str, nn.Module | None] = {
        "denoiser": system.denoiser, "detail extractor": system.extractor, "Q-Former": system.instruction.qformer,
        "image encoder": system.instruction.image, "text transformer": system.instruction.text, "VAE": system.vae,
    }  # fmt: skip
    counted = {
        name: sum(p.numel() for p in part.parameters() if id(p) not in branch)
        for name, part in parts.items()
        if part is not None
    }
    return {**counted, "refer-attention": sum(p.numel() for p in system.denoiser.parameters() if id(p) in branch)}
