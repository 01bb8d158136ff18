"""The promptable segmenter: equal to transformers' SAM, its prompts, its loss, and what it refuses."""

import json

import pytest
import torch

from provenn.core.errors import UserError
from provenn.nn.promptable import (
    TINY,
    VIT_B,
    VIT_H,
    VIT_L,
    PromptableConfig,
    PromptableSegmenter,
    boxes_of,
    draw_prompts,
    load_segmenter,
    prompt_loss,
)

SMALL = {
    "vision_config": {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 80,
        "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_dim": 48,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 80, "patch_size": 8, "mask_input_channels": 8},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 16},
}  # fmt: skip


@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.SamModel(transformers.SamConfig(**SMALL)).double().eval()
    for parameter in model.parameters():  # relative positions start at 0
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_scores_and_gradients_are_those_of_transformers(theirs, double, tmp_path, boxed, masked):
    theirs.save_pretrained(tmp_path)
    ours = load_segmenter(tmp_path)
    torch.manual_seed(1)
    images, points = torch.randn(1, 3, 80, 80), torch.rand(3, 2, 2) * 80
    labels = torch.tensor([[1, 0], [1, 1], [0, -1]])
    boxes = torch.sort(torch.rand(3, 2, 2) * 80, dim=1).values.flatten(1) if boxed else None
    masks = torch.randn(1, 1, 40, 40) if masked else None
    expected = theirs(
        pixel_values=images, input_points=points[None], input_labels=labels[None],
        input_boxes=None if boxes is None else boxes[None], input_masks=masks,
    )  # fmt: skip
    given = None if masks is None else masks.expand(3, -1, -1, -1)
    decoded = ours.decode(ours.encode(images), points=points, labels=labels, boxes=boxes, masks=given)
    torch.testing.assert_close(decoded.logits, expected.pred_masks[0])
    torch.testing.assert_close(decoded.scores, expected.iou_scores[0])
    (expected.pred_masks.sin().sum() + expected.iou_scores.sum()).backward()
    (decoded.logits.sin().sum() + decoded.scores.sum()).backward()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, msg=name)


@pytest.mark.parametrize(("config", "count"), [(VIT_B, 93_735_728), (VIT_L, 312_343_088), (VIT_H, 641_090_864)])
def test_the_three_sizes_have_as_many_parameters_as_the_released_ones(config, count):
    with torch.device("meta"):
        model = PromptableSegmenter(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.mask_decoder.parameters()) == 4_058_340


def test_prompts_of_one_image_are_decoded_as_each_alone():
    torch.manual_seed(0)
    model = PromptableSegmenter(TINY).eval()
    seen = model.encode(torch.randn(1, 3, 64, 64))
    points, labels = torch.rand(4, 2, 2) * 64, torch.tensor([[1, 0], [1, -1], [0, 1], [1, 1]])
    together = model.decode(seen, points=points, labels=labels).logits
    alone = torch.cat([model.decode(seen, points=points[k : k + 1], labels=labels[k : k + 1]).logits for k in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    # What is no point may lie anywhere.
    moved = points.clone()
    moved[1, 1] = 1.0
    assert torch.equal(model.decode(seen, points=moved, labels=labels).logits[1], together[1])


def test_the_best_mask_is_that_of_the_highest_score():
    model = PromptableSegmenter(TINY).eval()
    decoded = model.decode(model.encode(torch.randn(1, 3, 64, 64)), boxes=torch.tensor([[3.0, 4.0, 30.0, 40.0]]))
    best = decoded.best()
    assert best.scores.item() == decoded.scores.max() and best.logits.shape == (1, 1, 64, 64)
    assert torch.equal(best.logits[0, 0], decoded.logits[0, decoded.scores.argmax()])


def test_prompts_are_drawn_inside_and_outside():
    masks = torch.zeros(20, 16, 24, dtype=torch.bool)
    masks[:, 3:9, 5:20] = True
    points, labels = draw_prompts(masks, generator=torch.Generator().manual_seed(0))
    x, y = points.long().unbind(-1)
    inside = masks[torch.arange(20)[:, None], y, x]
    assert inside[:, 0].all() and not inside[:, 1].any()
    assert (labels[:, 0] == 1).all() and set(labels[:, 1].tolist()) == {0, -1}


def test_boxes_hold_their_masks_and_no_more():
    masks = torch.zeros(2, 6, 9, dtype=torch.bool)
    masks[0, 2:4, 1:8] = True
    assert boxes_of(masks).tolist() == [[1, 2, 8, 4], [0, 0, 0, 0]]
    assert boxes_of(masks[:0]).shape == (0, 4)


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model = PromptableSegmenter(TINY)
    masks = torch.zeros(4, 64, 64, dtype=torch.bool)
    for k, mask in enumerate(masks):
        mask[8 * k : 8 * k + 20, 10:40] = True
    images = masks[:, None].float().expand(-1, 3, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = prompt_loss(model, images, masks, generator=torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_rel_pos": False}, "use_rel_pos=False"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"patch_size": 7}, "patch must divide image"),
    ],
)
def test_a_config_that_is_not_built_is_refused(tmp_path, change, words):
    values = {"model_type": "sam", **SMALL, "vision_config": {**SMALL["vision_config"], **change}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=words):
        load_segmenter(tmp_path)


def test_prompts_that_do_not_fit_are_refused():
    model = PromptableSegmenter(TINY)
    with pytest.raises(UserError, match="64×64 pixels, got 65×64"):
        model.encode(torch.zeros(1, 3, 64, 65))
    seen = model.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="a prompt is needed"):
        model.decode(seen)
    with pytest.raises(UserError, match="a prompt is needed"):
        model.decode(seen, points=torch.zeros(1, 1, 2))
    with pytest.raises(UserError, match="as many of each kind"):
        model.decode(seen.expand(3, -1, -1, -1), boxes=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="patch must divide image"):
        PromptableSegmenter(PromptableConfig(image=100))
    with pytest.raises(ValueError, match="decoder_heads must divide"):
        PromptableSegmenter(PromptableConfig(decoder_heads=3))
