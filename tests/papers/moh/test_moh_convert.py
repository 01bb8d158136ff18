"""MoH in pretrained models: no parameter more, the authors' router, streamed, saved, tuned and undone."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from provenn.core.errors import UserError
from provenn.huggingface import attentions, convert, revert, tune
from provenn.papers.moh import moh_small, watch_routing
from provenn.papers.moh.convert import report
from provenn.testing import seeded_array, seeded_state

VOCAB = 60


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=8, vocab_size=VOCAB, n_positions=64, initializer_range=0.3)
    )


def llama(**options):
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**small, **options}))


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
executions = pytest.mark.parametrize("execute", ["dense", "gather", "auto"])


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


def test_a_llama_gives_the_values_of_the_authors_code():
    """Logits that their modeling_llama.py gave for weights and tokens of this seed; it holds no gradient of a gate."""
    golden = json.loads((Path(__file__).with_name("llama.json")).read_text())
    model = llama(intermediate_size=48, tie_word_embeddings=False).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(seeded_state(shapes, golden["seed"]))
    noise = seeded_array(golden["tokens"]["shape"], golden["tokens"]["name"], golden["seed"])
    ids = torch.from_numpy(((noise / np.sqrt(3) + 1) / 2 * golden["tokens"]["below"]).astype(np.int64))
    with torch.no_grad():
        logits = convert(model, "moh")(ids).logits
    expected = torch.tensor(golden["output"]["value"])
    torch.testing.assert_close(logits.flatten()[golden["output"]["index"]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared, top_k", [(4, 2), (2, 2), (None, None)])
def test_our_language_model_is_a_llama_whose_heads_are_weighed(shared, top_k):
    """Hugging Face's Llama with the same weights; what W_O reads is multiplied by the gates of equations 4 to 6."""
    ours = moh_small(VOCAB, dim=32, layers=2, heads=8, shared=shared, top_k=top_k).double().eval()
    for name, weight in ours.named_parameters():
        nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    theirs = llama(num_key_value_heads=8, intermediate_size=ours.blocks[0].feedforward.linear1.out_features).double()
    theirs.model.embed_tokens.weight.data = theirs.lm_head.weight.data = ours.embed.weight.data
    theirs.model.norm.weight.data = ours.norm.weight.data
    theirs.model.norm.variance_epsilon = 1e-6
    for block, layer in zip(ours.blocks, theirs.eval().model.layers, strict=True):
        mixer, feedforward = block.mixer, block.feedforward
        for own, other in (
            (block.norm1, layer.input_layernorm),
            (block.norm2, layer.post_attention_layernorm),
            (mixer.query, layer.self_attn.q_proj),
            (mixer.key, layer.self_attn.k_proj),
            (mixer.value, layer.self_attn.v_proj),
            (mixer.out, layer.self_attn.o_proj),
            (feedforward.gate, layer.mlp.gate_proj),
            (feedforward.linear1, layer.mlp.up_proj),
            (feedforward.linear2, layer.mlp.down_proj),
        ):
            other.weight.data = own.weight.data
        if shared is not None:
            gate_by_the_equations(layer, mixer.router, shared, top_k)
    ids = tokens()
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    weight = torch.randn(*ids.shape, VOCAB, dtype=torch.float64)
    (own,) = torch.autograd.grad((ours(ids) * weight).sum(), ours.blocks[0].mixer.query.weight)
    (other,) = torch.autograd.grad((theirs(ids).logits * weight).sum(), theirs.model.layers[0].self_attn.q_proj.weight)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def gate_by_the_equations(layer, router, shared, top_k):
    """g = (2 α₁ h_s softmax(W_s x), 2 α₂ K p ⊙ m / Σ(p ⊙ m)) on what the output map of an attention reads."""
    seen = []

    def read(_, args, named):
        seen.append(named["hidden_states"] if "hidden_states" in named else args[0])

    def gate(_, args):
        x = seen.pop()
        p = (x @ router.routed.weight.T).softmax(-1)
        kept = torch.where(p >= p.topk(top_k).values[..., -1:], p, 0)
        alpha = 2 * (x @ router.kinds.weight.T).softmax(-1)
        first = shared * (x @ router.common.weight.T).softmax(-1)
        gates = torch.cat([alpha[..., :1] * first, alpha[..., 1:] * top_k * kept / kept.sum(-1, keepdim=True)], -1)
        return (args[0] * gates.repeat_interleave(args[0].shape[-1] // gates.shape[-1], -1),)

    layer.self_attn.register_forward_pre_hook(read, with_kwargs=True)
    layer.self_attn.o_proj.register_forward_pre_hook(gate)


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
        ({"execute": "sparse"}, "dense, gather, auto, got"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        convert(llama(), "moh", **options)
