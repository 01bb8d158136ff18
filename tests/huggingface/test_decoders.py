"""Folders that transformers wrote, as models of ours: the same outputs, gradients and texts, and back again."""

import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.initialization import no_init_weights

from provenn.core.errors import UserError
from provenn.huggingface.decoders import LAYOUTS, LayerFeatures, from_config, from_huggingface, save_huggingface
from provenn.nn.decoder import Decoder, RotaryPositions, Stretch
from provenn.nn.language import init_narrow
from provenn.nn.vision_language import MLPProjector, VisionLanguageModel

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IMAGE = 63
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
LONG = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PATCHES = {
    "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def llava(vision, text=None, **options) -> LlavaForConditionalGeneration:
    text = LlamaConfig(**SIZES) if text is None else text
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, initializer_range=0.2, **options
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> Qwen2VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tokens = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    text = {**SIZES, "rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=PATCHES, text_config=text, **tokens))


FOLDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LONG, head_dim=10)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "llava": lambda: llava(CLIPVisionConfig(**VISION)),
    "llava-siglip": lambda: llava(
        SiglipVisionConfig(**VISION), Qwen2Config(**SIZES), vision_feature_layer=[-1, 2],
        vision_feature_select_strategy="full", multimodal_projector_bias=False,
    ),
    "qwen2_vl": qwen2_vl,
}  # fmt: skip


class Case(NamedTuple):
    ours: Decoder | VisionLanguageModel
    theirs: PreTrainedModel
    tokens: torch.Tensor
    mask: torch.Tensor
    our_images: dict[str, torch.Tensor]
    their_images: dict[str, torch.Tensor]

    @property
    def layout(self):
        return LAYOUTS[self.theirs.config.model_type]

    def their_logits(self):
        return self.theirs(input_ids=self.tokens, attention_mask=self.mask.long(), **self.their_images).logits

    def our_logits(self):
        return self.ours(self.tokens, mask=self.mask, **self.our_images)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    written = {}
    for name, make in FOLDERS.items():
        torch.manual_seed(len(name))
        theirs = make().eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.dim() == 1:  # no bias 0 and no scale 1
                    parameter.add_(0.2 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path_factory.mktemp(name))
        theirs.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, use_cache=True)
        written[name] = theirs, theirs.name_or_path or tmp_path_factory.getbasetemp() / f"{name}0"
    return written


@pytest.fixture(params=FOLDERS)
def case(request, folders) -> Case:
    """A batch of three rows: two images apart, words alone, and an image at the start; the last two left-padded."""
    theirs, folder = folders[request.param]
    theirs.zero_grad()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (3, 16), generator=generator)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1, :6], mask[2, :3] = False, False
    tokens[~mask] = 0
    if request.param in ("llama", "llama-biased", "qwen2"):
        return Case(from_huggingface(folder), theirs, tokens, mask, {}, {})
    for row, start in ((0, 2), (0, 9), (2, 3)):
        tokens[row, start : start + 4] = IMAGE
    if request.param == "qwen2_vl":
        grids = torch.tensor([[1, 4, 4], [1, 2, 8], [1, 8, 2]])
        patches = torch.randn(48, 3 * 2 * 4**2, generator=generator)
        theirs_too = {"image_grid_thw": grids, "mm_token_type_ids": (tokens == IMAGE).int()}
        ours = {"images": patches, "grids": grids}
        return Case(from_huggingface(folder), theirs, tokens, mask, ours, {"pixel_values": patches, **theirs_too})
    images = torch.randn(3, 3, 16, 16, generator=generator)
    return Case(from_huggingface(folder), theirs, tokens, mask, {"images": images}, {"pixel_values": images})


def test_outputs_and_gradients_are_those_of_transformers(case):
    ours, theirs = case.our_logits(), case.their_logits()
    assert theirs[case.mask].std() > 0.3
    torch.testing.assert_close(ours[case.mask], theirs[case.mask], **CLOSE)
    for logits in (ours, theirs):
        torch.nn.functional.cross_entropy(logits[case.mask], case.tokens[case.mask]).backward()
    named, reached = dict(case.theirs.named_parameters()), 0
    for name, parameter in case.ours.named_parameters():
        expected = named[case.layout.theirs(name)].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, **CLOSE, msg=name)
            reached += bool(expected.any())
    assert reached > 0.7 * len(named) and sum(p.numel() for p in case.ours.parameters()) == case.theirs.num_parameters()


def test_greedy_texts_are_those_of_transformers(case):
    theirs = case.theirs.generate(
        input_ids=case.tokens, attention_mask=case.mask.long(), max_new_tokens=10, do_sample=False, **case.their_images
    )
    ours = torch.stack(list(case.ours.generate(case.tokens, 10, mask=case.mask, temperature=0, **case.our_images)), 1)
    assert torch.equal(ours, theirs[:, 16:]) and len(set(ours.flatten().tolist())) > 5


def test_what_is_saved_is_read_by_transformers(case, tmp_path):
    with torch.no_grad():
        for parameter in case.ours.parameters():
            parameter.mul_(1.1)
    expected = case.our_logits()
    save_huggingface(case.ours, tmp_path)
    again, found = type(case.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()) and again.config.get_text_config().eos_token_id == 2
    torch.testing.assert_close(
        case._replace(theirs=again.eval()).their_logits()[case.mask], expected[case.mask], **CLOSE
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"head_dim": 6, "rotary": RotaryPositions(700, stretch=Stretch(2, 1, 4, 8))}, LlamaForCausalLM),
        ({"bias": True, "out_bias": True, "tied": False, "max_length": 40}, LlamaForCausalLM),
        ({"bias": True, "eps": 1e-3, "layers": 3}, Qwen2ForCausalLM),
    ],
)
def test_a_model_of_ours_is_read_by_transformers(options, kind, tmp_path):
    model = init_narrow(Decoder(**{"vocab": 50, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, **options}))
    save_huggingface(model, tmp_path)
    tokens = torch.randint(50, (2, 20))
    torch.testing.assert_close(kind.from_pretrained(tmp_path)(tokens).logits, model(tokens), **CLOSE)
    torch.testing.assert_close(from_huggingface(tmp_path)(tokens), model(tokens), rtol=0, atol=0)


def test_a_model_of_ours_with_a_tower_of_transformers_is_read_by_it(tmp_path):
    tower = LayerFeatures(CLIPVisionModel(CLIPVisionConfig(**VISION)), layer=2)
    model = VisionLanguageModel(Decoder(64, 32, 2, 4, bias=True), tower, MLPProjector(24, 32), image_token=IMAGE)
    save_huggingface(model.eval(), tmp_path)
    tokens, images = torch.tensor([[5, *[IMAGE] * 5, 6]]), torch.randn(1, 3, 16, 16)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(input_ids=tokens, pixel_values=images).logits, model(tokens, images), **CLOSE)


def test_precision_is_that_of_the_files(folders, tmp_path):
    theirs, _ = folders["qwen2"]
    torch.manual_seed(0)
    type(theirs)(theirs.config).bfloat16().save_pretrained(tmp_path)
    model = from_huggingface(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training


LLAVA = {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
         "text_config": {"model_type": "llama", "vocab_size": 32064}}  # fmt: skip
QWEN2_VL = {
    "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published", "vision"),
    [
        (LlavaConfig(**LLAVA), 7_063_427_072, 303_507_456 + 20_979_712),
        (Qwen2VLConfig(text_config=QWEN2_VL, vision_config={"hidden_size": 1536}), 2_208_985_600, 665_271_296),
    ],
    ids=["LLaVA-1.5-7B", "Qwen2-VL-2B"],
)
def test_published_counts(config, published, vision):
    with torch.device("meta"), no_init_weights():
        model = from_config(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(counts.values()) == published and counts["vision"] + counts["projector"] == vision


def test_folders_that_cannot_be_read_give_one_line(folders, tmp_path):
    def line(action, *args):
        with pytest.raises(UserError) as caught:
            action(*args)
        words = str(caught.value)
        assert "\n" not in words
        return words.replace(str(tmp_path), "FOLDER")

    assert line(from_huggingface, tmp_path / "none").endswith("there is no such folder")
    assert line(from_huggingface, tmp_path).startswith("FOLDER cannot be loaded as a model: ")
    GPT2Config().save_pretrained(tmp_path)
    able = "these can: llama, qwen2, llava, qwen2_vl"
    assert line(from_huggingface, tmp_path) == f"models of type 'gpt2' cannot be read; {able}"
    theirs, _ = folders["llama"]
    theirs.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    values = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight"
    changes = {
        "lack 1 parameters": {name: value for name, value in values.items() if name != lost},
        "have other sizes than its config says for 1 parameters": {**values, lost: values[lost][:3].clone()},
    }
    for words, changed in changes.items():
        save_file(changed, file, metadata={"format": "pt"})
        assert line(from_huggingface, tmp_path) == f"the weights of FOLDER {words}, {lost} among them"
    save_file({**values, lost: values[lost].long()}, file, metadata={"format": "pt"})
    assert lost in line(from_huggingface, tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    assert line(from_huggingface, tmp_path).startswith("the weights of FOLDER cannot be loaded: ")
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    for change, words in (
        ({"mlp_bias": True}, "a llama model with biases in its feed-forward part cannot be read"),
        ({"hidden_act": "gelu"}, "a llama model with the activation gelu cannot be read"),
        ({"attention_dropout": 0.1}, "a llama model with dropout of attention weights cannot be read"),
        ({"rope_parameters": yarn}, "rotary positions of type 'yarn' cannot be read; these can: default, llama3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert line(from_huggingface, tmp_path) == words
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert line(from_config, sliding) == "a qwen2 model with a sliding window cannot be read"
    vision = CLIPVisionConfig(**VISION)
    other = LlavaConfig(vision_config=vision, text_config=MistralConfig(**SIZES))
    assert line(from_config, other).startswith("decoders of type 'mistral' cannot be read; these can: llama, qwen2")
    other = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), projector_hidden_act="relu")
    assert line(from_config, other) == "a projector with relu is not read: expected gelu"


def test_models_that_transformers_lacks_are_refused(tmp_path):
    for model, words in (
        (VisionLanguageModel(Decoder(9, 8, 1, 2), image_token=7), "no family of transformers has a Identity with a "),
        (Decoder(9, 8, 1, 2, out_bias=True), "no family of transformers has a bias after attention alone"),
        (Decoder(9, 8, 1, 2, rotary=RotaryPositions(sections=(1, 1, 0))), "no family of transformers has sections of "),
    ):
        with pytest.raises(UserError, match=rf"^{words}"):
            save_huggingface(model, tmp_path)
