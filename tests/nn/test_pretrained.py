"""The small trained models: their size, their metrics held to what stands beside them, and what they are read with."""

import pytest
import torch

import provenn.nn
from provenn.core.errors import UserError
from provenn.nn.contrastive import ContrastivePair
from provenn.nn.promptable import PromptableSegmenter
from provenn.nn.shipped import FOLDER, about
from provenn.nn.vision_language import ImageChat
from provenn.tasks import get_task
from provenn.tasks.portable import standardise

NAMES = ("tiny-clip", "tiny-vlm", "tiny-lister")


class Embeds(torch.nn.Module):
    """A pair as the task of retrieval calls it."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def encode_images(self, images, regions):
        return self.pair.encode_image(images)

    def encode_texts(self, tokens, words):
        return self.pair.encode_text(tokens, mask=words)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_model_is_small_and_says_what_made_it(name):
    model, said = provenn.nn.pretrained(name), about(name)
    assert isinstance(model, ContrastivePair if name == "tiny-clip" else ImageChat) and not model.training
    assert sum(file.stat().st_size for file in (FOLDER / name).iterdir()) <= 2e6
    assert said["command"] == f"python scripts/shared_models.py {name}" and said["core_minutes"] < 12
    assert said["size"] == 64 and len(said["mean"]) == len(said["std"]) == 3 and "<image>" in said["words"]
    again = provenn.nn.pretrained(name)
    next(again.parameters()).data.zero_()  # a copy, which nobody shares
    assert next(model.parameters()).abs().max() > 0


def test_the_tiny_clip_finds_what_it_never_saw_together():
    said = about("tiny-clip")
    task = get_task("image-text-retrieval")
    held_out = task.held_out("composed", said)
    metrics = task.evaluate(Embeds(provenn.nn.pretrained("tiny-clip")), held_out.dataset)
    for name, stated in said["metrics"].items():
        assert metrics[name] == pytest.approx(stated, abs=0.01), name
    assert metrics["rsum"] > 3.5 and said["metrics"]["text_r1"] > 0.3


def test_the_tiny_model_of_images_and_text_answers_by_what_it_sees():
    said, model = about("tiny-vlm"), provenn.nn.pretrained("tiny-vlm")
    task = get_task("visual-question-answering")
    dataset = task.held_out("composed", said).dataset
    scores = task.scores(model, dataset)
    metrics = task.summary(scores)
    for name, stated in said["metrics"].items():
        if name.startswith("vqa_"):
            assert metrics[name.removeprefix("vqa_")] == pytest.approx(stated, abs=0.01), name
    # The same questions with the pictures of other scenes.
    dataset.pictures = dataset.pictures.roll(1, 0)
    blind = task.summary(task.scores(model, dataset))
    assert metrics["accuracy"] > blind["accuracy"] + 0.1
    assert metrics["colour"] > 2 * blind["colour"] and metrics["ground"] > 2 * blind["ground"]


def test_the_tiny_segmenter_is_small_and_cuts_out_objects_that_it_never_saw():
    said, model = about("tiny-sam"), provenn.nn.pretrained("tiny-sam")
    assert isinstance(model, PromptableSegmenter) and not model.training
    assert sum(file.stat().st_size for file in (FOLDER / "tiny-sam").iterdir()) <= 2e6
    assert said["command"] == "python scripts/shared_models.py tiny-sam" and said["core_minutes"] < 12
    dataset = get_task("open-ended-detection").load("composed", examples=40).test
    found = []
    for example in (dataset[k] for k in range(40)):
        image = standardise(example.image.float() / 255, said)[None]
        boxes = torch.from_numpy(example.boxes).float()
        masks = model.decode(model.encode(image), boxes=boxes).best().logits[:, 0] > 0
        truth = torch.from_numpy(example.masks)
        found.append((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2)))
    assert torch.cat(found).mean() == pytest.approx(said["metrics"]["box_iou"], abs=0.02)


def test_no_model_of_another_name():
    there = "there are tiny-clip, tiny-lister, tiny-sam, tiny-vlm"
    with pytest.raises(UserError, match=f"no small trained model is called 'tiny-bert'; {there}"):
        provenn.nn.pretrained("tiny-bert")
    with pytest.raises(AttributeError, match="has no attribute 'pretrain'"):
        _ = provenn.nn.pretrain
