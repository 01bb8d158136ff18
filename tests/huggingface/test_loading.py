"""What is looked at before the weights of a model, and how often the hub is asked."""

import shlex

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from provenn import huggingface
from provenn.cli import main
from provenn.errors import UserError
from provenn.huggingface import Source, load

DEEP = {
    "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "vocab_size": 60,
    "max_position_embeddings": 64,
}  # fmt: skip
FOLDERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=4, vocab_size=60, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DEEP)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DEEP, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DEEP, num_key_value_heads=2, sliding_window=8)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**DEEP)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(n_layers=1, dim=16, hidden_dim=16, n_heads=4, vocab_size=60, max_position_embeddings=64)
    ),
}


@pytest.fixture
def folder(tmp_path):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<end>", "<mask>"]
    inner.train_from_iterator(["the cat sat on the mat"], trainers.BpeTrainer(vocab_size=40, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", mask_token="<mask>")
    (tmp_path / "story.txt").write_text("the cat sat on the mat. " * 120)

    def save(family):
        torch.manual_seed(0)
        FOLDERS[family]().save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize(
    ("family", "slug"),
    [("qwen2", "rat"), ("mistral", "titans"), ("gpt2", "aaren"), ("roberta", "hedgehog"), ("distilbert", "moh")],
)
def test_the_command_line_converts_a_folder_of_every_family(family, slug, folder, tmp_path, capsys):
    host, out = folder(family), tmp_path / "out"
    line = f"convert {slug} {host} --data {tmp_path / 'story.txt'} -o {out} --steps 2 --prepare-steps 2 --length 16"
    assert main(shlex.split(line)) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and ("note     the model attended to windows of 8 tokens" in said) == (
        family == "mistral"
    )
    model, tokenizer = load(out)
    assert model.config.conversion["paper"] == slug
    auto = AutoModelForCausalLM if family in ("qwen2", "mistral", "gpt2") else AutoModelForMaskedLM
    again = auto.from_pretrained(out).eval()
    tokens = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("llama", "aaren {host} --data {story}", "aaren cannot serve Llama: its one query weighs a token once for all"),
        (
            "roberta",
            "rat {host} --data {story}",
            "rat cannot serve RoBERTa: its chunks are read from the first token on",
        ),
        ("llama", "rat {host} --data {story} --set chunk=0", "chunk must be a whole number of at least 1, got 0"),
        ("llama", "rat {host} --data {story} --set depth=2", "rat takes no option depth; it takes chunk, positions"),
        ("gpt2", "moh {host} --data {story} --set shared=much", "moh cannot be put into this GPT-2 with shared='much'"),
        ("llama", "hedgehog {host} --data {story} --tune some", "--tune takes full, lora, none"),
        ("llama", "hedgehog {host} --data {story} --lr 0", "--lr must be a positive number, got 0.0"),
        ("llama", "hedgehog {host} --data {story} --prepare-lr nan", "--prepare-lr must be a positive number, got nan"),
        ("llama", "hedgehog {host} --data nothing.txt", "nothing.txt"),
        ("llama", "hedgehog {host} --data {story} --length 65", "length must lie between 2 and the 64 positions"),
        ("llama", "hedgehog {host} --data {story} --device moon", "moon"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(
    family, words, message, folder, tmp_path, capsys, monkeypatch
):
    def never(self):
        raise AssertionError("the weights were read first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Source, "weights", never)
    line = words.format(host=folder(family), story=tmp_path / "story.txt")
    assert main(shlex.split(f"convert {line} -o out" + ("" if "--length" in line else " --length 16"))) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not (tmp_path / "out").exists()


def test_wrong_arguments_are_said_before_anything_of_the_model_is_looked_at(tmp_path, capsys):
    for words, message in (("--tune some", "--tune takes"), ("--lr -1", "--lr must be a positive number")):
        assert main(shlex.split(f"convert hedgehog nobody/nothing --data stdlib -o {tmp_path / 'out'} {words}")) == 2
        assert message in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def refuse(self, name, **options):
        asked.append((name, options))
        raise ConnectionError("no network\nand no more lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    message = "nobody/nothing cannot be loaded as a model: no folder here, and the hub does not answer: no network$"
    with pytest.raises(UserError, match=message):
        load("nobody/nothing")
    assert [name for name, _ in asked] == ["nobody/nothing"] and 0 < asked[0][1]["timeout"] <= 10
    for place in ("./nothing", "/no/such/folder", "a/b/c"):
        with pytest.raises(UserError, match="there is no such folder"):
            load(place)
    assert len(asked) == 1


def test_a_copy_of_the_hubs_does_where_the_hub_does_not(folder, monkeypatch):
    """Of a model that was fetched before, each file is then read without asking again."""
    seen = []

    def refuse(self, name, **options):
        raise ConnectionError("no network")

    def note(name, **options):
        seen.append(options)
        raise OSError("enough")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(folder("gpt2") / file))
    monkeypatch.setattr(huggingface.loading.AutoConfig, "from_pretrained", note)
    with pytest.raises(UserError, match="enough"):
        load("somebody/model")
    assert seen == [{"local_files_only": True}]
