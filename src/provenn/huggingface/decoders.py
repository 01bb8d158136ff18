"""Folders of Llama, Qwen2, LLaVA and Qwen2-VL as models of `provenn.nn`, and these as folders that transformers reads.

transformers does what it can do: it reads files of every form and age, checks configurations, makes vision towers, and
writes. Between its models and ours weights change their names and nothing else, and no tensor is copied.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from provenn.core.errors import UserError
from provenn.huggingface.families import Host
from provenn.huggingface.saving import check_folder, check_keys, check_stored_types, first_line
from provenn.nn.decoder import Decoder, RotaryPositions, Stretch
from provenn.nn.vision_language import MLPProjector, PatchMerger, VisionLanguageModel

Model = Decoder | VisionLanguageModel
DECODER = (  # parts of names, ours and theirs
    ("embed.", "embed_tokens."),
    ("blocks.", "layers."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".attention.query.", ".self_attn.q_proj."),
    (".attention.key.", ".self_attn.k_proj."),
    (".attention.value.", ".self_attn.v_proj."),
    (".attention.out.", ".self_attn.o_proj."),
    (".feedforward.gate.", ".mlp.gate_proj."),
    (".feedforward.linear1.", ".mlp.up_proj."),
    (".feedforward.linear2.", ".mlp.down_proj."),
)
TEXT = (("head.", "lm_head."), ("", "model."))  # prefixes, ours and theirs


@dataclass(frozen=True)
class Layout:
    """How a kind of folder is named: transformers' class, and the prefixes of names, ours and theirs."""

    kind: Any
    prefixes: tuple[tuple[str, str], ...] = TEXT

    def theirs(self, name: str) -> str:
        """transformers' name of a parameter or buffer of ours."""
        ours, prefix = next(pair for pair in self.prefixes if name.startswith(pair[0]))
        rest = name.removeprefix(ours)
        if ours in ("", "decoder."):
            for part, their_part in DECODER:
                rest = rest.replace(part, their_part)
        return prefix + rest


LAYOUTS = {
    "llama": Layout(LlamaForCausalLM),
    "qwen2": Layout(Qwen2ForCausalLM),
    "llava": Layout(
        LlavaForConditionalGeneration,
        (
            ("decoder.head.", "lm_head."),
            ("decoder.", "model.language_model."),
            ("vision.tower.", "model.vision_tower."),
            ("projector.linear1.", "model.multi_modal_projector.linear_1."),
            ("projector.linear2.", "model.multi_modal_projector.linear_2."),
        ),
    ),
    "qwen2_vl": Layout(
        Qwen2VLForConditionalGeneration,
        (
            ("decoder.head.", "lm_head."),
            ("decoder.", "model.language_model."),
            ("vision.tower.", "model.visual."),
            ("projector.norm.", "model.visual.merger.ln_q."),
            ("projector.linear1.", "model.visual.merger.mlp.0."),
            ("projector.linear2.", "model.visual.merger.mlp.2."),
        ),
    ),
}


class LayerFeatures(nn.Module):
    """A tower of transformers, CLIP's or SigLIP's, that gives the tokens of one of its layers.

    Args:
        tower: transformers' model.
        layer: which, 0 being the embedding and −1 the last; of several, the features stand side by side.
        drop_first: whether the first token, CLIP's class token, is left out.

    Shapes: images (batch, channels, height, width) to (batch, tokens, dim).
    """

    def __init__(self, tower: nn.Module, *, layer: int | list[int] = -1, drop_first: bool = False):
        super().__init__()
        self.tower, self.layer, self.drop_first = tower, layer, drop_first

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        states = self.tower(images, output_hidden_states=True).hidden_states
        layers = [self.layer] if isinstance(self.layer, int) else self.layer
        return torch.cat([states[layer][:, int(self.drop_first) :] for layer in layers], dim=-1)


class PackedPatches(nn.Module):
    """A tower of transformers, Qwen2-VL's, that reads the patches of all images as one sequence.

    Shapes: patches (patches, numbers), as transformers' processor cuts them, and grids (images, 3) to
    (1, patches, dim).
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(
        self, patches: Float[Tensor, "patches numbers"], grids: Int[Tensor, "images 3"]
    ) -> Float[Tensor, "1 patches dim"]:
        if len(patches) != grids.prod(dim=1).sum():
            raise UserError(f"{len(patches)} patches are not those of images with grids {grids.tolist()}")
        return self.tower(patches, grid_thw=grids).last_hidden_state[None]


def from_config(config: PreTrainedConfig) -> Model:
    """A model of ours as a configuration of transformers describes it, with new weights.

    Raises:
        UserError: a family that is not read, or an option of one that the model lacks.
    """
    return _build(config, _tower(config) if config.model_type in ("llava", "qwen2_vl") else None)


def from_huggingface(folder: str | Path) -> Model:
    """The model of a folder, or of a name on the hub: a `Decoder`, or a `VisionLanguageModel` where it reads images.

    Weights are those of the files, in their precision. The model is in evaluation mode, and keeps the configuration as
    `origin`. Tokenizers and processors are transformers' own: `AutoTokenizer` and `AutoProcessor` load them.

    Raises:
        UserError: nothing there, a family that is not read, or weights that cannot be read or are not all there.
    """
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of a damaged folder, any of a dozen classes of several packages
        raise UserError(f"{folder} cannot be loaded as a model: {first_line(error)}") from None
    layout = _layout(config)
    with torch.device("meta"), no_init_weights():
        model = from_config(config)  # what is wrong with the configuration shows before the weights
    try:
        theirs, found = layout.kind.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(f"the weights of {folder} cannot be loaded: {first_line(error)}") from None
    check_keys(str(folder), found)
    if Path(folder).is_dir():
        check_stored_types(theirs, Path(folder))
    values = theirs.state_dict()
    if isinstance(model, VisionLanguageModel):
        # Their tower as it is: what it computes and does not store would be lost on the meta device.
        llava = config.model_type == "llava"
        tower = theirs.model.vision_tower if llava else _without_merger(theirs.model.visual)
        cast(Host, model.vision).tower = tower
    model.load_state_dict({name: values[layout.theirs(name)] for name in model.state_dict()}, assign=True)
    model.origin = config
    return model.eval()


def save_huggingface(model: Model, folder: str | Path) -> None:
    """Write a model of ours as a folder that transformers reads.

    What the model does not know, such as the tokens that end a text, is as in the configuration that it was loaded
    with. Tokenizers and processors are saved by transformers, beside it.

    Raises:
        UserError: a vision tower, a projector or positions that no family of transformers has.
    """
    config = _config(model)
    layout = LAYOUTS[config.model_type]
    with torch.device("meta"), no_init_weights():
        theirs = layout.kind(config)
    values = {layout.theirs(name): value for name, value in model.state_dict().items()}
    absent = theirs.load_state_dict(values, assign=True, strict=False)
    text = model.decoder if isinstance(model, VisionLanguageModel) else model
    lacking = [name for name in absent.missing_keys if text.head is not None or name != "lm_head.weight"]
    if lacking or absent.unexpected_keys:
        name = (lacking + absent.unexpected_keys)[0]
        raise UserError(f"transformers' {layout.kind.__name__} and this model differ in {name}; save its state_dict")
    theirs.tie_weights()
    theirs.save_pretrained(folder)


def _layout(config: PreTrainedConfig) -> Layout:
    if config.model_type not in LAYOUTS:
        raise UserError(f"models of type {config.model_type!r} cannot be read; these can: {', '.join(LAYOUTS)}")
    return LAYOUTS[config.model_type]


def _tower(config: Host) -> nn.Module:
    if config.model_type == "qwen2_vl":
        return _without_merger(Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config))
    return AutoModel.from_config(config.vision_config)


def _without_merger(tower: Host) -> nn.Module:
    tower.merger = nn.Identity()  # the projector is ours
    return tower


def _build(config: Host, tower: nn.Module | None) -> Model:
    _layout(config)
    decoder = _decoder(config.get_text_config(), tied=config.tie_word_embeddings)
    if tower is None:
        return decoder
    token, vision = config.image_token_id, config.vision_config
    if config.model_type == "qwen2_vl":
        merger = PatchMerger(vision.embed_dim, decoder.norm.weight.shape[0], side=vision.spatial_merge_size)
        return VisionLanguageModel(decoder, PackedPatches(tower), merger, image_token=token)
    if config.projector_hidden_act != "gelu":
        raise UserError(f"a projector with {config.projector_hidden_act} is not read: expected gelu")
    layer = config.vision_feature_layer
    features = LayerFeatures(tower, layer=layer, drop_first=config.vision_feature_select_strategy == "default")
    width = vision.hidden_size * (1 if isinstance(layer, int) else len(layer))
    bias = config.multimodal_projector_bias
    projector = MLPProjector(width, decoder.norm.weight.shape[0], bias=bias)
    return VisionLanguageModel(decoder, features, projector, image_token=token)


def _decoder(config: Host, *, tied: bool) -> Decoder:
    """The decoder that a configuration of text describes."""
    kind = config.model_type
    if kind not in ("llama", "qwen2", "qwen2_vl_text"):
        raise UserError(f"decoders of type {kind!r} cannot be read; these can: llama, qwen2, qwen2_vl_text")
    for what, unlike in _departures(config):
        if unlike:
            raise UserError(f"a {kind} model with {what} cannot be read")
    biased = kind != "llama" or config.attention_bias
    return Decoder(
        vocab=config.vocab_size,
        dim=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        hidden=config.intermediate_size,
        bias=biased,
        out_bias=biased and kind == "llama",
        rotary=_rotary(config.rope_parameters),
        tied=tied,
        eps=config.rms_norm_eps,
        max_length=config.max_position_embeddings,
    )


def _departures(config: Host) -> Iterator[tuple[str, bool]]:
    """What a configuration may say that the decoder has not."""
    yield f"the activation {config.hidden_act}", config.hidden_act != "silu"
    yield "biases in its feed-forward part", bool(getattr(config, "mlp_bias", False))
    yield "dropout of attention weights", bool(config.attention_dropout)
    yield "a sliding window", "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _rotary(values: dict[str, Any]) -> RotaryPositions:
    kind = values.get("rope_type", "default")
    sections = values.get("mrope_section")
    if kind not in ("default", "llama3"):
        raise UserError(f"rotary positions of type {kind!r} cannot be read; these can: default, llama3")
    stretch = None
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        stretch = Stretch(*(values[name] for name in names))
    return RotaryPositions(values["rope_theta"], None if sections is None else tuple(sections), stretch)


def _config(model: Model) -> Host:
    """The configuration of a model: what it is, and the rest as in the one that it was loaded with."""
    decoder = model.decoder if isinstance(model, VisionLanguageModel) else model
    origin: Host = copy.deepcopy(model.origin)
    family = _family(model)
    if origin is None or origin.model_type != family:
        origin = NEW[family](model)
    origin.tie_word_embeddings = decoder.head is None
    if isinstance(model, VisionLanguageModel):
        origin.image_token_id = model.image_token
    for name, value in _sizes(decoder).items():
        setattr(origin.get_text_config(), name, value)
    weight = decoder.embed.weight
    origin.dtype = origin.get_text_config().dtype = weight.dtype
    return origin


def _family(model: Model) -> str:
    if isinstance(model, Decoder):
        if model.rotary.sections is not None:
            raise UserError("no family of transformers has sections of positions without a vision tower")
        return _decoder_family(model)
    if isinstance(model.vision, LayerFeatures) and isinstance(model.projector, MLPProjector):
        return "llava"
    if isinstance(model.vision, PackedPatches) and isinstance(model.projector, PatchMerger):
        return "qwen2_vl"
    raise UserError(
        f"no family of transformers has a {type(model.vision).__name__} with a {type(model.projector).__name__}: LLaVA "
        "has LayerFeatures with MLPProjector, Qwen2-VL PackedPatches with PatchMerger; save its state_dict"
    )


def _decoder_family(decoder: Decoder) -> str:
    attention = decoder.blocks[0].attention
    biases = attention.query.bias is not None, attention.out.bias is not None
    if biases == (False, True):
        raise UserError("no family of transformers has a bias after attention alone; save its state_dict")
    return "qwen2" if biases == (True, False) else "llama"


def _sizes(decoder: Decoder) -> dict[str, Any]:
    """Entries of a configuration of text."""
    attention, feedforward = decoder.blocks[0].attention, decoder.blocks[0].feedforward
    vocab, dim = decoder.embed.weight.shape
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(decoder.rotary.base)}
    if decoder.rotary.stretch is not None:
        factor, low, high, original = decoder.rotary.stretch
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        rope["original_max_position_embeddings"] = original
    if decoder.rotary.sections is not None:
        rope["mrope_section"] = list(decoder.rotary.sections)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": feedforward.gate.out_features,
        "num_hidden_layers": len(decoder.blocks),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": decoder.norm.eps,
        "rope_parameters": rope,
    }
    if _decoder_family(decoder) == "llama":
        sizes["attention_bias"] = attention.query.bias is not None
    else:
        # transformers makes a list of it with the number of layers that a new configuration has.
        sizes["layer_types"] = ["full_attention"] * len(decoder.blocks)
    if decoder.max_length is not None:
        sizes["max_position_embeddings"] = decoder.max_length
    return sizes


def _new_llava(model: VisionLanguageModel) -> PreTrainedConfig:
    features, projector = cast(LayerFeatures, model.vision), cast(MLPProjector, model.projector)
    tower: Host = features.tower
    return LlavaConfig(
        vision_config=tower.config,
        text_config=NEW[_decoder_family(model.decoder)](model.decoder),
        vision_feature_layer=features.layer,
        vision_feature_select_strategy="default" if features.drop_first else "full",
        multimodal_projector_bias=projector.linear1.bias is not None,
    )


def _new_qwen2_vl(model: VisionLanguageModel) -> PreTrainedConfig:
    tower: Host = cast(PackedPatches, model.vision).tower
    return Qwen2VLConfig(vision_config=tower.config.to_dict(), text_config=_sizes(model.decoder))


def _new_text(kind: Any, decoder: Decoder) -> PreTrainedConfig:
    return kind(**_sizes(decoder))


NEW: dict[str, Callable[[Any], PreTrainedConfig]] = {
    "llama": lambda decoder: _new_text(LlamaConfig, decoder),
    "qwen2": lambda decoder: _new_text(Qwen2Config, decoder),
    "llava": _new_llava,
    "qwen2_vl": _new_qwen2_vl,
}
