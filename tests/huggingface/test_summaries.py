"""Dialogues and their summaries, for a language model that writes one."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from provenn.core.errors import UserError  # noqa: E402
from provenn.huggingface import Summaries, convert  # noqa: E402

WORDS = ["Summarize", "this", "dialog", ":", "---", "Summary", "Anna", "Ben", "Dora", "hello", "hi", "meets", "."]


@pytest.fixture
def tokenizer():
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    entries = [{"dialogue": f"Anna : {'hi ' * n}Ben", "summary": "Anna meets Ben ."} for n in (1, 7, 3)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


def test_the_summary_alone_is_learned(folder, tokenizer, model):
    given = Summaries.of(folder, tokenizer, model, length=48, written=8)
    (batch,) = given.batches(1, 3, seed=0)
    for tokens, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        learned = labels != -100
        assert tokenizer.decode(tokens[learned]) == "Anna meets Ben . </s>" and torch.equal(
            tokens[learned], labels[learned]
        )
        assert mask.sum() == learned.nonzero().max() + 1 and not tokens[mask == 0].ne(2).any()
        assert tokenizer.decode(tokens[: learned.nonzero().min()]).startswith("<s> Summarize this dialog : Anna")
    assert given.stages(2) == {"steps": 3, "prepare_steps": 3}


def test_the_end_of_a_long_dialogue_is_kept(folder, tokenizer, model):
    given = Summaries.of(folder, tokenizer, model, length=20, written=8)
    prompt, _ = given.test[1]
    assert len(prompt) == 12 and tokenizer.decode(prompt).split().count("hi") == 3 and "Ben" in tokenizer.decode(prompt)


@pytest.mark.parametrize("mechanism", ["softmax", "hedgehog"])
def test_company_changes_no_summary(mechanism, folder, tokenizer, model):
    given = Summaries.of(folder, tokenizer, model, length=48, written=8)
    if mechanism != "softmax":
        convert(model, mechanism)
    together = given.write(model, 3)
    assert together == given.write(model, 1) and any(together)


def test_rouge_is_of_the_words_that_agree(folder, tokenizer, model, monkeypatch):
    given = Summaries.of(folder, tokenizer, model, length=48, written=8)
    monkeypatch.setattr(Summaries, "write", lambda self, model, batch_size: ["Anna meets Ben.", "Ben", "hello"])
    # F of precision and recall over 3 words: 1; 1 and 1/3; 0.
    assert given.quality(model, 2) == pytest.approx(100 * (1 + 0.5 + 0) / 3)


def test_refusals(folder, tokenizer, model):
    with pytest.raises(UserError, match="at most the 64 positions"):
        Summaries.of(folder, tokenizer, model, length=80)
    with pytest.raises(UserError, match="written must be less"):
        Summaries.of(folder, tokenizer, model, length=8, written=8)
    (folder / "test.json").write_text('[{"dialogue": 3}]')
    with pytest.raises(UserError, match=r"test\.json: expected a list of objects"):
        Summaries.of(folder, tokenizer, model, length=48, written=8)
    (folder / "test.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Summaries.of(folder, tokenizer, model, length=48, written=8)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UserError, match="causal language model"):
        Summaries.of(folder, tokenizer, bert, length=48, written=8)
