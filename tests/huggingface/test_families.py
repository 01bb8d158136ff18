"""Every family of models with every mechanism that it can have: forward, generate, save, load, undo; or the reason."""

import copy
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
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
    RobertaForSequenceClassification,
)

from provenn.core.errors import UserError
from provenn.huggingface import (
    FAMILIES,
    StateCache,
    Text,
    WindowLifted,
    attentions,
    conversion_of,
    convert,
    family_of,
    learn,
    revert,
    tune,
)
from provenn.huggingface.families import max_tokens
from provenn.nn.attention import SoftmaxAttention
from provenn.papers.aaren import AarenAttention
from provenn.papers.rat import RATMixer
from provenn.papers.titans import MemoryAsGate

VOCAB = 60
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.3}
DEEP = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, **SIZES}
TURNED = {**DEEP, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
NARROW = {"n_layers": 2, "dim": 16, "hidden_dim": 32, "n_heads": 4, **SIZES}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, bos_token_id=0, eos_token_id=0, **SIZES))


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**TURNED, **options}))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**TURNED, rope_theta=1e6))


def mistral(**options):
    return MistralForCausalLM(MistralConfig(**{**TURNED, "sliding_window": None, **options}))


def roberta(kind=RobertaForMaskedLM, **options):
    return kind(RobertaConfig(**DEEP, **options))


def distilbert(kind=DistilBertForMaskedLM, **options):
    return kind(DistilBertConfig(**NARROW, **options))


DECODERS = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "mistral": mistral}
ENCODERS = {"roberta": roberta, "distilbert": distilbert}
OPTIONS = {"hedgehog": {}, "moh": {}, "aaren": {}, "rat": {"chunk": 4}, "titans": {"window": 4, "chunk": 4}}
# Hedgehog and MoH in GPT-2 and Llama have tests of their own.
CAUSAL = [
    *((family, slug) for family in ("qwen2", "mistral") for slug in ("hedgehog", "moh", "rat", "titans")),
    *((family, slug) for family in ("gpt2", "llama") for slug in ("rat", "titans")),
    ("gpt2", "aaren"),
]
GENERATE = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(tokens=12, padding=0):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(2, VOCAB, (2, tokens)), "attention_mask": mask}


def close(actual, expected):
    # Weights that lie elsewhere in memory are added up in another order: rounding, never more.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def same_network(again, model, given):
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    close(again(**given).logits, model(**given).logits)


def convert_and_stir(model, slug, **options):
    """What is new away from where it starts, so that what is compared is not trivial."""
    old = set(dict(model.named_parameters()))
    convert(model, slug, **{**OPTIONS[slug], **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in old:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(("family", "slug"), CAUSAL)
def test_a_decoder_is_converted_generates_is_found_again_and_undone(family, slug, tmp_path):
    model, given = DECODERS[family]().eval(), batch(padding=5)
    before = model(**given).logits
    convert_and_stir(model, slug)
    after = model(**given).logits
    assert (after - before).abs().max() > 1e-2
    # With a cache, of states or of keys and values, it says what it says without.
    for prompt in (given, batch()):
        assert torch.equal(model.generate(**prompt, **GENERATE), model.generate(**prompt, **GENERATE, use_cache=False))
    beams = {**GENERATE, "num_beams": 3}
    assert torch.equal(model.generate(**given, **beams), model.generate(**given, **beams, use_cache=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    same_network(again, model, given)
    twin = copy.deepcopy(model)
    close(revert(twin)(**given).logits, before)
    close(model(**given).logits, after)
    close(revert(again)(**given).logits, before)
    assert set(again.state_dict()) == set(DECODERS[family]().state_dict())


@pytest.mark.parametrize(("family", "slug"), [(family, slug) for family in ENCODERS for slug in ("hedgehog", "moh")])
def test_an_encoder_is_converted_found_again_and_undone(family, slug, tmp_path):
    model, given = ENCODERS[family]().eval(), batch(padding=3)
    before = model(**given).logits
    after = convert_and_stir(model, slug)(**given).logits
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    same_network(again, model, given)
    close(revert(again)(**given).logits, before)


@pytest.mark.parametrize(
    "model",
    [
        roberta(RobertaForSequenceClassification, num_labels=5),
        distilbert(DistilBertForSequenceClassification, num_labels=5),
    ],
    ids=["roberta", "distilbert"],
)
def test_a_classifier_of_a_new_family_is_tuned_by_lora_and_found_again(model, tmp_path):
    given = {**batch(), "labels": torch.tensor([1, 4])}
    convert(model, "hedgehog").eval()
    before = model(**given).loss.item()
    tune(model.train(), 20 * [given], "lora", lr=1e-2)
    # Without dropout, whose noise is as large as what is learned.
    assert model.eval()(**given).loss < 0.8 * before
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    same_network(again, model, given)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "roberta", "distilbert"])
def test_lora_reaches_every_attention_of_a_new_family(family):
    model = {**DECODERS, **ENCODERS}[family]()
    before = copy.deepcopy(model.state_dict())
    tune(model, 2 * [{**batch(), "labels": torch.randint(1, VOCAB, (2, 12))}], "lora", lr=1e-2)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 4 * 2, changed  # q, k, v and o of two layers


@pytest.mark.parametrize(
    ("slug", "build", "reason"),
    [
        *(
            ("aaren", build, "rotary positions make that weight depend on the distance")
            for build in (llama, qwen2, mistral)
        ),
        ("aaren", roberta, "aaren cannot serve RoBERTa: it attends over prefixes"),
        ("rat", distilbert, "rat cannot serve DistilBERT: its chunks are read from the first token on"),
        ("titans", roberta, "titans cannot serve RoBERTa: its memory learns as it reads"),
    ],
)
def test_what_mathematics_forbids_is_refused_with_the_reason_and_the_model_left_alone(slug, build, reason):
    model, given = build().eval(), batch()
    names, logits = list(model.state_dict()), model(**given).logits
    with pytest.raises(UserError, match=reason):
        convert(model, slug)
    assert list(model.state_dict()) == names and torch.equal(model(**given).logits, logits)


@pytest.mark.parametrize(
    ("slug", "options", "message"),
    [
        ("rat", {"chunk": 0}, "chunk must be a whole number of at least 1, got 0"),
        ("rat", {"positions": "here"}, "positions must be token or chunk"),
        ("rat", {"depth": 2}, "rat takes no option depth; it takes chunk, positions, gate_bias"),
        ("moh", {"heads": 2}, "moh takes no option heads"),
        ("aaren", {"heads": 2}, "aaren takes no option heads; it takes none"),
        ("titans", {"window": 0}, "window must be a whole number of at least 1, got 0"),
        ("rat", {"gate_bias": "low"}, "rat cannot be put into this GPT-2 with gate_bias=.low."),
        ("titans", {"depth": 0}, "depth must be at least 1, got 0"),
        ("titans", {"layers": 2}, "layers"),
    ],
)
def test_options_that_a_mechanism_does_not_take_are_refused(slug, options, message):
    with pytest.raises(UserError, match=message):
        convert(gpt2(), slug, **options)


def weigh(linear, conv):
    """A linear map from columns of GPT-2's transposed one."""
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)


def test_a_converted_gpt2_attends_as_the_papers_aaren_does():
    model = convert_and_stir(gpt2().eval(), "aaren")
    host, x = attentions(model)[0].module, torch.randn(2, 9, 16)
    softmax = SoftmaxAttention(16, 4)
    parts = host.c_attn.weight.T.chunk(3), host.c_attn.bias.chunk(3)
    for linear, weight, bias in zip((softmax.query, softmax.key, softmax.value), *parts):
        linear.load_state_dict({"weight": weight, "bias": bias})
    weigh(softmax.out, host.c_proj)
    paper = AarenAttention.from_softmax(softmax)
    paper.token = host.aaren.token
    torch.testing.assert_close(host(x)[0], paper(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["token", "chunk"])
def test_a_converted_llama_attends_as_the_papers_rat_does(positions):
    model = convert_and_stir(llama(num_key_value_heads=4).eval(), "rat", positions=positions)
    tokens = batch(tokens=11)["input_ids"]
    host, x = attentions(model)[0].module, torch.randn(2, 11, 16)
    paper = RATMixer(16, 4, chunk=4, groups=4, positions=positions)
    z, g = host.companion.gates.weight.chunk(2)
    with torch.no_grad():
        paper.project.weight.copy_(torch.cat([z, host.v_proj.weight, g, host.q_proj.weight, host.k_proj.weight]))
        paper.out.weight.copy_(2 * host.o_proj.weight)
        paper.gate_bias.copy_(host.companion.gate_bias)
    rotation = model.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    theirs, _ = host(x, position_embeddings=rotation, attention_mask=None)
    torch.testing.assert_close(theirs, paper(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS)
def test_rat_with_chunks_of_one_and_closed_gates_is_the_host(build):
    model, given = build().eval(), batch(padding=3)
    logits = model(**given).logits
    real = given["attention_mask"].bool()
    convert(model, "rat", chunk=1, gate_bias=-30.0)
    torch.testing.assert_close(model(**given).logits[real], logits[real], rtol=1e-3, atol=1e-3)


def test_a_converted_llama_attends_as_the_papers_mag_does():
    model = convert_and_stir(llama(num_key_value_heads=4).eval(), "titans", persistent=3)
    host, x = attentions(model)[0].module, torch.randn(2, 11, 16)
    paper = MemoryAsGate(16, 4, window=4, persistent=3, chunk=4)
    maps = {name: getattr(host, f"{name[0]}_proj").weight for name in ("query", "key", "value", "out")}
    paper.load_state_dict(
        {f"attention.{name}.weight": weight for name, weight in maps.items()} | host.companion.state_dict()
    )
    rotation = model.model.rotary_emb(x, torch.arange(11)[None])
    ours, _ = host(x, position_embeddings=rotation, attention_mask=None)
    torch.testing.assert_close(ours, paper(x), rtol=1e-3, atol=1e-4)


def test_what_is_new_is_trained_alone():
    for slug, part in (("aaren", "aaren"), ("rat", "companion"), ("titans", "companion")):
        model = convert(gpt2(), slug, **OPTIONS[slug])
        before = copy.deepcopy(model.state_dict())
        given = batch()
        stage = conversion_of(slug).prepare(model, 5 * [{**given, "labels": given["input_ids"]}], 1e-2)
        losses = learn(model, stage)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert len(losses) == 5 and changed and all(part in name for name in changed)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("slug", ["rat", "titans"])
def test_a_new_mechanism_trains_with_padding_in_mixed_precision(slug):
    model = convert(llama(), slug, **OPTIONS[slug]).train()
    given = batch(padding=3)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**given, labels=labels).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("build", "kept"),
    [
        (lambda: mistral(sliding_window=5), {"sliding_window": 5}),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**TURNED, use_sliding_window=True, sliding_window=5, max_window_layers=1)
            ),
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
    ],
)
def test_a_window_of_the_host_is_lifted_with_a_warning_and_comes_back(build, kept, tmp_path):
    model, given = build().eval(), batch(tokens=12)
    logits = model(**given).logits
    with pytest.warns(WindowLifted, match="windows of 5 tokens; the mechanism reads the whole text"):
        convert(model, "moh")
    assert model.config.conversion["window"] == kept
    # The window gone, generating with transformers' cache is generating without.
    assert torch.equal(model.generate(**given, **GENERATE), model.generate(**given, **GENERATE, use_cache=False))
    model.save_pretrained(tmp_path)
    for converted in (model, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(revert(converted)(**given).logits, logits, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(mistral(sliding_window=64), "moh")  # as long as the model's positions: nobody could feel it


def test_roberta_has_fewer_positions_than_its_table(tmp_path):
    model = roberta()
    assert max_tokens(model.config) == 62 == 64 - model.config.pad_token_id - 1
    model(torch.full((1, 62), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 63), 5))
    with pytest.raises(UserError, match="between 2 and the 62 positions"):
        Text.of(tmp_path, None, model, length=63)


def test_a_state_of_aaren_does_not_grow_and_a_table_of_families_is_whole():
    model, cache = convert(gpt2().eval(), "aaren"), StateCache()
    sizes = set()
    with torch.no_grad():
        for tokens in (1, 7, 30):
            model(torch.randint(1, VOCAB, (1, tokens)), past_key_values=cache, use_cache=True)
            sizes.add(cache.nbytes)
    assert sizes == {2 * 4 * 4 * (2 + 4)} and cache.get_seq_length() == 38
    for build in (*DECODERS.values(), *ENCODERS.values()):
        model = build()
        family = family_of(model.config)
        assert family is FAMILIES[model.config.model_type] and len(attentions(model)) == 2
        assert family.causal == model.can_generate()
