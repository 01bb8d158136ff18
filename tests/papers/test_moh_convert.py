"""MoH in pretrained models: no parameter more, the authors' router, streamed, saved, tuned and undone."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from provenn.errors import UserError
from provenn.huggingface import attentions, convert, revert, tune
from provenn.papers.moh import watch_routing
from provenn.papers.moh.convert import report

VOCAB = 60


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=8, vocab_size=VOCAB, n_positions=64, initializer_range=0.3)
    )


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def bert():
    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=8,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    )


hosts = pytest.mark.parametrize("build", [gpt2, llama, bert])
executions = pytest.mark.parametrize("execute", ["dense", "gather"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(count=14):
    return torch.randint(1, VOCAB, (2, count))


@hosts
def test_conversion_adds_no_parameter_and_can_be_undone(build):
    model, ids = build().eval(), tokens()
    before, logits = copy.deepcopy(model.state_dict()), model(ids).logits
    convert(model, "moh")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model(ids).logits - logits).abs().max() > 1e-2
    revert(model)
    torch.testing.assert_close(model(ids).logits, logits)
    with torch.no_grad():
        convert(model, "moh", active=1.0)
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_llama_chooses_heads_as_the_authors_formula_says():
    """From the map's own output, before rotation: the norms over their deviation, the K largest; half are shared."""
    model, ids = convert(llama().eval(), "moh"), tokens()
    queries = []
    hook = attentions(model)[0].module.q_proj.register_forward_hook(lambda _, __, y: queries.append(y))
    with torch.no_grad(), watch_routing(model) as seen:
        model(ids)
    hook.remove()
    norms = queries[0].unflatten(-1, (8, 4)).norm(dim=-1)[..., 4:]
    scores = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    first = next(iter(seen.values()))[0]
    torch.testing.assert_close(first.scores, scores)
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(2).indices, True)
    assert torch.equal(first.active[..., 4:], expected) and first.active[..., :4].all()
    assert first.active.float().mean() == 0.75


@executions
@pytest.mark.parametrize("build", [gpt2, llama])
def test_step_by_step_it_uses_the_same_heads(build, execute):
    model, ids = convert(build().eval(), "moh", execute=execute), tokens()
    with torch.no_grad(), watch_routing(model) as seen:
        whole = model(ids).logits
        full = {name: calls.pop() for name, calls in seen.items()}
        cache, outputs = None, []
        for t in range(ids.shape[1]):
            found = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            outputs.append(found.logits)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-4)
    for name, calls in seen.items():
        assert torch.equal(torch.cat([call.active for call in calls], 1), full[name].active)


@hosts
def test_gathered_equals_dense_with_padding_too(build):
    model, ids = build().eval(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        outputs = []
        for execute in ("dense", "gather"):
            outputs.append(convert(model, "moh", execute=execute)(ids, attention_mask=mask).logits)
            revert(model)
    torch.testing.assert_close(outputs[1][mask.bool()], outputs[0][mask.bool()], rtol=1e-4, atol=1e-4)


def test_it_is_saved_loaded_and_generates(tmp_path):
    model = convert(llama().eval(), "moh", shared=0.25, active=0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
    assert torch.equal(again.generate(ids, **given), model.generate(ids, **given))
    rows = report(again, {"input_ids": ids})
    assert [row["heads_in_use"] for row in rows] == [0.5, 0.5]
    assert all(0 <= row["load_entropy"] <= 1 + 1e-6 and row["least_used"] <= 1 <= row["most_used"] for row in rows)


def test_tuning_takes_the_balance_along():
    ids = tokens(30)
    batch = {"input_ids": ids, "labels": ids}
    weights = []
    for balance in (0.0, 100.0):
        torch.manual_seed(0)
        model = convert(llama(), "moh", balance=balance)
        losses = tune(model, [batch] * 3, lr=1e-3)
        assert len(losses) == 3 and losses[-1] < losses[0]
        weights.append(attentions(model)[0].module.q_proj.weight)
    assert (weights[0] - weights[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shared": 0.8}, "shared < active"),
        ({"active": 1.5}, "active <= 1"),
        ({"shared": 0.5, "active": 0.55}, "leave nothing to choose from"),
        ({"execute": "sparse"}, "dense, gather"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        convert(llama(), "moh", **options)
