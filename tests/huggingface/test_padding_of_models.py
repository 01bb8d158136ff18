"""Padding changes no token of a text: every mixer of the catalogue, every conversion, wherever the padding stands."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers import BertForMaskedLM as BertLM

from provenn import catalog, swap
from provenn.catalog import mechanisms_of
from provenn.core.errors import UserError
from provenn.huggingface import as_attention, conversion_of, convert
from provenn.huggingface.families import family_of
from provenn.huggingface.mixers import padding_of
from provenn.nn.language import CausalLM, Encoder
from provenn.nn.mixers import BASELINES

VOCAB = 60
SIZES = {
    "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "vocab_size": VOCAB,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
GENERATE = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
LENGTHS = (20, 4)  # past a chunk of 16, and shorter than one
ROOM = 3


def tiny_llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def mixer_factories():
    """Every token mixer by name."""
    mechanisms = mechanisms_of("token-mixer").items()
    return BASELINES | {
        name: partial(card.resolve(layer.layer), **layer.arguments) for name, (card, layer) in mechanisms
    }


MIXERS = mixer_factories()
mixers = pytest.mark.parametrize("mixer", MIXERS)


def masks(lengths=LENGTHS, *, gaps=True):
    """Padding before, behind, on both sides of and inside each text, in a batch of different lengths."""
    width = max(lengths) + ROOM
    whole = {"left": torch.zeros(len(lengths), width, dtype=torch.long)}
    whole |= {name: whole["left"].clone() for name in ("right", "both", *(["inside"] if gaps else []))}
    for row, length in enumerate(lengths):
        starts = {"left": width - length, "right": 0, "both": (width - length) // 2}
        for name, start in starts.items():
            whole[name][row, start : start + length] = 1
        if gaps:
            whole["inside"][row, : length // 2] = whole["inside"][row, length // 2 + 2 : length + 2] = 1
    return whole


def texts(lengths=LENGTHS):
    return [torch.randint(2, VOCAB, (1, length)) for length in lengths]


def padded(rows, mask):
    """The texts at the positions of a mask, with tokens of every kind as padding, and the positions of the texts."""
    tokens = torch.randint(VOCAB, mask.shape)
    tokens[mask.bool()] = torch.cat(rows, dim=1)[0]
    return tokens, (mask.cumsum(dim=1) - 1).clamp_min(0)


def same(outputs, mask, alone):
    torch.testing.assert_close(outputs[mask.bool()], torch.cat(alone, dim=1)[0], rtol=1e-3, atol=2e-4)


def stir(model):
    """Weights that all count: what a mechanism adds often begins as if it were not there."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def streamed(model, tokens, mask, positions, cache, first):
    """Logits of a text that is read in two goes and then token by token."""
    bounds = [0, first, first + 2, *range(first + 3, tokens.shape[1] + 1)]
    return torch.cat(
        [
            model(
                tokens[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                past_key_values=cache, use_cache=True,
            ).logits
            for start, end in pairwise(bounds)
        ],
        dim=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def swapped_llama(mixer):
    model = tiny_llama()
    try:
        swap(model, "model.layers.*.self_attn", as_attention(MIXERS[mixer]))
    except UserError as error:
        assert "cannot replace this attention" in str(error)
        pytest.skip(f"no mixer for a decoder: {error}")
    return stir(model)


@mixers
@torch.no_grad()
def test_padding_moves_no_logit_of_a_decoder_with_any_mixer(mixer):
    model, rows = swapped_llama(mixer), texts()
    alone = [model(row, use_cache=False).logits for row in rows]
    streams = hasattr(model.model.layers[0].self_attn.mixer, "init_state")
    for mask in masks().values():
        tokens, positions = padded(rows, mask)
        same(model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits, mask, alone)
        if streams:
            same(streamed(model, tokens, mask, positions, DynamicCache(), 17), mask, alone)


@mixers
@torch.no_grad()
def test_padded_texts_go_on_as_they_would_alone(mixer):
    model, rows = swapped_llama(mixer), texts((9, 1))
    mask = masks((9, 1))["left"]
    tokens, _ = padded(rows, mask)
    cached = {"use_cache": hasattr(model.model.layers[0].self_attn.mixer, "init_state")}
    generated = model.generate(tokens, attention_mask=mask, **GENERATE, **cached)
    for row, text in enumerate(rows):
        alone = model.generate(text, **GENERATE, **cached)
        assert torch.equal(generated[row, tokens.shape[1] :], alone[0, text.shape[1] :])


@mixers
@torch.no_grad()
def test_padding_moves_no_output_of_an_encoder_with_any_mixer(mixer):
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    try:
        swap(model, "encoder.layer.*.attention.self", as_attention(MIXERS[mixer]))
    except UserError as error:
        assert "cannot replace this attention" in str(error) or "looks back alone" in str(error)
        pytest.skip(f"no mixer for an encoder: {error}")
    rows = texts()
    stir(model)
    alone = [model(row).last_hidden_state for row in rows]
    for mask in masks().values():
        tokens, positions = padded(rows, mask)
        same(model(tokens, attention_mask=mask, position_ids=positions).last_hidden_state, mask, alone)


@mixers
@torch.no_grad()
def test_padding_moves_no_logit_of_our_own_models(mixer):
    for kind in (CausalLM, Encoder):
        try:
            model = stir(kind(VOCAB, 16, 1, MIXERS[mixer], positions="learned", max_length=32).eval())
        except (ValueError, TypeError):  # of a mixer that looks back alone, or never
            continue
        rows = texts()
        alone = [model(row) for row in rows]
        for mask in masks().values():
            tokens, _ = padded(rows, mask)
            same(model(tokens, mask=mask.bool()), mask, alone)


def test_padding_has_no_gradient():
    model, rows = tiny_llama(), texts((5, 2))
    swap(model, "model.layers.*.self_attn", as_attention("titans"))
    for mask in masks((5, 2)).values():
        tokens, positions = padded(rows, mask)
        x = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[mask.bool()].square().sum(), x)
        alone = []
        for row in rows:
            own = model.get_input_embeddings()(row).detach().requires_grad_()
            alone += torch.autograd.grad(model(inputs_embeds=own, use_cache=False).logits.square().sum(), own)
        assert not gradient[~mask.bool()].any()
        torch.testing.assert_close(gradient[mask.bool()], torch.cat(alone, dim=1)[0], rtol=1e-3, atol=1e-3)


CONVERTED = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=VOCAB, n_positions=64, initializer_range=0.3)
    ),
    "llama": tiny_llama,
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)),
    "bert": lambda: BertLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(
            n_layers=1, dim=16, hidden_dim=16, n_heads=4, vocab_size=VOCAB, max_position_embeddings=64,
            initializer_range=0.3,
        )
    ),
}  # fmt: skip
SMALL = {"rat": {"chunk": 3}, "titans": {"chunk": 3, "window": 4}}
SLUGS = [slug for slug, card in catalog.cards().items() if card.has("convert")]


@pytest.mark.filterwarnings("ignore::provenn.huggingface.WindowLifted")
@pytest.mark.parametrize("family", CONVERTED)
@pytest.mark.parametrize("slug", SLUGS)
@torch.no_grad()
def test_padding_moves_no_logit_of_a_converted_model_or_is_refused(slug, family):
    try:
        model = convert(CONVERTED[family]().eval(), slug, **SMALL.get(slug, {}))
    except UserError as error:
        assert "cannot serve" in str(error)
        return
    stir(model)
    rows = texts((7, 10, 2))
    alone = [model(row).logits for row in rows]
    for name, mask in masks((7, 10, 2)).items():
        tokens, positions = padded(rows, mask)
        if family == "distilbert" and name != "right":
            continue  # a host that takes no positions counts padding among them
        given = {"position_ids": positions + (2 if family == "roberta" else 0)} if family != "distilbert" else {}
        if name == "inside" and not conversion_of(slug).gaps:
            with pytest.raises(UserError, match="padding stands between two tokens of one text"):
                model(tokens, attention_mask=mask, **given)
            continue
        same(model(tokens, attention_mask=mask, **given).logits, mask, alone)
        if family_of(model.config).causal:
            make = conversion_of(slug).cache
            for cache in (DynamicCache(), *([make(model)] if make else [])):
                same(streamed(model, tokens, mask, positions, cache, 9), mask, alone)


@torch.no_grad()
def test_a_batch_whose_texts_differ_in_length_can_be_chosen_from_repeated_and_copied():
    model, mask = tiny_llama(), masks((6, 4, 1))["left"]
    swap(model, "model.layers.*.self_attn", as_attention("window"))
    rows = texts((6, 4, 1))
    tokens, positions = padded(rows, mask)
    cache = DynamicCache()
    given = {"use_cache": True, "past_key_values": cache}
    model(tokens, attention_mask=mask, position_ids=positions, **given)
    chosen = torch.tensor([2, 2, 0])
    other = copy.deepcopy(cache)
    cache.reorder_cache(chosen)
    other.batch_repeat_interleave(2)
    new = torch.randint(1, VOCAB, (1, 1))
    for past, order in ((cache, chosen), (other, torch.arange(3).repeat_interleave(2))):
        grown = torch.cat([mask[order], torch.ones(len(order), 1, dtype=torch.long)], dim=1)
        at = grown.sum(dim=1, keepdim=True) - 1
        logits = model(
            new.expand(len(order), 1), attention_mask=grown, position_ids=at, past_key_values=past, use_cache=True
        ).logits[:, -1]
        for row, source in zip(logits, order.tolist()):
            alone = model(torch.cat([rows[source], new], dim=1), use_cache=False).logits[0, -1]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_padding_is_the_same_in_every_form_of_mask():
    real = masks((4, 2))["both"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    whole = (causal & real[:, None, :])[:, None]
    low = torch.finfo(torch.float32).min
    forms = [
        real,
        real.int(),
        real.float(),
        torch.zeros(real.shape).masked_fill(~real, -torch.inf),
        whole,
        whole.long(),
    ]
    forms += [
        torch.zeros(whole.shape).masked_fill(~whole, low),
        torch.zeros(whole.shape).masked_fill(~whole, -torch.inf),
    ]
    forms += [whole.expand(2, 4, *whole.shape[2:]), real[:, None, None, :]]
    for mask in forms:
        assert torch.equal(padding_of(mask, real.shape[1], causal=True), real)
    with pytest.raises(UserError, match="differs from head to head"):
        padding_of(torch.stack([whole, whole & False], dim=2)[:, 0], real.shape[1], causal=True)
    with pytest.raises(UserError, match="ends with the 9 new tokens"):
        padding_of(real, 9, causal=True)
