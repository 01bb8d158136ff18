"""The system of Wings: presets, official weights, curves of attention, inspection, what its experiments stand on."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import provenn
from provenn.catalog import card
from provenn.core.errors import UserError
from provenn.papers.wings import Wings, studies, wings_llama3_1_8b, wings_qwen1_5_1_8b, wings_qwen1_5_7b, wings_small
from provenn.papers.wings import model as presets
from provenn.papers.wings.adapter import learner_parameters, wings_blocks
from provenn.papers.wings.inspection import inspect
from provenn.papers.wings.laws import Laws, attention_laws, shift_of
from provenn.papers.wings.official import convert
from provenn.papers.wings.rivals import add_low_rank, add_prefix, added_parameters
from provenn.papers.wings.studies import (
    CHARACTERS,
    IGNORED,
    IMAGE,
    MIXES,
    PATCHES,
    TASK,
    Chat,
    Variant,
    accuracy,
    completed,
    drift,
    encode,
    first_parameters,
    parameters_added,
    partial_correlation,
    prepared,
    rows,
    second_parameters,
    text_turn,
    with_replay,
)
from provenn.tasks import TaskData
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD
from provenn.tasks.multimodal_chat import fitted
from provenn.training import Recipe

SMALL = {"dim": 16, "layers": 2, "heads": 2, "image_size": 16}


def small(seed: int = 0, **options) -> Wings:
    torch.manual_seed(seed)
    return wings_small(12, 5, **{**SMALL, "rank": 2, "max_len": 64, **options}).eval()


@pytest.mark.parametrize(
    ("build", "whole", "added", "projector"),
    [
        (wings_qwen1_5_7b, 8_275_056_224, 134_479_936, 21_504_000),
        (wings_qwen1_5_1_8b, 2_291_662_416, 50_528_304, 6_557_696),
        (wings_llama3_1_8b, 8_583_992_928, 134_479_936, 21_504_000),
    ],
)
def test_sizes_are_those_of_the_authors_code(build, whole, added, projector):
    with torch.device("meta"):
        system = build()
    tower = sum(p.numel() for p in system.model.vision.parameters())
    assert sum(p.numel() for p in system.parameters()) == whole and tower == 397_747_744
    assert sum(p.numel() for p in learner_parameters(system).values()) == added
    assert sum(p.numel() for p in system.model.projector.parameters()) == projector


def test_gradients_reach_all_that_learns_where_there_is_an_image():
    system = small().train()
    for parameter in learner_parameters(system).values():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.tensor([[1, 6, 5, 7, 8, 2], [1, 6, 9, 7, 8, 2]])
    system(tokens, torch.randn(1, 3, 16, 16)).square().mean().backward()
    missed = {
        n
        for n, p in system.named_parameters()
        if (p.grad is None or not p.grad.any()) and not n.endswith("k_proj.bias")
    }
    # The patches are taken from before CLIP's last norm.
    assert all(".vision." in name and "post_layernorm" in name for name in missed), missed


def test_stages_of_a_system_train_what_they_name_and_the_projector_faster():
    first = {n for n, p in small(stage=1).named_parameters() if p.requires_grad}
    assert first and all(".projector." in name or ".visual." in name for name in first)
    second = small(stage=2)
    frozen = {n for n, p in second.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in second.named_parameters() if ".vision." in n}
    groups = second.optimizers(Recipe(epochs=1, lr=0.1, decay_vectors=False, weight_decay=0.5)).param_groups
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    named = {n: rates[id(p)] for n, p in second.named_parameters() if p.requires_grad}
    assert {round(r, 6) for n, r in named.items() if ".projector." in n} == {0.5}
    assert {round(r, 6) for n, r in named.items() if ".projector." not in n} == {0.1}
    whole = small(stage=0)
    assert all(p.requires_grad for p in whole.parameters())
    assert {g["lr"] for g in whole.optimizers(Recipe(epochs=1, lr=0.1)).param_groups} == {0.1}


def test_pictures_of_the_tasks_reach_the_tower_as_siglip_reads_them():
    """From −1 to 1. What comes standardised by ImageNet's numbers is turned; the authors' own is taken as it is."""
    sizes = {
        "vocab_size": 20,
        "dim": 16,
        "layers": 1,
        "heads": 2,
        "hidden": 24,
        "vision_dim": 16,
        "vision_layers": 1,
        "vision_heads": 2,
        "vision_hidden": 24,
        "image_size": 16,
        "patch": 8,
        "rank": 2,
        "max_len": 16,
    }
    made = {}
    for name in ("imagenet", "siglip"):
        torch.manual_seed(0)
        made[name] = wings_qwen1_5_7b(**sizes, standardised=name)
    pixels, by = torch.rand(2, 3, 16, 16), {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "siglip": ([0.5] * 3, [0.5] * 3)}
    seen = []
    for name, (mean, std) in by.items():
        images = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        seen.append(made[name].model.vision(images))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    assert made["imagenet"].state_dict().keys() == made["siglip"].state_dict().keys()
    torch.manual_seed(0)
    torch.testing.assert_close(wings_qwen1_5_7b(**sizes).model.vision(images), made["imagenet"].model.vision(images))
    with pytest.raises(ValueError, match="standardised must be one of imagenet, siglip, got 'clip'"):
        wings_qwen1_5_7b(**sizes, standardised="clip")


@pytest.mark.parametrize("name", ["wings_qwen1_5_7b", "wings_qwen1_5_1_8b", "wings_llama3_1_8b"])
def test_the_user_s_pictures_are_read_as_large_as_the_tower_does(name):
    """A square of the tower's side by bands, whatever the picture's shape."""
    preset = next(preset for preset in card("wings").presets if preset.name == name)
    with torch.device("meta"):
        side = getattr(presets, name)().model.vision.tower.config.image
    shown = fitted(torch.zeros(3, 30, 90, dtype=torch.uint8), {"mean": [0.5] * 3, **preset.reads})
    assert tuple(shown.shape) == (3, side, side) and (shown[:, side // 2] == 0).all() and (shown[:, 0] == 128).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"stage": 3},
        {"stage": True},
        {"projector_rate": 0},
        {"rank": 0},
        {"learners": "textual", "stage": 1},
        {"system_length": -1},
    ],
)
def test_impossible_systems_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        small(**wrong)


def test_images_and_placeholders_that_do_not_fit_are_refused_in_words():
    system, tokens = small(), torch.tensor([[1, 6, 5, 7]])
    with pytest.raises(UserError, match="1 placeholders of images and there is no image"):
        system(tokens)
    with pytest.raises(UserError, match="too few"):
        system(tokens, torch.randn(2, 3, 16, 16))
    with pytest.raises(UserError, match="too many"):
        system(torch.tensor([[5, 5, 1]]), torch.randn(1, 3, 16, 16))


def test_a_text_alone_is_the_same_by_both_ways_and_beside_an_image():
    system = small()
    for parameter in learner_parameters(system).values():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.tensor([[1, 6, 9, 7, 8, 2], [1, 6, 5, 7, 8, 2]])
    alone = system(tokens[:1])
    mixed = system(tokens, torch.randn(1, 3, 16, 16), mask=torch.ones_like(tokens, dtype=torch.bool))
    assert torch.allclose(alone, mixed[:1], atol=1e-5)


# Official


def case(number: int) -> dict:
    return json.loads(Path(__file__).with_name("golden.json").read_text())["cases"][number]


def state(number: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in case(number)["shapes"].items()}


def test_sizes_come_from_shapes_and_config_and_the_rest_is_asked_for():
    config = {"num_attention_heads": 8, "rope_theta": 7.0, "max_position_embeddings": 99, "system_prompt_length": 3}
    name, options, _ = convert(state(), config)
    assert name == "wings_qwen1_5_7b"
    assert (options["heads"], options["base"], options["max_length"], options["system_length"]) == (8, 7.0, 99, 3)
    assert (options["layers"], options["dim"], options["rank"], options["image_size"]) == (3, 32, 4, 12)
    with pytest.raises(UserError, match="3 layers of width 32: say heads"):
        convert(state())
    name, options, _ = convert(state(2), heads=4)
    assert name == "wings_llama3_1_8b" and options["kv_heads"] == 2
    with pytest.raises(UserError, match="expected a state dict of a Wings model"):
        convert({"conv.weight": torch.zeros(1)})


def test_a_first_stage_is_recognised_by_its_missing_routers():
    _, options, ours = convert(state(4), heads=4)
    assert options["stage"] == 1 and not [name for name in ours if ".textual." in name]


def test_norms_and_stretched_positions_are_those_of_the_config():
    scaling = {
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    heads = {"num_attention_heads": 4}
    for config, eps, stretch in (
        ({"rms_norm_eps": 1e-3, "rope_scaling": scaling}, 1e-3, (2.0, 1.0, 3.0, 64)),
        ({"rope_scaling": None}, 1e-5, None),
        ({}, 1e-5, (8.0, 1.0, 4.0, 8192)),
    ):
        name, options, _ = convert(state(2), heads | config)
        decoder = getattr(presets, name)(vision_heads=2, **options).decoder
        assert decoder.norm.eps == decoder.blocks[0].norm1.eps == eps
        assert decoder.rotary.stretch == stretch
    with pytest.raises(UserError, match="rope_scaling of the type 'yarn'; what is read: llama3, default"):
        convert(state(2), heads | {"rope_scaling": {"type": "yarn"}})
    with pytest.raises(UserError, match="of the type llama3 without high_freq_factor"):
        convert(state(2), heads | {"rope_scaling": {k: v for k, v in scaling.items() if k != "high_freq_factor"}})


def test_a_head_that_is_tied_is_the_embedding():
    given = state(2)
    given.pop("lm_head.weight")
    embedding = given["model.embed_tokens.weight"] = torch.randn_like(given["model.embed_tokens.weight"])
    name, options, ours = convert(given, heads=4)
    system = getattr(presets, name)(vision_heads=2, **options)
    system.load_state_dict(ours)
    assert torch.equal(system.decoder.head.weight, embedding)


# Curves of attention


def test_shares_of_attention_sum_to_one_and_are_those_of_matrices():
    system = small()
    model = system.model
    tokens = torch.tensor([[1, 6, 5, 5, 5, 5, 7, 8], [1, 5, 5, 5, 5, 6, 7, 8]])
    images = torch.randn(2, 3, 16, 16)
    laws = attention_laws(model, tokens, images)
    assert torch.allclose(laws.before + laws.image + laws.after, torch.ones(2, 2), atol=1e-5)
    reading = model.read(tokens, images, layers=True)
    weights = model.decoder.attention_weights(reading, 1)[0].mean(dim=0)
    assert laws.before[1, 0].item() == pytest.approx(weights[:, :2].sum().item() / 8, rel=1e-5)
    assert laws.after[1, 0].item() == pytest.approx(weights[:, 6:].sum().item() / 8, rel=1e-5)
    with pytest.raises(UserError, match="text 2 has no image"):
        attention_laws(model, torch.tensor([[1, 5, 5, 5, 5], [1, 2, 3, 4, 6]]), images[:1])


def test_the_shift_is_one_less_pearsons_r_over_layers():
    before, after = torch.rand(8, 3), torch.rand(8, 3)
    r = torch.stack([torch.corrcoef(torch.stack([b, a]))[0, 1] for b, a in zip(before.T, after.T)])
    assert torch.allclose(shift_of(Laws(before, before, after)), 1 - r, atol=1e-5)
    assert shift_of(Laws(before, before, 2 * before + 1)).abs().max() < 1e-5


def test_inspection_shows_the_visual_weight_at_each_token():
    system = small()
    found = inspect(system, torch.randn(1, 3, 16, 16))
    assert list(found) == ["layer 1", "layer 2"] and all(row.shape == (7,) for row in found.values())
    assert all(((row > 0) & (row < 1)).all() for row in found.values())
    with pytest.raises(UserError, match="no router"):
        inspect(small(stage=1), torch.randn(1, 3, 16, 16))
    with pytest.raises(UserError, match="no learners"):
        inspect(torch.nn.Linear(1, 1), torch.randn(1, 3, 16, 16))


# What the experiments stand on


def test_turns_are_right_and_no_question_is_in_two_splits():
    import numpy as np

    draw, seen = np.random.default_rng(0), {"train": set(), "val": set(), "test": set()}
    for split, questions in seen.items():
        for _ in range(300):
            question, answer = text_turn(draw, split).rstrip(";").split("=")
            questions.add(question)
            if question[0] == "+":
                assert int(answer) == sum(map(int, question[1:].split(",")))
            elif question[0] == ">":
                assert answer == question[1:]
            else:
                assert answer == question[question.index(question[-1]) + 1]
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]


def test_targets_are_answers_and_their_ends_alone():
    tokens, targets = encode("img:*?=#;+34,5=39;", "7")
    assert tokens.count(IMAGE) == PATCHES and tokens[-3:] == [CHARACTERS.index(c) for c in "39;"]
    asked = [(CHARACTERS[tokens[k]], CHARACTERS[t]) for k, t in enumerate(targets) if t != IGNORED]
    assert asked == [("=", "7"), ("7", ";"), ("=", "3"), ("3", "9"), ("9", ";")]


def test_the_last_turn_is_scored_and_each_mix_by_itself():
    part = rows("TV", 4, "test", 0)
    answers = part.tensors[3]
    assert ((answers != IGNORED).sum(dim=1) == 2).all()  # a digit and its end; the first turn is not scored
    found = TASK.summary({"right": torch.tensor([1.0, 0, 1, 1]).numpy(), "mix": torch.tensor([0, 0, 1, 1]).numpy()})
    assert found == {"balanced accuracy": 0.75, "V": 0.5, "T": 1.0}
    data = TaskData("turns", part, part, part, "")
    assert 0 <= accuracy("TV", Chat(Variant("plain")).eval(), data) <= 1


def test_an_answer_is_right_where_all_of_it_is(monkeypatch):
    part = rows("T", 12, "test", 0)
    last = part.tensors[3]
    long = (last != IGNORED).sum(1) > 1
    assert long.any()

    def told(model, tokens, patches, *, wrong):
        aims = last.clamp_min(0)
        first = torch.zeros_like(last, dtype=torch.bool)
        first[torch.arange(len(last)), (last != IGNORED).int().argmax(1)] = True
        return torch.nn.functional.one_hot(torch.where(first & wrong, (aims + 1) % len(CHARACTERS), aims)).float()

    for wrong, share in ((False, 1.0), (True, 0.0)):
        monkeypatch.setattr(studies, "answer_logits", partial(told, wrong=wrong))
        assert TASK.summary(TASK.scores(torch.nn.Linear(1, 1), part))["T"] == share


def test_no_picture_of_the_test_is_tuned_on():
    seen = [
        {patches.numpy().tobytes() for patches in rows("V", 200, split, 0).tensors[2]} for split in ("train", "test")
    ]
    assert len(seen[1]) > 100 and not seen[0] & seen[1]


def test_rivals_start_as_the_decoder_and_have_as_many_parameters_as_wings():
    counts = {kind: parameters_added(Variant(kind)) for kind in ("wings", "lora", "prefix")}
    assert max(counts.values()) <= 1.03 * min(counts.values()), counts
    plain = Chat(Variant("plain")).eval()
    tokens = torch.randint(0, 30, (2, 9))
    weights = plain.decoder.state_dict()
    for kind in ("wings", "lora"):
        model = prepared(Variant(kind), weights).eval()
        assert torch.allclose(model.decoder(tokens), plain.decoder(tokens), atol=1e-5), kind
    prefix = prepared(Variant("prefix"), weights).eval()
    changed = tokens.clone()
    changed[:, 5] += 1
    before, after = prefix.decoder(tokens), prefix.decoder(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6) and not torch.allclose(before, plain.decoder(tokens))
    with pytest.raises(ValueError, match="keeps no cache"):
        prefix.decoder.prefill(tokens)


def test_every_way_learns_what_it_says():
    weights = Chat(Variant("plain")).decoder.state_dict()
    for kind in ("lora", "prefix", "frozen"):
        model = prepared(Variant(kind), weights)
        learning = {id(p) for p in second_parameters(model)}
        names = {n for n, p in model.named_parameters() if id(p) in learning}
        assert all("projector" in n or n.endswith((".down", ".up", ".keys", ".values")) for n in names), kind
        assert (len(names) > 4) is (kind != "frozen")
    staged = prepared(Variant("wings"), weights)
    assert all(block.textual is None for block in wings_blocks(staged))
    assert {id(p) for p in first_parameters(staged)} > {id(p) for p in staged.projector.parameters()}
    staged = completed(staged)
    assert all(block.textual is not None and block.router is not None for block in wings_blocks(staged))
    assert len(second_parameters(staged)) == len(list(staged.parameters()))
    assert all(
        b.router is None and b.textual is not None
        for b in wings_blocks(completed(prepared(Variant("wings", routing="fixed"), weights)))
    )


def test_replay_puts_texts_in_place_of_pictures():
    train = rows("V", 20, "train", 0)
    mixed = with_replay(train, 0.1, 0)
    assert len(mixed) == 20
    assert (mixed.tensors[4] == list(MIXES).index("T")).sum() == 2 and (mixed.tensors[0] == IMAGE).any(
        dim=1
    ).sum() == 18


def test_drift_and_partial_correlation_are_their_definitions():
    model = Chat(Variant("plain"))
    weights = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    assert drift(model, weights) == 0
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.5)
    assert drift(model, weights) == pytest.approx(0.5, rel=1e-5)
    draw = torch.Generator().manual_seed(0)
    shift, far = torch.randn(40, generator=draw), torch.randn(40, generator=draw)
    text = 3 * far - shift
    found = [
        {"shift": s, "text": t + 9 * (k % 2), "drift": d}
        for k, (s, t, d) in enumerate(zip(shift.tolist(), text.tolist(), far.tolist()))
    ]
    assert partial_correlation(found, [k % 2 for k in range(40)]) == pytest.approx(-1)
    assert partial_correlation([{"shift": 1.0, "text": 1.0, "drift": 1.0}] * 4, [0] * 4) == 0


def test_added_parameters_are_those_of_the_baselines_alone():
    for add, count in ((add_low_rank, 8 * 4 * 2 * 2 * 48), (add_prefix, 8 * 2 * 2 * 48)):
        decoder = Chat(Variant("plain")).decoder
        assert not added_parameters(decoder)
        add(decoder, 2)
        assert sum(p.numel() for p in added_parameters(decoder)) == count


def test_a_folder_of_the_authors_answers_from_the_command_line(tmp_path, monkeypatch):
    """In the pieces of its tokenizer, of a square of the picture by bands; the system prompt is the user's to give."""
    tokenizers = pytest.importorskip("tokenizers")
    marks = ["<|im_start|>", "<|im_end|>"]
    vocab = {piece: number for number, piece in enumerate([*marks, *dict.fromkeys("aeimnorstuwyhbkdf? \n.")])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens(marks)
    inner.save(str(tmp_path / "tokenizer.json"))
    torch.save(state(2), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wings_qwen2", "num_attention_heads": 4}))
    shown = np.random.default_rng(0).integers(0, 256, (12, 30, 3), dtype=np.uint8)
    Image.fromarray(shown).save(tmp_path / "it.png")
    asked, seen = [str(tmp_path / "it.png"), "what is it?"], []
    given = {"heads": 4, "vision_heads": 2, "tokenizer": str(tmp_path), "system": "be kind."}
    with monkeypatch.context() as patch:
        patch.setattr("provenn.tasks.multimodal_chat.write", lambda *read, **_: seen.append(read) or ["yes"])
        assert provenn.predict("wings", asked, weights=tmp_path, overrides=given) == "yes"
    ((loaded, _, (prompt,), ((picture,),), _),) = seen
    texts = (
        "<|im_start|>system\nbe kind.<|im_end|>\n<|im_start|>user\n",
        " what is it?<|im_end|>\n<|im_start|>assistant\n",
    )
    before, after = (inner.encode(text).ids for text in texts)
    assert prompt == [*before, -200, *after]
    side = loaded.model.vision.tower.config.image
    assert tuple(picture.shape) == (3, side, side)
    name, options, weights = convert(state(2), heads=4, vision_heads=2)
    whole = getattr(presets, name)(**{**options, "vision_heads": 2, "heads": 4, "standardised": "siglip"}).eval()
    whole.load_state_dict(weights)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    tokens = torch.tensor([prompt])
    expected = whole(tokens, (2 * (picture * std + mean) - 1)[None])
    torch.testing.assert_close(loaded(tokens, picture[None]), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="these weights bring no tokenizer"):
        provenn.predict("wings", asked, weights=tmp_path, overrides={"heads": 4, "vision_heads": 2})
