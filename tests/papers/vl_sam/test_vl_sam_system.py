"""The system: frozen, once a view, places that go there and back, sizes of any kind, and what it refuses."""

import copy
from types import SimpleNamespace

import pytest
import torch

import provenn
from provenn.core.errors import UserError
from provenn.data.composed import composed_scenes
from provenn.nn.promptable import Decoded
from provenn.nn.shipped import about, pretrained
from provenn.papers.vl_sam import VLSAM, Flow, HuggingFaceCaptioner, SamSegmenter, Told, views_of, vl_sam_scenes
from provenn.papers.vl_sam.model import sampled
from provenn.papers.vl_sam.names import parse_names
from provenn.papers.vl_sam.training import listing_data
from provenn.tasks import get_task


@pytest.fixture(scope="module")
def system():
    return vl_sam_scenes()


@pytest.fixture(scope="module")
def image():
    scene = composed_scenes("test", 0, 1, words="train")[0]
    return torch.from_numpy(scene.pixels).permute(2, 0, 1).contiguous()


class OnePatch:
    """Answers with words whose attention lies on one cell each of a grid."""

    depth = 2

    def __init__(self, words, cells, grid=(6, 8)):
        self.text, self.cells, self.grid, self.asked = " , ".join(words), cells, grid, 0
        starts = [self.text.index(word) for word in words]
        self.pieces = [(start, start + len(word)) for start, word in zip(starts, words)]

    def tell(self, images, question, **draw):
        self.asked += 1
        rows, columns = self.grid
        count = rows * columns
        total = count + 3 + len(self.pieces)
        layer = torch.eye(total).expand(2, -1, -1).clone()
        for k, cells in enumerate(self.cells):
            row = layer[:, count + 3 + k]
            row[:] = 0
            for y, x in cells:
                row[:, y * columns + x] = 1 / len(cells)
        named = torch.arange(total) < count
        return [
            Told(self.text, self.pieces, count + 3, named, self.grid, (0.0, 0.0, float(i.shape[2]), float(i.shape[1])),
                 self.depth, lambda _: layer)
            for i in images
        ]  # fmt: skip

    def to(self, *args):
        return self


class Discs:
    """Gives a square around the positive point, and counts what it is asked."""

    side, mask_side = 64, 32

    def __init__(self):
        self.encoded, self.points = 0, []

    def fitted(self, height, width):
        longer = max(height, width)
        return round(height * self.side / longer), round(width * self.side / longer)

    def encode(self, images):
        self.encoded += 1
        return [None] * len(images)

    def decode(self, seen, *, points, labels, **more):
        self.points.append(points[:, 0])
        at = (points[:, 0] + 0.5) * self.mask_side / self.side
        steps = torch.arange(self.mask_side) + 0.5
        near = ((steps[None] - at[:, :1]).abs() < 3)[:, None, :] & ((steps[None] - at[:, 1:]).abs() < 3)[:, :, None]
        logits = torch.where(near, 4.0, -4.0)[:, None]
        return Decoded(logits, torch.full((len(points), 1), 0.9))

    def to(self, *args):
        return self


class Stretched(Discs):
    """Sees an image as a square, as SAM 2 does."""

    def fitted(self, height, width):
        return self.side, self.side


@pytest.mark.parametrize("segmenter", [Discs, Stretched])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (90, 40), (31, 77), (200, 210)])
def test_a_patch_goes_to_its_place_at_any_size(height, width, segmenter):
    cell = (4, 6)
    found = VLSAM(OnePatch(["dog"], [[cell]]), segmenter(), crops=False, refine="off").detect(
        torch.zeros(3, height, width).byte()
    )
    assert found.names == ["dog"] and found.masks.shape == (1, height, width)
    left, top, right, bottom = found.boxes[0].tolist()
    x, y = (cell[1] + 0.5) / 8 * width, (cell[0] + 0.5) / 6 * height
    near = 0.07 * max(height, width)
    assert abs((left + right) / 2 - x) < near and abs((top + bottom) / 2 - y) < near


def test_erasing_finds_the_second_of_a_name_and_off_does_not():
    words, cells, picture = ["cat"], [[(4, 1), (4, 6)]], torch.zeros(3, 60, 80).byte()
    both = VLSAM(OnePatch(words, cells), Discs(), crops=False).detect(picture)
    assert both.names == ["cat", "cat"]
    assert len(VLSAM(OnePatch(words, cells), Discs(), crops=False, refine="off").detect(picture).names) == 1
    kept = VLSAM(OnePatch(words, cells), Discs(), crops=False, refine="keep").detect(picture)
    assert len(kept.names) == 1


def test_quarters_are_mapped_back_and_each_view_is_encoded_once():
    segmenter, captioner = Discs(), OnePatch(["dog"], [[(0, 0)]])
    system = VLSAM(captioner, segmenter, questions=("What is there?", "What else?"))
    found = system.detect(torch.zeros(3, 61, 83).byte())
    assert segmenter.encoded == 1 and captioner.asked == 2 and found.notes["views"] == 5
    corners = found.boxes[:, :2].round().tolist()
    for x, y in ((0, 0), (41, 0), (0, 30), (41, 30)):
        assert any(abs(x - a) < 6 and abs(y - b) < 6 for a, b in corners), (x, y, corners)
    # Asking the same twice adds nothing.
    once = VLSAM(OnePatch(["dog"], [[(0, 0)]]), Discs()).detect(torch.zeros(3, 61, 83).byte())
    assert torch.equal(once.boxes, found.boxes)


def test_flat_maps_are_noted_and_no_mask_is_made_up():
    everywhere = [(y, x) for y in range(6) for x in range(8)]
    found = VLSAM(OnePatch(["ghost"], [everywhere]), Discs(), crops=False, flat=0.9).detect(torch.zeros(3, 9, 9).byte())
    assert found.names == [] and found.boxes.shape == (0, 4) and found.masks.shape == (0, 9, 9)


def test_an_answer_without_a_list_finds_nothing():
    found = VLSAM(OnePatch(["sorry"], [[(0, 0)]]), Discs()).detect(torch.zeros(3, 20, 20).byte())
    assert found.names == [] and not found.scores.numel()


def test_views_cover_the_image_and_a_line_of_pixels_has_one():
    picture = torch.arange(3 * 7 * 11).reshape(3, 7, 11).to(torch.uint8)
    quarters = views_of(picture)[1:]
    again = torch.zeros_like(picture)
    for view in quarters:
        tall, wide = view.pixels.shape[1:]
        again[:, view.top : view.top + tall, view.left : view.left + wide] = view.pixels
    assert torch.equal(again, picture)
    assert len(views_of(picture[:, :1])) == 1


def test_nothing_learns_and_nothing_changes(system, image):
    models = (system.captioner.model, system.segmenter.model)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    first, again = system.detect(image), system.detect(image)
    assert first.names == again.names and torch.equal(first.boxes, again.boxes)
    assert not list(system.parameters()) and not system.state_dict()
    for model, state in zip(models, before):
        assert not any(p.requires_grad for p in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_attention_of_the_chat_is_causal_and_sums_to_one(system, image):
    told = system.captioner.tell([image], system.question)[0]
    assert int(told.images.sum()) == told.grid[0] * told.grid[1] == 64
    for number in range(told.depth):
        layer = told.layer(number)
        torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer.sum(-1)))
        assert not layer.triu(1).any()
    names = parse_names(told.text, numerals=True)
    assert names and told.text[names[0].start : names[0].end]


def test_draws_are_seeded(image):
    answers = [
        vl_sam_scenes(temperature=1.0, top_p=0.9, seed=seed).detect(image).notes["answers"] for seed in (0, 0, 1, 2)
    ]
    assert answers[0] == answers[1] and len({str(each) for each in answers}) > 1


def test_maps_of_words_alone_and_a_word_that_was_not_said(system, image):
    maps = system.attention_maps(image)
    assert maps and all(heat.shape == (64, 64) and heat.min() >= 0 and heat.max() <= 1 for heat in maps.values())
    with pytest.raises(UserError, match="the answer has no 'zebra'"):
        system.attention_maps(image, ["zebra"])
    with pytest.raises(UserError, match="first_layer=9: the model has 3 layers"):
        system.attention_maps(image, first=9)


def test_every_option_of_the_flow_gives_a_map(system, image):
    for options in (
        {"form": "figure"}, {"form": "rollout"}, {"place": "final"}, {"place": "accumulated"}, {"place": "none"},
        {"weighted": False}, {"keys": "visual"}, {"norm": "max"}, {"first": 1}, {"row": "emit"}, {"naive": True},
        {"length": "layers"},
    ):  # fmt: skip
        assert all(heat.isfinite().all() for heat in system.attention_maps(image, **options).values()), options


def test_sampling_reads_cells_at_their_middles():
    maps = torch.arange(6.0).reshape(1, 2, 3)
    found = sampled(maps, (0.0, 0.0, 3.0, 2.0), 2, 3)
    torch.testing.assert_close(found, maps)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_attention_of_transformers_models_is_read_with_its_grid(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 60}  # fmt: skip
    if family == "llava":
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "image_size": 12, "patch_size": 4, "model_type": "clip_vision_model"}  # fmt: skip
        config = transformers.LlavaConfig(
            vision_config=vision, text_config={**text, "model_type": "llama"}, image_token_index=50,
            vision_feature_select_strategy="default",
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = transformers.LlavaForConditionalGeneration(config)
        inputs = {"pixel_values": torch.randn(1, 3, 12, 12)}
        ids, grid = [1, *[50] * 9, 5, 6], (3, 3)
    else:
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 2,
                  "temporal_patch_size": 1, "in_channels": 3, "spatial_merge_size": 2}  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "default"}
        config = transformers.Qwen2VLConfig(
            vision_config=vision, text_config={**text, "rope_parameters": {**rope, "rope_theta": 1e4}},
            image_token_id=50, vision_start_token_id=51, vision_end_token_id=52,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = transformers.Qwen2VLForConditionalGeneration(config)
        inputs = {"pixel_values": torch.randn(24, 12), "image_grid_thw": torch.tensor([[1, 4, 6]])}
        ids, grid = [1, 51, *[50] * 6, 52, 5, 6], (2, 3)
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 50).int()

    class Processor:
        tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(f"w{k}" for k in ids))

        def apply_chat_template(self, said, **more):
            return said[0]["content"][1]["text"]

        def __call__(self, **given):
            return SimpleNamespace(to=lambda device: inputs)

    captioner = HuggingFaceCaptioner(model, Processor(), answer=4)
    told = captioner.tell([torch.zeros(3, 12, 12).byte()], "what?")[0]
    assert told.grid == grid and int(told.images.sum()) == grid[0] * grid[1] and told.depth == 2
    layer = told.layer(1)
    assert layer.shape == (4, len(told.images), len(told.images)) and not layer.triu(1).any()
    torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer.sum(-1)))
    assert captioner.notes["heads of keys"] == 2
    told = captioner.tell([torch.zeros(3, 12, 12).byte()], "what?")[0]
    whole = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    again = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if family == "qwen2_vl":
        again["mm_token_type_ids"] = (whole == 50).int()
    for number, expected in enumerate(model(**again, output_attentions=True).attentions):
        torch.testing.assert_close(told.layer(number), expected[0])
    heat = Flow().maps(told, parse_names("w1") or [])
    assert heat.shape[1:] == grid


def test_predict_and_inspect_write_what_they_say(tmp_path, image):
    from PIL import Image

    file = tmp_path / "scene.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    text = provenn.predict("vl_sam", [file], output=tmp_path / "found.json", overrides={"overlay": True, "crops": True})
    assert "scene.png:" in text and (tmp_path / "found.png").exists() and (tmp_path / "found.json").exists()
    inspected = provenn.inspect("vl_sam", file)
    assert any(name.endswith("regularised flow") for name in inspected.layers)
    inspected.save(tmp_path / "maps.png")
    with pytest.raises(UserError, match="no such folder"):
        provenn.predict("vl_sam", [file], overrides={"vlm": str(tmp_path / "none")})


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="questions must be from 1 to 10, got 0"):
        vl_sam_scenes(questions=0)
    with pytest.raises(ValueError, match="threshold must lie"):
        VLSAM(OnePatch(["a"], [[(0, 0)]]), Discs(), threshold=0)
    assert isinstance(vl_sam_scenes().segmenter, SamSegmenter)


def test_the_tiny_lister_names_what_is_in_scenes_that_it_never_saw():
    said, model = about("tiny-lister"), pretrained("tiny-lister")
    data = listing_data(0, smoke=False, rare=True)
    metrics = get_task("multimodal-chat").evaluate(model, data.test)
    for name, stated in said["metrics"].items():
        assert metrics[name] == pytest.approx(stated, abs=0.02), name
    data.test.pictures = data.test.pictures.roll(1, 0)  # the lists of other scenes
    assert get_task("multimodal-chat").evaluate(model, data.test)["perplexity"] > 1.5 * metrics["perplexity"]
