"""SAM 2 of transformers behind the same interface as SAM: what its own forward gives, prompt by prompt."""

import json

import pytest
import torch

from provenn.core.errors import UserError
from provenn.nn.shipped import FOLDER
from provenn.papers.vl_sam import Sam2Segmenter, SamSegmenter, open_segmenter, vl_sam_scenes

transformers = pytest.importorskip("transformers")
POINTS = torch.tensor([[[10.0, 20.0], [3.0, 4.0]], [[30.0, 40.0], [50.0, 1.0]]])
LABELS = torch.tensor([[1, 0], [1, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    backbone = {
        "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4], "model_type": "sam2_hiera_det_model",
    }  # fmt: skip
    config = transformers.Sam2Config(
        vision_config={
            "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "model_type": "sam2_vision_model",
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 48, "iou_head_hidden_dim": 32},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Sam2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("sam2")
    model.save_pretrained(path)
    return path


def test_sam_2_gives_what_its_own_forward_gives(folder):
    found = open_segmenter(folder)
    assert isinstance(found, Sam2Segmenter) and (found.side, found.mask_side) == (64, 16)
    images = [torch.randint(256, (3, 40, 56)).byte(), torch.randint(256, (3, 64, 64)).byte()]
    seen = found.encode(images)
    pixels = (images[1].float() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    decoded = found.decode(seen[1], points=POINTS, labels=LABELS)
    with torch.no_grad():
        for k in range(2):  # one prompt at a time
            asked = {"input_points": POINTS[None, k : k + 1], "input_labels": LABELS[None, k : k + 1]}
            own = found.model(pixels[None], **asked)
            torch.testing.assert_close(decoded.logits[k], own.pred_masks[0, 0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(decoded.scores[k], own.iou_scores[0, 0], rtol=1e-3, atol=1e-4)
            again = found.decode(seen[1], points=POINTS, labels=LABELS, masks=decoded.best().logits)
            own = found.model(pixels[None], **asked, input_masks=decoded.best().logits[k : k + 1])
            torch.testing.assert_close(again.logits[k], own.pred_masks[0, 0], rtol=1e-3, atol=1e-4)
    assert (again.logits - decoded.logits).abs().max() > 0.01, "the mask prompt is read"


def test_sam_2_reads_each_image_by_itself_and_takes_boxes(folder):
    found = open_segmenter(folder)
    images = [torch.randint(256, (3, 40, 56)).byte(), torch.randint(256, (3, 64, 64)).byte()]
    both, alone = found.encode(images), found.encode(images[:1])
    for one, other in zip(both[0], alone[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    boxes = found.decode(both[0], boxes=torch.tensor([[1.0, 2, 30, 40], [4, 4, 20, 20], [0, 0, 5, 5]]))
    assert boxes.logits.shape == (3, 3, 16, 16)


def test_a_system_with_sam_2_finds_in_the_pixels_of_the_picture(folder):
    system = vl_sam_scenes(segmenter=str(folder), flat=1.0)
    found = system.detect(torch.randint(256, (3, 50, 70)).byte())
    assert found.masks.shape[1:] == (50, 70) and len(found.names) == len(found.boxes)
    assert isinstance(open_segmenter(sam_folder(folder.parent)), SamSegmenter)


def sam_folder(at):
    """A SAM in the layout of transformers, of random weights."""
    config = transformers.SamConfig(
        vision_config={"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32,
                       "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    transformers.SamModel(config).save_pretrained(at / "sam")
    return at / "sam"


def test_other_folders_are_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        open_segmenter(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match="llava"):
        open_segmenter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam2"}))
    with pytest.raises(UserError, match="holds no SAM 2 that can be read"):
        open_segmenter(tmp_path)
    with pytest.raises(UserError, match="provenn-segmenter"):
        open_segmenter(FOLDER / "tiny-sam")
