"""Translation: one sentence in, another out, letter by letter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from provenn.data.text import Bytes, parse_json, read_text, text_of
from provenn.errors import UserError
from provenn.files import whole
from provenn.tasks.base import (
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.meta import Length

END = 0  # begins what is written, ends both sides, and fills them up
LARGEST = 9999

ENGLISH, ENGLISH_TENS, GERMAN, GERMAN_TENS = (
    words.split()
    for words in (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
        "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
        "siebzehn achtzehn neunzehn",
        "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    )
)


def english(number: int) -> str:
    """A number up to 9,999 in words.

    >>> english(1042)
    'one thousand and forty-two'
    """
    thousands, hundreds, rest = number // 1000, number // 100 % 10, number % 100
    words = [f"{ENGLISH[thousands]} thousand"] if thousands else []
    words += [f"{ENGLISH[hundreds]} hundred"] if hundreds else []
    if rest or not words:
        below = (
            ENGLISH[rest]
            if rest < 20
            else ENGLISH_TENS[rest // 10 - 2] + (f"-{ENGLISH[rest % 10]}" if rest % 10 else "")
        )
        words += ["and", below] if words else [below]
    return " ".join(words)


def german(number: int) -> str:
    """The same in German, where the ones stand before the tens.

    >>> german(1042)
    'eintausendzweiundvierzig'
    """
    thousands, hundreds, rest = number // 1000, number // 100 % 10, number % 100
    word = f"{GERMAN[thousands]}tausend" * (thousands > 0) + f"{GERMAN[hundreds]}hundert" * (hundreds > 0)
    if rest == 1 or number == 0:
        return word + ("eins" if rest else "null")
    if rest < 20:
        return word + (GERMAN[rest] if rest else "")
    return word + (f"{GERMAN[rest % 10]}und" if rest % 10 else "") + GERMAN_TENS[rest // 10 - 2]


class Translation(Task):
    """Models take a source (batch, other), what is written so far (batch, tokens) and mask=, and give its logits."""

    name = "translation"
    meta_schema = Length
    metric = "exact"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "numbers": "the numbers from 1 to 9,999 in English words and in German ones, where the ones precede the tens"
    }
    reads = "a .tsv with a sentence and its translation a line, or a .jsonl with the keys source and target"
    takes_words = True
    smooths = True

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        """Pairs of sentences as bytes, split 90 : 5 : 5.

        Args:
            source: "numbers" or a file.
            seed: of the split.

        Raises:
            UserError: a file without pairs, or with a line that is none.
        """
        place = self._named(source)
        if isinstance(place, str):
            pairs = [(english(number), german(number)) for number in range(1, LARGEST + 1)]
        else:
            pairs = _read(place)
        if len(pairs) < 20:
            raise UserError(f"{source}: expected at least 20 pairs of sentences, got {len(pairs)}")
        sides = [_padded([pair[side] for pair in pairs]) for side in (0, 1)]
        train, val, test = (
            TensorDataset(*(side[part] for side in sides))
            for part in split_indices(len(pairs), (0.9, 0.05, 0.05), seed)
        )
        about = f"{self.embedded.get(str(source), 'the user’s own sentences')}; {len(pairs):,} pairs"
        meta = {"length": sides[1].shape[1]}
        return TaskData(str(source), train, val, test, fingerprint(*sides), {"vocab": 256}, meta, about=about)

    def _told(self, model: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every letter given those before it, and which count: up to the end, the end included."""
        written = F.pad(target[:, :-1], (1, 0), value=END)
        counts = F.pad(target[:, :-1] != END, (1, 0), value=True)
        return model(source, written, mask=source != END), counts

    def loss(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> Tensor:
        logits, counts = self._told(model, *batch)
        return F.cross_entropy(logits[counts].float(), batch[1][counts], label_smoothing=smoothing)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each sentence: whether every letter is right, as greedy writing has it; of letters how many."""
        rows = []
        for source, target in batches(dataset, batch_size, device_of(model)):
            logits, counts = self._told(model, source, target)
            told = (logits.argmax(-1) == target) | ~counts
            rows.append([told.all(1).double(), (told & counts).double().sum(1), counts.double().sum(1)])
        names = ("exact", "right", "letters")
        return join_scores(names, rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """The share of sentences whose every letter is right, and of letters."""
        return {
            "exact": float(scores["exact"].mean()),
            "letters": float(scores["right"].sum() / scores["letters"].sum()),
        }

    def held_out(  # type: ignore[override]
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True
    ) -> HeldOut:
        """As in `Task`."""
        if isinstance(self._named(source), str) or not whole:
            return super().held_out(source, meta, seed=seed)
        pairs = _read(Path(source))
        sides = [_padded([pair[side] for pair in pairs]) for side in (0, 1)]
        return HeldOut(TensorDataset(*sides), f"all of {source}")

    def trivial(self, data: TaskData) -> float:
        """The share of test sentences that are the commonest translation of training."""
        (_, train), (_, test) = (part.tensors for part in (data.train, data.test))  # type: ignore[attr-defined]
        kinds, counts = train.unique(dim=0, return_counts=True)
        return (test == kinds[counts.argmax()]).all(1).double().mean().item()

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"length": 256}

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Any], output: Path | None) -> str:
        """Writes the likeliest letter after letter for each sentence, or each line of a file."""
        lines = [line for given in inputs for line in text_of(given).splitlines()]
        if not all(line.strip() for line in lines):
            raise UserError("expected a sentence to translate, got an empty one")
        texts = []
        for line in lines:
            source = _padded([line]).to(device_of(model))
            written = source.new_full((1, 1), END)
            for _ in range(meta["length"]):
                letter = model(source, written, mask=source != END)[:, -1].argmax(-1, keepdim=True)
                if int(letter) == END:
                    break
                written = torch.cat([written, letter], dim=1)
            texts.append(Bytes().decode(written[0, 1:].tolist()))
        joined = "\n".join(texts)
        if output is not None:
            with whole(output) as place:
                place.write_text(joined + "\n", "utf-8")
            return f"{joined}\nwrote {output}"
        return joined


TASK = Translation()


def _padded(texts: Sequence[str]) -> Int[Tensor, "texts letters"]:
    """Bytes, each text ended and filled up with zeros."""
    rows = [torch.from_numpy(Bytes().encode(text)) for text in texts]
    return nn.utils.rnn.pad_sequence([F.pad(row, (0, 1), value=END) for row in rows], True, END)


def _read(path: Path) -> list[tuple[str, str]]:
    if path.is_dir():
        raise UserError(f"{path} is a folder: expected a .tsv or a .jsonl of pairs of sentences")
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        parts: list[Any]
        if path.suffix.lower() == ".jsonl":
            entry = parse_json(line, f"{path}, line {number}")
            if not isinstance(entry, dict) or not {"source", "target"} <= entry.keys():
                raise UserError(f"{path}, line {number}: expected an object with the keys source and target")
            parts = [entry["source"], entry["target"]]
        else:
            parts = line.removesuffix("\r").split("\t")
        if len(parts) != 2 or not all(isinstance(part, str) and part.strip() and "\0" not in part for part in parts):
            raise UserError(f"{path}, line {number}: expected a sentence, a tab and its translation")
        pairs.append((parts[0], parts[1]))
    return pairs
