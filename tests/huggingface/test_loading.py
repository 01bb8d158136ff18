"""What is looked at before the weights of a model, and how often the hub is asked."""

import json
import shlex

import huggingface_hub
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
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
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from provenn import huggingface
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.huggingface import Source, Text, load
from provenn.huggingface.tuning import Spans

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
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, decoder_start_token_id=0,
            relative_attention_num_buckets=8, relative_attention_max_distance=10,
        )
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=4)
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<end>", "<mask>", "<extra_id_0>", "<extra_id_1>"]
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


@pytest.fixture
def photos(tmp_path):
    """Dark and light squares, in a folder each."""
    for name, value in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (value, value + i, value)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_the_command_line_converts_t5_on_the_task_that_it_was_trained_on(folder, tmp_path, capsys):
    host, out = folder("t5"), tmp_path / "out"
    line = (
        f"convert urpe {host} --data {tmp_path / 'story.txt'} -o {out} --steps 1 --prepare-steps 1 --length 16 --json"
    )
    assert main(shlex.split(line)) == 0
    report = json.loads(capsys.readouterr().out)
    # Ones leave the model what it was; then they are trained.
    assert report["converted"] == pytest.approx(report["before"], rel=1e-6) and report["tuned"] != report["converted"]
    assert report["parameters"] == 2 * 8 * 4
    model, tokenizer = load(out)
    assert model.config.conversion == {"paper": "urpe", "options": {}}
    tables = [value for name, value in model.named_parameters() if "urpe" in name]
    assert len(tables) == 2 and not any((table == 1).all() for table in tables)
    tokens = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    again = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    assert again.generate(tokens, max_new_tokens=4).equal(model.eval().generate(tokens, max_new_tokens=4))


def test_the_command_line_converts_swin_on_pictures(folder, photos, tmp_path, capsys):
    host, out = folder("swin"), tmp_path / "out"
    settings = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2]}
    (host / "preprocessor_config.json").write_text(json.dumps(settings))
    line = f"convert urpe {host} --data {photos} -o {out} --steps 1 --prepare-steps 1 --tune lora"
    assert main(shlex.split(line)) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and f"added    {49 * (2 + 4)} parameters" in said
    assert json.loads((out / "preprocessor_config.json").read_text()) == settings
    json.loads((out / "conversion.json").read_text(), parse_constant=pytest.fail)  # no NaN, which JSON has not
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.conversion["paper"] == "urpe"


def test_spans_that_a_source_lacks_are_what_is_to_be_told(folder):
    config = T5Config(decoder_start_token_id=7)
    spans = Spans(torch.tensor([90, 91, 92, 93]), 7, 99)
    assert Spans.of(load(folder("t5"))[1], config).marks.tolist() == [2, 3]
    rows = torch.arange(40).expand(5, -1) + torch.randint(40, (5, 1))
    batch = spans.batch(rows, torch.Generator().manual_seed(0))
    assert batch["decoder_input_ids"][:, 0].eq(7).all()
    assert batch["decoder_input_ids"][:, 1:].equal(batch["labels"][:, :-1])
    starts = set()
    for row, source, target in zip(rows.tolist(), batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert source[-1] == target[-1] == 99 and len(target) == 6 + 2 + 1  # 15 % of 40, in spans of about 3
        whole = []
        for token in source[:-1]:
            if token < 90:
                whole.append(token)
                continue
            rest = target[target.index(token) + 1 :]
            span = rest[: next(i for i, other in enumerate(rest) if other >= 90)]
            assert span
            whole += span
        assert whole == row
        starts.add(source.index(90))
    assert len(starts) > 1
    for length in (2, 3, 7):
        short = spans.batch(rows[:, :length], torch.Generator().manual_seed(0))
        assert short["input_ids"].shape[1] + short["labels"].shape[1] == length + 2 + 2


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("swin", "urpe {host} --data stdlib", "takes images: --data must be a folder of class folders"),
        ("swin", "urpe {host} --data {photos} --length 8", "--length sets rows of text"),
        ("swin", "hedgehog {host} --data {photos}", "hedgehog cannot serve Swin: it takes no biases"),
        ("t5", "moh {host} --data {story}", "moh cannot serve T5: it takes no biases"),
        ("t5", "urpe {host} --data {story} --set max_length=0", "max_length must be a whole number of at least 1"),
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
    family, words, message, folder, photos, tmp_path, capsys, monkeypatch
):
    def never(self):
        raise AssertionError("the weights were read first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Source, "weights", never)
    line = words.format(host=folder(family), story=tmp_path / "story.txt", photos=photos)
    given = "" if "--length" in line or family == "swin" else " --length 16"
    assert main(shlex.split(f"convert {line} -o out{given}")) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not (tmp_path / "out").exists()


def test_t5_without_marks_in_its_tokenizer_is_refused(folder, tmp_path):
    host = folder("t5")
    file = host / "tokenizer.json"
    file.write_text(file.read_text().replace("<extra_id_0>", "<other>"))
    tokenizer = load(host)[1]
    with pytest.raises(UserError, match="its tokenizer has no token <extra_id_0>"):
        Text.of(tmp_path / "story.txt", tokenizer, Source.of(host).outline, length=16)
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        Spans.of(load(folder("t5"))[1], T5Config())


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
    for path in ("./nothing", "/no/such/folder", "a/b/c"):
        with pytest.raises(UserError, match="there is no such folder"):
            load(path)
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
