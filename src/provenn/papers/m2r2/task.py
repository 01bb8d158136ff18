"""Language modelling by a decoder that may leave early: how well its first gate tells what all layers would."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.papers.m2r2.decoding import Statistics
from provenn.papers.m2r2.model import ExitModel
from provenn.tasks.base import Scores, batches, device_of, join_scores
from provenn.tasks.language_modelling import LOGITS, LanguageModelling, Windows


class AcceleratedModelling(LanguageModelling):
    """Models are `ExitModel`s: (batch, tokens) to logits of all layers, with gates, and several ways to generate."""

    name = "accelerated-language-modelling"
    metric = "exit_bits_per_byte"

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        assert isinstance(model, ExitModel)
        return model.training_loss(batch)

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
            told = logits.argmax(-1)
            sizes = dataset.bytes_of.to(y.device)[y]
            parts = (nats, told == y, sizes > -1, sizes, early_nats, early.argmax(-1) == told)
            rows.append([part.double().sum(1) for part in parts])
        return join_scores(("nats", "right", "tokens", "bytes", "exit_nats", "agreed"), rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """Bits a byte of the first gate, how often it agrees with all layers, and what language modelling has."""
        plain = super().summary(scores)
        if "exit_nats" not in scores:
            return plain
        nats, agreed, tokens, size = (float(scores[name].sum()) for name in ("exit_nats", "agreed", "tokens", "bytes"))
        return {"exit_bits_per_byte": nats / size / math.log(2), "agreement": agreed / tokens, **plain}

    def example(self, file: Path, meta: dict[str, Any]) -> Tensor:
        """What `provenn inspect` reads of a text."""
        return self.first_window(file, meta)

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
        tokens: int = 200,
        temperature: float | int = 0.8,
        top_k: int | None = None,
        top_p: float | int | None = None,
        seed: int = 0,
        tell: Callable[[str], None] | None = None,
    ) -> str:
        """Goes on with each prompt, and says how fast.

        Args:
            model, meta, inputs, output, tokens, temperature, top_k, top_p, seed, tell: as of language modelling.
            mode: full (all layers for every token), exit (a token leaves where the router is sure) or speculative
                (drafts by the first gate, checked by all layers: what full may write, sooner; with temperature=0 the
                same text).
            gamma, stop, threshold: as in `provenn.papers.m2r2.decode`.
        """
        statistics = Statistics()
        options = {"mode": mode, "gamma": gamma, "stop": stop, "threshold": threshold, "statistics": statistics}
        text = super().predict(
            _Decoding(model, options),
            meta,
            inputs,
            output,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            tell=tell,
        )
        line = f"\n\n{account(mode, statistics)}"
        if tell is not None:
            tell(line)
        return text + line


class _Decoding(nn.Module):
    """A model that generates as it was asked to."""

    def __init__(self, model: Any, options: dict[str, Any]):  # any ExitModel; what else a caller has, is refused below
        super().__init__()
        self.model, self.options = model, options

    def generate(self, prompt: Tensor, count: int, **draw: Any) -> Iterator[Tensor]:
        return self.model.generate(prompt, count, **self.options, **draw)


def account(mode: str, statistics: Statistics) -> str:
    """How a text came about, in a line."""
    words = [
        f"{mode}: {statistics.tokens} tokens in {statistics.seconds:.2f} s, {statistics.tokens_per_second:.0f} a second"
    ]
    if statistics.drafted:
        kept = f"{statistics.accept_rate:.0%} of {statistics.drafted} drafted tokens kept"
        words.append(f"{kept}, {statistics.tokens / statistics.rounds:.2f} tokens a check")
    if statistics.depths:
        words.append(f"{statistics.mean_depth:.1f} layers a token")
    words.append(f"weights of {statistics.passes / max(1, statistics.tokens):.1f} layers read a token")
    return "; ".join(words)


TASK = AcceleratedModelling()
