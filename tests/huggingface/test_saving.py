"""A changed model is saved with a note of its changes, given back to the bit, and never loaded as another one."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from provenn import insert_after, swap
from provenn.core.errors import UserError
from provenn.huggingface import Source, as_attention, convert, load_model, revert
from provenn.papers.rat import RATMixer
from provenn.surgery import remove

TOKENS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
CALL = r"provenn changed this model: load it by provenn\.huggingface\.load_model\(folder\)"


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "vocab_size": 60,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=4, vocab_size=60, n_positions=64)).eval()


def trained(model):
    """A step of training, after which no weight is what it was."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model.eval()


def same(again, model):
    ours, theirs = again.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert type(again) is type(model)


def refused(folder, *kinds):
    for kind in kinds:
        for options in ({}, {"attn_implementation": "eager"}, {"dtype": torch.float32}):
            with pytest.raises(ValueError, match=CALL):
                kind.from_pretrained(folder, **options)


CHANGES = {
    "all": lambda model: swap(model, "model.layers.*.self_attn", as_attention("rat", chunk=4)),
    "one": lambda model: swap(model, "model.layers.1.self_attn", as_attention("titans")),
    "class": lambda model: swap(model, "model.layers.*.self_attn", as_attention(RATMixer, heads=2)),
    "several": lambda model: (
        swap(model, "model.layers.0.self_attn", as_attention("prf")),
        insert_after(model, "model.layers.*.mlp", nn.RMSNorm, name="norm"),
        remove(model, "model.layers.1.post_attention_layernorm"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_given_back_to_the_bit_and_by_nothing_else(change, tmp_path):
    model = llama()
    CHANGES[change](model)
    trained(model).save_pretrained(tmp_path)
    same(load_model(tmp_path), model)
    refused(tmp_path, LlamaForCausalLM, AutoModelForCausalLM, AutoModel)
    # What was loaded is saved again with the same note.
    load_model(tmp_path).save_pretrained(tmp_path / "again")
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first["provenn_changes"] == again["provenn_changes"] and first["provenn"] == again["provenn"]


def test_a_folder_within_a_folder_is_loaded_as_transformers_does(tmp_path):
    model = llama()
    CHANGES["one"](model)
    llama(num_hidden_layers=1).save_pretrained(tmp_path)  # whose config is another
    trained(model).save_pretrained(tmp_path / "changed")
    same(load_model(tmp_path, subfolder="changed"), model)


def test_precision_shards_and_tied_embeddings_are_kept(tmp_path):
    for model in (llama(tie_word_embeddings=True).to(torch.bfloat16), gpt2()):
        where = "model.layers.0.self_attn" if isinstance(model, LlamaForCausalLM) else "transformer.h.*.attn"
        swap(model, where, as_attention("rat", chunk=4))
        folder = tmp_path / type(model).__name__
        trained(model).save_pretrained(folder, max_shard_size="2KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        again = load_model(folder)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        same(again, model)


def test_a_weight_in_another_precision_than_the_rest_keeps_it(tmp_path):
    model = llama()
    swap(model, "model.layers.0.self_attn", as_attention("rat", chunk=4))
    model.to(torch.bfloat16)
    model.model.layers[0].self_attn.mixer.float()
    model.save_pretrained(tmp_path)
    ours, theirs = load_model(tmp_path).state_dict(), model.state_dict()
    assert all(ours[name].dtype == value.dtype and torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_fresh_process_gives_the_same(tmp_path):
    model = llama()
    CHANGES["several"](model)
    trained(model).save_pretrained(tmp_path)
    with torch.no_grad():
        save_file({"tokens": TOKENS, "logits": model(TOKENS).logits}, tmp_path / "saved.safetensors")
    script = (
        "import sys, torch; from safetensors.torch import load_file; from provenn.huggingface import load_model;"
        "saved = load_file(sys.argv[1] + '/saved.safetensors');"
        "assert torch.equal(load_model(sys.argv[1])(saved['tokens']).logits, saved['logits'])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_a_function_of_ones_own_is_asked_for_again(tmp_path):
    def change(model):
        return swap(model, "model.layers.*.self_attn", as_attention(lambda dim: RATMixer(dim, 4, chunk=4)))

    model = llama()
    change(model)
    trained(model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a function of your own at model\.layers\.0\.self_attn.*rebuild=function"):
        load_model(tmp_path)
    same(load_model(tmp_path, rebuild=change), model)
    refused(tmp_path, LlamaForCausalLM, AutoModelForCausalLM)
    with pytest.raises(UserError, match="lack"):
        load_model(tmp_path, rebuild=lambda model: swap(model, "model.layers.*.self_attn", as_attention("urpe")))


def test_a_part_and_a_whole_that_share_a_config_are_both_noted(tmp_path):
    model = llama()
    swap(model.model, "layers.0.self_attn", as_attention("rat", chunk=4))
    model.save_pretrained(tmp_path / "whole")
    same(load_model(tmp_path / "whole"), model)
    refused(tmp_path / "whole", LlamaForCausalLM, AutoModelForCausalLM)
    model.model.save_pretrained(tmp_path / "part")
    refused(tmp_path / "part", LlamaModel, AutoModel)
    wrapper = nn.ModuleDict({"host": llama()})
    swap(wrapper, "host.model.layers.0.self_attn", as_attention("rat", chunk=4))
    wrapper["host"].save_pretrained(tmp_path / "wrapped")
    same(load_model(tmp_path / "wrapped"), wrapper["host"])


def test_changed_models_are_copied_and_pickled():
    model = llama()
    CHANGES["several"](model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(again, model)
        assert again.config.provenn_changes == model.config.provenn_changes
        assert type(again.config) is type(model.config) and isinstance(again.config, LlamaConfig)


def test_a_converted_model_is_not_loaded_as_its_host(tmp_path):
    model = convert(llama(), "hedgehog")
    model.save_pretrained(tmp_path)
    refused(tmp_path, LlamaForCausalLM)
    same(load_model(tmp_path), model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.conversion == model.config.conversion
    swap(model, "model.layers.1.self_attn", as_attention("rat", chunk=4))
    model.save_pretrained(tmp_path / "both")
    same(load_model(tmp_path / "both"), model)
    with pytest.raises(UserError, match=CALL):
        AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    with pytest.raises(UserError, match="only convert can be undone"):
        revert(model)
    changed = llama()
    swap(changed, "model.layers.1.self_attn", as_attention("rat"))
    with pytest.raises(UserError, match="convert it first"):
        convert(changed, "hedgehog")


def test_an_unchanged_model_is_loaded_as_ever(tmp_path):
    model = llama()
    with pytest.raises(UserError):
        swap(model, "model.layers.*.self_attn", as_attention("linear-global-attention"))
    model.save_pretrained(tmp_path)
    assert "provenn" not in (tmp_path / "config.json").read_text()
    same(load_model(tmp_path), model)
    same(LlamaForCausalLM.from_pretrained(tmp_path), model)


def test_weights_that_are_not_all_there_or_too_many_are_told(tmp_path):
    model = llama()
    CHANGES["all"](model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "mixer" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 parameters, {lost} among them"):
        load_model(tmp_path)
    save_file({**weights, "model.more": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit: the model lacks 1 parameters, model\.more among them"):
        load_model(tmp_path)
    for path in (tmp_path / "nothing", "/nothing", "./nothing"):
        with pytest.raises(UserError, match=f"{path} cannot be loaded as a model: there is no such folder$"):
            load_model(path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["provenn_changes"][0]["factory"] = {"class": "os:system", "arguments": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'os:system', which is no layer"):
        load_model(tmp_path)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_weights_of_no_floating_point_numbers_are_refused_by_name(tmp_path, dtype):
    gpt2().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "transformer.h.1.ln_1.bias"
    weights = load_file(file)
    message = f"model.safetensors: {name} is of type {str(dtype)[6:]} where the model has float32: give weights of fl"
    for stored in (name, name.removeprefix("transformer.")):  # as a body alone has it
        state = {n.removeprefix("transformer.") if stored != name else n: value for n, value in weights.items()}
        save_file({**state, stored: state[stored].to(dtype)}, file, {"format": "pt"})
        for load in (load_model, lambda folder: Source.of(folder).weights()):
            with pytest.raises(UserError, match=message.replace(name, stored)):
                load(tmp_path)
    halves = {name: value.bfloat16() for name, value in weights.items()}
    save_file(halves, file, {"format": "pt"})
    assert load_model(tmp_path).transformer.wte.weight.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
def test_pickled_weights_of_no_floating_point_numbers_are_refused_by_name(tmp_path, dtype):
    gpt2().save_pretrained(tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "transformer.h.1.ln_1.bias"
    torch.save({**weights, name: weights[name].to(dtype)}, tmp_path / "pytorch_model.bin")
    load_model(tmp_path)  # which reads the other file
    (tmp_path / "model.safetensors").unlink()
    message = f"pytorch_model.bin: {name} is of type {str(dtype)[6:]} where the model has float32: give weights of fl"
    for load in (load_model, lambda folder: Source.of(folder).weights()):
        with pytest.raises(UserError, match=message):
            load(tmp_path)
    torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(
        Source.of(tmp_path).weights().transformer.wte.weight, weights["transformer.wte.weight"].bfloat16()
    )


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch])
def test_what_is_no_folder_is_refused_in_one_line(tmp_path, make):
    make(tmp_path / "model")
    for load in (load_model, Source.of):
        with pytest.raises(UserError, match="model cannot be loaded as a model: it is no folder; give"):
            load(tmp_path / "model")


def test_weights_without_a_place_in_the_model_are_told_of(tmp_path):
    gpt2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "transformer.more": torch.ones(1)}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 parameters of .* are left out, transformer\.more among them"):
        Source.of(tmp_path).weights()


def test_adapters_go_onto_a_changed_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    CHANGES["one"](model)
    trained(model).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        nn.init.normal_(next(value for name, value in lora.named_parameters() if "lora_B" in name))
        lora.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, lora.eval()(TOKENS).logits)


def test_an_encoder_is_given_back(tmp_path):
    config = BertConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=8, num_attention_heads=4, vocab_size=60)
    model = BertModel(config).eval()
    swap(model, "encoder.layer.*.attention.self", as_attention("nprf"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
    refused(tmp_path, BertModel, AutoModel)
