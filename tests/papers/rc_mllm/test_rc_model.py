"""RC-Qwen2-VL: counts, M-RoPE's worked example, logits equal to transformers', caches; and the small model's start."""

import pytest
import torch

from provenn import from_official
from provenn.core.box_text import smart_resize
from provenn.core.errors import UserError
from provenn.nn.shipped import pretrained
from provenn.nn.vision_language import image_positions
from provenn.papers.rc_mllm import cut_patches, rc_mllm_small, rc_qwen2_vl_2b, rc_qwen2_vl_7b
from provenn.papers.rc_mllm.inspection import inspect
from provenn.papers.rc_mllm.layers import patch_places
from provenn.papers.rc_mllm.model import BACK
from provenn.papers.rc_mllm.official import convert

TINY = {
    "vocab_size": 60, "dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 48, "sections": (2, 3, 3),
    "image_token": 50, "vision_dim": 16, "vision_layers": 2, "vision_heads": 2, "vision_hidden": 32, "patch": 4,
    "min_pixels": 64, "max_pixels": 64 * 64,
}  # fmt: skip


def tiny(**options):
    torch.manual_seed(0)
    return rc_qwen2_vl_2b(**{**TINY, **options}).eval()


@pytest.mark.parametrize(
    ("build", "whole", "vision"),
    [(rc_qwen2_vl_2b, 2_208_985_600, 665_271_296), (rc_qwen2_vl_7b, 8_291_375_616, 675_759_104)],
)
def test_sizes_are_those_of_qwen2_vl(build, whole, vision):
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == whole
    assert sum(p.numel() for part in (model.model.vision, model.model.projector) for p in part.parameters()) == vision


def test_the_worked_example_of_m_rope():
    """Three words, a picture of 2×3 tokens, two words."""
    images = torch.tensor([[False] * 3 + [True] * 6 + [False] * 2])
    time, rows, columns = image_positions(images, torch.tensor([[1, 2, 3]]))[:, 0].tolist()
    assert time == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7]
    assert rows == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7]
    assert columns == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]


def test_pictures_are_cut_at_the_size_of_the_rule():
    patches, grids = cut_patches([torch.randn(3, 70, 100), torch.randn(3, 56, 56)])
    seen = smart_resize(100, 70)
    assert grids.tolist() == [[1, seen.height // 14, seen.width // 14], [1, 4, 4]]
    assert patches.shape == (int(grids.prod(1).sum()), 3 * 2 * 14 * 14)
    picture = torch.arange(8 * 8.0).reshape(1, 8, 8)
    patches, _ = cut_patches([picture], 2, min_pixels=1)
    corner = patches.reshape(-1, 2, 2, 2)[:, 0, 0, 0]  # the upper left pixel of each patch
    rows, columns = (corner // 16).int(), (corner % 8 // 2).int()
    assert torch.stack([rows, columns], 1).tolist() == patch_places([1, 4, 4]).tolist()


def theirs():
    """A tiny Qwen2-VL of transformers, whose configuration is that of `tiny`."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_parameters": rope,
            "tie_word_embeddings": True, "max_position_embeddings": 32_768,
        },
        vision_config={
            "embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=50, vision_start_token_id=51, vision_end_token_id=52, video_token_id=53,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # large enough that attention tells places apart
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model


def test_logits_and_gradients_are_those_of_transformers():
    model = theirs()
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    name, options, ours = convert(state, heads=2, vision_heads=2, sections=(2, 3, 3), image_token=50)
    assert name == "rc_qwen2_vl_2b" and (options["vision_dim"], options["kv_heads"]) == (16, 1)
    system = rc_qwen2_vl_2b(**options, min_pixels=64, max_pixels=64 * 64).eval()
    system.load_state_dict(ours)
    system.requires_grad_(True)
    pictures = torch.randn(2, 3, 16, 24)
    patches, grids = cut_patches(list(pictures), 4, min_pixels=64)
    count = int(grids[0].prod()) // 4
    words = [[1, 2, 51, *[50] * count, 52, 3, 4], [7, 51, *[50] * count, 52, 8, 9, 5]]
    tokens = torch.tensor(words)
    types = (tokens == 50).int()
    expected = model(tokens, pixel_values=patches, image_grid_thw=grids, mm_token_type_ids=types).logits
    got = system.model(tokens, patches, grids=grids)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    by = torch.randn(expected.shape)
    for logits in (expected, got):
        (logits * by).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if name != "lm_head.weight"}
    _, _, wanted = convert(wanted, heads=2, vision_heads=2, sections=(2, 3, 3), image_token=50)
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-3 * wanted[name].abs().max()), name
    # With one placeholder a picture, which is how conversations have it.
    short = torch.tensor([[1, 2, 51, 50, 52, 3, 4], [7, 51, 50, 52, 8, 9, 5]])
    assert torch.allclose(system(short, pictures)[:, -2:], expected[:, -2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_says_all_sizes_itself(tmp_path, tied):
    model = theirs()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 32))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    system = from_official("rc_mllm", tmp_path)
    assert (system.model.decoder.head is None) == tied
    tokens = torch.tensor([[1, 2, 3, 4]])
    expected = model(tokens).logits
    assert torch.allclose(system(tokens), expected, rtol=1e-4, atol=1e-4)
    # A state dict of torch holds a tied head twice.
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again = from_official("rc_mllm", tmp_path / "pytorch_model.bin")
    assert (again.model.decoder.head is None) == tied
    assert torch.equal(again(tokens), system(tokens))


@torch.no_grad()
def test_answers_with_a_cache_are_those_without_and_alone():
    system = tiny()
    tokens, mask = torch.tensor([[1, 50, 3, 4], [50, 7, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    pictures = torch.randn(2, 3, 16, 24)
    steps = torch.stack(list(system.generate(tokens, 4, pictures, mask=mask, temperature=0.0)), 1)
    for row, length in enumerate((4, 2)):
        text = tokens[row : row + 1, :length]
        for k in range(4):
            likeliest = system(text, pictures[row : row + 1])[0, -1].argmax()
            assert likeliest == steps[row, k]
            text = torch.cat([text, likeliest.view(1, 1)], 1)


@torch.no_grad()
def test_no_token_looks_ahead_and_an_empty_context_is_refused():
    system, pictures = tiny(), torch.randn(1, 3, 16, 24)
    tokens = torch.tensor([[1, 50, 3, 4, 5]])
    changed = tokens.clone()
    changed[0, -1] = 9
    assert torch.allclose(system(tokens, pictures)[:, :-1], system(changed, pictures)[:, :-1], atol=1e-6)
    with pytest.raises(UserError, match="there is no image"):
        system(tokens)
    long = tiny(max_length=5)
    with pytest.raises(UserError, match="more than the model's 5"):
        long(tokens, pictures)


@pytest.mark.parametrize("wrong", [{"min_pixels": 0}, {"min_pixels": 99, "max_pixels": 9}, {"vision_heads": 3}])
def test_impossible_systems_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"min_pixels|heads"):
        tiny(**wrong)


def test_the_tower_stays_as_it_is_in_tuning_unless_told():
    assert not any(p.requires_grad for p in tiny().model.vision.parameters())
    assert all(p.requires_grad for p in tiny(frozen_vision=False).parameters())


def test_the_small_model_begins_with_the_tiny_ones_tower():
    source, model = pretrained("tiny-vlm"), rc_mllm_small(160, 5)
    for name, value in source.model.vision.state_dict().items():
        assert torch.equal(model.model.vision.state_dict()[name], value), name
    assert not any(p.requires_grad for p in model.model.vision.parameters())
    drawn = rc_mllm_small(160, 5, start="none")
    assert all(p.requires_grad for p in drawn.parameters())
    with pytest.raises(ValueError, match="start must be"):
        rc_mllm_small(160, 5, start="nothing")
    with pytest.raises(ValueError, match="reads 64 pixels"):
        rc_mllm_small(160, 5, image_size=32)


@torch.no_grad()
def test_the_small_model_starts_by_looking_back_and_at_its_like():
    torch.manual_seed(0)
    decoder = rc_mllm_small(160, 5).decoder
    tokens = torch.randint(10, 159, (1, 60))
    tokens[0, 50] = tokens[0, 20]
    reading = decoder.read(decoder.embed(tokens), layers=True)
    first = decoder.attention_weights(reading, 0, torch.tensor([50]))[0, :, 0]
    assert (50 - first.argmax(1)).tolist() == list(BACK) and first.amax(1).min() > 0.9
    at_like, elsewhere = [], []
    for place in range(40, 60):  # each looks at a like token 30 before it, the second layer among what the first added
        tokens[0, place] = tokens[0, place - 30]
        second = decoder.attention_weights(decoder.read(decoder.embed(tokens), layers=True), 1, torch.tensor([place]))
        row = second[0, :, 0].mean(0)
        at_like.append(row[place - 30])
        elsewhere.append((row[:place].sum() - row[place - 30]) / (place - 1))
    assert torch.stack(at_like).mean() > 1.5 * torch.stack(elsewhere).mean()
    assert all(p.requires_grad for p in decoder.parameters())


def test_a_picture_has_its_places_added_and_no_others():
    model = rc_mllm_small(160, 5).eval()
    projector = model.model.projector
    x = torch.randn(1, 64, 64)
    alike = x[:, :1].expand(-1, 64, -1)
    with torch.no_grad():
        told = projector(alike)
        torch.testing.assert_close(told - told[:, :1], projector.place[None] - projector.place[None, :1])
        assert 0.3 < projector.inner(projector.norm(x)).std() / projector.place.std() < 3
        assert projector(9 * x).std() < 1.2 * projector(x).std()  # a tower's scale is no matter
        with pytest.raises(UserError, match="a picture has 64 tokens here, got 16"):
            projector(x[:, :16])


def test_inspection_is_attention_to_the_picture():
    found = inspect(rc_mllm_small(160, 5).eval(), torch.randn(1, 3, 64, 64))
    assert list(found) == ["layer 1", "layer 2", "layer 3"]
    assert all(row.shape == (64,) and 0 < row.sum() < 1 and (row >= 0).all() for row in found.values())
    with pytest.raises(UserError, match="reads no pictures"):
        inspect(torch.nn.Linear(1, 1), torch.randn(1, 3, 8, 8))


def test_other_weights_are_refused_and_sizes_are_asked_for():
    with pytest.raises(UserError, match="expected a state dict of Qwen2-VL"):
        convert({"conv.weight": torch.zeros(1)})
    state = {name: value for name, value in theirs().state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match="say heads and vision_heads"):
        convert(state)
    rope = {"mrope_section": [2, 3, 3], "rope_theta": 7.0}
    text = {"num_attention_heads": 2, "rope_parameters": rope}
    config = {"text_config": text, "vision_config": {"num_heads": 2}, "image_token_id": 50}
    _, options, _ = convert(state, config)
    assert (options["heads"], options["vision_heads"], options["base"], options["image_token"]) == (2, 2, 7.0, 50)
