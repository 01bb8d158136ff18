"""RCMHA inside pretrained models: nothing changes until it is trained, and then caches and padding change nothing."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from provenn.core.errors import UserError
from provenn.huggingface import StateCache, attentions, convert, revert
from provenn.papers.rcmha import RelativeConvAttention

VOCAB = 40
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}


def gpt2(layers=2):
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=16, n_head=2, n_positions=64, **COMMON)).eval()


def llama():
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **COMMON)).eval()


hosts = pytest.mark.parametrize("build", [gpt2, llama])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(model, **options):
    """Converted, with convolutions and tables as if they had been trained."""
    convert(model, "rcmha", **{"max_distance": 6, **options})
    for attention in attentions(model):
        for parameter in attention.module.companion.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def batch(padding=0, tokens=11):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(1, VOCAB, (2, tokens)), "attention_mask": mask}


@hosts
def test_a_model_is_what_it_was_until_it_is_trained_and_again_when_undone(build):
    model, given = build(), batch(padding=3)
    real = given["attention_mask"].bool()
    before = model(**given).logits[real]
    convert(model, "rcmha")
    torch.testing.assert_close(model(**given).logits[real], before, rtol=1e-4, atol=1e-5)
    changed = stirred(revert(model))
    assert (changed(**given).logits[real] - before).abs().max() > 1e-2
    assert torch.equal(revert(changed)(**given).logits[real], before)


@pytest.mark.parametrize("options", [{}, {"relative": False, "kernel": 4}, {"conv": ""}])
def test_a_converted_attention_is_the_papers_over_the_hosts_maps(options):
    model = stirred(gpt2(layers=1), **options)
    host = model.transformer.h[0].attn
    layer = RelativeConvAttention(16, 2, future_rows=False, **{"max_distance": 6, **options})
    missing, extra = layer.load_state_dict(host.companion.state_dict(), strict=False)
    assert not extra and {name.split(".")[0] for name in missing} == {"query", "key", "value", "out"}
    # The host's maps have biases of queries and keys, which ours has without tables alone.
    host.c_attn.bias.data[:32] = 0
    for part, weight in zip((layer.query, layer.key, layer.value), host.c_attn.weight.T.split(16)):
        nn.init.zeros_(part.bias) if part.bias is not None else None
        part.weight.data = weight
    layer.value.bias.data, layer.out.weight.data = host.c_attn.bias[32:], host.c_proj.weight.T
    layer.out.bias.data = host.c_proj.bias
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(host(x)[0], layer(x), rtol=1e-4, atol=1e-5)


@hosts
def test_a_cache_changes_nothing_nor_does_padding(build):
    model, given = stirred(build()), batch(padding=4)
    padded = model.generate(**given, **GENERATE)
    assert torch.equal(padded, model.generate(**given, **GENERATE, use_cache=False))
    assert torch.equal(
        model.generate(**given, **GENERATE, num_beams=3),
        model.generate(**given, **GENERATE, num_beams=3, use_cache=False),
    )
    alone = model.generate(input_ids=given["input_ids"][:1, 4:], **GENERATE)
    assert torch.equal(padded[:1, 4:], alone)
    cache, tokens, pieces = StateCache(), given["input_ids"][1:], []
    for piece in tokens.split([1, 4, 2, 4], dim=1):
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_scores_of_a_host_with_rotations_see_distances_and_no_places():
    model, given = stirred(llama()), batch()
    places = torch.arange(11).expand(2, 11)
    here, there = (model(**given, position_ids=places + start).logits for start in (0, 20))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


def test_every_part_learns_but_the_bias_that_moves_nothing():
    model, given = stirred(gpt2()).train(), batch()
    model(**given, labels=given["input_ids"]).loss.backward()
    for attention in attentions(model):
        for name, parameter in attention.module.companion.named_parameters():
            assert parameter.grad.abs().max() > 1e-6 or name == "conv.key.bias", name


def test_what_cannot_be_converted_is_refused():
    bert = BertForMaskedLM(
        BertConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=VOCAB)
    )
    with pytest.raises(UserError, match="its convolutions look back"):
        convert(bert, "rcmha")
    for options, message in (
        ({"conv": "x"}, "letters q, k and v"),
        ({"kernel": 0}, "kernel must be at least 1"),
        ({"max_distance": 0}, "max_distance must be at least 1"),
        ({"conv": "", "relative": False}, "nothing would be converted"),
    ):
        model = gpt2(layers=1)
        kept = copy.deepcopy(model.state_dict())
        with pytest.raises(UserError, match=message):
            convert(model, "rcmha", **options)
        assert model.state_dict().keys() == kept.keys()
