"""The models that can be converted: where their self-attentions are, and what is particular to each family."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    SwinForImageClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from provenn.core.errors import UserError

Host = Any  # a model or a module of transformers: its attributes differ by family, and no type of theirs names them
Tokenizer = Any  # any of transformers' classes, which are called alike and typed apart
PREFIX = "provenn_"  # of the model types of converted models


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        label: as people write it.
        attention: the class of its self-attention.
        lora: which of its maps LoRA adapts (q, k, v, o).
        causal: whether a token sees those before it alone.
        rotary: whether queries and keys are turned by their positions.
        relative: whether scores have biases of the tokens' relation, which most mechanisms do not take.
    """

    label: str
    attention: str
    lora: tuple[str, ...]
    causal: bool = False
    rotary: bool = False
    relative: bool = False


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
BERT = ("self.query", "self.key", "self.value", "attention.output.dense")
FAMILIES = {
    "gpt2": Family("GPT-2", "GPT2Attention", ("attn.c_attn", "attn.c_proj"), causal=True),
    "llama": Family("Llama", "LlamaAttention", LLAMA, causal=True, rotary=True),
    "qwen2": Family("Qwen2", "Qwen2Attention", LLAMA, causal=True, rotary=True),
    "mistral": Family("Mistral", "MistralAttention", LLAMA, causal=True, rotary=True),
    "bert": Family("BERT", "BertSelfAttention", BERT),
    "roberta": Family("RoBERTa", "RobertaSelfAttention", BERT),
    "distilbert": Family("DistilBERT", "DistilBertSelfAttention", ("q_lin", "k_lin", "v_lin", "out_lin")),
    "vit": Family("ViT", "ViTAttention", LLAMA),
    "swin": Family("Swin", "SwinAttention", LLAMA, relative=True),
    "t5": Family("T5", "T5Attention", ("q", "k", "v", "o"), relative=True),
}
DISENTANGLED = (
    "its attention takes its softmax inside a module of its own, between sums that are not handed on, and not by "
    "transformers' table of attention functions"
)
# Kinds of models that people ask for and that cannot be converted, and why.
OUT_OF_REACH = {"deberta": DISENTANGLED, "deberta-v2": DISENTANGLED}
# Models with a head, and the Auto class that finds each.
MODELS: dict[type[PreTrainedModel], Any] = {  # Any: the Auto classes share no typed base
    GPT2LMHeadModel: AutoModelForCausalLM,
    LlamaForCausalLM: AutoModelForCausalLM,
    Qwen2ForCausalLM: AutoModelForCausalLM,
    MistralForCausalLM: AutoModelForCausalLM,
    BertForMaskedLM: AutoModelForMaskedLM,
    RobertaForMaskedLM: AutoModelForMaskedLM,
    DistilBertForMaskedLM: AutoModelForMaskedLM,
    BertForSequenceClassification: AutoModelForSequenceClassification,
    RobertaForSequenceClassification: AutoModelForSequenceClassification,
    DistilBertForSequenceClassification: AutoModelForSequenceClassification,
    ViTForImageClassification: AutoModelForImageClassification,
    SwinForImageClassification: AutoModelForImageClassification,
    T5ForConditionalGeneration: AutoModelForSeq2SeqLM,
}
# What `Text` and `recover` are for.
LANGUAGE_MODELS = [
    model
    for model, auto in MODELS.items()
    if auto in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM)
]
PICTURE_MODELS = [model for model, auto in MODELS.items() if auto is AutoModelForImageClassification]


def why_not(kind: str, able: Iterable[str]) -> str:
    """The end of a sentence that refuses models of a kind: the reason where there is one, else which can."""
    return f": {OUT_OF_REACH[kind]}" if kind in OUT_OF_REACH else f"; these can: {', '.join(able)}"


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model, converted or not, by its configuration.

    Raises:
        UserError: a family that cannot be converted.
    """
    kind = config.model_type.removeprefix(PREFIX)
    if kind not in FAMILIES:
        raise UserError(f"models of type {kind!r} cannot be converted{why_not(kind, FAMILIES)}")
    return FAMILIES[kind]


def max_tokens(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; None where nothing says so."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type.removeprefix(PREFIX) == "roberta":
        return positions - config.pad_token_id - 1  # RoBERTa counts from the token of padding on
    return positions


@dataclass(frozen=True)
class Attention:
    """One self-attention of a model: its name, its module, how many heads it has, and how wide a head is."""

    name: str
    module: nn.Module
    heads: int
    head_dim: int


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The self-attentions of a model in the order of its layers."""
    kind = family_of(model.config).attention
    self_attentions = []
    for name, module in model.named_modules():
        host: Host = module
        crossing = getattr(host, "is_cross_attention", False) or name.endswith("EncDecAttention")
        if type(host).__name__ != kind or crossing:
            continue
        heads = host.config.num_attention_heads
        if isinstance(heads, list | tuple):  # a number a stage
            heads = host.num_attention_heads
        widths = ("attention_head_size", "head_dim", "key_value_proj_dim")
        width = next(getattr(host, each) for each in widths if hasattr(host, each))
        self_attentions.append(Attention(name, host, heads, width))
    return self_attentions


def lift_window(config: PreTrainedConfig) -> dict[str, Any]:
    """Let every layer attend to the whole text, where some attend to a window of it; gives what the config said."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        if "sliding_attention" not in layer_types:
            return {}
        # The kind of each layer decides its mask, in the families that name them.
        config.layer_types = ["full_attention"] * len(layer_types)
        return {"layer_types": list(layer_types)}
    window = getattr(config, "sliding_window", None)
    if window is None:
        return {}
    config.sliding_window = None
    return {"sliding_window": window}


def restore_window(model: PreTrainedModel, window: dict[str, Any]) -> None:
    """Undo `lift_window`, in a model that may have been built after it."""
    config: Host = model.config
    for name, value in window.items():
        setattr(config, name, value)
    if "layer_types" not in window:
        return
    for module in cast(Host, model).modules():
        if hasattr(module, "has_sliding_layers"):
            module.has_sliding_layers = True
    for attention, kind in zip(attentions(model), window["layer_types"], strict=True):
        host: Host = attention.module
        host.layer_type = kind
        host.sliding_window = config.sliding_window if kind == "sliding_attention" else None
