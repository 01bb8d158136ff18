"""Dialogues and their summaries, for a pretrained language model that writes one after a conversion."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.huggingface.conversion import Batch
from provenn.huggingface.examples import Examples
from provenn.huggingface.families import Host, Tokenizer, family_of, max_tokens
from provenn.huggingface.loading import Source
from provenn.huggingface.tuning import training_mode

PROMPT = "Summarize this dialog:\n{}\n---\nSummary:\n"  # as llama-recipes has it
UNPREDICTED = -100  # a label that no loss counts


@dataclass(frozen=True)
class Summaries(Examples):
    """Dialogues with summaries to learn from and to test on.

    Args:
        train: tokens of the prompt and of the summary with its end.
        test: tokens of the prompt, and the summary that a person wrote.
        tokenizer: the model's.
        length: tokens of prompt and summary together at most; the dialogue is cut at its start.
        written: tokens of a summary at most.
        passes: over the training examples, in each stage of a training.
    """

    train: list[tuple[list[int], list[int]]]
    test: list[tuple[list[int], str]]
    tokenizer: Tokenizer
    length: int
    written: int
    passes: float | int = 2
    metric = "rouge1"
    higher_is_better = True

    @classmethod
    def of(
        cls,
        source: str | Path,
        tokenizer: Tokenizer,
        model: PreTrainedModel,
        *,
        length: int = 1024,
        written: int = 128,
        passes: float | int = 2,
        tested: int | None = None,
    ) -> "Summaries":
        """The examples of a folder for a model.

        Args:
            source: holds `train.json` and `test.json` as SAMSum has them: a list of objects with `dialogue` and
                `summary`.
            tokenizer: the model's.
            model: a causal language model; says how long an example can be.
            length: tokens of prompt and summary together at most.
            written: tokens of a summary at most.
            passes: over the training examples, in each stage of a training.
            tested: how many are tested at the most, the first ones; all by default.

        Raises:
            UserError: files that cannot be read, a model of masked tokens, or a length that does not fit.
        """
        if not family_of(model.config).causal:
            raise UserError(f"a summary is written by a causal language model, got {type(model).__name__}")
        limit = max_tokens(model.config)
        if not 1 <= written < length or (limit is not None and length > limit):
            raise UserError(
                f"written must be less than length, and length at most the {limit} positions of this model, got "
                f"{written} and {length}"
            )
        before, after = (_tokens(tokenizer, part) for part in PROMPT.split("{}"))
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def prompt(dialogue: str) -> list[int]:
            room = length - written - len(start) - len(before) - len(after)
            # What was said last is kept.
            return [*start, *before, *_tokens(tokenizer, dialogue)[-max(1, room) :], *after]

        train, test = (_read(Path(source) / name) for name in ("train.json", "test.json"))
        return cls(
            [(prompt(d), [*_tokens(tokenizer, s)[: written - len(end)], *end]) for d, s in train],
            [(prompt(d), s) for d, s in test[:tested]],
            tokenizer,
            length,
            written,
            passes,
        )

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """So many random batches of the examples to learn from; the same for the same seed."""
        for indices in self.indices(steps, batch_size, seed):
            yield self._batch([self.train[index] for index in indices])

    def tests(self, batch_size: int) -> Iterator[Batch]:
        """The examples to test on with their own summaries, in their order."""
        for start in range(0, len(self.test), batch_size):
            chosen = self.test[start : start + batch_size]
            yield self._batch([(prompt, _tokens(self.tokenizer, summary)) for prompt, summary in chosen])

    def _batch(self, examples: Iterable[tuple[list[int], list[int]]]) -> Batch:
        """What a model reads, and the summary alone as what it is to predict."""
        rows = [
            {"input_ids": [*prompt, *summary], "labels": [*[UNPREDICTED] * len(prompt), *summary]}
            for prompt, summary in examples
        ]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
            for name, filler in (("input_ids", self._padding), ("labels", UNPREDICTED))
        }
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**batch, "attention_mask": (torch.arange(longest) < sizes[:, None]).long()}

    @property
    def _padding(self) -> int:
        token = self.tokenizer.pad_token_id
        return token if token is not None else self.tokenizer.eos_token_id or 0

    def quality(self, model: PreTrainedModel, batch_size: int) -> float:
        """The mean ROUGE-1 of the summaries that the model writes, greedily, in points of 100; higher is better."""
        from torchmetrics.functional.text import rouge_score

        summaries = self.write(model, batch_size)
        scores = rouge_score(summaries, [summary for _, summary in self.test], rouge_keys="rouge1")
        return 100 * float(scores["rouge1_fmeasure"])

    def write(self, model: PreTrainedModel, batch_size: int) -> list[str]:
        """A summary of each dialogue to test on."""
        # Alike ones together: the less is padded.
        order = sorted(range(len(self.test)), key=lambda index: len(self.test[index][0]))
        written: dict[int, str] = {}
        starts = range(0, len(order), batch_size)
        with training_mode(model, training=False), torch.no_grad():
            for first in progress.track(starts, "writing summaries"):
                chosen = order[first : first + batch_size]
                prompts = [self.test[index][0] for index in chosen]
                for index, tokens in zip(chosen, self._continued(model, prompts), strict=True):
                    written[index] = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return [written[index] for index in range(len(self.test))]

    def _continued(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> Tensor:
        """(prompts, tokens): padded before the prompt, so that each goes on where it ends."""
        longest = max(map(len, prompts))
        rows = torch.tensor([[self._padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(longest) >= longest - sizes[:, None]).long()
        host: Host = model
        tokens: Tensor = host.generate(
            rows.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=self.written,
            do_sample=False,
            pad_token_id=self._padding,
        )
        return tokens[:, longest:]

    def host(self, source: Source, *, device: str, **training: Any) -> Host:
        """The pretrained model as it is."""
        return source.weights().to(device)


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        pairs = [(entry["dialogue"], entry["summary"]) for entry in parse_json(read_text(file), str(file))]
    except (TypeError, KeyError):
        raise UserError(
            f"{file}: expected a list of objects with 'dialogue' and 'summary', as SAMSum has them"
        ) from None
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UserError(f"{file}: expected one or more dialogues with a summary, both of text")
    return pairs
