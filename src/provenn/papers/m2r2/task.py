"""Language modelling by a decoder that may leave early: how well its first gate predicts what all layers would."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind
from provenn.papers.m2r2.comparison import WAYS, Way, compare_ways
from provenn.papers.m2r2.decoding import MODES, Statistics
from provenn.papers.m2r2.model import ExitModel, draft_tiny, m2r2_tiny
from provenn.tasks.base import Scores, batches, device_of, join_scores
from provenn.tasks.language_modelling import LOGITS, LanguageModelling, Windows
from provenn.training import Hardware, Stage, only, run_stages


def fit_added(model: ExitModel, batches: Iterable[Any], *, lr: float = 3e-3) -> list[float]:
    """Train what was added to a trained base, a step of AdamW a batch of tokens (batch, tokens).

    `provenn train` trains a base together with it. Returns the loss of every step.

    Raises:
        UserError: nothing was added that could learn.
    """
    if not model.added():
        raise UserError(f"{type(model).__name__} without a router has nothing to train")

    def exit_loss(model: ExitModel, batch: Any) -> Tensor:
        tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
        return model.training_loss((tokens[:, :-1], tokens[:, 1:]))

    learning = partial(only, lambda model: [parameter for _, parameter in model.added()])
    stage = Stage.of_batches("exits", exit_loss, batches, learning, lr=lr)
    losses = run_stages(model, [stage], hardware=Hardware(str(device_of(model))))[0].losses
    model.eval()
    return losses


class AcceleratedModelling(LanguageModelling):
    """Models are `ExitModel`s: (batch, tokens) to logits of all layers, with gates, and several ways to generate."""

    name = "accelerated-language-modelling"
    metric = "exit_bits_per_byte"

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return of_kind(model, ExitModel, "the model").training_loss(batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """As of language modelling, and of the first gate: its nats, and how often it names what all layers name."""
        if not isinstance(dataset, Windows) or not isinstance(model, ExitModel):
            return super().scores(model, dataset, batch_size)
        size = len(dataset.bytes_of) * dataset.length
        rows = []
        for x, y in batches(dataset, max(1, min(batch_size, LOGITS // size)), device_of(model)):
            streams = model.streams(x)
            logits, early = streams.logits, model.exit_logits(streams)[0]
            nats, early_nats = (
                F.cross_entropy(each.transpose(1, 2).float(), y, reduction="none") for each in (logits, early)
            )
            predicted = logits.argmax(-1)
            sizes = dataset.bytes_of.to(y.device)[y]
            parts = (nats, predicted == y, sizes > -1, sizes, early_nats, early.argmax(-1) == predicted)
            rows.append([part.double().sum(1) for part in parts])
        return join_scores(("nats", "right", "tokens", "bytes", "exit_nats", "agreed"), rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """Bits a byte of the first gate, how often it agrees with all layers, and what language modelling has."""
        plain = super().summary(scores)
        if "exit_nats" not in scores:
            return plain
        nats, agreed, tokens, size = (float(scores[name].sum()) for name in ("exit_nats", "agreed", "tokens", "bytes"))
        return {"exit_bits_per_byte": nats / size / math.log(2), "agreement": agreed / tokens, **plain}

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Any],
        output: Path | None,
        *,
        mode: str = "speculative",
        gamma: int = 4,
        stop: float | int = 0.3,
        threshold: float | int = 0.9,
        confidence: str = "router",
        fill: str = "exact",
        tokens: int = 200,
        temperature: float | int = 0.8,
        top_k: int | None = None,
        top_p: float | int | None = None,
        seed: int = 0,
        context: int | None = None,
        rounds: int = 5,
        log: Callable[[str], None] | None = None,
    ) -> str:
        """Goes on with each prompt, and says how fast.

        Args:
            model, meta, inputs, output, tokens, temperature, top_k, top_p, seed, context, log: as of language
                modelling.
            mode: full, exit, speculative, two-model or compare. With full, every token takes all layers. With exit, a
                token leaves where the router is sure. With speculative, the first gate drafts and all layers check:
                that writes what full may write, sooner, and with temperature=0 the same text. With two-model, the
                second model that ships drafts, which is of bytes. Compare writes the text of full, and then times
                all ways in turns.
            gamma, stop, threshold, confidence, fill: as in `provenn.papers.m2r2.decode`.
            rounds: of mode=compare, how often each way is timed.
        """
        if mode not in (*MODES, "compare"):
            raise UserError(f"mode must be one of {', '.join((*MODES, 'compare'))}, got {mode!r}")
        if rounds < 1:
            raise UserError(f"rounds must be at least 1, got {rounds}")
        model = of_kind(model, ExitModel, "the model")
        statistics = Statistics()
        of_ways = {"gamma": gamma, "stop": stop, "threshold": threshold, "confidence": confidence, "fill": fill}
        draft = _second_model(model, meta) if mode in ("two-model", "compare") else None
        if mode == "two-model" and draft is None:
            raise UserError("the second model that ships is of bytes, this one is not: no mode=two-model")
        if mode == "compare":
            options: dict[str, Any] = {"mode": "full"}
        else:
            options = {"mode": mode, **of_ways, **({"draft": draft} if mode == "two-model" else {})}
        writer = _Decoding(model, {**options, "statistics": statistics})
        draw: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        how: dict[str, Any] = {"tokens": tokens, "seed": seed, "context": context, "log": log}
        text = super().predict(writer, meta, inputs, output, **how, **draw)
        depth = model.depth
        if mode == "compare":
            try:
                ways = compare_ways(
                    model, writer.prompts, tokens, draft=draft, rounds=rounds, seed=seed, draw=draw, **of_ways
                )
            except ValueError as error:
                raise UserError(str(error)) from None
            lines = describe_ways(ways, drawn=temperature > 0, depth=depth)
        else:
            lines = account(mode, statistics, depth)
        if log is not None:
            log(f"\n\n{lines}")
        return f"{text}\n\n{lines}"


def shipped(preset: str) -> Any:
    """A preset of this paper with the weights that ship."""
    build: dict[str, Callable[[], nn.Module]] = {"m2r2_tiny": m2r2_tiny, "draft_tiny": draft_tiny}
    model = build[preset]()
    model.load_state_dict({k: v.float() for k, v in load_file(catalog.card("m2r2").shipped_weights(preset)).items()})
    return model.eval()


def _second_model(model: ExitModel, meta: dict[str, Any]) -> nn.Module | None:
    """The model that drafts instead of the first gate; None where the tokens are not its bytes."""
    return shipped("draft_tiny").to(device_of(model)) if meta["tokenizer"] == "bytes" else None


class _Decoding(nn.Module):
    """A model that generates as it was asked to, and keeps what it was asked to go on from."""

    def __init__(self, model: ExitModel, options: dict[str, Any]):
        super().__init__()
        self.model, self.options = model, options
        self.prompts: list[Tensor] = []

    def generate(self, prompt: Tensor, count: int, **draw: Any) -> Iterator[Tensor]:
        self.prompts.append(prompt)
        return self.model.generate(prompt, count, **self.options, **draw)


def account(mode: str, statistics: Statistics, depth: int) -> str:
    """How a text came about, in a line; `depth` is how many layers there are."""
    speed = f"{statistics.tokens_per_second:.0f} a second"
    return "; ".join(
        [f"{mode}: {statistics.tokens} tokens in {statistics.seconds:.2f} s, {speed}", *_counts(statistics, depth)]
    )


def describe_ways(ways: Mapping[str, Way], *, drawn: bool, depth: int) -> str:
    """A line for each way to generate: its speed beside all layers', what it cost, and whether it wrote the same."""
    lines = ["tokens a second, in turns:"]
    for mode, way in ways.items():
        words = [f"{way.tokens_per_second:.0f}"]
        if mode != "full":
            words.append(f"{way.ratio:.2f} times all layers")
            if drawn:
                words.append("of another distribution" if mode == "exit" else "drawn from the same distribution")
            elif way.same == way.statistics.tokens:
                words.append("the same text")
            else:
                words.append(f"as all layers for {way.same} of {way.statistics.tokens} tokens")
        lines.append(f"  {WAYS[mode]:<21}  {'; '.join([*words, *_counts(way.statistics, depth)])}")
    return "\n".join(lines)


def _counts(statistics: Statistics, depth: int) -> list[str]:
    words = []
    if statistics.drafted:
        kept = f"{statistics.accept_rate:.0%} of {statistics.drafted} drafted tokens kept"
        words.append(f"{kept}, {statistics.tokens / statistics.rounds:.2f} tokens a check")
    if statistics.depths:
        words.append(f"{statistics.mean_depth:.1f} layers a token")
    read = statistics.passes / max(1, statistics.tokens)
    small = statistics.draft_passes / max(1, statistics.tokens)
    words.append(
        f"weights of {read:.1f} of {depth} layers read a token" + (f", and of {small:.1f} small ones" if small else "")
    )
    return words


TASK = AcceleratedModelling()
