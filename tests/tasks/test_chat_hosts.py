"""Cross-mixers in a model of images and text: of one size, looking at the image, compared on questions and on chats."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.experiments.compare import compare, comparison, host_for, hosts_of
from provenn.tasks.chat_hosts import CHAT, DIM, QUERIES, QUESTIONS, chat_model

OPTIONS = {"vocab_size": 20, "image_token": 5, "image_size": 32}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Questions about eight pictures."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * number, np.uint8)).save(folder / f"{number}.png")
        lines.append(
            {"image": f"{number}.png", "question": "what is it ?", "answer": "dark" if number < 4 else "light"}
        )
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_every_cross_mixer_fits_at_one_size_and_reads_the_image():
    assert hosts_of("cross-mixer") == [CHAT, QUESTIONS]
    known = comparison._choose("cross-mixer", QUESTIONS, None, print)
    assert next(iter(known)) == "attention" and {"mean", "lorra", "rca", "rcr-attention", "bvr-attention"} <= set(known)
    tokens = torch.tensor([[1, 5, 2, 3]])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for name, (factory, _) in known.items():
        torch.manual_seed(0)
        model = chat_model(factory, OPTIONS).eval()
        sizes[name] = count_parameters(model)
        assert model.model.features(images)[1] == [QUERIES] * 2
        with torch.no_grad():
            for parameter in model.model.projector.mixer.parameters():  # some begin as nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
            one, other = (model(tokens, image[None])[0, -1] for image in images)
        assert not torch.allclose(one, other, atol=1e-4), name
    assert max(sizes.values()) - min(sizes.values()) <= 2 * DIM, sizes


def test_a_mixer_too_large_is_refused():
    with pytest.raises(ValueError, match="its 49,152 parameters are more than the 49,152 of a layer"):
        chat_model(lambda dim: torch.nn.Linear(dim, 12 * dim, bias=False), OPTIONS)


@pytest.mark.parametrize(
    ("task", "metric"), [("visual-question-answering", "accuracy"), ("multimodal-chat", "perplexity")]
)
def test_mixers_are_compared_on_questions_and_on_chats(questions, tmp_path, task, metric):
    result = compare(
        "cross-mixer", ["wings", "mean", "attention"], data=questions, task=task, budget="smoke", seeds=1,
        device="cpu", out=tmp_path,
    )  # fmt: skip
    assert (result.metric, result.higher_is_better) == (metric, metric == "accuracy")
    attention, lorra, mean = result.candidates
    assert (attention.name, lorra.name, mean.name, lorra.paper) == ("attention", "lorra", "mean", "wings")
    assert all(one.flops > 0 and math.isfinite(one.mean) for one in result.candidates)
    assert mean.flops < lorra.flops < attention.flops


def test_the_kind_of_work_chooses_the_host():
    assert host_for("cross-mixer", "composed") is CHAT
    assert host_for("cross-mixer", "composed", "visual-question-answering") is QUESTIONS
    message = "image-classification has no host for cross-mixer; there are: multimodal-chat, visual-question-answering"
    with pytest.raises(UserError, match=message):
        host_for("cross-mixer", "composed", "image-classification")
