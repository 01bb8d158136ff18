"""Translation: one sentence in, another out, letter by letter or word by word."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.inputs import parse_json, read_text
from provenn.data.text import Bytes, text_of
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
UNKNOWN, GOES_ON = "<unk>", "@@"  # a word of another text; what ends a piece that its word goes on behind
SPLITS = ("train", "valid", "test")
BEAM, LENGTH_PENALTY = 5, 1.2  # of what BLEU is computed of, as the papers of IWSLT14 have it
AT_ONCE = 32  # sentences that are translated together

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


class Pieces:
    """Tokens are what stands between blanks: words, or byte pairs that end in @@ where their word goes on.

    >>> pieces = Pieces.learn(["a b@@ c", "a"])
    >>> pieces.encode("a d"), pieces.decode([2, 3, 4])
    (tensor([2, 1]), 'a bc')
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.vocab = len(self.words)

    @classmethod
    def learn(cls, lines: Iterable[str]) -> "Pieces":
        """All that stand in these lines, the commonest first, after the end and what is unknown."""
        counts = Counter(word for line in lines for word in line.split())
        counts.pop(UNKNOWN, None)
        return cls(["", UNKNOWN, *(word for word, _ in counts.most_common())])

    def encode(self, text: str) -> Int[Tensor, " tokens"]:
        """The tokens of a text that is cut into pieces already, without an end."""
        return torch.tensor([self.numbers.get(word, 1) for word in text.split()], dtype=torch.long)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, its pieces joined to words."""
        text = " ".join(self.words[token] for token in tokens)
        return text.replace(f"{GOES_ON} ", "").removesuffix(GOES_ON)


class Letters(Bytes):
    """Tokens are bytes."""

    def encode(self, text: str) -> Int[Tensor, " tokens"]:  # type: ignore[override]  # a tensor
        """The bytes of a text."""
        return torch.from_numpy(super().encode(text))


class Benchmark(TensorDataset):
    """Pairs of sentences that are also translated, and compared by BLEU."""

    def __init__(self, source: Tensor, target: Tensor, tokens: Pieces, length: int):
        super().__init__(source, target)
        self.tokens, self.length = tokens, length


class Translation(Task):
    """Models take a source (batch, other), what is written so far (batch, tokens) and mask=, and give its logits."""

    name = "translation"
    meta_schema = Length
    metric = "exact"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "numbers": "the numbers from 1 to 9,999 in English words and in German ones, where the ones precede the tens"
    }
    reads = (
        "a .tsv with a sentence and its translation a line, a .jsonl with the keys source and target, or a folder such "
        "as de-en/ with train.de, train.en, valid.de, valid.en, test.de and test.en"
    )
    takes_words = True
    smooths = True

    def load(  # type: ignore[override]  # names its options
        self, source: str | Path, *, seed: int = 0, languages: str | None = None
    ) -> TaskData:
        """Pairs of sentences: as bytes, split 90 : 5 : 5; of a folder as the words of its files, in its own splits.

        Args:
            source: "numbers", a file or a folder.
            seed: of the split.
            languages: of a folder, from what into what, such as "de-en"; by default its name.

        Raises:
            UserError: a file without pairs, or with a line that is none.
        """
        location = self._named(source)
        if isinstance(location, Path) and location.is_dir():
            return _corpus(location, languages)
        if languages is not None:
            raise UserError(f"languages is of a folder of files for each language; of {source} leave it out")
        if isinstance(location, str):
            pairs = [(english(number), german(number)) for number in range(1, LARGEST + 1)]
        else:
            pairs = _read(location)
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

    def _logits(self, model: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every letter given those before it, and which count: up to the end, the end included."""
        written = F.pad(target[:, :-1], (1, 0), value=END)
        counts = F.pad(target[:, :-1] != END, (1, 0), value=True)
        return model(source, written, mask=source != END), counts

    def loss(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of each piece given those before it, in nats, the mean over pieces that are no padding."""
        logits, counts = self._logits(model, *batch)
        return F.cross_entropy(logits[counts].float(), batch[1][counts], label_smoothing=smoothing)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each sentence: whether every letter is right, as greedy writing has it; of letters how many."""
        rows = []
        for source, target in batches(dataset, batch_size, device_of(model)):
            logits, counts = self._logits(model, source, target)
            right = (logits.argmax(-1) == target) | ~counts
            rows.append([right.all(1).double(), (right & counts).double().sum(1), counts.double().sum(1)])
        names = ("exact", "right", "letters")
        scores = join_scores(names, rows)
        return {**scores, **_matches(model, dataset)} if isinstance(dataset, Benchmark) else scores

    def summary(self, scores: Scores) -> dict[str, float]:
        """The share of sentences whose every letter is right, and of letters; of a benchmark's translations BLEU."""
        shares = {
            "exact": float(scores["exact"].mean()),
            "letters": float(scores["right"].sum() / scores["letters"].sum()),
        }
        return {**shares, "bleu": _bleu(scores)} if "written" in scores else shares

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        languages: str | None = None,
    ) -> HeldOut:
        """As in `Task`; `languages`: of a folder, as in `load`."""
        location = self._named(source)
        folder = isinstance(location, Path) and location.is_dir()
        if folder != (meta.get("words") is not None):
            translated, given = ("letters", "a folder of words") if folder else ("the words of a folder", str(source))
            raise UserError(f"these weights translate {translated}, got {given}")
        if folder:
            lines = _lines(Path(location), "test", languages)
            return HeldOut(_benchmark(lines, Pieces(meta["words"]), meta["length"]), f"the test split of {source}")
        if isinstance(location, str) or not whole:
            return super().held_out(source, meta, seed=seed)
        pairs = _read(Path(source))
        sides = [_padded([pair[side] for pair in pairs]) for side in (0, 1)]
        return HeldOut(TensorDataset(*sides), f"all of {source}")

    def dummy_baseline(self, data: TaskData) -> float:
        """The share of test sentences that are the commonest translation of training."""
        (_, train), (_, test) = (part.tensors for part in (data.train, data.test))  # type: ignore[attr-defined]  # a TensorDataset
        kinds, counts = train.unique(dim=0, return_counts=True)
        return (test == kinds[counts.argmax()]).all(1).double().mean().item()

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"length": 256}

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Any], output: Path | None) -> str:
        """Writes the likeliest letter after letter for each sentence, or each line of a file."""
        lines = [line for given in inputs for line in text_of(given).splitlines()]
        if not all(line.strip() for line in lines):
            raise UserError("expected a sentence to translate, got an empty one")
        tokens = Letters() if meta.get("words") is None else Pieces(meta["words"])
        texts = []
        for line in lines:
            source = _padded([line], tokens).to(device_of(model))
            written = source.new_full((1, 1), END)
            for _ in range(meta["length"]):
                letter = model(source, written, mask=source != END)[:, -1].argmax(-1, keepdim=True)
                if int(letter) == END:
                    break
                written = torch.cat([written, letter], dim=1)
            texts.append(tokens.decode(written[0, 1:].tolist()))
        joined = "\n".join(texts)
        if output is not None:
            with atomic_write(output) as temporary:
                temporary.write_text(joined + "\n", "utf-8")
            return f"{joined}\nwrote {output}"
        return joined


TASK = Translation()


def _lines(folder: Path, split: str, languages: str | None) -> list[list[str]]:
    """The sentences of a split in both languages."""
    both = (languages or folder.name).split("-")
    if len(both) != 2 or not all(both):
        raise UserError(f"{folder}: from what into what? Call the folder such as de-en, or give languages=de-en")
    files = [folder / f"{split}.{language}" for language in both]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}: expected train, valid and test of {both[0]} and {both[1]}")
    texts = [read_text(file).removesuffix("\n").split("\n") for file in files]
    if len(texts[0]) != len(texts[1]):
        raise UserError(f"{files[0]} has {len(texts[0]):,} lines, {files[1].name} {len(texts[1]):,}: expected as many")
    kept = [pair for pair in zip(*texts) if all(part.strip() for part in pair)]
    if not kept:
        raise UserError(f"{files[0]} holds no sentences")
    return [list(side) for side in zip(*kept)]


def _corpus(folder: Path, languages: str | None) -> TaskData:
    """Words of both languages are one vocabulary, as their byte pairs are learned together."""
    splits = {split: _lines(folder, split, languages) for split in SPLITS}
    tokens = Pieces.learn(line for side in splits["train"] for line in side)
    train, val = (TensorDataset(*(_padded(side, tokens) for side in splits[split])) for split in SPLITS[:2])
    length = max(part.tensors[1].shape[1] for part in (train, val))
    sizes = ", ".join(f"{len(side):,} {split}" for split, (side, _) in splits.items())
    checksum = fingerprint(*("\n".join(side) for split in SPLITS for side in splits[split]))
    return TaskData(
        str(folder),
        train,
        val,
        _benchmark(splits["test"], tokens, length),
        checksum,
        {"vocab": tokens.vocab},
        {"length": length, "words": tokens.words},
        about=f"pairs of sentences: {sizes}; {tokens.vocab:,} words or pieces of words",
    )


def _benchmark(lines: Sequence[Sequence[str]], tokens: Pieces, length: int) -> Benchmark:
    source, target = (_padded(side, tokens) for side in lines)
    return Benchmark(source, target, tokens, length)


def translate(
    model: nn.Module, source: Int[Tensor, "batch other"], length: int, beam: int = BEAM, penalty: float = LENGTH_PENALTY
) -> list[list[int]]:
    """The best translation of each sentence that a beam search finds: log p / tokens^penalty, the end included.

    Args:
        model: as of the task.
        source: sentences, ended and filled up with zeros.
        length: tokens at the most.
        beam: translations of each sentence that are gone on with.
        penalty: above 1 long ones are preferred.
    """
    batch = len(source)
    source = source.repeat_interleave(beam, 0)
    written = source.new_full((batch * beam, 1), END)
    # At first all of a sentence's beams are the same: the first alone counts.
    scores = source.new_full((batch, beam), -torch.inf, dtype=torch.float32)
    scores[:, 0] = 0
    best: list[tuple[float, list[int]]] = [(-torch.inf, [])] * batch
    for step in range(1, length + 1):
        log = model(source, written, mask=source != END)[:, -1].float().log_softmax(-1)
        vocab = log.shape[-1]
        sums = (scores[..., None] + log.view(batch, beam, vocab)).flatten(1)
        top, candidates = sums.topk(min(2 * beam, sums.shape[1]))  # at most half of them end here
        chosen = written.view(batch, beam, -1)
        kept = []
        for i in range(batch):
            rows: list[tuple[float, int]] = []
            for score, at in zip(top[i].tolist(), candidates[i].tolist()):
                if score == -torch.inf:
                    continue
                ended = at % vocab == END
                if (ended or step == length) and score / step**penalty > best[i][0]:
                    tail = [] if ended else [at % vocab]
                    best[i] = (score / step**penalty, [*chosen[i, at // vocab, 1:].tolist(), *tail])
                if not ended and len(rows) < beam:
                    rows.append((score, at))
            rows += [(-torch.inf, 0)] * (beam - len(rows))
            kept.append(rows)
        scores = torch.tensor([[score for score, _ in rows] for rows in kept]).to(scores)
        index = torch.tensor([[at for _, at in rows] for rows in kept], device=source.device)
        parents = (index // vocab + beam * torch.arange(batch, device=source.device)[:, None]).flatten()
        written = torch.cat([written[parents], (index % vocab).flatten()[:, None]], 1)
        # What goes on can at best keep its score, and be as long as may be.
        done = [best[i][0] > scores[i].max().item() / length**penalty for i in range(batch)]
        if all(done):
            break
    return [tokens for _, tokens in best]


def _matches(model: nn.Module, dataset: Benchmark) -> Scores:
    """Of each translation, in whole words: what BLEU adds up over sentences."""
    from torchmetrics.text import BLEUScore

    tokens, meter = dataset.tokens, BLEUScore()
    matched: list[list[Any]] = []
    for source, target in batches(dataset, AT_ONCE, device_of(model)):
        for ours, theirs in zip(translate(model, source, dataset.length), target.tolist()):
            meter.reset()
            meter.update([tokens.decode(ours)], [[tokens.decode(theirs[: theirs.index(END)])]])
            matched.append([*meter.numerator.tolist(), *meter.denominator.tolist(), meter.preds_len, meter.target_len])
    names = [f"{kind}{n}" for kind in ("matches", "grams") for n in range(1, 5)] + ["written", "asked"]
    return {name: torch.tensor([float(row[i]) for row in matched]).numpy() for i, name in enumerate(names)}


def _bleu(scores: Scores) -> float:
    """BLEU of all sentences together, of 100 (Papineni et al., 2002)."""
    from torchmetrics.text import BLEUScore

    meter = BLEUScore()
    sums = {name: torch.tensor(float(column.sum())) for name, column in scores.items()}
    meter.numerator, meter.denominator = (
        torch.stack([sums[f"{kind}{n}"] for n in range(1, 5)]) for kind in ("matches", "grams")
    )
    meter.preds_len, meter.target_len = sums["written"], sums["asked"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was updated: the sums are
        return 100 * float(meter.compute())


def _padded(texts: Sequence[str], tokens: Letters | Pieces | None = None) -> Int[Tensor, "texts letters"]:
    """Tokens, bytes by default, each text ended and filled up with zeros."""
    rows = [(tokens or Letters()).encode(text) for text in texts]
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
    if not pairs:
        raise UserError(f"{path} is empty: expected pairs of sentences")
    return pairs
