"""Bayes-PFL: prompts drawn from learned distributions, with which a frozen CLIP finds defects (Qu et al., 2025)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.core.narrowing import present
from provenn.nn.anomaly import Anomalies
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.contrastive import ContrastivePair
from provenn.nn.towers import ACTIVATIONS, MLP, TextConfig, VisionConfig
from provenn.papers.bayes_pfl.augmentation import augment
from provenn.papers.bayes_pfl.clip import small_clip
from provenn.papers.bayes_pfl.layers import (
    INIT,
    START,
    PatchPooling,
    PromptDistribution,
    ResidualCrossModalAttention,
    dice_loss,
    focal_loss,
    initialise,
    kl_estimate,
    orthogonal_loss,
    smooth,
)
from provenn.papers.bayes_pfl.words import OBJECT, Letters, OfFolder, OneWord, Tokenizer, prompts_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # how the task standardises images
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OFFSETS = (0.5, -0.5)  # means of the state vectors at first, normal and abnormal
KL_WEIGHT = 0.01
RCA = ("rca", "plain", "none")
STANDARDS = ("imagenet", "clip")
# Of the learning rate: prompts and flows 1e-3, temperatures 1e-2, all else 1e-4.
FASTER, FASTEST = 10.0, 100.0
LARGEST = 2**27  # values of the maps that are held at once


class Seen(NamedTuple):
    """What CLIP says of images.

    Args:
        feature: the projected class token, of any length.
        patches: of each layer, as its block gave them.
        grid: rows and columns of the patches.
    """

    feature: Float[Tensor, "batch dim"]
    patches: list[Float[Tensor, "batch patches vision"]]
    grid: tuple[int, int]


class Samples(NamedTuple):
    """What is added to the words of the prompts.

    Args:
        context: to the context words, of each sample and image.
        states: to the words of the normal and of the abnormal state, of each sample.
    """

    context: Float[Tensor, "draws images dim"]
    states: Float[Tensor, "draws states dim"]


class Explanation(NamedTuple):
    """What is said of images, and how sure it is.

    Args:
        heat: the mean probability of a defect over layers, prompts and samples, smoothed.
        spread: the standard deviation of a pixel's probability over prompts and samples, the mean over layers.
        probability: that an image is defective, by its global feature alone.
        layers: the mean map of each layer, not smoothed.
    """

    heat: Float[Tensor, "batch height width"]
    spread: Float[Tensor, "batch height width"]
    probability: Float[Tensor, " batch"]
    layers: Float[Tensor, "layers batch height width"]


class PlainResidual(nn.Module):
    """A control for RCA of as many parameters, which looks at no patch: normalise(T + W T + c)."""

    def __init__(self, dim: int):
        super().__init__()
        self.layer = nn.Linear(dim, dim)

    def forward(
        self, texts: Float[Tensor, "batch tokens dim"], patches: Float[Tensor, "batch other dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return F.normalize(texts + self.layer(texts), dim=-1)


class Unchanged(nn.Module):
    """No attention: texts as they are."""

    def forward(
        self, texts: Float[Tensor, "batch tokens dim"], patches: Float[Tensor, "batch other dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return texts


class BayesPFL(nn.Module):
    """A frozen CLIP with a bank of prompts, their distributions, and residual cross-model attention.

    A prompt is [start] E_b + z_c, G_b + z_s, the category's name, [end]. E are P context words. G are Q words of the
    normal or of the abnormal state. z_c is drawn for each image, and z_s for all of them. R samples of B pairs give
    B·R pairs of text embeddings, sample by sample, and their probabilities are averaged.

    Noise in evaluation is drawn once, from `noise_seed`. An image's answer thus depends on nothing but the image.

    Args:
        clip: the two towers. They are frozen.
        tokenizer: of the text tower.
        layers: blocks whose patches are read, from 1.
        prompts: B, pairs in the bank.
        context, state: P and Q, words of each.
        flows: K, planar steps of each distribution.
        samples: R, in evaluation; training draws one.
        specific, agnostic: whether context words are shifted by the image's distribution, and state words by theirs.
        bias_scale: what samples are multiplied by before they are added; 1 is the paper's.
        attention: "rca"; "plain", a residual layer of as many parameters without patches; or "none".
        heads: of RCA.
        hidden: inside encoders and pooling. Default: half of the vision tower's width.
        stage: 1 compares texts with CLIP's global feature, 2 with one that the patches were mixed into.
        smoothing: deviation of the Gaussian that heat maps are smoothed by, in pixels.
        top: the image's score is half its probability, and half the mean of this many of its largest pixels.
        invertible: bend the flows' directions so that they can be inverted.
        official_log_det: divide the log-determinant of image-agnostic flows by the size of the batch, as the authors'
            code does.
        standardised: what the images come standardised by, "imagenet" or "clip"; CLIP's numbers are what it gets. None
            leaves the images as they come.
        turn: whether images of training are turned, and their brightness and noise are changed.
        noise_seed: of the samples in evaluation.
        clip_steps: steps in which a small CLIP learns from textures first; 0 takes it as it is.
        pretrained: whether the CLIP has trained weights, as `stages` asks for.

    Shapes: images (batch, 3, height, width), and a name for each, to `Anomalies`.

    Raises:
        ValueError: options out of range, a CLIP of another layout, or texts of another width than the common space.
    """

    reads_names = True
    noise: Tensor
    unnamed: Tensor

    def __init__(
        self,
        clip: ContrastivePair,
        tokenizer: Tokenizer,
        layers: Sequence[int],
        *,
        prompts: int = 3,
        context: int = 5,
        state: int = 5,
        flows: int = 10,
        samples: int = 10,
        specific: bool = True,
        agnostic: bool = True,
        bias_scale: float | int = 1.0,
        attention: str = "rca",
        heads: int = 4,
        hidden: int = 0,
        stage: int = 2,
        smoothing: float | int = 8.0,
        top: int = 2000,
        invertible: bool = False,
        official_log_det: bool = False,
        standardised: str | None = None,
        turn: bool = True,
        noise_seed: int = 0,
        clip_steps: int = 0,
        pretrained: bool = True,
    ):
        super().__init__()
        check_whole(prompts=prompts, context=context, state=state, samples=samples, top=top, hidden=hidden)
        check_whole(noise_seed=noise_seed, clip_steps=clip_steps)
        check_finite(bias_scale=bias_scale, smoothing=smoothing)
        vision, text = clip.vision_model.config, clip.text_model.config
        if clip.layout != "clip" or text.dim != clip.dim:
            raise ValueError(
                "expected a CLIP whose texts are as wide as its common space, got "
                f"{clip.layout} with {text.dim} and {clip.dim}"
            )
        for name, value in (("prompts", prompts), ("samples", samples), ("top", top)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in (
            ("context", context),
            ("state", state),
            ("noise_seed", noise_seed),
            ("clip_steps", clip_steps),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if smoothing < 0:
            raise ValueError(f"smoothing must not be negative, got {smoothing}")
        if context + state < 1:
            raise ValueError("context and state are both 0: a prompt has at least one word that learns")
        if attention not in RCA:
            raise ValueError(f"attention must be one of {', '.join(RCA)}, got {attention!r}")
        if standardised not in (None, *STANDARDS):
            raise ValueError(f"standardised must be one of {', '.join(STANDARDS)}, got {standardised!r}")
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage}")
        if not layers or any(not 1 <= layer <= vision.depth for layer in layers):
            raise ValueError(f"layers must be blocks from 1 to {vision.depth}, got {tuple(layers)}")
        dim, hidden = clip.dim, hidden or vision.dim // 2
        self.clip = clip.requires_grad_(False)
        self.tokenizer, self.layers, self.stage = tokenizer, tuple(layers), stage
        self.prompts, self.words, self.samples = prompts, (context, state), samples
        self.bias_scale, self.smoothing, self.top = bias_scale, smoothing, top
        self.official_log_det, self.standardised, self.turn = official_log_det, standardised, turn
        self.noise_seed, self.clip_steps, self.pretrained = noise_seed, clip_steps, pretrained
        self.room = text.max_length - 1 - context - state
        if self.room < len(tokenizer.encode(OBJECT)) + 1:
            raise ValueError(f"{context} + {state} words leave no room in {text.max_length} tokens for a name")

        self.context = nn.Parameter(torch.empty(prompts, context, dim))
        self.normal, self.abnormal = (nn.Parameter(torch.empty(prompts, state, dim)) for _ in range(2))
        self.temperature_pixel, self.temperature_image = (nn.Parameter(torch.tensor(START)) for _ in range(2))
        options: dict[str, Any] = {"steps": flows, "invertible": invertible}
        self.specific = PromptDistribution(dim, hidden, **options) if specific else None
        self.agnostic = PromptDistribution(dim, hidden, kinds=2, **options) if agnostic else None
        kinds: dict[str, Any] = {"rca": partial(ResidualCrossModalAttention, heads=heads), "plain": PlainResidual}
        self.attention = kinds[attention](dim) if attention in kinds else Unchanged()
        self.to_text = nn.ModuleList(nn.Linear(vision.dim, dim, bias=False) for _ in layers)
        self.text_mapping = nn.Linear(dim, dim)
        self.image_mapping = nn.Linear(dim, dim) if stage == 2 else None
        self.fuse = PatchPooling(vision.dim, len(layers), hidden, dim) if stage == 2 else None
        for name, part in self.named_children():
            if name != "clip":
                initialise(nn.ModuleList([part]))
        for words, mean in ((self.context, 0.0), (self.normal, OFFSETS[0]), (self.abnormal, OFFSETS[1])):
            nn.init.trunc_normal_(words, mean=mean, std=INIT)
        self.resample(noise_seed)
        row = torch.tensor(prompts_of([OBJECT], tokenizer, self.room)[0], device=torch.get_default_device())
        self.register_buffer("unnamed", row, persistent=False)

    def resample(self, seed: int, samples: int | None = None) -> None:
        """Draw the noise of evaluation anew.

        Args:
            seed: of the draw.
            samples: R. Default: as many as before.
        """
        self.samples = samples or self.samples
        like = self.context
        drawn = np.random.default_rng([seed, 2503]).standard_normal((3, self.samples, 1, like.shape[-1]))
        # The device that is chosen for new tensors, which may be one without values.
        noise = torch.from_numpy(drawn).to(device=like.device, dtype=like.dtype)
        self.register_buffer("noise", noise, persistent=False)

    # Images

    def see(self, images: Float[Tensor, "batch 3 height width"]) -> Seen:
        """CLIP's global feature and the patches of the chosen layers."""
        if self.standardised == "imagenet":
            (mean, std), (to_mean, to_std) = (
                (images.new_tensor(m)[:, None, None], images.new_tensor(s)[:, None, None])
                for m, s in ((IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD))
            )
            images = (images * std + mean - to_mean) / to_std
        found = self.clip.vision_model(images, layers=self.layers)
        projection = present(self.clip.visual_projection, "CLIP's projection")
        patches = [found.layers[layer].patches for layer in self.layers]
        return Seen(projection(present(found.pooled, "the class token")), patches, found.grid)

    # Texts

    def draw(self, feature: Float[Tensor, "batch dim"]) -> Samples:
        """The samples of evaluation: those of the states are the same for all images."""
        still = feature.new_zeros(1, 1, feature.shape[-1])
        context, states = still, still.expand(1, 2, -1)
        if self.specific is not None:
            context = self.bias_scale * self.specific(feature, self.noise[0]).z
        if self.agnostic is not None:
            states = self.bias_scale * self.agnostic(None, self.noise[1:, :, 0].transpose(0, 1)).z
        samples = max(len(context), len(states))
        return Samples(context.expand(samples, -1, -1), states.expand(samples, -1, -1))

    def draw_training(self, feature: Float[Tensor, "batch dim"]) -> tuple[Samples, Tensor]:
        """One sample, and the sum of the three divergences: the images' mean, and those of both states."""
        still = feature.new_zeros(1, 1, feature.shape[-1])
        context, states, divergence = still, still.expand(1, 2, -1), feature.new_zeros(())
        if self.specific is not None:
            drawn = self.specific(feature, torch.randn_like(feature)[None])
            context, divergence = self.bias_scale * drawn.z, divergence + kl_estimate(drawn).mean()
        if self.agnostic is not None:
            drawn = self.agnostic(None, torch.randn_like(states))
            shares = len(feature) if self.official_log_det else 1
            states, divergence = self.bias_scale * drawn.z, divergence + kl_estimate(drawn, shares=shares).sum()
        return Samples(context, states), divergence

    def name_tokens(self, names: Sequence[str] | None, batch: int) -> tuple[Int64[Tensor, "batch length"], Tensor]:
        """Tokens of each image's category with the end of the text, filled up with it, and how many there are."""
        if names is None:
            return self.unnamed.expand(batch, -1), self.unnamed.new_tensor(self.unnamed.shape[0]).expand(batch)
        if len(names) != batch:
            raise UserError(f"{batch} images have {len(names)} names of categories: expected one for each")
        rows = prompts_of(names, self.tokenizer, self.room)
        tokens = torch.full((batch, max(map(len, rows), default=1)), self.tokenizer.end)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
        device = self.context.device
        return tokens.to(device), torch.tensor(list(map(len, rows)), dtype=torch.long, device=device)

    def embed_texts(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"], samples: Samples
    ) -> Float[Tensor, "batch 2 pairs dim"]:
        """All prompts of all images in one call of the text tower, of length 1.

        They are cut to the longest, which changes nothing: the tower is causal. Pairs are sorted by sample, then by
        their place in the bank.
        """
        batch, count = tokens.shape[0], samples.states.shape[0]
        dim, bank = self.context.shape[-1], self.prompts
        # (batch, state, sample, pair, word, dim), of which each part is missing some axes.
        shift = samples.context.transpose(0, 1)[:, None, :, None, None]
        context = (self.context[None, None, None] + shift).expand(batch, 2, count, -1, -1, -1)
        states = torch.stack([self.normal, self.abnormal])[None, :, None]
        states = states + samples.states.transpose(0, 1)[None, :, :, None, None]
        states = states.expand(batch, -1, -1, -1, -1, -1)
        tower = self.clip.text_model
        start = tower.embed(tokens.new_full((1, 1), self.tokenizer.start)).expand(batch, 2, count, bank, 1, dim)
        name = tower.embed(tokens)[:, None, None, None].expand(-1, 2, count, bank, -1, -1)
        words = torch.cat([start, context, states, name], 4).flatten(0, 3)
        before = 1 + sum(self.words)
        inside = torch.arange(words.shape[1], device=words.device) < (lengths + before)[:, None]
        mask = inside[:, None].expand(-1, 2 * count * bank, -1).flatten(0, 1)
        texts = self.clip.encode_text(embeddings=words, mask=mask)
        return F.normalize(texts, dim=-1).unflatten(0, (batch, 2, count * bank))

    # Scores

    def image_logits(self, texts: Float[Tensor, "batch 2 pairs dim"], seen: Seen) -> Float[Tensor, "batch 2 pairs"]:
        """How well each text and the image go together, by global features."""
        feature = seen.feature
        if self.stage == 2:
            fuse, mapping = present(self.fuse, "the pooling"), present(self.image_mapping, "the image's mapping")
            feature = mapping(feature + fuse(seen.patches))
        mapped = F.normalize(self.text_mapping(texts), dim=-1)
        return self.temperature_image.exp() * (mapped @ F.normalize(feature, dim=-1)[:, None, :, None])[..., 0]

    def maps(
        self, texts: Float[Tensor, "batch 2 pairs dim"], seen: Seen, size: tuple[int, int]
    ) -> Iterator[Float[Tensor, "batch pairs height width"]]:
        """Of each layer the probability of a defect at each pixel, by each pair.

        A softmax over two logits is a sigmoid of their difference. Both are enlarged linearly, so the difference is.
        """
        pairs = texts.shape[2]
        for mapping, patches in zip(self.to_text, seen.patches, strict=True):
            local = F.normalize(mapping(patches), dim=-1)
            looked = self.attention(texts.flatten(1, 2), local).unflatten(1, (2, pairs))
            difference = self.temperature_pixel.exp() * (local @ (looked[:, 1] - looked[:, 0]).mT)
            logits = difference.mT.unflatten(2, seen.grid)
            yield F.interpolate(logits, size, mode="bilinear", align_corners=True).sigmoid()

    def _said(
        self, images: Float[Tensor, "batch 3 height width"], names: Sequence[str] | None
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch height width"]]:
        """Each image's probability and its map, not smoothed."""
        batch, size = images.shape[0], (images.shape[2], images.shape[3])
        seen = self.see(images)
        texts = self.embed_texts(*self.name_tokens(names, batch), self.draw(seen.feature))
        logits = self.image_logits(texts, seen)
        probability = (logits[:, 1] - logits[:, 0]).sigmoid().mean(1)
        heat = torch.stack([one.mean(1) for one in self.maps(texts, seen, size)]).mean(0)
        return probability, heat

    def score(self, probability: Float[Tensor, " batch"], heat: Float[Tensor, "batch height width"]) -> Tensor:
        """½ probability + ½ the mean of the largest pixels, where nothing is known of other images."""
        top = min(self.top, heat.shape[1] * heat.shape[2])
        return 0.5 * probability + 0.5 * heat.flatten(1).topk(top).values.mean(1)

    def forward(self, images: Float[Tensor, "batch 3 height width"], names: Sequence[str] | None = None) -> Anomalies:
        each = self.samples * self.prompts * images.shape[2] * images.shape[3]
        share = max(1, LARGEST // each)
        if torch.compiler.is_compiling() or len(images) <= share:
            probability, heat = self._said(images, names)
        else:  # maps of all pairs at full size are what takes the memory
            parts = [
                self._said(part, None if names is None else names[k * share : (k + 1) * share])
                for k, part in enumerate(images.split(share))
            ]
            probability, heat = (torch.cat(together) for together in zip(*parts, strict=True))
        return Anomalies(self.score(probability, heat), smooth(heat, self.smoothing))

    @torch.no_grad()
    def explain(self, images: Float[Tensor, "batch 3 height width"], names: Sequence[str] | None = None) -> Explanation:
        """The heat map with its spread over prompts and samples, and the map of each layer."""
        batch, size = images.shape[0], (images.shape[2], images.shape[3])
        seen = self.see(images)
        texts = self.embed_texts(*self.name_tokens(names, batch), self.draw(seen.feature))
        logits = self.image_logits(texts, seen)
        means, spreads = [], []
        for one in self.maps(texts, seen, size):
            means.append(one.mean(1))
            spreads.append(one.std(1, correction=0))
        layers = torch.stack(means)
        return Explanation(
            smooth(layers.mean(0), self.smoothing),
            torch.stack(spreads).mean(0),
            (logits[:, 1] - logits[:, 0]).sigmoid().mean(1),
            layers,
        )

    # Training

    def losses(self, batch: Sequence[Any], chosen: int | None = None) -> dict[str, Float[Tensor, ""]]:
        """The parts of the loss of stage 1: "image", "pixel", "divergence" (weighted) and "orthogonal".

        Args:
            batch: images, names, labels and masks.
            chosen: which pair of the bank is trained. Default: one at random for the whole batch.
        """
        images, names, labels, masks = batch
        if self.turn:
            images, masks = augment(images, masks)
        with torch.no_grad():
            seen = self.see(images)
        samples, divergence = self.draw_training(seen.feature)
        texts = self.embed_texts(*self.name_tokens(names, len(images)), samples)
        if chosen is None:
            chosen = int(torch.randint(self.prompts, (1,)))
        pair = texts[:, :, chosen : chosen + 1]
        image = F.cross_entropy(self.image_logits(pair, seen)[..., 0], labels.long())
        pixel = images.new_zeros(())
        for one in self.maps(pair, seen, (images.shape[2], images.shape[3])):
            pixel = pixel + focal_loss(one[:, 0], masks) + dice_loss(one[:, 0], masks)
        apart = orthogonal_loss(texts[:, 0]) + orthogonal_loss(texts[:, 1])
        return {"image": image, "pixel": pixel, "divergence": KL_WEIGHT * divergence, "orthogonal": apart}

    def image_loss(self, batch: Sequence[Any]) -> Float[Tensor, ""]:
        """The loss of stage 2: the cross-entropy of a random pair, from which texts get no gradient."""
        images, names, labels, masks = batch
        if self.turn:
            images, masks = augment(images, masks)
        with torch.no_grad():
            seen = self.see(images)
            samples, _ = self.draw_training(seen.feature)
            texts = self.embed_texts(*self.name_tokens(names, len(images)), samples)
        chosen = int(torch.randint(self.prompts, (1,)))
        return F.cross_entropy(self.image_logits(texts[:, :, chosen : chosen + 1], seen)[..., 0], labels.long())

    def training_loss(self, batch: Sequence[Any]) -> Float[Tensor, ""]:
        """The sum of the losses of the stage that the system is in."""
        if self.stage == 2:
            return self.image_loss(batch)
        return torch.stack(list(self.losses(batch).values())).sum()

    def of_stage(self, stage: int) -> list[nn.Parameter]:
        """What learns in a stage: all but CLIP and what stage 2 adds; or both mappings and the pooling."""
        added = [part for part in (self.fuse, self.image_mapping) if part is not None]
        late = [p for part in (*added, self.text_mapping) for p in part.parameters()]
        if stage == 2:
            return late
        left = {id(p) for part in (*added, self.clip) for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in left]

    @contextmanager
    def in_stage(self, stage: int) -> Iterator["BayesPFL"]:
        """Inside, the system answers and learns as in a stage."""
        before, self.stage = self.stage, stage
        try:
            yield self
        finally:
            self.stage = before

    def check_recipe(self, recipe: Any) -> None:
        """Does the recipe say what can be done here?

        Raises:
            UserError: `layer_decay`, as no row of blocks learns; a pattern of `no_decay` that no name meets.
        """
        if recipe.layer_decay != 1:
            raise UserError(
                f"layer_decay={recipe.layer_decay:g}: the blocks of CLIP are frozen, so no rate can fall from block to "
                "block: leave layer_decay at 1"
            )
        named = [name for name, _ in self.named_parameters() if not name.startswith("clip.")]
        for pattern in recipe.no_decay:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise UserError(f"no_decay: nothing that learns is called {pattern!r}; there are {', '.join(named)}")

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """The recipe's: prompts and flows learn at ten times its rate, and temperatures at a hundred times."""
        self.check_recipe(recipe)
        named = {p: name for name, p in self.named_parameters() if p.requires_grad}
        here = tuple(pattern for pattern in recipe.no_decay if any(fnmatchcase(n, pattern) for n in named.values()))
        made = replace(recipe, no_decay=here).make_optimizer(self)  # of a stage, in which others may be still
        for group in list(made.param_groups):
            made.param_groups.remove(group)
            for factor in (1.0, FASTER, FASTEST):
                if some := [p for p in group["params"] if _faster(named[p]) == factor]:
                    made.add_param_group({**group, "params": some, "lr": recipe.lr * factor})
        return made

    @torch.no_grad()
    def prompt_embeddings(
        self, images: Float[Tensor, "batch 3 height width"], names: Sequence[str]
    ) -> Float[Tensor, "batch 2 pairs dim"]:
        """The text embeddings of all sampled prompts, of length 1."""
        return self.embed_texts(*self.name_tokens(names, len(images)), self.draw(self.see(images).feature))


def _faster(name: str) -> float:
    """What the learning rate of a parameter is multiplied by."""
    if name.startswith("temperature"):
        return FASTEST
    bank = name in ("context", "normal", "abnormal") or ".free." in name or ".amortised." in name
    return FASTER if bank or name.endswith(".states") else 1.0


def bayes_clip(
    *,
    vision_dim: int,
    vision_depth: int,
    vision_heads: int,
    patch: int,
    text_dim: int,
    text_depth: int = 12,
    text_heads: int = 0,
    vocab: int = 49408,
    text_length: int = 77,
    image_size: int = 518,
    activation: str = "gelu",
    clip: str | None = None,
    layers: tuple[int, ...] = (6, 12, 18, 24),
    prompts: int = 3,
    context: int = 5,
    state: int = 5,
    flows: int = 10,
    samples: int = 10,
    specific: bool = True,
    agnostic: bool = True,
    bias_scale: float | int = 1.0,
    attention: str = "rca",
    stage: int = 2,
    smoothing: float | int = 8.0,
    top: int = 2000,
    invertible: bool = False,
    official_log_det: bool = False,
    standardised: str = "imagenet",
    turn: bool = True,
    noise_seed: int = 0,
) -> BayesPFL:
    """Bayes-PFL upon a CLIP of OpenAI's layout.

    Args:
        vision_dim, vision_depth, vision_heads, patch: of the vision tower.
        text_dim, text_depth, text_heads: of the text tower; heads are 64 wide by default.
        vocab, text_length: tokens that it knows, and that it reads.
        image_size: side of the images that positions are made for, in pixels.
        activation: "gelu", as the authors have it, or "quick_gelu", as OpenAI's weights were trained.
        clip: a folder of Hugging Face with CLIP's weights and tokenizer. Default: new weights, and the category object.
            Trained weights hold its weights and not its tokenizer: they name the folder, or get it anew.
        layers, prompts, context, state, flows, samples, specific, agnostic, bias_scale, attention, stage, smoothing,
            top, invertible, official_log_det, standardised, turn, noise_seed: as of `BayesPFL`.

    Raises:
        UserError: there is no such folder, or it holds another model, or one of other sizes.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    vision = VisionConfig(
        "clip", vision_dim, vision_depth, vision_heads, image=image_size, patch=patch, activation=activation
    )
    text = TextConfig(
        "clip", text_dim, text_depth, text_heads or max(1, text_dim // 64), activation=activation, vocab=vocab,
        max_length=text_length, end_of_text=min(49407, vocab - 1),
    )  # fmt: skip
    tokenizer: Tokenizer = OneWord()
    if clip is None:
        pair = ContrastivePair(vision, text, text_dim)
    else:
        pair, tokenizer = _from_folder(clip, vision, text), OfFolder(clip)
    return BayesPFL(
        pair, tokenizer, layers, prompts=prompts, context=context, state=state, flows=flows, samples=samples,
        specific=specific, agnostic=agnostic, bias_scale=bias_scale, attention=attention, stage=stage,
        smoothing=smoothing, top=top, invertible=invertible, official_log_det=official_log_det,
        standardised=standardised, turn=turn, noise_seed=noise_seed,
        pretrained=clip is not None,
    )  # fmt: skip


def _from_folder(folder: str | Path, vision: VisionConfig, text: TextConfig) -> ContrastivePair:
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: there is no such folder, whose tokenizer reads the categories: say where that CLIP of Hugging "
            "Face lies now with --set clip=FOLDER"
        )
    pair = ContrastivePair.from_huggingface(folder)
    if pair.layout != "clip":
        raise UserError(f"{folder} holds a {pair.layout}: expected a CLIP")
    for what, own, other in (("vision", vision, pair.vision_model.config), ("text", text, pair.text_model.config)):
        for name in ("dim", "depth", "heads", *(["patch"] if what == "vision" else ["vocab", "max_length"])):
            here, there = getattr(own, name), getattr(other, name)
            if here != there:
                raise UserError(
                    f"{folder}: its {what} tower has {name} {there}, and this preset {here}: choose another preset, or "
                    "set it"
                )
    for part in pair.modules():
        if isinstance(part, MLP):
            part.activation = vision.activation
    pair.vision_model.resize(vision.image, antialias=True)
    return pair


LARGE: dict[str, Any] = {"vision_dim": 1024, "vision_depth": 24, "vision_heads": 16, "patch": 14, "text_dim": 768}
BASE: dict[str, Any] = {"vision_dim": 768, "vision_depth": 12, "vision_heads": 12, "patch": 16, "text_dim": 512}
bayes_vit_l14 = partial(bayes_clip, **LARGE)  # at 224 or 336: what differs is resized
bayes_vit_b16 = partial(bayes_clip, **BASE, layers=(3, 6, 9, 12), image_size=512)


def bayes_defects(
    *,
    image_size: int = 64,
    prompts: int = 3,
    context: int = 5,
    state: int = 5,
    flows: int = 10,
    samples: int = 10,
    specific: bool = True,
    agnostic: bool = True,
    bias_scale: float | int = 0.01,
    attention: str = "rca",
    stage: int = 2,
    smoothing: float | int = 1.0,
    top: int = 40,
    invertible: bool = False,
    official_log_det: bool = False,
    turn: bool = True,
    noise_seed: int = 0,
    clip_steps: int = 400,
) -> BayesPFL:
    """Bayes-PFL upon a small CLIP that learns from textures first; ours, what trains in minutes.

    Args:
        image_size: side of the images, in pixels.
        clip_steps: steps of the small CLIP before the prompts learn.
        prompts, context, state, flows, samples, specific, agnostic, bias_scale, attention, stage, smoothing, top,
            invertible, official_log_det, turn, noise_seed: as of `BayesPFL`.
    """
    return BayesPFL(
        small_clip(image=image_size), Letters(), (1, 2, 3, 4), prompts=prompts, context=context, state=state,
        flows=flows, samples=samples, specific=specific, agnostic=agnostic, bias_scale=bias_scale, attention=attention,
        stage=stage, smoothing=smoothing, top=top, invertible=invertible, official_log_det=official_log_det, turn=turn,
        noise_seed=noise_seed, clip_steps=clip_steps,
    )  # fmt: skip
