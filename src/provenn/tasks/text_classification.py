"""One text or two in, a class or a score out: GLUE's tasks, each by its official metrics."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.data.sentences import Example, Labelled, docstrings, read_sentences
from provenn.data.text import BytePairs, Bytes, Document, Tokenizer, read_tokenizer, text_of
from provenn.tasks.base import (
    LABEL,
    PREDICTED,
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    blind_accuracy,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.meta import Sentences

DOCSTRINGS = "stdlib-docstrings"
OFFICIAL = (("accuracy",), ("matthews",), ("accuracy", "f1"), ("pearson", "spearman"))
BETWEEN = "\t"  # two texts of a prediction

# One text or two, to tokens and to whose they are: 0 of the first text, 1 of the second.
Encode = Callable[[str, str | None], tuple[Sequence[int], Sequence[int]]]


class Encoded(Dataset):
    """Examples in tokens: (tokens (length,) padded with zeros, whose they are (length,), how many, class or score).

    Args:
        examples: one text or two, each with its label.
        encode: to at most `length` tokens.
        length: tokens of every example.
        classes: what labels are called; none where they are scores.
        official: names of the metrics that they are judged by.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encode: Encode,
        length: int,
        classes: Sequence[str],
        official: tuple[str, ...],
    ):
        self.official = official
        self.tokens = torch.zeros(len(examples), length, dtype=torch.long)
        self.parts = torch.zeros_like(self.tokens)
        self.counts = torch.zeros(len(examples), dtype=torch.long)
        for row, example in enumerate(examples):
            tokens, parts = encode(example.first, example.second)
            self.counts[row] = len(tokens)
            self.tokens[row, : len(tokens)] = torch.as_tensor(tokens)
            self.parts[row, : len(parts)] = torch.as_tensor(parts)
        labels = [classes.index(str(e.label)) if classes else float(e.label) for e in examples]
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens[index], self.parts[index], self.counts[index], self.labels[index]


class TextClassification(Task):
    """Systems are called as those of Hugging Face: input_ids and token_type_ids (batch, tokens) and attention_mask.

    They give logits (batch, classes), or (batch, 1) where a score is predicted.
    """

    name = "text-classification"
    meta_schema = Sentences
    metric = "score"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        DOCSTRINGS: "heads of functions in Python's standard library and first lines of docstrings, of which half "
        "belong to another function; those tested are of files that are not trained on",
    }
    takes_words = True
    reads = "a folder of one of GLUE's tasks: train.tsv and dev.tsv, or of texts: train.csv and test.csv"

    def load(  # type: ignore[override]
        self,
        source: str | Path,
        *,
        seed: int = 0,
        length: int = 256,
        tokenizer: str = "bytes",
        vocab_size: int = 4096,
        validation: float | int = 0.05,
    ) -> TaskData:
        """Sentences in tokens; of GLUE dev.tsv is the test, whose published labels are secret.

        Args:
            source: an embedded name, or a folder.
            seed: which of GLUE's training examples are validated with.
            length: tokens of an example; the longer text of a pair is cut first.
            tokenizer: "bytes", or "bpe", learned from the training text.
            vocab_size: tokens that "bpe" learns.
            validation: share of GLUE's training examples to hold out.

        Raises:
            UserError: no such data, or data that cannot be read.
        """
        if length < 2:
            raise UserError(f"length must be at least 2 tokens, got {length}")
        if not 0 < validation < 1:
            raise UserError(f"validation must lie between 0 and 1, got {validation}")
        if tokenizer not in ("bytes", "bpe"):
            raise UserError(f"tokenizer must be bytes or bpe, got {tokenizer!r}")
        train, val, test, content = self._splits(source, seed, validation)
        texts = [text for example in train for text in (example.first, example.second or "")]
        chosen = Bytes() if tokenizer == "bytes" else BytePairs.learn([Document("", t) for t in texts], vocab_size)
        meta: dict[str, Any] = {
            "tokenizer": chosen.dump(),
            "length": length,
            "classes": classes_of(content),
            "official": list(content.official),
        }
        sets = [self._encoded(part, meta, chosen) for part in (train, val, test)]
        marks = [tensor for each in sets for tensor in (each.tokens, each.labels)]
        sizes = f"{len(sets[0]):,} train, {len(sets[1]):,} valid, {len(sets[2]):,} test"
        return TaskData(
            str(source),
            train=sets[0],
            val=sets[1],
            test=sets[2],
            fingerprint=fingerprint(*marks),
            options={"vocab": chosen.vocab, "num_classes": max(1, len(meta["classes"])), "length": length},
            meta=meta,
            about=f"{self.embedded.get(str(source), content.about)}: {sizes}",
        )

    def sentences(self, source: str | Path) -> Labelled:
        """The examples themselves, of any source that `load` takes."""
        location = self._named(source)
        if isinstance(location, str):
            train, _, test = docstrings()
            return Labelled(train, test, ("accuracy",), "")
        return read_sentences(location)

    def _splits(
        self, source: str | Path, seed: int, validation: float
    ) -> tuple[list[Example], list[Example], list[Example], Labelled]:
        content = self.sentences(source)
        if source == DOCSTRINGS:
            return content.train, docstrings()[1], content.test, content
        kept, held = split_indices(len(content.train), (1 - validation, validation), seed)
        if not kept or not held:
            raise UserError(f"{source} holds {len(content.train)} examples to train on: too few to hold some out")
        train, val = ([content.train[i] for i in sorted(part)] for part in (kept, held))
        return train, val, content.test, content

    def _encoded(self, examples: Sequence[Example], meta: dict[str, Any], tokenizer: Tokenizer) -> Encoded:
        return Encoded(examples, _encoder(tokenizer, meta["length"]), meta["length"], meta["classes"], _official(meta))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits, labels = _logits(model, batch), batch[3]
        return F.cross_entropy(logits, labels) if labels.dtype == torch.long else F.mse_loss(logits[:, 0], labels)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 64) -> Scores:
        """The true and the predicted class or score of each example, and the metrics that they are judged by."""
        official = OFFICIAL.index(dataset.official)  # type: ignore[attr-defined]
        rows: list[list[Tensor]] = []
        for batch in batches(dataset, batch_size, device_of(model)):
            logits, labels = _logits(model, batch).float(), batch[3]
            by = torch.full(labels.shape, official)
            rows.append([labels, logits.argmax(-1) if labels.dtype == torch.long else logits[:, 0], by])
        scored = dataset.official == OFFICIAL[3]  # type: ignore[attr-defined]
        return join_scores(("wanted", "given", "official") if scored else (LABEL, PREDICTED, "official"), rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """The official metrics, and as `score` their mean; of classes accuracy too. All are shares, none per cent.

        Where all predictions are equal, a correlation is 0.
        """
        official = OFFICIAL[int(scores["official"][0])]
        wanted, given = (scores[name] for name in ((LABEL, PREDICTED) if LABEL in scores else ("wanted", "given")))
        names = dict.fromkeys([*official, *(["accuracy"] if LABEL in scores else [])])
        metrics = {name: _metric(name, wanted, given) for name in names}
        return {"score": float(np.mean([metrics[name] for name in official])), **metrics}

    def held_out(  # type: ignore[override]
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True
    ) -> HeldOut:
        """As in `Task`: the test split, in the model's own tokens and classes."""
        content = self.sentences(source)
        if content.scored != (not meta["classes"]):
            one, two = ("scores", "classes") if content.scored else ("classes", "scores")
            raise UserError(f"{source} has {one}, the model was trained on {two}")
        unknown = {e.label for e in content.test} - set(meta["classes"]) if meta["classes"] else set()
        if unknown:
            known = ", ".join(meta["classes"])
            raise UserError(f"{source}: the model knows no class {min(map(str, unknown))!r}; it knows: {known}")
        judged = {**meta, "official": list(content.official)}
        dataset = self._encoded(content.test, judged, read_tokenizer(meta["tokenizer"]))
        return HeldOut(dataset, f"the test split of {source}")

    def dummy_baseline(self, data: TaskData) -> float:
        """Of always predicting the class that is best so in training, or of guessing evenly; 0 of a correlation."""
        train, test = (np.asarray([int(part[i][3]) for i in range(len(part))]) for part in (data.train, data.test))  # type: ignore[arg-type]
        official = data.test.official  # type: ignore[attr-defined]
        if official == ("accuracy",):
            return blind_accuracy(torch.from_numpy(train), torch.from_numpy(test))
        if official != ("accuracy", "f1"):
            return 0.0

        def score_of(label: int, wanted: np.ndarray) -> float:
            scores = {LABEL: wanted, PREDICTED: np.full_like(wanted, label), "official": np.full_like(wanted, 2)}
            return self.summary(scores)["score"]

        return score_of(max(np.unique(train).tolist(), key=lambda label: score_of(label, train)), test)

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        classes = [str(index) for index in range(options.get("num_classes", 2))]
        return {
            "tokenizer": "bytes",
            "length": options.get("length", 256),
            "classes": classes,
            "official": ["accuracy"],
        }

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Any], output: Path | None) -> str:
        """The class or the score of each text, or of each pair with a tab between; of a file, of each of its lines."""
        lines = [line for given in inputs for line in text_of(given).splitlines() if line.strip()]
        examples = []
        for line in lines:
            first, tab, second = line.partition(BETWEEN)
            examples.append(Example(first, second if tab else None, meta["classes"][0] if meta["classes"] else 0.0))
        if not examples:
            raise UserError("there is no text to classify")
        dataset = self._encoded(examples, meta, read_tokenizer(meta["tokenizer"]))
        with torch.no_grad():
            logits = torch.cat(
                [_logits(model, batch).float().cpu() for batch in batches(dataset, 64, device_of(model))]
            )
        rows = []
        for line, row in zip(lines, logits):
            best = int(row.argmax())
            answer = f"{meta['classes'][best]}\t{row.softmax(0)[best]:.3f}" if meta["classes"] else f"{row[0]:.3f}"
            rows.append(f"{answer}\t{line}")
        text = "\n".join(rows)
        if output is None:
            return text
        with atomic_write(output) as temporary:
            temporary.write_text(text + "\n", "utf-8")
        return f"{text}\nwrote {output}"


TASK = TextClassification()


def classes_of(content: Labelled) -> list[str]:
    """The classes of examples in alphabetical order, so that 1 comes after 0; none where scores are predicted.

    Raises:
        UserError: one class alone, or one that occurs in the test alone.
    """
    if content.scored:
        return []
    classes = sorted({str(example.label) for example in content.train})
    unknown = {str(example.label) for example in content.test} - {*classes}
    if len(classes) < 2 or unknown:
        what = f"the class {min(unknown)!r} occurs in no training example" if unknown else f"all are {classes[0]!r}"
        raise UserError(f"{content.about}: {what}: expected two classes or more, every one in training")
    return classes


def _official(meta: dict[str, Any]) -> tuple[str, ...]:
    return tuple(meta["official"])


def _encoder(tokenizer: Tokenizer, length: int) -> Encode:
    """First text, the token that ends a document, second text; of a pair that is too long the longer is cut."""

    def encode(first: str, second: str | None) -> tuple[Sequence[int], Sequence[int]]:
        a = tokenizer.encode(first).tolist()
        if second is None:
            return a[:length] or [tokenizer.end], [0] * max(1, min(length, len(a)))
        b = tokenizer.encode(second).tolist()
        room = length - 1
        while len(a) + len(b) > room:
            longer = a if len(a) > len(b) else b
            del longer[max(room - min(len(a), len(b)), room // 2) :]
        return [*a, tokenizer.end, *b], [0] * (len(a) + 1) + [1] * len(b)

    return encode


def inputs_of(batch: Any) -> dict[str, Int[Tensor, "batch tokens"]]:
    """What a system is called with: a batch cut to its longest example."""
    tokens, parts, counts, _ = batch
    longest = int(counts.max())
    mask = torch.arange(longest, device=tokens.device) < counts[:, None]
    return {
        "input_ids": tokens[:, :longest],
        "attention_mask": mask.long(),
        "token_type_ids": parts[:, :longest],
    }


def _logits(model: nn.Module, batch: Any) -> Float[Tensor, "batch classes"]:
    output = model(**inputs_of(batch))
    return getattr(output, "logits", output)  # models of Hugging Face give more than these


def _metric(name: str, wanted: np.ndarray, given: np.ndarray) -> float:
    if name == "accuracy":
        return float((wanted == given).mean())
    if name in ("pearson", "spearman"):
        import scipy.stats

        if np.ptp(wanted) == 0 or np.ptp(given) == 0:
            return 0.0
        correlation = scipy.stats.pearsonr if name == "pearson" else scipy.stats.spearmanr
        return float(correlation(wanted, given).statistic)
    from sklearn.metrics import f1_score, matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a sample with one class: its figure is 0
        return float(matthews_corrcoef(wanted, given) if name == "matthews" else f1_score(wanted, given))
