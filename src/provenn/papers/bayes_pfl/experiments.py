"""What Bayes-PFL's abstract says, and what its equations cost beside it, as measurements."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import macs
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.papers.bayes_pfl.model import BayesPFL, Samples, bayes_clip, bayes_vit_l14
from provenn.papers.bayes_pfl.rivals import TEMPLATES
from provenn.papers.bayes_pfl.studies import (
    HEAD,
    LEVEL,
    LOOKED_AT,
    AtLevel,
    OverFolds,
    Variant,
    cover,
    defects,
    head,
    image_auroc,
    kind_ap,
    network,
    seen_defects,
    spread,
    traced,
    tuned,
    unseen_at_level,
)

RATES = (1e-4, 3e-4, 1e-3)
SCALE = 0.01  # bias_scale: about what brings samples to a word's size; set, and not tuned
NOTE = "One small CLIP a seed learned from the textures that are trained on, and is frozen under all heads."
BY_FOLDS = (
    "Three folds of seven textures that are not measured choose rates; those of local contrast are ten times larger."
)
ABOUT = (
    "17 textures of photographs, 64×64 pixels, with composed scratches, blends and stains; 10 to train on, 2 to "
    "validate, 5 to test, others for each seed. Text, coins and cells among them have much that looks like a defect."
)
RCA = head(plain=True, attention="rca")
HEADS: dict[str, tuple[str, Variant]] = {
    "contrast": ("local contrast", head("contrast", faster=10.0)),
    "templates": ("hand-written templates", head("templates", plain=True, prompts=len(TEMPLATES[0]))),
    "pair": ("one pair", head(plain=True, prompts=1)),
    "pair long": ("one pair, three times the steps", head(plain=True, prompts=1, longer=3.0)),
    "three": ("three pairs", head(plain=True)),
    "rca": ("three pairs, RCA", RCA),
    "plain": ("three pairs, plain residual layer", head(plain=True, attention="plain")),
    "agnostic": ("image-agnostic", head(specific=False, bias_scale=SCALE)),
    "specific": ("image-specific", head(agnostic=False, bias_scale=SCALE)),
    "both": ("both distributions", head(bias_scale=SCALE)),
    "official": ("both distributions, scale 1", head(bias_scale=1.0)),
    "gaussian": ("both, without flow", head(bias_scale=SCALE, flows=0)),
    "noise": ("three pairs with noise", head("noise", agnostic=False, specific=False)),
}
UNSEEN = OverFolds(
    "defects in unseen textures",
    "anomaly-detection",
    data=defects,
    variants=HEADS,
    build=network,
    recipe=HEAD,
    lrs=RATES,
    probes={
        "image AUROC": image_auroc,
        "AP of blends": partial(kind_ap, kind="blend"),
        "AP of stains": partial(kind_ap, kind="stain"),
        "cover": cover,
        "spread": spread,
    },
    trained=tuned,
    about=ABOUT,
    kind="head",
    note=f"{NOTE} {BY_FOLDS}",
)
ON_THE_WAY = Study(
    "unseen textures at equal skill on seen ones",
    "anomaly-detection",
    data=seen_defects,
    variants={
        "both": HEADS["both"],
        "rca": HEADS["rca"],
        "light": ("three pairs, RCA, weight decay 1e-4", head(plain=True, attention="rca", decay=1e-4)),
        "strong": ("three pairs, RCA, weight decay 1e-2", head(plain=True, attention="rca", decay=1e-2)),
    },
    build=network,
    recipe=LOOKED_AT,
    lrs=RATES,
    probes={"unseen at the level": unseen_at_level},
    trained=traced,
    about=ABOUT,
    kind="head",
    setting={"level": LEVEL},
    note=f"After each epoch both are looked at; unseen textures count where seen ones rise to the level. {NOTE}",
)
EXPERIMENTS: dict[str, Any] = {
    "templates_over_contrast": UNSEEN.against("templates", "contrast", shown=("pair",)),
    "pair_over_contrast": UNSEEN.against("pair", "contrast", shown=("templates",)),
    "forms_of_blends": UNSEEN.against("three", ("pair", "pair long"), metric="AP of blends"),
    "forms_of_stains": UNSEEN.against("three", ("pair", "pair long"), metric="AP of stains"),
    "regularised_at_equal_skill": AtLevel(ON_THE_WAY, ("both",), ("rca", "light", "strong"), "unseen at the level"),
    "both_over_deterministic": UNSEEN.against("both", "rca", shown=("agnostic", "specific", "official")),
    "official_over_deterministic": UNSEEN.against("official", "rca", shown=("both",)),
    "cover_over_others": UNSEEN.against("both", ("gaussian", "noise"), metric="cover"),
    "cover_at_equal_ap": UNSEEN.against("both", ("gaussian", "noise"), shown=("rca",)),
    "spread_over_gaussian": UNSEEN.against("both", "gaussian", metric="spread"),
    "rca_over_plain": UNSEEN.against("rca", ("three", "plain")),
    "full_ap": UNSEEN.against("both", ("rca", "templates", "pair", "contrast")),
    "full_image_auroc": UNSEEN.against("both", ("rca", "templates", "pair", "contrast"), metric="image AUROC"),
}


# Costs


def text_branch(batched: bool, samples: int, device: str) -> Callable[[], Tensor]:
    """All prompts of one image at a third of ViT-B/16's text tower, in one call or one after the other."""
    torch.manual_seed(0)
    model = bayes_clip(
        vision_dim=128, vision_depth=1, vision_heads=2, patch=16, image_size=32, text_dim=512, text_depth=4,
        layers=(1,), samples=samples,
    ).eval().to(device)  # fmt: skip
    feature = torch.randn(1, 512, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        return (model.embed_texts if batched else partial(one_by_one, model))(
            *model.name_tokens(None, 1), model.draw(feature)
        )

    return call


def one_by_one(model: BayesPFL, tokens: Tensor, lengths: Tensor, samples: Samples) -> Tensor:
    """The authors' loop: images and samples one after the other, and every text of the tower's full length."""
    images = []
    full = model.clip.text_model.config.max_length - 1 - sum(model.words)
    tokens = torch.cat([tokens, tokens.new_full((len(tokens), full - tokens.shape[1]), model.tokenizer.end)], 1)
    for k in range(len(tokens)):
        rows = []
        for r in range(len(samples.states)):
            one = Samples(samples.context[r : r + 1, k % samples.context.shape[1]][:, None], samples.states[r : r + 1])
            rows.append(_uncut(model, tokens[k : k + 1], lengths[k : k + 1], one))
        images.append(torch.cat(rows, 2))
    return torch.cat(images)


def _uncut(model: BayesPFL, tokens: Tensor, lengths: Tensor, one: Samples) -> Tensor:
    # A name as long as the tower, of which one joins the batch: nothing is cut, and the first is what is asked for.
    pad = torch.cat([tokens, tokens])
    return model.embed_texts(pad, torch.cat([lengths, lengths.new_full((1,), pad.shape[1])]), one)[:1]


TEXTS = Timing(
    "prompts of one image",
    {"one call": partial(text_branch, True), "one by one": partial(text_branch, False)},
    sizes=(10,),
    unit="samples",
    rounds=11,
    setting={"threads": 1, "text tower": "4 layers, D = 512"},
)
EXPERIMENTS["batched_texts"] = TEXTS.against("one call", "one by one")


def operations(samples: int = 10) -> dict[str, float]:
    """Multiply-adds of ViT-L/14 at 518 pixels for one image, by part, in 10⁹."""
    with torch.device("meta"):
        model = bayes_vit_l14(samples=samples).eval()
        image = torch.zeros(1, 3, 518, 518)
        seen = model.see(image)
        texts = torch.zeros(1, 2, 3 * samples, 768)
        patches = torch.zeros(1, seen.patches[0].shape[1], 768)

    def attention() -> None:
        for _ in model.layers:
            model.attention(texts.flatten(1, 2), patches)

    def prompts() -> None:
        model.embed_texts(*model.name_tokens(None, 1), model.draw(seen.feature))

    with torch.no_grad():
        parts = {"vision tower": macs(lambda: model.see(image)), "texts": macs(prompts), "RCA": macs(attention)}
    return {name: count / 1e9 for name, count in parts.items()}


def _shares(part: str) -> Measurement:
    rows: list[list[Any]] = []
    for samples in (1, 5, 10):
        counted = operations(samples)
        rows.append([samples, *(round(counted[name], 2) for name in counted)])
        last = counted
    columns = ["samples", *(f"{name}, 10⁹ multiply-adds" for name in last)]
    table = Table(caption="ViT-L/14 at 518×518, one image, the category object", columns=columns, rows=rows)
    return Measurement.exact(round(last[part] / last["vision tower"], 4), unit="of the vision tower", tables=[table])


@measures("rca_share")
def rca_share(run: Run) -> Measurement:
    """What RCA costs beside the vision tower at 10 samples."""
    return _shares("RCA")


@measures("text_share")
def text_share(run: Run) -> Measurement:
    """What the texts of 10 samples cost beside the vision tower, cut to the longest."""
    return _shares("texts")


def both_states(offset: float) -> Tensor:
    """Text embeddings of a small head in float64 with the given mean of the state words, all else alike."""
    torch.manual_seed(0)
    model = bayes_clip(
        vision_dim=64, vision_depth=1, vision_heads=1, patch=16, image_size=32, text_dim=64, text_depth=2, layers=(1,),
        vocab=49408,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        model.normal.add_(offset - 0.5)
        model.abnormal.sub_(offset - 0.5)
        return model.embed_texts(*model.name_tokens(None, 1), model.draw(torch.zeros(1, 64, dtype=torch.float64)))


@measures("offset_invisible")
def offset_invisible(run: Run) -> Measurement:
    """The text embeddings with the state words' means at ±0.5, as published, and at 0."""
    apart = float((both_states(0.5) - both_states(0.0)).abs().max())
    return Measurement.holds(
        apart < 1e-9,
        f"The largest change is {apart:.1g}: a layer norm takes away what all channels of a token have alike.",
    )
