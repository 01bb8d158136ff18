"""Mechanisms of the catalogue inside Hugging Face's models: convert, tune, save, load, generate, and undo.

A paper that can convert a pretrained Transformer says how in its `convert.py`, as a `Conversion`. Here is what all of
them share. It says which models there are, how a converted one is saved and found again by transformers' Auto classes
once this package has been imported, and how quality is measured on the way.

    model = convert(AutoModelForCausalLM.from_pretrained("gpt2"), "hedgehog")
    recovery = recover(model, "hedgehog", Text.of("my_text/", tokenizer, model))    # or with all its training
    model.save_pretrained("converted")
    model = load_model("converted")

Any token mixer can also replace an attention, in any model of Hugging Face:

    swap(model, "model.layers.*.self_attn", as_attention("rat", chunk=16), example={"input_ids": tokens})

Folders of Llama, Qwen2, LLaVA and Qwen2-VL become models of `provenn.nn`, whose layers a mechanism can reach into:

    model = from_huggingface("llava-1.5-7b-hf/")
    save_huggingface(model, "tuned/")
"""

from provenn.core.errors import UserError

try:
    import transformers as _transformers  # noqa: F401
except ImportError:
    raise UserError("converting pretrained models needs transformers and peft: pip install 'provenn[hf]'") from None

from provenn.huggingface.cache import StateCache, StateLayer
from provenn.huggingface.companion import Companion, companion_conversion
from provenn.huggingface.conversion import (
    CONVERTED,
    Attend,
    Batch,
    Conversion,
    WindowLifted,
    conversion_of,
    convert,
    revert,
    window_note,
)
from provenn.huggingface.decoders import LayerFeatures, PackedPatches, from_huggingface, save_huggingface
from provenn.huggingface.families import FAMILIES, Attention, Family, attentions, family_of
from provenn.huggingface.loading import Source, load, quiet
from provenn.huggingface.mixers import MixerAttention, as_attention
from provenn.huggingface.pictures import Pictures
from provenn.huggingface.saving import load_model
from provenn.huggingface.sentences import Sentences
from provenn.huggingface.summaries import Summaries
from provenn.huggingface.tuning import (
    TUNINGS,
    Material,
    Recovery,
    Text,
    Tuning,
    check_tuning,
    learn,
    perplexity,
    recover,
    train_alone,
    tune,
)
from provenn.training import Stage, only

__all__ = [
    "CONVERTED",
    "FAMILIES",
    "TUNINGS",
    "Attend",
    "Attention",
    "Batch",
    "Companion",
    "Conversion",
    "Family",
    "LayerFeatures",
    "Material",
    "MixerAttention",
    "PackedPatches",
    "Pictures",
    "Recovery",
    "Sentences",
    "Source",
    "Stage",
    "StateCache",
    "StateLayer",
    "Summaries",
    "Text",
    "Tuning",
    "WindowLifted",
    "as_attention",
    "attentions",
    "check_tuning",
    "companion_conversion",
    "conversion_of",
    "convert",
    "family_of",
    "from_huggingface",
    "learn",
    "load",
    "load_model",
    "only",
    "perplexity",
    "quiet",
    "recover",
    "revert",
    "save_huggingface",
    "train_alone",
    "tune",
    "window_note",
]
