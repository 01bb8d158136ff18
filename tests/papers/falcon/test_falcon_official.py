"""The authors' checkpoints: the whole model's logits and gradients, parts that a stage trained, folders, refusals."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import provenn
from provenn.core.errors import UserError
from provenn.nn.towers import VisionConfig
from provenn.papers.falcon import RegisterViT, falcon_8b, load_stage, markers_of
from provenn.papers.falcon.crops import MEAN, STD
from provenn.papers.falcon.official import convert, mark_crops, read_folder, rename
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD
from provenn.testing import seeded_state
from provenn.testing.golden import assert_values
from provenn.testing.seeded import seeded_array

HERE = Path(__file__).parent
CHAT = json.loads((HERE / "chat.json").read_text())
WHOLE = next(c for c in json.loads((HERE / "golden.json").read_text())["cases"] if c["preset"] == "falcon_8b")
OPTIONS = {"tower_heads": 2, "heads": 4, "rope_factor": 1.0, "standardised": "clip"}

STATISTICS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "clip": (MEAN, STD)}


def state() -> dict[str, torch.Tensor]:
    return seeded_state({name: tuple(shape) for name, shape in WHOLE["shapes"].items()}, CHAT["seed"])


def model(**options):
    preset, found, weights = convert(state(), **OPTIONS)
    assert preset == "falcon_8b"
    made = falcon_8b(**{**found, **OPTIONS, **options})
    made.load_state_dict(weights)
    return made.eval()


def image(shape: list[int], name: str) -> torch.Tensor:
    return torch.from_numpy(seeded_array(shape, name, CHAT["seed"]).astype(np.float32))


def test_two_images_in_two_texts_give_the_authors_logits_loss_and_gradients():
    """Of two and of one crop, their text between; in their code a placeholder stands for all registers of a crop."""
    whole = model().model
    first = image([1, 3, 192, 96], "first").requires_grad_()
    crops, grids = whole.vision.cut([first[0], image([1, 3, 96, 96], "second")[0]])
    assert grids == [(2, 1), (1, 1)]
    rows = [[token for one in row for token in ([one] * (5 if one == -200 else 1))] for row in CHAT["rows"]]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    logits = whole(tokens, crops, grids=torch.tensor([[1, *grid] for grid in grids]), mask=mask)
    for row, golden, length in zip(logits, CHAT["logits"], map(len, rows)):
        assert_values(row[:length], golden)
    targets = tokens.masked_fill(~mask | (tokens == -200), -100)[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(CHAT["loss"], rel=1e-5)
    loss.backward()
    assert_values(first.grad, CHAT["image_gradient"], what="the image's gradient")
    ours = rename({name: name for name in CHAT["gradients"]}, "vision.vit.")
    parameters = dict(whole.named_parameters())
    for name, theirs in ours.items():
        assert_values(parameters[name].grad, CHAT["gradients"][theirs], what=theirs)


def test_pictures_of_the_tasks_reach_the_encoder_by_its_own_statistics():
    """One standardised by ImageNet's gives what the same gives by CLIP's, whole or among others of other sizes."""
    pixels = [torch.rand(3, 70 + 40 * k, 90) for k in range(2)]
    by = {name: [(x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] for x in pixels]
          for name, (mean, std) in STATISTICS.items()}  # fmt: skip
    given, own = (model(standardised=name) for name in ("imagenet", "clip"))
    for name, images in (("one", lambda x: x[0][None]), ("several", tuple)):
        ours, sizes = given.model.features(images(by["imagenet"]))
        theirs, expected = own.model.features(images(by["clip"]))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert sizes == expected
    one = given.model.vision(by["imagenet"][0][None])
    torch.testing.assert_close(one, own.model.vision(by["clip"][0][None]), rtol=1e-4, atol=1e-4)
    crops, grids = own.model.vision.cut(by["clip"])
    grids = torch.tensor([[1, *grid] for grid in grids])
    assert torch.equal(given.model.features(crops, grids)[0], own.model.features(crops, grids)[0])  # as they come
    assert inspect.signature(falcon_8b).parameters["standardised"].default == "imagenet"
    with pytest.raises(ValueError, match="standardised must be one of imagenet, clip, got 'siglip'"):
        model(standardised="siglip")


def test_sizes_follow_from_the_shapes():
    _, found, weights = convert(state(), **OPTIONS)
    assert {name: found[name] for name in ("registers", "limit", "tower_dim", "tower_depth", "side", "patch")} == {
        "registers": 5, "limit": 16, "tower_dim": 24, "tower_depth": 2, "side": 96, "patch": 4,
    }  # fmt: skip
    assert (found["vocab_size"], found["dim"], found["layers"], found["kv_heads"]) == (50, 32, 2, 2)
    assert not any("head.probe" in name for name in weights)


def test_the_folder_that_the_trainer_writes_is_read(tmp_path):
    config = {"model_type": "jiutian", "num_attention_heads": 4, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(state())
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, some in shards.items():
        torch.save({name: state()[name] for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    read = read_folder(tmp_path, tower_heads=2, standardised="clip")
    tokens = torch.tensor([[1, -200, 3]])
    picture = image([1, 3, 96, 192], "first")
    assert torch.equal(read(tokens, picture), model()(tokens, picture))
    mark_crops(read, lambda text: [len(text)])
    assert set(markers_of((4, 4))) <= set(read.model.markers) and read.model.markers["<global_img>"] == [12]
    assert not torch.allclose(read(tokens, picture), model()(tokens, picture))
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="is not there: bring all files"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(UserError, match="type 'llava'; supported here: jiutian"):
        read_folder(tmp_path)


def test_a_folder_of_the_authors_answers_from_the_command_line(tmp_path, monkeypatch):
    """In the pieces of its tokenizer, each crop's own text before its registers, of a picture at its own size."""
    tokenizers = pytest.importorskip("tokenizers")
    marks, letters = ["<|im_start|>", "<|im_end|>"], "aeilmnorstuwy_<>0123crpgbhd?\nxk "
    vocab = {piece: number for number, piece in enumerate([*marks, *dict.fromkeys(letters)])}
    assert len(vocab) <= 50
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens(marks)
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"model_type": "jiutian", "num_attention_heads": 4, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state(), tmp_path / "pytorch_model.bin")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "it.png")
    asked = [str(tmp_path / "it.png"), "what is it?"]
    given = {"tower_heads": 2, "tokenizer": str(tmp_path), "markers": str(tmp_path), "answer": 4}
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("provenn.tasks.multimodal_chat.write", lambda *read, **_: seen.append(read) or ["yes"])
        assert provenn.predict("falcon", asked, weights=tmp_path, overrides=given) == "yes"
    ((loaded, _, (prompt,), ((picture,),), count),) = seen
    texts = "<|im_start|>user\n", " what is it?<|im_end|>\n<|im_start|>assistant\n"
    before, after = (inner.encode(text).ids for text in texts)
    assert prompt == [*before, -200, *after] and count == 4
    whole = model(standardised="clip")
    mark_crops(whole, lambda text: inner.encode(text, add_special_tokens=False).ids)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    tokens = torch.tensor([prompt])
    expected = whole(tokens, image[None])
    torch.testing.assert_close(loaded(tokens, picture[None]), expected, rtol=1e-3, atol=1e-3)
    whole.model.markers = None
    assert (whole(tokens, image[None]) - expected).abs().max() > 0.01, "the texts of crops count"
    with pytest.raises(UserError, match=r"markers must be a tokenizer\.json or a folder that holds one, got 'gone'"):
        provenn.predict("falcon", asked, weights=tmp_path, overrides={**given, "markers": "gone"})
    with pytest.raises(UserError, match="these weights bring no tokenizer"):
        provenn.predict("falcon", asked, weights=tmp_path, overrides={"tower_heads": 2})


def test_early_stages_have_no_reatten_and_the_last_starts_from_a_copy():
    early = {name: value for name, value in state().items() if "interact_attn" not in name}
    _, found, _ = convert(early, **OPTIONS)
    assert not found["interact"]
    whole = falcon_8b(**{**found, **OPTIONS, "interact": True})
    assert load_stage(whole, early) == []
    vit = whole.model.vision.vit
    for layer, block in zip(vit.interact, vit.blocks):
        assert torch.equal(layer.attention.q_proj.weight, block.self_attn.q_proj.weight)
    assert torch.equal(
        vit.blocks[0].self_attn.q_proj.weight,
        early[next(n for n in early if "0.self_attn.q_proj.weight" in n and "vision" in n)],
    )


def test_what_a_stage_trained_goes_into_a_model():
    """The first stage trains registers, crop tables and projector alone."""
    trained = {
        name: value
        for name, value in state().items()
        if "vision_queries" in name or "crop_embedding" in name or "vision2text" in name
    }
    _, found, _ = convert(state(), **OPTIONS)
    whole = falcon_8b(**{**found, **OPTIONS})
    left = load_stage(whole, trained)
    assert torch.equal(whole.model.vision.vit.registers.registers, state()["model.vision_model.vision_queries"])
    assert torch.equal(whole.model.projector.linear2.weight, state()["model.vision2text.2.weight"])
    assert "decoder.embed.weight" in left and not any("registers" in name or "interact" in name for name in left)
    vision = {
        name.removeprefix("model.vision_model."): value for name, value in trained.items() if "vision_model" in name
    }
    vit = RegisterViT(VisionConfig("siglip", 24, 2, 2, hidden=48, image=96, patch=4), registers=5)
    load_stage(vit, vision)
    assert torch.equal(vit.registers.rows.weight, vision["crop_embedding_h.weight"])


def test_other_files_are_refused_in_words():
    _, found, _ = convert(state(), **OPTIONS)
    cases = [
        (lambda: convert({"conv.weight": torch.zeros(2, 2)}), "conv.weight is no parameter of FALCON"),
        (lambda: convert({"model.vision_model.vision_queries": torch.zeros(1, 5, 24)}), "goes into a model"),
        (lambda: convert(state()), "24 channels are no heads of 64: give their number, tower_heads="),
        (lambda: convert(state(), tower_heads=2), "32 channels are no heads of 128: give their number, heads="),
        (lambda: convert({n: v for n, v in state().items() if "lm_head" not in n}, **OPTIONS), "bring all shards"),
        (lambda: load_stage(falcon_8b(**{**found, "registers": 4, **OPTIONS}), state()), "does not fit a model"),
        (lambda: load_stage(torch.nn.Linear(2, 2), {}), "has no RegisterViT inside"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
