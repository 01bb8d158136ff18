"""Mechanisms of the catalogue inside Hugging Face's models: convert, tune, save, load, generate, and undo.

A paper that can convert a pretrained Transformer says how in its `convert.py`, as a `Conversion`. Here is what all of
them share: which models there are, how a converted one is saved and found again by transformers' Auto classes once this
module has been imported, and how quality is measured on the way.

    model = convert(AutoModelForCausalLM.from_pretrained("gpt2"), "hedgehog")
    recovery = recover(model, "hedgehog", Text.of("my_text/", tokenizer, model))    # or with all its training
    model.save_pretrained("converted")
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from provenn import catalog, progress
from provenn.errors import UserError
from provenn.nn.auxiliary import collect_auxiliary
from provenn.tasks import get_task

try:
    import transformers
except ImportError:
    raise UserError("converting pretrained models needs transformers and peft: pip install 'provenn[hf]'") from None
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.masking_utils import flash_attention_mask

Batch = dict[str, Tensor]
PREFIX = "provenn_"  # of the model types of converted models
TUNINGS = ("full", "lora", "none")
LEARNING_RATES = {"full": 6e-4, "lora": 1e-4}  # arXiv:2402.04347, section 5.4, and its group's later code


@runtime_checkable
class Attend(Protocol):
    """The attention of a converted model, in the place of softmax's.

    Args:
        host: the module that attends, with whatever `install` gave it.
        queries: (batch, heads, tokens, head_dim), turned already where the host turns them.
        keys, values: likewise, of as many tokens as the cache hands on, and of fewer heads where these serve several.
        causal: whether a query sees the tokens up to its own only.
        mask: True where a token is no padding, (batch, tokens of `keys`); None where none is padding.
        scale: of the host's softmax.

    Returns (batch, heads, tokens, head_dim). Dropout of attention weights is left out.
    """

    def __call__(
        self,
        host: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Conversion:
    """How a paper converts a model; its `convert.py` names one `CONVERSION`.

    Args:
        attend: what each self-attention of a converted model does.
        install: gives a model the mechanism in place, on the model's device and in its precision, from keyword options
            that JSON can hold. It runs at conversion, and again when a converted model is loaded, before its weights,
            possibly on the meta device; so whatever it adds must be a parameter or buffer of the model.
        uninstall: takes out again what `install` put in.
        prepare: what is trained after conversion and before tuning, if anything: (model, batches, lr) → losses.
        lr: of `prepare`, by default.
        cache: makes what `generate` keeps of the past, where that is no key-value cache.
        report: one row a layer of whatever tells how well a converted model does on a batch, before or after tuning.
    """

    attend: Attend
    install: Callable[..., None]
    uninstall: Callable[[PreTrainedModel], None]
    prepare: Callable[[PreTrainedModel, Iterable[Batch], float], list[float]] | None = None
    lr: float = 1e-2
    cache: Callable[[PreTrainedModel], Any] | None = None
    report: Callable[[PreTrainedModel, Batch], list[dict[str, Any]]] | None = None


def conversion_of(paper: str) -> Conversion:
    """The conversion of a paper.

    Raises:
        UserError: no such paper, or one that converts nothing.
    """
    card = catalog.card(paper)
    if not card.has("convert"):
        able = ", ".join(slug for slug, other in catalog.cards().items() if other.has("convert"))
        raise UserError(f"{card.slug} has no conversion of pretrained models; these have: {able}")
    return card.resolve("convert:CONVERSION")


@dataclass(frozen=True)
class Attention:
    """One self-attention of a model: its name, its module, how many heads it has, and how wide a head is."""

    name: str
    module: nn.Module
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Host:
    """A family of models: what its self-attention is called, and which of its maps LoRA adapts (q, k, v, o)."""

    attention: str
    lora: tuple[str, ...]


HOSTS = {
    "gpt2": Host("GPT2Attention", ("attn.c_attn", "attn.c_proj")),
    "llama": Host("LlamaAttention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "bert": Host("BertSelfAttention", ("self.query", "self.key", "self.value", "attention.output.dense")),
    "vit": Host("ViTAttention", ("q_proj", "k_proj", "v_proj", "o_proj")),
}


def host_of(model: PreTrainedModel) -> Host:
    """The family of a model, converted or not."""
    family = model.config.model_type.removeprefix(PREFIX)
    if family not in HOSTS:
        raise UserError(f"models of type {family!r} cannot be converted; these can: {', '.join(HOSTS)}")
    return HOSTS[family]


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The self-attentions of a model in the order of its layers."""
    wanted = host_of(model).attention
    found = []
    for name, module in model.named_modules():
        part: Any = module
        if type(part).__name__ != wanted or getattr(part, "is_cross_attention", False):
            continue
        heads = part.config.num_attention_heads
        width = part.attention_head_size if hasattr(part, "attention_head_size") else part.head_dim
        found.append(Attention(name, part, heads, width))
    return found


# Converted models: the host's own classes, which install the mechanism when they are built.


def _install(model: Any, paper: str, options: dict[str, Any]) -> None:
    """Put a mechanism in, and send the model's attention through it by transformers' table of attention functions."""
    conversion, name = conversion_of(paper), f"{PREFIX}{paper}"
    conversion.install(model, **options)
    AttentionInterface.register(name, partial(_attend, conversion.attend))
    # The mask that fused attention wants is ours too: which tokens are padding, or None where none is.
    AttentionMaskInterface.register(name, flash_attention_mask)
    model.own_attention = model.config._attn_implementation
    model.config._attn_implementation = name


def _attend(
    attend: Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (batch, heads, tokens, head_dim) in, (batch, tokens, heads, head_dim) out."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(f"expected a mask of padding, (batch, tokens); got one of shape {tuple(attention_mask.shape)}")
    mask = None if attention_mask is None else attention_mask[:, -key.shape[-2] :].bool()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module, query, key, value, causal=causal, mask=mask, scale=scale).transpose(1, 2), None


class _Converted:
    """What is added to a host's class: the mechanism at construction, and its cache in `generate`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        given = config.conversion
        if given is None:
            raise UserError(
                f"{type(self).__name__} is built by provenn.huggingface.convert, or loaded from what it saved"
            )
        _install(self, given["paper"], given["options"])

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model = cast(Any, self)
        make = conversion_of(model.config.conversion["paper"]).cache
        own = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        if make is not None and own and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = make(model)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


def _config(host: type[PreTrainedConfig]) -> Any:
    """The host's configuration, with a model type of its own and a note of the paper and its options.

    Made and not written out: transformers turns a subclass into a dataclass, whose arguments a run-time type checker of
    this package's classes would take for its own.
    """
    name = f"Converted{host.__name__}"
    about = "The host's configuration, and which paper's mechanism it has with which options."
    kind = f"{PREFIX}{host.model_type}"
    fields = {"model_type": kind, "conversion": None, "__annotations__": {"conversion": dict | None}}
    return type(name, (host,), {**fields, "__doc__": about, "__module__": __name__})


ConvertedGPT2Config = _config(GPT2Config)
ConvertedLlamaConfig = _config(LlamaConfig)
ConvertedBertConfig = _config(BertConfig)
ConvertedViTConfig = _config(ViTConfig)


class ConvertedGPT2LMHeadModel(_Converted, GPT2LMHeadModel):
    """GPT-2 with another attention."""

    config_class = ConvertedGPT2Config


class ConvertedLlamaForCausalLM(_Converted, LlamaForCausalLM):
    """Llama with another attention."""

    config_class = ConvertedLlamaConfig


class ConvertedBertForMaskedLM(_Converted, BertForMaskedLM):
    """BERT with another attention."""

    config_class = ConvertedBertConfig


class ConvertedBertForSequenceClassification(_Converted, BertForSequenceClassification):
    """A BERT that classifies, with another attention."""

    config_class = ConvertedBertConfig


class ConvertedViTForImageClassification(_Converted, ViTForImageClassification):
    """A vision Transformer that classifies, with another attention."""

    config_class = ConvertedViTConfig


CONVERTED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    GPT2LMHeadModel: ConvertedGPT2LMHeadModel,
    LlamaForCausalLM: ConvertedLlamaForCausalLM,
    BertForMaskedLM: ConvertedBertForMaskedLM,
    BertForSequenceClassification: ConvertedBertForSequenceClassification,
    ViTForImageClassification: ConvertedViTForImageClassification,
}

LANGUAGE_MODELS = (GPT2LMHeadModel, LlamaForCausalLM, BertForMaskedLM)  # what `Text` and `recover` are for

_found: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, ConvertedGPT2LMHeadModel),
    (AutoModelForCausalLM, ConvertedLlamaForCausalLM),
    (AutoModelForMaskedLM, ConvertedBertForMaskedLM),
    (AutoModelForSequenceClassification, ConvertedBertForSequenceClassification),
    (AutoModelForImageClassification, ConvertedViTForImageClassification),
)
for _auto, _class in _found:
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    _auto.register(_class.config_class, _class, exist_ok=True)


def convert(model: PreTrainedModel, paper: str, **options: Any) -> PreTrainedModel:
    """Give a pretrained model a paper's mechanism, in place; its own weights do not change.

    The model becomes one of the classes above, so that `save_pretrained` notes what was done, and `from_pretrained` of
    the Auto classes finds it again. `revert` undoes it.

    Args:
        model: GPT-2, Llama, BERT or ViT with a head.
        paper: the slug of a paper that has a `convert.py`.
        options: of the mechanism, such as `feature_map="t2r"` for Hedgehog.

    Raises:
        UserError: a model of another kind, or one that is converted already.
    """
    if isinstance(model, _Converted):
        done = model.config.conversion["paper"]
        raise UserError(f"this model has {done}'s mechanism already; revert it first")
    if type(model) not in CONVERTED:
        names = ", ".join(kind.__name__ for kind in CONVERTED)
        raise UserError(f"{type(model).__name__} cannot be converted; these can: {names}")
    slug = catalog.card(paper).slug
    _install(model, slug, options)
    _become(model, CONVERTED[type(model)])
    model.config.conversion = {"paper": slug, "options": options}
    return model


def _become(model: Any, kind: Any) -> None:
    """Another class for a model and its configuration, whose attributes stay as they are."""
    model.__class__ = kind
    model.config.__class__ = kind.config_class


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert`, in place: without tuning in between, the model is what it was, bit for bit."""
    if not isinstance(model, _Converted):
        raise UserError(f"this {type(model).__name__} is not converted")
    conversion_of(model.config.conversion["paper"]).uninstall(model)
    model.config._attn_implementation = model.__dict__.pop("own_attention")
    _become(model, next(host for host, kind in CONVERTED.items() if kind is type(model)))
    del model.config.conversion
    return model


# Text, quality, tuning.


def _rows(documents: Sequence[Any], tokenizer: Any, length: int, what: str) -> Tensor:
    """Texts in tokens, packed end to end in rows of `length`; a rest that fills no row is left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"], *end]
    rows = len(stream) // length
    if not rows:
        raise UserError(
            f"too little text: {len(stream)} tokens {what} are fewer than a row of {length}; "
            "give more text, or a smaller length"
        )
    return torch.tensor(stream[: rows * length]).view(rows, length)


@dataclass(frozen=True)
class Text:
    """Tokens to learn from and tokens to test on, in rows of equal length.

    Args:
        train, test: (rows, length).
        masked: the mask token, where the model predicts masked tokens; None where it predicts the next.
    """

    train: Tensor
    test: Tensor
    masked: int | None = None

    @classmethod
    def of(
        cls,
        source: str | Path,
        tokenizer: Any,
        model: PreTrainedModel,
        *,
        length: int = 256,
        tested: int = 32_768,
    ) -> "Text":
        """The rows of a text for a model.

        Args:
            source: what the task language-modelling takes: "stdlib", a file, a folder, or "hf:NAME". Whole documents
                are held out; of one long text, its end.
            tokenizer: the model's.
            model: says what is predicted, and how long a row can be.
            length: tokens a row.
            tested: how many tokens are tested at the most, in rows spread evenly.

        Raises:
            UserError: too little text, or rows longer than the model's positions.
        """
        limit = getattr(model.config, "max_position_embeddings", length)
        if not 2 <= length <= limit:
            raise UserError(f"length must lie between 2 and the {limit} positions of this model, got {length}")
        masked = None
        if not _causal(model):
            masked = tokenizer.mask_token_id
            if masked is None:
                raise UserError("this model predicts masked tokens, but its tokenizer has no mask token")
        train, _, test = cast(Any, get_task("language-modelling")).documents(source)
        rows = _rows(test, tokenizer, length, "of test text")
        kept = min(len(rows), max(1, tested // length))
        spread = torch.arange(kept) * len(rows) // kept
        return cls(_rows(train, tokenizer, length, "of training text"), rows[spread], masked)

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """What a model reads and is to predict."""
        whole = torch.ones_like(rows)
        if self.masked is None:
            return {"input_ids": rows, "attention_mask": whole, "labels": rows}
        hidden = torch.rand(rows.shape, generator=generator) < 0.15
        hidden[:, 0] = True  # at least one in each row
        labels = rows.masked_fill(~hidden, -100)
        return {"input_ids": rows.masked_fill(hidden, self.masked), "attention_mask": whole, "labels": labels}

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """So many random batches of the rows to learn from; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.train), (batch_size,), generator=generator)
            yield self.batch(self.train[chosen], generator)

    def tests(self, batch_size: int) -> Iterator[Batch]:
        """The rows to test on, always with the same masks."""
        generator = torch.Generator().manual_seed(0)
        for rows in self.test.split(batch_size):
            yield self.batch(rows, generator)


def _on(batch: Batch, model: PreTrainedModel) -> Batch:
    return {name: part.to(model.device) for name, part in batch.items()}


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """exp of the mean loss over all predicted tokens; lower is better."""
    training = model.training
    model.eval()
    total = count = 0.0
    try:
        for batch in batches:
            given = _on(batch, model)
            labels = given.pop("labels")
            logits = model(**given, use_cache=False).logits if _causal(model) else model(**given).logits
            if _causal(model):
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            total, count = total + loss.item(), count + (labels != -100).sum().item()
    finally:
        model.train(training)
    return math.exp(min(total / count, 80))


def _causal(model: PreTrainedModel) -> bool:
    return isinstance(model, GPT2LMHeadModel | LlamaForCausalLM)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tune(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    how: str = "full",
    *,
    lr: float | None = None,
    rank: int = 8,
    alpha: int = 16,
    clip: float = 1.0,
) -> list[float]:
    """Fine-tune a model in place on its own task, with AdamW; returns the loss of every step.

    Args:
        model: converted or not.
        batches: with labels; one step each.
        how: "full" trains every parameter; "lora" trains low-rank additions to the maps of q, k, v and o by peft, and
            merges them into the weights at the end, so that what is saved is an ordinary model; "none" does nothing.
        lr: by default 6e-4 for full and 1e-4 for lora.
        rank, alpha: of lora.
        clip: largest norm of the gradient.
    """
    if how not in TUNINGS:
        raise UserError(f"--tune takes {', '.join(TUNINGS)}, got {how!r}")
    if how == "none":
        return []
    lr = LEARNING_RATES[how] if lr is None else lr
    trained: Any = model
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if how == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise UserError("--tune lora needs peft: pip install 'provenn[hf]'") from None
        lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(host_of(model).lora),
            fan_in_fan_out=isinstance(model, GPT2LMHeadModel),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what peft asks of transformers
            trained = get_peft_model(cast(Any, model), lora)
    losses = []
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    try:
        with _mode(model, training=True):
            for batch in batches:
                with collect_auxiliary() as added:
                    loss = trained(**_on(batch, model)).loss
                optimizer.zero_grad()
                (loss + torch.stack(added).mean() if added else loss).backward()
                nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                losses.append(loss.item())
    finally:
        if trained is not model:
            trained.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])
    return losses


@dataclass
class Recovery:
    """What a model could do before it was converted, and after each stage: perplexity on text that it was not shown.

    Args:
        before: of the model as it came.
        converted: right after the mechanism was put in.
        prepared: after the new parts were trained, everything else frozen; None where the paper has no such stage.
        tuned: after tuning; None without.
        parameters: how many the mechanism added.
        losses: of each step of the stages "prepare" and "tune".
        layers: what the paper reports of each layer, after the last stage.
        setting: how it was done.
    """

    before: float
    converted: float
    prepared: float | None = None
    tuned: float | None = None
    parameters: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)

    def stages(self) -> list[tuple[str, float, float]]:
        """Each stage that was run, its perplexity, and the share of the quality before: 1 where none was lost."""
        found = {
            "before": self.before,
            "converted": self.converted,
            "prepared": self.prepared,
            "tuned": self.tuned,
        }
        return [(name, value, self.before / value) for name, value in found.items() if value is not None]

    def json(self) -> dict[str, Any]:
        """All of it for a file."""
        return {**asdict(self), "recovered": {name: share for name, _, share in self.stages()}}


def recover(
    model: PreTrainedModel,
    paper: str,
    text: Text,
    *,
    tuning: str = "full",
    steps: int = 200,
    prepare_steps: int = 200,
    batch_size: int = 8,
    lr: float | None = None,
    prepare_lr: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Recovery:
    """Convert a model, train what is new, tune the whole, and measure its quality before and after each stage.

    Args:
        model: as for `convert`; converted in place.
        paper: the slug.
        text: to learn from and to test on.
        tuning: "full", "lora" or "none".
        steps, prepare_steps: batches of tuning, and of the stage before.
        batch_size: rows a batch.
        lr, prepare_lr: by default those of `tune` and of the conversion.
        seed: of the batches, and of whatever the mechanism draws.
        options: of the mechanism.
    """
    conversion = conversion_of(paper)
    torch.manual_seed(seed)
    before = perplexity(model, text.tests(batch_size))
    had = sum(parameter.numel() for parameter in model.parameters())
    convert(model, paper, **options)
    recovery = Recovery(before, perplexity(model, text.tests(batch_size)))
    recovery.parameters = sum(parameter.numel() for parameter in model.parameters()) - had
    if conversion.prepare is not None and prepare_steps:
        given = (_on(batch, model) for batch in text.batches(prepare_steps, batch_size, seed))
        shown = progress.track(given, "new parts", prepare_steps)
        recovery.losses["prepare"] = conversion.prepare(model, shown, prepare_lr or conversion.lr)
        recovery.prepared = perplexity(model, text.tests(batch_size))
    if tuning != "none" and steps:
        shown = progress.track(text.batches(steps, batch_size, seed + 1), "tuning", steps)
        recovery.losses["tune"] = tune(model, shown, tuning, lr=lr)
        recovery.tuned = perplexity(model, text.tests(batch_size))
    if conversion.report is not None:
        recovery.layers = conversion.report(model, _on(next(text.tests(batch_size)), model))
    recovery.setting = {
        "paper": paper,
        "options": options,
        "tuning": tuning,
        "steps": steps,
        "prepare_steps": prepare_steps,
        "batch_size": batch_size,
        "length": text.test.shape[1],
        "seed": seed,
    }
    return recovery


def load(name: str | Path) -> tuple[Any, Any]:
    """A language model and its tokenizer, from a folder or from the hub.

    Raises:
        UserError: nothing there, a model of another kind, weights that are not all there, or no tokenizer.
    """
    # What a damaged folder raises is any of a dozen classes, of several packages.
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(f"{name} cannot be loaded as a model: {_first_line(error)}") from None
    if config.model_type.removeprefix(PREFIX) not in HOSTS:
        raise UserError(
            f"{name} is of type {config.model_type!r}, which cannot be converted; these can: {', '.join(HOSTS)}"
        )
    named = (config.architectures or ["none"])[0]
    kinds = {kind.__name__: kind for pair in CONVERTED.items() for kind in pair}
    able = [kind.__name__ for kind in LANGUAGE_MODELS]
    if named.removeprefix("Converted") not in able:
        raise UserError(f"{name} holds a {named}, which predicts no tokens of a text; these do: {', '.join(able)}")
    try:
        # Sizes that differ are told below: of these, transformers raises an error that names none.
        model, found = cast(Any, kinds[named]).from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(f"the weights of {name} cannot be loaded: {_first_line(error)}") from None
    for what, of in (
        ("lack", found["missing_keys"]),
        ("have other sizes than its config says for", found["mismatched_keys"]),
    ):
        if of:
            names = sorted(key if isinstance(key, str) else key[0] for key in of)
            raise UserError(f"the weights of {name} {what} {len(names)} parameters, {names[0]} among them")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} has no tokenizer that can be loaded: {_first_line(error)}") from None
    # Where there are no files, some families get an empty tokenizer and not an error.
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{name} has no tokenizer; save the model's own beside it")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens and its model {model.config.vocab_size}: "
            "they do not belong together"
        )
    return model, tokenizer


def quiet() -> None:
    """Only transformers' errors, and none of its progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error  # a check of a config wraps what it found
    return (str(error).strip() or type(error).__name__).splitlines()[0]
