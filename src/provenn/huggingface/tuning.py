"""Text for a language model, its perplexity, tuning, and how much quality a converted model recovers."""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel

from provenn.core.errors import UserError
from provenn.core.finite import finite_outputs
from provenn.huggingface.conversion import Batch, conversion_of, convert
from provenn.huggingface.families import Host, Tokenizer, family_of, max_tokens
from provenn.huggingface.loading import Source
from provenn.tasks.language_modelling import TASK
from provenn.training import Batches, Fit, Hardware, Saving, Stage, only, run_stages

TUNINGS = ("full", "lora", "none")
TUNING = "tuning"  # the stage of that name
LEARNING_RATES = {"full": 6e-4, "lora": 1e-4}  # arXiv:2402.04347, section 5.4, and its group's later code


# Documents are of the task's readers, which this part does not import.
def _pack_rows(documents: Sequence[Any], tokenizer: Tokenizer, length: int, what: str) -> Tensor:
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


SPAN, CORRUPTED = 3, 0.15  # tokens a span that is left out, and their share of a text: T5's own (arXiv:1910.10683)


@dataclass(frozen=True)
class Spans:
    """T5's own task: spans are left out of the source, a mark instead of each, and predicted after their marks.

    Args:
        marks: tokens that stand for a span each, `<extra_id_0>` and so on.
        start: what the decoder reads first.
        end: what source and answer end with; None where the tokenizer has no such token.
    """

    marks: Tensor
    start: int
    end: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: Host) -> "Spans":
        """The marks of a tokenizer, for a model's configuration.

        Raises:
            UserError: there are none, or the configuration does not say what a decoder begins with.
        """
        known = tokenizer.get_vocab()
        marks = [known[mark] for mark in takewhile(known.__contains__, (f"<extra_id_{i}>" for i in count()))]
        if not marks:
            raise UserError("this model predicts spans that are left out, but its tokenizer has no token <extra_id_0>")
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            raise UserError("the config has no decoder_start_token_id, which the decoder is to read first")
        return cls(torch.tensor(marks), start, tokenizer.eos_token_id)

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """Source, what the decoder reads, and what it is to predict; as many spans in each row, at random positions."""
        number, length = rows.shape
        hidden = max(1, round(CORRUPTED * length))
        spans = min(max(1, round(hidden / SPAN)), len(self.marks))
        # Kept and hidden parts in turn, a kept one first; each part's length is at least 1.
        kept_parts, hidden_parts = (_parts(number, size, spans, generator) for size in (length - hidden, hidden))
        ends = torch.stack([kept_parts, hidden_parts], dim=-1).flatten(1).cumsum(dim=1)
        part = torch.searchsorted(ends, torch.arange(length).expand(number, -1).contiguous(), right=True)
        gone, mark = part % 2 == 1, self.marks[part // 2]
        changes = part[:, 1:] != part[:, :-1]
        first = gone & nn.functional.pad(changes, (1, 0), value=False)  # of each hidden part
        before = ~gone & nn.functional.pad(changes, (0, 1), value=False)  # the last of each kept one
        source = torch.where(first, mark, rows)[~gone | first].view(number, -1)
        labels = torch.where(before, mark, rows)[gone | before].view(number, -1)
        if self.end is not None:
            source, labels = (nn.functional.pad(tokens, (0, 1), value=self.end) for tokens in (source, labels))
        read = nn.functional.pad(labels[:, :-1], (1, 0), value=self.start)
        whole = torch.ones_like(source)
        return {"input_ids": source, "attention_mask": whole, "decoder_input_ids": read, "labels": labels}


def _parts(rows: int, total: int, parts: int, generator: torch.Generator) -> Tensor:
    """Random lengths of at least 1 that sum to `total`, (rows, parts)."""
    cuts = torch.rand(rows, total - 1, generator=generator).argsort(dim=1)[:, : parts - 1].sort(dim=1).values + 1
    ends = nn.functional.pad(cuts, (0, 1), value=total)
    return ends.diff(dim=1, prepend=torch.zeros(rows, 1, dtype=torch.long))


@dataclass(frozen=True)
class Text:
    """Tokens to learn from and tokens to test on, in rows of equal length.

    Args:
        train, test: (rows, length).
        masked: the mask token, where the model predicts masked tokens; None where it predicts the next.
        spans: where the model predicts spans that its source lacks, as T5 does.
    """

    train: Tensor
    test: Tensor
    masked: int | None = None
    spans: Spans | None = None
    metric = "perplexity"
    higher_is_better = False

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.test.shape[1]

    @classmethod
    def of(
        cls,
        source: str | Path,
        tokenizer: Tokenizer,
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
            UserError: too little text, rows longer than the model's positions, or a tokenizer without the tokens that
                the model's own task needs.
        """
        limit = max_tokens(model.config)
        if length < 2 or (limit is not None and length > limit):
            raise UserError(f"length must lie between 2 and the {limit} positions of this model, got {length}")
        masked = spans = None
        if cast(Host, model.config).is_encoder_decoder:
            spans = Spans.of(tokenizer, model.config)
        elif not _causal(model):
            masked = tokenizer.mask_token_id
            if masked is None:
                raise UserError("this model predicts masked tokens, but its tokenizer has no mask token")
        train, _, test = TASK.documents(source)
        rows = _pack_rows(test, tokenizer, length, "of test text")
        row_count = min(len(rows), max(1, tested // length))
        chosen = torch.arange(row_count) * len(rows) // row_count
        return cls(_pack_rows(train, tokenizer, length, "of training text"), rows[chosen], masked, spans)

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        """What a model reads and is to predict."""
        if self.spans is not None:
            return self.spans.batch(rows, generator)
        whole = torch.ones_like(rows)
        if self.masked is None:
            return {"input_ids": rows, "attention_mask": whole, "labels": rows}
        # All become the mask token: no share is left as it is or replaced, as BERT's own training has it.
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

    def quality(self, model: PreTrainedModel, batch_size: int) -> float:
        """The perplexity of the rows to test on."""
        return perplexity(model, self.tests(batch_size))

    def stages(self, batch_size: int) -> dict[str, int]:
        """Nothing: `recover` says how many steps its stages have."""
        return {}

    def host(self, source: Source, *, device: str, **training: Any) -> Host:
        """The pretrained model as it is."""
        return source.weights().to(device)


@runtime_checkable
class Material(Protocol):
    """What a converted model is trained and tested on: `Text`, `Sentences`, `Summaries` or `Pictures`.

    All have `of`, which reads them, `host`, which makes the model that is converted, and `stages`, the steps that each
    stage of `recover` takes where the material says.
    """

    @property
    def metric(self) -> str:
        """What the quality is called."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher quality is the better one."""

    @property
    def length(self) -> int:
        """Tokens of an example at most."""

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """So many random batches to learn from, the same for the same seed."""

    def tests(self, batch_size: int) -> Iterator[Batch]:
        """What is tested on."""

    def quality(self, model: PreTrainedModel, batch_size: int) -> float:
        """One figure of what is tested on."""


def to_device(batch: Batch, model: PreTrainedModel) -> Batch:
    """The batch where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[Batch]) -> float:
    """exp of the mean loss over all predicted tokens; lower is better."""
    training = model.training
    model.eval()
    total = predicted = 0.0
    try:
        for batch in batches:
            inputs = to_device(batch, model)
            labels = inputs.pop("labels")
            logits = model(**inputs, use_cache=False).logits if _causal(model) else model(**inputs).logits
            if _causal(model):
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            total, predicted = total + loss.item(), predicted + (labels != -100).sum().item()
    finally:
        model.train(training)
    # A model that has come apart would overflow; no text has a loss near 80.
    return math.exp(min(total / predicted, 80))


def _causal(model: PreTrainedModel) -> bool:
    return family_of(model.config).causal


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the model trains or does not; afterwards each module is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_tuning(how: str) -> None:
    """Is this a way of tuning, and is what it needs installed?

    Raises:
        UserError: it is none, or low-rank tuning without the package peft.
    """
    if how not in TUNINGS:
        raise UserError(f"--tune takes {', '.join(TUNINGS)}, got {how!r}")
    if how == "lora" and importlib.util.find_spec("peft") is None:
        raise UserError("--tune lora needs peft: pip install 'provenn[hf]'")


def tune(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    how: str = "full",
    *,
    lr: float | None = None,
    rank: int = 8,
    alpha: int = 16,
    clip: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Fine-tune a model in place on its own task, with AdamW; returns the loss of every step.

    Args:
        model: converted or not.
        batches: with labels; one step each.
        how: "full" trains every parameter, and "none" does nothing. "lora" trains low-rank additions to the maps of q,
            k, v and o by peft. It merges them into the weights at the end, so that what is saved is an ordinary model.
        lr: by default 6e-4 for full and 1e-4 for lora.
        rank, alpha: of lora.
        clip: largest norm of the gradient.
        seed: of dropout, and of what lora begins with.
    """
    check_tuning(how)
    if how == "none":
        return []
    return learn(model, _tuning_stage(model, batches, how, lr, clip, rank=rank, alpha=alpha), seed)


def train_alone(part: str, model: PreTrainedModel, batches: Iterable[Batch], lr: float) -> Stage:
    """The stage in which the parameters that have `part` in their names learn a model's own task, all others frozen.

    What a conversion adds is trained so before the whole is tuned: `Conversion(prepare=partial(train_alone, "gates"))`.
    """

    def named(model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if part in name.split(".")]

    return _own_stage("new-parts", model, batches, partial(only, named), lr, 1.0)


def learn(model: PreTrainedModel, stage: Stage, seed: int = 0) -> list[float]:
    """Train a model in place in one stage, where it is; returns the loss of every step."""
    return run_stages(model, [stage], seed=seed, hardware=Hardware(str(model.device)))[0].losses


def _tuning_stage(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    how: str,
    lr: float | None,
    clip: float = 1.0,
    rank: int = 8,
    alpha: int = 16,
) -> Stage:
    """The stage in which the whole learns, or low-rank additions to its attention."""
    learning = partial(_low_rank, rank=rank, alpha=alpha) if how == "lora" else nullcontext
    return _own_stage(TUNING, model, batches, learning, LEARNING_RATES[how] if lr is None else lr, clip)


def _own_stage(
    name: str,
    model: PreTrainedModel,
    batches: Iterable[Batch],
    learning: Callable[[Any], AbstractContextManager[nn.Module]],
    lr: float,
    clip: float,
) -> Stage:
    """Steps of AdamW on the model's own loss."""
    options = {"use_cache": False} if _causal(model) else {}

    def own_loss(model: Host, batch: Batch) -> Tensor:
        return model(**batch, **options).loss

    return Stage.of_batches(name, own_loss, batches, learning, lr=lr, clip=clip)


@contextmanager
def _low_rank(model: PreTrainedModel, *, rank: int, alpha: int) -> Iterator[nn.Module]:
    """Inside, low-rank additions by peft are what learns; afterwards they are part of the weights."""
    from peft import LoraConfig, get_peft_model

    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(family_of(model.config).lora),
        fan_in_fan_out=isinstance(model, GPT2LMHeadModel),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft asks of transformers
        trained = get_peft_model(cast(Host, model), lora)
    try:
        yield trained
    finally:
        trained.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])


@dataclass
class Recovery:
    """What a model could do before it was converted, and after each stage: perplexity on text that it was not shown.

    Of other material its own figure; see `Material.quality`.

    Args:
        before: of the model as it came.
        converted: right after the mechanism was put in.
        prepared: after the new parts were trained, everything else frozen; None where the paper has no such stage.
        tuned: after tuning; None without.
        parameters: how many the mechanism added.
        losses: of each step of the stages "prepare" and "tune".
        layers: what the paper reports of each layer, after the last stage.
        setting: how it was done.
        higher_is_better: whether a higher figure is the better one, as a perplexity is not.
    """

    before: float
    converted: float
    prepared: float | None = None
    tuned: float | None = None
    parameters: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    higher_is_better: bool = False

    def stages(self) -> list[tuple[str, float, float]]:
        """Each stage that was run, its figure, and the share of the quality before: 1 where none was lost."""
        figures = {
            "before": self.before,
            "converted": self.converted,
            "prepared": self.prepared,
            "tuned": self.tuned,
        }
        return [(name, value, self._kept(value)) for name, value in figures.items() if value is not None]

    def _kept(self, value: float) -> float:
        ours, theirs = (value, self.before) if self.higher_is_better else (self.before, value)
        return ours / theirs if theirs else math.nan  # a correlation may be 0

    def json(self) -> dict[str, Any]:
        """All of it for a file."""
        shares = {name: None if math.isnan(share) else share for name, _, share in self.stages()}
        return {**asdict(self), "recovered": shares}


@dataclass(frozen=True)
class Tuning:
    """How a converted model is trained.

    Args:
        method: of the whole: "full", "lora" or "none".
        steps, prepare_steps: batches of tuning, and of the stage before, in which only what is new learns.
        batch_size: rows a batch.
        lr, prepare_lr: by default those of `tune` and of the conversion.
    """

    method: str = "full"
    steps: int = 200
    prepare_steps: int = 200
    batch_size: int = 8
    lr: float | None = None
    prepare_lr: float | None = None


def recover(
    model: PreTrainedModel,
    paper: str,
    text: Material,
    tuning: Tuning = Tuning(),  # it is frozen
    *,
    seed: int = 0,
    saving: Saving | None = None,
    **options: Any,
) -> Recovery:
    """Convert a model, train what is new, tune the whole, and measure its quality before and after each stage.

    Args:
        model: as for `convert`; converted in place.
        paper: the slug.
        text: to learn from and to test on; a `Text`, or `Sentences` for a model that classifies them.
        tuning: how it is trained.
        seed: of the batches, of dropout, and of whatever the mechanism draws.
        saving: where to keep checkpoints of both stages, so that a run that was killed goes on.
        options: of the mechanism.

    Raises:
        UserError: at some stage the model's outputs are no finite numbers, with the first such layer.
    """

    def measured(stage: str) -> float:
        with finite_outputs(model, f"the model {stage}", "what is tested on"):
            return text.quality(model, tuning.batch_size)

    def batches(steps: int, seed: int) -> Batches:
        return Batches(lambda: text.batches(steps, tuning.batch_size, seed), steps)

    check_tuning(tuning.method)
    conversion = conversion_of(paper)
    torch.manual_seed(seed)
    before = measured("as it came")
    parameters_before = sum(parameter.numel() for parameter in model.parameters())
    convert(model, paper, **options)
    recovery = Recovery(before, measured("converted"), higher_is_better=text.higher_is_better)
    recovery.parameters = sum(parameter.numel() for parameter in model.parameters()) - parameters_before
    stages = []
    if conversion.prepare is not None and tuning.prepare_steps:
        given = batches(tuning.prepare_steps, seed)
        stages.append(conversion.prepare(model, given, tuning.prepare_lr or conversion.lr))
    if tuning.method != "none" and tuning.steps:
        stages.append(_tuning_stage(model, batches(tuning.steps, seed + 1), tuning.method, tuning.lr))

    def note(stage: Stage, done: Fit) -> None:
        if stage.name == TUNING:
            recovery.losses["tune"], recovery.tuned = done.losses, measured("tuned")
        else:
            recovery.losses["prepare"], recovery.prepared = done.losses, measured("with its new parts trained")

    run_stages(model, stages, seed=seed, hardware=Hardware(str(model.device)), saving=saving, after=note)
    if conversion.report is not None:
        recovery.layers = conversion.report(model, to_device(next(text.tests(tuning.batch_size)), model))
    recovery.setting = {
        "paper": paper,
        "options": options,
        "tuning": tuning.method,
        "steps": tuning.steps,
        "prepare_steps": tuning.prepare_steps,
        "batch_size": tuning.batch_size,
        "length": text.length,
        "seed": seed,
    }
    return recovery
