"""What RC-MLLM's abstract says: digits with entries, answered with boxes, crops and marks, before and after tuning."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from provenn.core.box_text import image_tokens
from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Timing, measures
from provenn.nn.decoder import Decoder
from provenn.papers.rc_mllm.model import rc_qwen2_vl_2b
from provenn.papers.rc_mllm.protocol import Entry, build_prompt, without_boxes
from provenn.papers.rc_mllm.studies import (
    KINDS,
    RECIPE,
    TASK,
    Variant,
    about_pictures,
    accuracy_of,
    answered_falsely,
    binding_data,
    citation_f1,
    entry_and_fact,
    half_at_least,
    in_stages,
    kept_over_orders,
    lookup_gain,
    network,
    refusals_in_place,
)
from provenn.papers.rc_mllm.task.tokens import RegionWords

BINDING = Study(
    "digits and owners",
    TASK,
    data=binding_data,
    variants={
        "boxes": ("boxes as text", Variant("boxes")),
        "crops": ("a crop beside each entry", Variant("crops")),
        "marks": ("numbered marks", Variant("marks")),
        "before": ("pictures alone, as many steps", Variant("boxes", tuned=False)),
    },
    build=network,
    recipe=RECIPE,
    lrs=(1.5e-3, 3e-3, 6e-3),
    probes={
        **{kind: partial(accuracy_of, kind, "") for kind in KINDS},
        "boxes moved": partial(accuracy_of, "V2C", "moved"),
        "boxes left out": partial(accuracy_of, "V2C", "bare"),
        "citation F1": citation_f1,
        "kept over orders": kept_over_orders,
        "false answers": answered_falsely,
        "refusals in place": refusals_in_place,
        "entry and fact": partial(half_at_least, entry_and_fact),
        "about pictures": partial(half_at_least, about_pictures),
        "look-up over text": lookup_gain,
    },
    trained=in_stages,
    about=(
        "three digits (scikit-learn) in nine cells of 8×8 with entries in random order; names and glyphs of the test "
        "are new. Each text of a test tells name and price, so that a lot among the entries is right in a third"
    ),
    kind="entries",
    note=(
        "Every variant first learns questions about pictures alone, for 5 epochs. Tuned ones then learn all kinds, for "
        "16. What is not tuned has these 16 on pictures alone too, and its rate by questions about these."
    ),
)

EXPERIMENTS: dict[str, Any] = {
    "v2c_above_shortcuts": BINDING.figure("boxes", metric="V2C", shown=("crops", "marks")),
    "c2v_above_shortcuts": BINDING.figure("boxes", metric="C2V", shown=("crops", "marks")),
    "v2c_near_crops": BINDING.against("boxes", "crops", metric="entry and fact"),
    "v2c_near_marks": BINDING.against("boxes", "marks", metric="entry and fact"),
    "follows_moved_boxes": BINDING.figure("boxes", metric="boxes moved"),
    "order_matters_little": BINDING.figure("boxes", metric="kept over orders"),
    "no_boxes_no_binding": BINDING.figure("boxes", metric="boxes left out"),
    "refuses_in_place": BINDING.figure("boxes", metric="refusals in place", shown=("crops",)),
    "tuned_v2c": BINDING.against("boxes", "before", metric="V2C", may_guess="an untuned model never saw an entry"),
    "tuned_c2v": BINDING.against("boxes", "before", metric="C2V", may_guess="an untuned model never saw an entry"),
    "tuned_v2c_none": BINDING.against(
        "boxes", "before", metric="V2C-none", may_guess="an untuned model never saw an entry"
    ),
    "tuned_c2v_none": BINDING.against(
        "boxes", "before", metric="C2V-none", may_guess="an untuned model never saw an entry"
    ),
    "tuned_citations": BINDING.against(
        "boxes", "before", metric="citation F1", may_guess="an untuned model never saw an entry"
    ),
    "tuned_false_answers": BINDING.against("boxes", "crops", metric="false answers"),
    "plain_questions_kept": BINDING.against(
        "boxes", "before", metric="about pictures", may_guess="an untuned model never saw an entry"
    ),
    "lookup_above_text": BINDING.figure("boxes", metric="look-up over text"),
}

PICTURE, CROP = image_tokens(640, 480), image_tokens(224, 224)  # of Qwen2-VL
SAID = "she is a teacher and bought it in spring for ten coins"


def prompt_tokens(form: str, count: int) -> int:
    """Tokens of a prompt with its picture. Words and marks are one each, and so is each digit, as in Qwen2.

    Args:
        form: "boxes" as text, or "crops", an image of 224×224 beside each entry.
        count: of entries, with twelve words each.
    """
    entries = [Entry("dog", (100 + k, 200 + k, 700 + k, 800 + k), SAID) for k in range(count)]
    prompt = build_prompt(entries, "who owns the dog ?")
    text = prompt if form == "boxes" else without_boxes(prompt)
    words = RegionWords.of_texts([prompt]).text(text)
    return PICTURE + len(words) + (CROP * count if form == "crops" else 0)


def count_tokens(form: str, size: int, device: str) -> Callable[[], int]:
    return partial(prompt_tokens, form, size)


def read_prompt(form: str, size: int, device: str) -> Callable[[], Any]:
    """A decoder layer of width 256 reads a prompt of `size` entries."""
    model = Decoder(vocab=16, dim=256, layers=1, heads=4, kv_heads=2).to(device)
    tokens = torch.zeros(1, prompt_tokens(form, size), dtype=torch.long, device=device)
    return lambda: model.read(model.embed(tokens)).hidden


FORMS = {"boxes as text": "boxes", "a crop beside each entry": "crops"}
PROMPT = Timing(
    "tokens of a prompt",
    {label: partial(count_tokens, form) for label, form in FORMS.items()},
    sizes=(1, 2, 4, 8, 16),
    quantity="count",
    unit="entries",
    of="tokens",
)
PREFILL = Timing(
    "a decoder layer reads a prompt",
    {label: partial(read_prompt, form) for label, form in FORMS.items()},
    sizes=(1, 2, 4, 8, 16),
    quantity="flops",
    unit="entries",
)
EXPERIMENTS["prompt_tokens"] = PROMPT.against("boxes as text", "a crop beside each entry")
EXPERIMENTS["prefill_flops"] = PREFILL.against("boxes as text", "a crop beside each entry")


@measures("parameters_added")
def parameters_added(run: Run) -> Measurement:
    """Parameters of RC-Qwen2-VL-2B, whose tuning adds none to Qwen2-VL-2B."""
    with torch.device("meta"):
        model = rc_qwen2_vl_2b()
    tower = count_parameters(model.model.vision) + count_parameters(model.model.projector)
    return Measurement.exact(
        count_parameters(model), unit="parameters", note=f"Of these {tower:,} are of the vision tower and its merger."
    )
