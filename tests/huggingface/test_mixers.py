"""Token mixers instead of the attentions of Hugging Face's models: masks, caches, generation."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from provenn import swap
from provenn.core.errors import UserError
from provenn.huggingface import MixerAttention, StateCache, StateLayer, as_attention
from provenn.huggingface.mixers import padding_of
from provenn.papers.rat import RATMixer

VOCAB = 60
GENERATE = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
OPTIONS = {"rat": {"chunk": 4}, "titans": {}, "aaren": {}, "hedgehog": {}, "softmax": {}, "window": {"window": 5}}
mixers = pytest.mark.parametrize("mixer", OPTIONS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_embd=16, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=0, eos_token_id=0,
            initializer_range=0.3,
        )
    ).eval()  # fmt: skip


ATTENTIONS = {llama: "model.layers.*.self_attn", gpt2: "transformer.h.*.attn"}


def batch(padding=0, tokens=12):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(1, VOCAB, (2, tokens)), "attention_mask": mask}


@pytest.mark.parametrize("build", ATTENTIONS, ids=["llama", "gpt2"])
@mixers
def test_a_mixer_takes_the_place_of_every_attention_and_generates(build, mixer):
    model, given = build(), batch()
    changes = swap(model, ATTENTIONS[build], as_attention(mixer, **OPTIONS[mixer]), example=given)
    assert len(changes) == model.config.num_hidden_layers
    alone = {**GENERATE, "use_cache": False}
    assert torch.equal(model.generate(**given, **GENERATE), model.generate(**given, **alone))
    assert torch.equal(model.generate(**given, **GENERATE, num_beams=3), model.generate(**given, **alone, num_beams=3))
    cache = StateCache()
    model(given["input_ids"], past_key_values=cache, use_cache=True)
    assert all(type(layer) is StateLayer for layer in cache.layers) and cache.nbytes > 0
    loss = model.train()(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mixer", ["rat", "titans", "aaren"])
def test_padding_on_the_left_changes_nothing_with_or_without_a_cache(mixer, implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    swap(model, "model.layers.*.self_attn", as_attention(mixer, **OPTIONS[mixer]))
    given = batch(padding=5)
    padded = model.generate(**given, **GENERATE)
    assert torch.equal(padded, model.generate(**given, **GENERATE, use_cache=False))
    alone = model.generate(input_ids=given["input_ids"][:1, 5:], **GENERATE)
    assert torch.equal(padded[:1, 5:], alone)


def test_states_and_keys_and_values_stand_side_by_side_in_one_cache():
    model, given = llama(), batch(padding=3)
    swap(model, ["model.layers.0.self_attn", "model.layers.2.self_attn"], as_attention("rat", chunk=4))
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        generated = model.generate(**given, **GENERATE, past_key_values=cache)
        kinds = [type(layer) for layer in cache.layers]
        assert kinds[0] is kinds[2] is StateLayer and kinds[1] is not StateLayer
        assert cache.get_seq_length() == cache.get_seq_length(1) == 12 + 7 - 1
        assert torch.equal(generated, model.generate(**given, **GENERATE, use_cache=False))


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (
            BertModel(BertConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=8, num_attention_heads=4)),
            "encoder.layer.*.attention.self",
        ),
        (
            DistilBertModel(DistilBertConfig(n_layers=2, dim=16, hidden_dim=8, n_heads=4)),
            "transformer.layer.*.attention",
        ),
    ],
    ids=["bert", "distilbert"],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_encoders_attention_is_one_of_both_directions(model, where, implementation):
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation(implementation)
    with pytest.raises(UserError, match=r"cannot replace this attention: .* causal must be True"):
        swap(model, where, as_attention("rat"))
    with pytest.raises(UserError, match="RATMixer looks back alone, and this attention sees the whole text"):
        swap(model, where, as_attention(lambda dim: RATMixer(dim, 4)))
    swap(model, where, as_attention("softmax"), example={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    given = batch(padding=0, tokens=9)
    given["attention_mask"][0, 6:] = 0
    out = model(**given).last_hidden_state
    short = model(input_ids=given["input_ids"][:1, :6]).last_hidden_state
    torch.testing.assert_close(out[:1, :6], short, rtol=1e-4, atol=1e-5)
    given["input_ids"][1, -1] = (given["input_ids"][1, -1] + 1) % VOCAB
    assert (model(**given).last_hidden_state[1, 0] - out[1, 0]).abs().max() > 1e-6  # the first token sees the last


def test_what_cannot_be_is_refused_in_one_line():
    attention = MixerAttention(RATMixer(16, 4), layer_idx=0)
    x = torch.randn(1, 3, 16)
    with pytest.raises(UserError, match="cannot replace cross-attention"):
        attention(x, encoder_hidden_states=x)
    full = DynamicCache()
    full.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    with pytest.raises(UserError, match="holds another model's keys and values"):
        attention(x, past_key_values=full)
    with pytest.raises(UserError, match="a cache of fixed size"):
        attention(x, past_key_values=StaticCache(config=llama().config, max_cache_len=8))
    with pytest.raises(UserError, match="give it its layer_idx"):
        MixerAttention(RATMixer(16, 4))(x, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="no token-mixer is called 'rta'"):
        as_attention("rta")
    with pytest.raises(UserError, match="is no self-attention of Hugging Face's"):
        as_attention("rat")(nn.Linear(2, 2))

    class Still(nn.Module):
        def forward(self, x):
            return x

    cache, still = DynamicCache(), MixerAttention(Still(), layer_idx=0)
    still(x, past_key_values=cache)
    with pytest.raises(UserError, match="Still cannot stream; call the model with use_cache=False"):
        still(x, past_key_values=cache)


def test_padding_is_read_off_every_form_of_mask_and_nothing_else_is_taken_for_it():
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    whole = (causal & real[:, None, :])[:, None]
    for mask in (real.long(), whole, torch.zeros(2, 1, 4, 4).masked_fill(~whole, torch.finfo(torch.float32).min)):
        assert torch.equal(padding_of(mask, 4, causal=True), real)
        assert torch.equal(padding_of(mask, 3, causal=True), real[:, 1:])
    assert padding_of(torch.ones(2, 4), 4, causal=True) is None
    assert torch.equal(padding_of(real[:, None, None, :].expand(2, 1, 4, 4), 4, causal=False), real)
    window = causal & ~torch.ones(4, 4, dtype=torch.bool).tril(-2)
    assert padding_of(window[None, None], 4, causal=True) is None
    two_texts = causal & (torch.tensor([0, 0, 1, 1])[:, None] == torch.tensor([0, 0, 1, 1]))
    with pytest.raises(UserError, match="several texts in one row"):
        padding_of(two_texts[None, None], 4, causal=True)
    with pytest.raises(UserError, match="shows later tokens"):
        padding_of(torch.ones(1, 1, 4, 4, dtype=torch.bool), 4, causal=True)
    with pytest.raises(UserError, match="hides more than padding"):
        padding_of(whole, 4, causal=False)
    with pytest.raises(UserError, match="2 or 4 dimensions"):
        padding_of(torch.ones(4), 4, causal=True)
