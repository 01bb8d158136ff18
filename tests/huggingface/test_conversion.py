"""Pretrained models with another attention: converted, taught, tuned, saved, loaded, streamed, and undone."""

import copy
import json
import math
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from provenn import huggingface
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.huggingface import Text, Tuning, attentions, conversion_of, convert, perplexity, recover, revert, tune
from provenn.papers.hedgehog.convert import StateCache, distil, distillation, report, teaching
from provenn.testing import seeded_array, seeded_state

VOCAB = 60
LOLCATS = json.loads((Path(__file__).parents[1] / "papers" / "hedgehog" / "lolcats.json").read_text())


def gpt2(**options):
    return GPT2LMHeadModel(
        GPT2Config(
            **{"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": VOCAB, "n_positions": 64, "bos_token_id": 0,
               "eos_token_id": 0, "initializer_range": 0.3, **options},
        )
    )  # fmt: skip


def llama(**options):
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
            **options,
        )
    )  # fmt: skip


def bert(**options):
    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=VOCAB,
            max_position_embeddings=64, initializer_range=0.3, **options,
        )
    )  # fmt: skip


BUILDERS = {"gpt2": gpt2, "llama": llama, "bert": bert}
GENERATE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
hosts = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
decoders_only = pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(tokens=14, padding=0):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(1, VOCAB, (2, tokens)), "attention_mask": mask}


def close(actual, expected):
    # Weights that lie elsewhere in memory are added up in another order: rounding, never more.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def stir(model):
    """Maps away from where they start, so that what is compared is not the identity."""
    with torch.no_grad():
        for attention in attentions(model):
            for parameter in attention.module.attention_maps.parameters():
                parameter += 0.5 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<end>", "<mask>"]
    inner.train_from_iterator(["the cat sat on the mat"], trainers.BpeTrainer(vocab_size=40, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", mask_token="<mask>")


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("the cat sat on the mat. " * 120)
    return file


@hosts
def test_conversion_keeps_every_weight_and_can_be_undone(build):
    model, given = build().eval(), batch()
    before, logits, kind = copy.deepcopy(model.state_dict()), model(**given).logits, type(model)
    assert convert(model, "hedgehog") is model and isinstance(model, kind)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert (model(**given).logits - logits).abs().max() > 1e-2
    revert(model)
    assert type(model) is kind and list(model.state_dict()) == list(before)
    assert torch.equal(model(**given).logits, logits)
    assert model.config.model_type in BUILDERS and not hasattr(model.config, "conversion")


@hosts
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_undone_a_model_attends_by_what_it_attended_by_before(build, attention):
    model, given = build().eval(), batch(padding=3)
    model.set_attn_implementation(attention)
    logits = model(**given).logits
    assert convert(model, "hedgehog").config._attn_implementation == "provenn_hedgehog"
    revert(model)
    assert model.config._attn_implementation == attention and torch.equal(model(**given).logits, logits)


@hosts
@pytest.mark.parametrize("padding", [0, 5])
def test_while_it_is_taught_a_model_gives_its_own_outputs(build, padding):
    model, given = build().eval(), batch(padding=padding)
    logits = model(**given).logits
    convert(model, "hedgehog")
    with teaching(model) as losses:
        taught = model(**given, **({} if build is bert else {"use_cache": False})).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(taught[real], logits[real], rtol=0, atol=0 if padding == 0 else 1e-5)
    assert len(losses) == 2


@hosts
def test_distillation_trains_the_maps_alone(build):
    model = convert(build().train(), "hedgehog")
    before = copy.deepcopy(model.state_dict())
    losses = distil(model, 40 * [batch(padding=3)], 1e-2)
    assert model.training and len(losses) == 40 and losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("attention_maps" in name)


@decoders_only
@pytest.mark.parametrize("mechanism", ["hedgehog", "moh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_model_trains_in_mixed_precision(build, mechanism, dtype):
    """Forward under autocast and backward outside, with a scaler, as transformers' trainer does it."""
    options = {"n_head": 4, "n_embd": 32} if build is gpt2 else {}
    model = convert(build(**options).train(), mechanism)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    given, gradients = batch(padding=3), []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = model(**given, labels=given["input_ids"]).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() <= 0.5 * gradients[0].norm()


def own_name(name):
    for theirs, own in (("feature_map_q.mlp.layer", "map_query"), ("feature_map_k.mlp.layer", "map_key")):
        name = name.replace(theirs, f"attention_maps.{own}.linear.weight")
    return name


@pytest.mark.parametrize("case", LOLCATS["cases"], ids=lambda case: f"{case['form']}-{case['feature_dim']}")
def test_a_converted_llama_is_that_of_the_groups_own_code(case):
    """Logits, loss and gradients of a Llama with grouped queries, as HazyResearch/lolcats computed them."""
    shapes, seed = {name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"]
    state = {}
    for name, value in seeded_state(shapes, seed).items():
        # Larger than drawn, so that attention is far from uniform.
        factor = 8 if "feature_map" in name else 2 if "q_proj" in name or "k_proj" in name else 1
        state[own_name(name)] = factor * value
    model = LlamaForCausalLM(LlamaConfig(**LOLCATS["config"])).eval()
    convert(model, "hedgehog", form=case["form"], feature_dim=case["feature_dim"])
    model.load_state_dict(state)
    noise = seeded_array(LOLCATS["tokens"], "tokens", seed) / math.sqrt(3)
    tokens = torch.from_numpy(((noise + 1) / 2 * LOLCATS["config"]["vocab_size"]).astype(np.int64))
    weights = {own_name(name): name for name in case["logits_gradient"]}
    parameters = {weights[name]: p.requires_grad_() for name, p in model.named_parameters() if name in weights}
    logits = model(tokens, use_cache=False).logits
    with teaching(model) as losses:
        model(tokens, use_cache=False)
    loss = torch.stack(losses).mean()
    assert_values(logits, case["logits"])
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    weighed = logits * torch.from_numpy(seeded_array(logits.shape, "gradient", seed).astype(np.float32))
    for scalar, golden in ((weighed.sum(), case["logits_gradient"]), (loss, case["loss_gradient"])):
        for name, values in golden.items():
            assert_values(torch.autograd.grad(scalar, parameters[name], retain_graph=True)[0], values)


def assert_values(tensor, golden):
    """To 1e-4 of the tensor's size."""
    expected, actual = np.asarray(golden["value"]), tensor.detach().flatten()[golden["index"]].numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.sqrt(np.mean(expected**2)))


@pytest.mark.parametrize("execute", ["dense", "gather"])
def test_a_host_with_a_scale_of_its_own_keeps_it(execute):
    """Layer i of this GPT-2 divides its scores by i + 1 besides: the teacher does, and all heads of MoH do."""
    model, given = gpt2(scale_attn_by_inverse_layer_idx=True).eval(), batch()
    with torch.no_grad():
        logits = model(**given).logits
        assert (gpt2().eval().requires_grad_(False)(**given).logits - logits).abs().max() > 1e-3
        convert(model, "moh", shared=0.0, active=1.0, execute=execute)
        torch.testing.assert_close(model(**given).logits, logits, rtol=1e-4, atol=1e-4)
        convert(revert(model), "hedgehog")
        with teaching(model):
            torch.testing.assert_close(model(**given, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)


@hosts
@pytest.mark.parametrize("padding", [0, 5])
def test_padding_on_the_left_changes_nothing(build, padding):
    model = stir(convert(build().eval(), "hedgehog"))
    tokens = torch.randint(1, VOCAB, (1, 9))
    positions = torch.arange(9)[None]
    alone = model(tokens, position_ids=positions).logits
    padded = model(
        torch.cat([torch.zeros(1, padding, dtype=torch.long), tokens], 1),
        attention_mask=(torch.arange(9 + padding) >= padding).long()[None],
        position_ids=torch.cat([torch.zeros(1, padding, dtype=torch.long), positions], 1),
    ).logits
    torch.testing.assert_close(padded[:, padding:], alone, rtol=1e-4, atol=1e-4)


@decoders_only
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("feature_map", ["hedgehog", "cosformer"])
def test_generate_keeps_a_state_of_constant_size_and_says_what_a_full_cache_says(
    build, padding, beams, feature_map, monkeypatch
):
    model, given = stir(convert(build().eval(), "hedgehog", feature_map=feature_map)), batch(padding=padding)
    made = []
    monkeypatch.setattr(StateCache, "__init__", lambda self, old=StateCache.__init__: (old(self), made.append(self))[0])
    ours = model.generate(**given, **GENERATE, num_beams=beams)
    assert len(made) == 1 and made[0].get_seq_length() == 14 + 8 - 1
    assert {tensor.shape[-2:] for layer in made[0].layers for tensor in [layer.state.s]} == {
        (2 * 8, 8)
    } or build is llama
    theirs = model.generate(**given, **GENERATE, num_beams=beams, past_key_values=DynamicCache())
    assert torch.equal(ours, theirs)
    if beams == 1 and not padding:
        tokens = given["input_ids"]
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ours, tokens)


@decoders_only
@pytest.mark.parametrize("cache", [StateCache, DynamicCache])
def test_positions_go_on_where_the_cache_ends(build, cache):
    """cosFormer's map knows its tokens' positions, and with 24 of them weights change from position to position."""
    model = convert(build().eval(), "hedgehog", feature_map="cosformer", length=24)
    tokens, past = torch.randint(1, VOCAB, (2, 20)), cache()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        parts = [model(part, past_key_values=past, use_cache=True).logits for part in tokens.split([9, 10, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@decoders_only
def test_a_stream_holds_the_same_bytes_after_any_number_of_tokens(build):
    model, cache = convert(build().eval(), "hedgehog"), StateCache()
    sizes = set()
    with torch.no_grad():
        for tokens in (1, 7, 30):
            model(torch.randint(1, VOCAB, (1, tokens)), past_key_values=cache, use_cache=True)
            sizes.add(cache.nbytes)
    heads, width = (2, 8) if build is gpt2 else (4, 4)
    assert sizes == {2 * 4 * heads * (2 * width * width + 2 * width)} and cache.get_seq_length() == 38


def test_a_state_can_be_split_repeated_and_reset_but_not_cropped():
    model, cache, alone = convert(gpt2().eval(), "hedgehog"), StateCache(), StateCache()
    tokens = torch.randint(1, VOCAB, (2, 6))
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
        model(tokens[1:], past_key_values=alone, use_cache=True)
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(one.layers[1].state.s, alone.layers[1].state.s)
    one.batch_repeat_interleave(3)
    assert one.layers[0].state.s.shape[0] == 3
    with pytest.raises(ValueError, match="cannot be taken out"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


@hosts
@pytest.mark.parametrize("options", [{}, {"feature_map": "t2r"}, {"form": "joint", "feature_dim": 3}], ids=str)
def test_a_saved_model_is_found_again_by_the_auto_classes(build, options, tmp_path):
    model, given = stir(convert(build().eval(), "hedgehog", **options)), batch()
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if build is bert else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.conversion == {"paper": "hedgehog", "options": options}
    close(again(**given).logits, model(**given).logits)
    revert(again)
    close(again(**given).logits, revert(model)(**given).logits)


@hosts
@pytest.mark.parametrize("how", ["full", "lora"])
def test_tuning_lowers_the_loss_and_leaves_an_ordinary_model(build, how):
    model = convert(build(), "hedgehog")
    given = {**batch(), "labels": torch.randint(1, VOCAB, (2, 14))}
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    losses = tune(model, 12 * [given], how, lr=1e-2)
    assert losses[-1] < losses[0] and list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    if how == "lora":
        suffixes = ("c_attn.weight", "attn.c_proj.weight", "_proj.weight", "query.weight", "key.weight", "value.weight")
        assert changed and all(name.endswith((*suffixes, "attention.output.dense.weight")) for name in changed)
        assert not any("mlp" in name or "attention_maps" in name for name in changed)
    else:
        assert any("attention_maps" in name for name in changed)


def image_classifier():
    return ViTForImageClassification(
        ViTConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, image_size=32,
            patch_size=3, num_channels=1, num_labels=5, initializer_range=0.3,
        )
    )  # fmt: skip


def text_classifier():
    return BertForSequenceClassification(bert(num_labels=5).config)


@pytest.mark.parametrize(
    ("build", "auto", "given"),
    [
        (image_classifier, AutoModelForImageClassification, {"pixel_values": torch.randn(6, 1, 32, 32)}),
        (text_classifier, AutoModelForSequenceClassification, batch(padding=2)),
    ],
)
def test_a_classifier_is_converted_distilled_tuned_saved_and_undone(build, auto, given, tmp_path):
    model = build().eval()
    logits = model(**given).logits
    revert(convert(model, "hedgehog"))
    assert torch.equal(model(**given).logits, logits)
    before = copy.deepcopy(convert(model, "hedgehog").state_dict())
    raw = report(model, given)
    losses = distil(model, 40 * [given], 1e-2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[name]) != ("attention_maps" in name) for name, v in model.state_dict().items())
    assert all(after["kl"] < fresh["kl"] for after, fresh in zip(report(model, given), raw, strict=True))
    for how in ("full", "lora"):
        losses = tune(model, 10 * [{**given, "labels": torch.arange(len(logits)) % 5}], how, lr=1e-2)
        assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    close(again(**given).logits, model(**given).logits)


def test_the_report_of_a_layer_is_near_softmax_where_the_maps_are():
    model = convert(llama(), "hedgehog")
    given = batch(padding=2)
    distil(model, 60 * [given], 3e-2)
    rows = report(model, given)
    assert [row["layer"] for row in rows] == [0, 1]
    raw = report(convert(revert(model), "hedgehog", feature_map="elu"), given)
    for learned, fixed in zip(rows, raw):
        assert 0 <= learned["kl"] < fixed["kl"]
        assert abs(learned["entropy"] - learned["entropy_of_softmax"]) < abs(
            fixed["entropy"] - fixed["entropy_of_softmax"]
        )


def test_recovery_measures_each_stage(tokenizer, story):
    model = gpt2()
    text = Text.of(story, tokenizer, model, length=16)
    tune(model, text.batches(40, 4, 0), lr=3e-3)
    recovery = recover(model, "hedgehog", text, Tuning(steps=20, prepare_steps=20, batch_size=4, lr=1e-3))
    names = [name for name, *_ in recovery.stages()]
    assert names == ["before", "converted", "prepared", "tuned"]
    assert recovery.before == pytest.approx(recovery.stages()[0][1]) and recovery.stages()[0][2] == 1
    assert recovery.prepared < recovery.converted and recovery.parameters == 2 * 2 * 2 * 8 * 8
    assert recovery.tuned == pytest.approx(perplexity(model, text.tests(4)))
    assert json.loads(json.dumps(recovery.json()))["recovered"]["before"] == 1


def test_masked_models_are_tested_on_what_is_masked(tokenizer, story):
    model = bert()
    text = Text.of(story, tokenizer, model, length=16)
    given = next(text.batches(1, 3, seed=0))
    hidden = given["labels"] != -100
    assert (given["input_ids"][hidden] == tokenizer.mask_token_id).all() and hidden.any(1).all()
    assert torch.equal(given["input_ids"][~hidden], given["input_ids"][~hidden])
    first, again = ([part["input_ids"] for part in text.tests(2)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    # A model that knows nothing is as unsure as its vocabulary is large.
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert perplexity(model, text.tests(2)) == pytest.approx(VOCAB)


def test_the_command_line_converts_a_folder(tokenizer, story, tmp_path, capsys):
    host = tmp_path / "host"
    gpt2().save_pretrained(host)
    tokenizer.save_pretrained(host)
    out = tmp_path / "converted"
    line = f"convert hedgehog {host} --data {story} -o {out} --tune lora --steps 3 --prepare-steps 3 --length 16 --json"
    assert main(shlex.split(line)) == 0
    written = json.loads(capsys.readouterr().out)
    assert written == json.loads((out / "conversion.json").read_text())
    assert (
        written["setting"]["tuning"] == "lora"
        and len(written["losses"]["prepare"]) == 3
        and len(written["layers"]) == 2
    )
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "ConvertedGPT2LMHeadModel"
    assert main(shlex.split(line)) == 2 and "is not empty" in capsys.readouterr().err
    again = f"convert hedgehog {out} --data {story} -o {tmp_path / 'twice'} --length 16"
    assert main(shlex.split(again)) == 2 and "already; revert it first" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from provenn.cli import main
from provenn.huggingface import Text

made = Text.batches

def batches(self, steps, batch_size, seed):
    for index, batch in enumerate(made(self, steps, batch_size, seed)):
        if (seed, index) == (1, 5):  # of the second stage
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

Text.batches = batches
main(sys.argv[1:])
"""


def test_a_conversion_that_is_killed_goes_on_and_ends_as_one_that_is_not(
    tokenizer, story, tmp_path, capsys, monkeypatch
):
    """By SIGKILL, in a process of its own, in the middle of the second stage."""
    host, whole, out = tmp_path / "host", tmp_path / "whole", tmp_path / "converted"
    gpt2().save_pretrained(host)
    tokenizer.save_pretrained(host)
    line = f"convert hedgehog {host} --data {story} --steps 8 --prepare-steps 4 --length 16 --save-every 2 --json"
    assert main(shlex.split(f"{line} -o {whole}")) == 0
    expected = json.loads(capsys.readouterr().out)
    line = f"{line} -o {out}"
    killed = subprocess.run([sys.executable, "-c", KILLED, *shlex.split(line)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "conversion.json").exists()
    for words, message in (
        (line, f"{out} holds a conversion that did not end: go on with --resume"),
        (f"{line} --resume --lr 0.01", f"{out} was begun with --lr None (now 0.01): resume with the same options"),
        (f"{line} --resume -o {whole}", f"nothing to resume in {whole}: it holds no checkpoints of a conversion"),
    ):
        assert main(shlex.split(words)) == 2
        assert message in capsys.readouterr().err
    learned, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss, *args, **kw: [learned.append(1), backward(loss, *args, **kw)]
    )
    assert main(shlex.split(f"{line} --resume")) == 0
    assert len(learned) == 8 - 4, "of the second stage alone, from its last checkpoint"
    assert json.loads(capsys.readouterr().out) == expected
    weights = [load_file(folder / "model.safetensors") for folder in (whole, out)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in whole.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hedgehog nowhere --data {story}", "nowhere cannot be loaded as a model"),
        ("hedgehog {host} --data nothing.txt --length 16", "nothing.txt"),
        ("hedgehog {host} --data {empty} --length 16", "is empty"),
        ("hedgehog {host} --data {story} --length 65", "length must lie between 2 and the 64 positions"),
        ("hedgehog {host} --data {short} --length 64", "too little text"),
        ("hedgehog {host} --data {story} --length 16 --tune some", "--tune takes full, lora, none"),
        ("hedgehog {host} --data {story} --length 16 --set feature_map=tanh", "feature_map must be one of"),
        ("hedgehog {host} --data {story} --length 16 --set depth=3", "does not take"),
        (
            "eca_net {host} --data {story}",
            "eca_net has no conversion of pretrained models; these have: aaren, hedgehog",
        ),
        ("hedgehog {bare} --data {story}", "no tokenizer"),
        ("hedgehog {small} --data {story}", "they do not belong together"),
        (
            "hedgehog {host} --data {story} --length 16 --set feature_map=cosformer --set length=9",
            "cosFormer's positions end at length=9, got 16 tokens",
        ),
    ],
)
def test_bad_input_is_answered_with_one_line(words, message, tokenizer, story, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    paths = {"story": story}
    for name in ("host", "bare", "small"):
        paths[name] = tmp_path / name
        gpt2(**({"vocab_size": 10} if name == "small" else {})).save_pretrained(paths[name])
    for name in ("host", "small"):
        tokenizer.save_pretrained(paths[name])
    for name, text in (("empty", ""), ("short", "the cat")):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(text)
    assert main(shlex.split(f"convert {words.format(**paths)} -o {tmp_path / 'out'} --steps 1 --prepare-steps 1")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (
            gpt2,
            {"model_type": "bart"},
            "host is of type 'bart', which cannot be converted; these can: gpt2, llama, qwen2",
        ),
        (gpt2, {"n_head": 3}, "the weights of host cannot be loaded: `embed_dim` must be divisible by num_heads"),
        (llama, {"num_attention_heads": 3}, "The hidden size (16) is not a multiple of the number of attention heads"),
        (bert, {"num_attention_heads": 3}, "The hidden size (16) is not a multiple of the number of attention heads"),
        (llama, {"num_key_value_heads": 4}, "have other sizes than its config says for 4 parameters, model.layers.0"),
        (gpt2, {"n_layer": 3}, "the weights of host lack 12 parameters, transformer.h.2.attn.c_attn.bias among them"),
        (gpt2, "config.json", "host cannot be loaded as a model"),
        (gpt2, "model.safetensors", "the weights of host cannot be loaded"),
        (gpt2, None, "host cannot be loaded as a model"),
        (text_classifier, {}, "host holds a BertForSequenceClassification, which does not predict tokens of a text"),
        (image_classifier, {}, "--length sets rows of text, and host takes images: leave it out"),
    ],
)
def test_a_damaged_model_is_answered_with_one_line(
    build, change, message, tokenizer, story, tmp_path, capsys, monkeypatch
):
    """Changes to its config, a file of it that was cut, or a folder without a config."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    host = Path("host")
    build().save_pretrained(host)
    tokenizer.save_pretrained(host)
    config = host / "config.json"
    if change is None:
        config.unlink()
    elif isinstance(change, str):
        (host / change).write_bytes((host / change).read_bytes()[:100])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert main(shlex.split(f"convert hedgehog host --data {story} -o out --length 16")) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and "Traceback" not in "".join(error) and not Path("out").exists()


def test_a_folder_below_a_file_is_refused_before_any_work(story, tmp_path, capsys):
    assert main(shlex.split(f"convert hedgehog nowhere --data {story} -o {story / 'out'}")) == 2
    assert "story.txt is a file; name another folder" in capsys.readouterr().err


def test_models_of_another_kind_are_refused():
    with pytest.raises(UserError, match="GPT2Model cannot be converted; these can: GPT2LMHeadModel"):
        convert(gpt2().transformer, "hedgehog")
    with pytest.raises(UserError, match="is not converted"):
        revert(gpt2())
    with pytest.raises(UserError, match="revert it first"):
        convert(convert(gpt2(), "hedgehog"), "hedgehog")
    with pytest.raises(UserError, match="is built by"):
        kind = huggingface.CONVERTED[GPT2LMHeadModel]
        kind(kind.config_class())
    model = convert(gpt2(), "hedgehog")
    with pytest.raises(UserError, match="expected a mask of padding"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))
    with teaching(model), pytest.raises(UserError, match="whole sequences"):
        model(torch.ones(1, 4, dtype=torch.long), past_key_values=StateCache(), use_cache=True)
    assert conversion_of("hedgehog").prepare is distillation
