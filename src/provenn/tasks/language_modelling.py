"""Language modelling: the next token of a text."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input
from provenn.core.inputs import read_text
from provenn.data.choices import Questions, read_questions
from provenn.data.prompts import read_prompts
from provenn.data.text import (
    ENDS,
    BytePairs,
    Bytes,
    Document,
    Tokenizer,
    Words,
    read_documents,
    read_hub,
    read_splits,
    read_tokenizer,
    split_documents,
    standard_library,
    text_of,
    written,
)
from provenn.tasks.base import (
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    count_examples,
    device_of,
    fingerprint,
    join_scores,
)
from provenn.tasks.meta import Text
from provenn.tasks.prompted import Answers, Written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HUB = "hf:"
LOGITS = 2**24  # that an evaluation holds at a time


class Windows(Dataset):
    """A text in tokens, packed end to end and cut into windows: each with the same one token later.

    Args:
        stream: the tokens.
        length: tokens a window.
        bytes_of: how many bytes each token of the vocabulary stands for.
        most: keep so many windows, spread evenly over the text; by default all.
        words: how many words there are to a byte, for perplexity by words.
    """

    def __init__(
        self,
        stream: Int64[np.ndarray, " tokens"],
        length: int,
        bytes_of: Int64[np.ndarray, " vocab"],
        most: int | None = None,
        words: float | None = None,
    ):
        self.stream, self.length, self.words = torch.from_numpy(stream), length, words
        self.bytes_of = torch.from_numpy(bytes_of)
        count = (len(stream) - 1) // length
        kept = count if most is None else min(most, count)
        self.starts = (torch.arange(kept) * count // max(kept, 1)) * length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.starts[index])
        both = self.stream[start : start + self.length + 1]
        return both[:-1], both[1:]


class Choices(Dataset):
    """Questions in tokens; an item is a list of (tokens, where the choice begins), one for each of its choices.

    A choice follows what is asked after a blank. Tokens are of both together, of which those that the question has by
    itself are its own; where there are more than a window, the first are cut.
    """

    def __init__(self, asked: Questions, tokenizer: Tokenizer, length: int):
        self.asked, self.vocab = asked, tokenizer.vocab
        self.items = [
            [_pair(context, choice, tokenizer, length) for context, choice in zip(question.contexts, question.choices)]
            for question in asked.questions
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[tuple[Int64[Tensor, " _"], int]]:
        return self.items[index]

    def scores(self, model: nn.Module, batch_size: int) -> Scores:
        """Of each question whether its right choice is the likeliest, and the likeliest for each of its letters.

        A single choice must be what the model writes, token for token.
        """
        rows = [row for item in self.items for row in item]
        nats, greedy = continuation_nats(model, rows, self.vocab, batch_size)
        right, right_by_length, start = [], [], 0
        for question in self.asked.questions:
            part = slice(start, start := start + len(question.choices))
            if len(question.choices) == 1:
                hits = [bool(greedy[part][0])] * 2
            else:
                letters = np.array([max(1, len(choice)) for choice in question.choices])
                hits = [each.argmin() == question.right for each in (nats[part], nats[part] / letters)]
            right.append(hits[0])
            right_by_length.append(hits[1])
        by_length = np.full(len(self), self.asked.by_length)
        return {"right": np.array(right), "right_by_length": np.array(right_by_length), "by_length": by_length}


class LanguageModelling(Task):
    """Models take tokens (batch, tokens) and give logits (batch, tokens, vocab); those that stream also generate."""

    name = "language-modelling"
    meta_schema = Text
    metric = "bits_per_byte"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "stdlib": "the source of Python's standard library, 11 MB in 580 files; those tested are not trained on",
    }
    takes_words = True
    divides_tokens = True
    asks = True  # whether questions with choices may be put to its models
    reads = (
        "text: a file, a .jsonl with a key text, a folder of these, or hf:NAME of the Hugging Face hub; to evaluate, "
        "questions with choices too, such as a folder with hellaswag_val.jsonl, and prompts of LongBench and RULER"
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        length: int = 256,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        eval_tokens: int = 65_536,
    ) -> TaskData:
        """Text as windows of tokens.

        Args:
            source: "stdlib", a path, or "hf:NAME" for a data set of the hub. Of QMSum, answers are learned.
            seed: which documents are held out.
            length: tokens a window.
            tokenizer: "bytes", "bpe" (learned from the training text), "words" (all of the training text's, between
                blanks, as WikiText has them), or a tokenizer.json, also one beside the text.
            vocab_size: tokens that "bpe" learns, 4,096 by default.
            eval_tokens: how many tokens of validation and of test text are read, in windows spread evenly over it.

        Raises:
            UserError: text that cannot be read, or less of it than windows need.
        """
        if length < 2:
            raise UserError(f"length must be at least 2 tokens, got {length}")
        if eval_tokens < length:
            raise UserError(f"eval_tokens must be at least one window of {length}, got {eval_tokens}")
        if vocab_size is not None and tokenizer != "bpe":
            raise UserError(f"vocab_size is of tokenizer=bpe, which learns its tokens; of {tokenizer} leave it out")
        location = None if str(source).startswith(HUB) or not self.asks else self._named(source)
        if isinstance(location, Path) and location.is_dir() and read_prompts(location, "train") is not None:
            return self._answers(location, _tokenizer(_beside(source, tokenizer), (), 0), length)
        parts = self.documents(source, seed)
        chosen = _tokenizer(_beside(source, tokenizer), parts[0], 4096 if vocab_size is None else vocab_size)
        streams = [_packed(part, chosen) for part in parts]
        for name, stream in zip(("training", "validation", "test"), streams):
            if len(stream) <= length:
                raise UserError(
                    f"{source}: too little text: {len(stream)} tokens of {name} are fewer than a window of {length}; "
                    "give more text, or a smaller length"
                )
        most = max(1, eval_tokens // length)
        train, val, test = (Windows(s, length, chosen.lengths(), m) for s, m in zip(streams, (None, most, most)))
        sizes = ", ".join(
            f"{len(stream):,} {name}" for stream, name in zip(streams, ("training", "validation", "test"))
        )
        return TaskData(
            str(source),
            train,
            val,
            test,
            fingerprint=fingerprint(*streams),
            options={"vocab": chosen.vocab},
            meta={"tokenizer": chosen.dump(), "length": length},
            about=f"{self.embedded.get(str(source), 'the user’s own text')}; tokens: {sizes}",
        )

    def _answers(self, folder: Path, tokenizer: Tokenizer, length: int) -> TaskData:
        """Prompts with answers, which are tuned on; what stands before an answer is read and not learned."""
        asked = [read_prompts(folder, split) for split in ("train", "val", "test")]
        if None in asked:
            raise UserError(f"{folder}: expected train.jsonl, val.jsonl and test.jsonl of one set")
        train, val, test = (Answers(prompts, tokenizer, length) for prompts in asked if prompts is not None)
        return TaskData(
            str(folder),
            train,
            val,
            test,
            fingerprint=fingerprint(*(x.numpy() for part in (train, val, test) for row in part.items for x in row)),
            options={"vocab": tokenizer.vocab},
            meta={"tokenizer": tokenizer.dump(), "length": length},
            about=f"{len(train):,} prompts of {train.asked.name} with answers, {len(val):,} to validate, "
            f"{len(test):,} to test",
        )

    def documents(self, source: str | Path, seed: int = 0) -> list[list[Document]]:
        """The texts for training, for validation and for the test, of any source that `load` takes."""
        if isinstance(source, str) and source.startswith(HUB):
            return split_documents(read_hub(source.removeprefix(HUB)), seed)
        location = self._named(source)
        if isinstance(location, str):
            return split_documents(standard_library())
        return read_splits(location) or split_documents(read_documents(location), seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the token after each, in nats, the mean over those that are targets."""
        x, y = batch
        return F.cross_entropy(model(x).transpose(1, 2).float(), y)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each window, from its start: nats, tokens predicted right, tokens, and the bytes that they stand for.

        Of questions whether the right choice is the likeliest, see `Choices`; of prompts how good an answer is, see
        `Written`.
        """
        if isinstance(dataset, Choices):
            return dataset.scores(model, batch_size)
        if isinstance(dataset, Written):
            return dataset.scores(model)
        bytes_of: Tensor = dataset.bytes_of  # type: ignore[attr-defined]
        size = len(bytes_of) * dataset.length  # type: ignore[attr-defined]
        rows = []
        for x, y in batches(dataset, max(1, min(batch_size, LOGITS // size)), device_of(model)):
            logits = model(x)
            nats = F.cross_entropy(logits.transpose(1, 2).float(), y, reduction="none").double()
            counts = y >= 0  # of an answer that is tuned on, the prompt is not
            sizes = bytes_of.to(y.device)[y.clamp_min(0)] * counts
            parts = (nats, logits.argmax(-1) == y, counts, sizes)
            rows.append([part.sum(1).double() for part in parts])
        scores = join_scores(("nats", "right", "tokens", "bytes"), rows)
        words: float | None = getattr(dataset, "words", None)
        return scores if words is None else {**scores, "words": scores["bytes"] * words}

    def summary(self, scores: Scores) -> dict[str, float]:
        """Bits a byte, perplexity and nats a token, and the share of tokens predicted right.

        Where the words are counted, perplexity by words too: of other tokens it is the same figure. Of questions the
        share that is answered right by the likelihood of a choice, and by that for each of its letters. Of the two,
        `score` is the one that the set is usually judged by. Of prompts `score` is the mean of the set's own metric.
        """
        if "written" in scores:
            return {"score": float(scores["written"].mean())}
        if "right" in scores and "by_length" in scores:
            plain, by_length = (float(scores[name].mean()) for name in ("right", "right_by_length"))
            usual = by_length if bool(scores["by_length"][0]) else plain
            return {"score": usual, "accuracy": plain, "accuracy_norm": by_length}
        nats, right, tokens, size = (float(scores[name].sum()) for name in ("nats", "right", "tokens", "bytes"))
        words = float(scores["words"].sum()) if "words" in scores else 0
        by_words = {"word_perplexity": math.exp(min(nats / words, 700))} if words else {}
        return {
            **by_words,
            "bits_per_byte": nats / size / math.log(2),
            "perplexity": math.exp(min(nats / tokens, 700)),
            "nll": nats / tokens,
            "accuracy": right / tokens,
        }

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        length: int | None = None,
        tokenizer: str | None = None,
        eval_tokens: int = 65_536,
        prompt_length: int | None = None,
    ) -> HeldOut:
        """As in `Task`, the text in the model's own tokens.

        Args:
            source, meta, seed, whole: as in `Task`.
            length: tokens a window; by default as the model was trained.
            tokenizer: a tokenizer.json, of weights that do not bring their own.
            eval_tokens: how many tokens are read, in windows spread evenly over the text.
            prompt_length: tokens of a prompt and its answer at most, by default as many as a window has.
        """
        length = meta["length"] if length is None else length
        if length < 2:
            raise UserError(f"length must be at least 2 tokens, got {length}")
        if eval_tokens < length:
            raise UserError(f"eval_tokens must be at least one window of {length}, got {eval_tokens}")
        tokens = (
            read_tokenizer(meta["tokenizer"]) if tokenizer is None else _tokenizer(_beside(source, tokenizer), (), 0)
        )
        vocab = meta.get("blank", meta.get("vocab", tokens.vocab))
        if vocab != tokens.vocab:
            raise UserError(
                f"the model has {vocab} tokens, the tokenizer {tokens.vocab}: give the model's own with "
                "--set tokenizer=tokenizer.json"
            )
        asked = read_questions(Path(source)) if self.asks and not str(source).startswith(HUB) else None
        if asked is not None:
            return HeldOut(Choices(asked, tokens, length), f"{len(asked.questions):,} questions of {asked.name}")
        prompts = read_prompts(Path(source)) if self.asks and not str(source).startswith(HUB) else None
        if prompts is not None:
            written = Written(prompts, tokens, length if prompt_length is None else prompt_length)
            return HeldOut(written, f"{len(written):,} prompts of {prompts.name}")
        parts = self.documents(source, seed)
        whole = whole and source not in self.embedded and read_splits(Path(source)) is None
        texts = [text for part in parts for text in part] if whole else parts[2]
        stream = _packed(texts, tokens)
        if len(stream) <= length:
            raise UserError(f"{source}: {len(stream)} tokens are fewer than a window of {length}; give more text")
        counted = sum(len(text.text.split()) for text in texts) / max(1, sum(len(text.text.encode()) for text in texts))
        windows = Windows(stream, length, tokens.lengths(), max(1, eval_tokens // length), counted)
        every = (len(stream) - 1) // length
        some = f"{len(windows)} of {every:,} windows" if len(windows) < every else f"all {every:,} windows"
        which = "" if whole else "the test split of "
        return HeldOut(self.asked(windows), f"{some} of {length} tokens of {which}{source}")

    def asked(self, windows: Windows) -> Dataset:
        """What is asked of windows of text: here the token after each."""
        return windows

    def dummy_baseline(self, data: TaskData) -> float:
        """Bits a byte of counts of pairs with back-off: p(y|x) = (c(x,y) + d(x) p(y)) / (c(x) + d(x)).

        d(x) is how many tokens were seen after x (Witten and Bell, 1991), and p(y) the share of y, to which one is
        added: a token not seen is not impossible. The counts are of the training text.
        """
        bytes_of: Tensor = data.test.bytes_of  # type: ignore[attr-defined]
        vocab = len(bytes_of)
        (before, after), (asked, answer) = (_pairs(part) for part in (data.train, data.test))
        singles = after.bincount(minlength=vocab).double() + 1
        seen, counts = (before * vocab + after).unique(return_counts=True)
        kinds = (seen // vocab).bincount(minlength=vocab).double()
        of_context = before.bincount(minlength=vocab).double()
        wanted = asked * vocab + answer
        place = torch.searchsorted(seen, wanted).clamp_max(len(seen) - 1)
        count = torch.where(seen[place] == wanted, counts[place], 0).double()
        backed_off = kinds[asked] * singles[answer] / singles.sum()
        known = of_context[asked] + kinds[asked]
        shares = torch.where(known > 0, (count + backed_off) / known, singles[answer] / singles.sum())
        return (-shares.log2().sum() / bytes_of[answer].sum()).item()

    def seen(self, data: TaskData, examples: int, seed: int) -> TaskData:
        """With as many windows of the training text as a training sees, drawn by the seed."""
        train = data.train
        if not isinstance(train, Windows) or examples >= len(train):
            return data
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:examples].sort().values
        part = copy(train)
        part.starts = train.starts[drawn]
        return replace(data, train=part)

    def nll_by_position(self, model: nn.Module, dataset: Dataset) -> Float[Tensor, " tokens"]:
        """Nats of the token at each position of a window, the mean over windows."""
        size = len(dataset.bytes_of) * dataset.length  # type: ignore[attr-defined]
        with torch.no_grad():
            each = [_nll(model, x, y).sum(0) for x, y in batches(dataset, max(1, LOGITS // size), device_of(model))]
        return torch.stack(each).sum(0).cpu() / count_examples(dataset)

    def example(self, file: Path, meta: dict[str, Any]) -> Int64[Tensor, "1 tokens"]:
        """The first window of a text, as a batch of one."""
        tokens = read_tokenizer(meta["tokenizer"]).encode(read_text(file))[: meta["length"]]
        if not len(tokens):
            raise UserError(f"{file} holds no text")
        return torch.from_numpy(tokens)[None]

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        vocab = {"vocab": options["vocab"]} if "vocab" in options else {}
        return {"tokenizer": "bytes", "length": 256, **vocab}

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Any],
        output: Path | None,
        *,
        tokens: int = 200,
        temperature: float | int = 0.8,
        top_k: int | None = None,
        top_p: float | int | None = None,
        seed: int = 0,
        context: int | None = None,
        log: Callable[[str], None] | None = None,
    ) -> str:
        """Goes on with each prompt.

        Args:
            inputs: prompts, or files that hold one.
            output: a file for the texts.
            tokens: how many to write for each.
            temperature, top_k, top_p: as in `CausalLM.generate`.
            seed: of the draws.
            context: how many tokens of a prompt are read, its last ones; by default as many as a window of training
                had, which is said where a prompt has more.
            log: is given the text piece by piece as it comes.
        """
        if output is not None:
            check_no_input(output, inputs)
        if tokens < 1:
            raise UserError(f"tokens must be at least 1, got {tokens}")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
        if context is not None and context < 1:
            raise UserError(f"context must be at least 1 token, got {context}")
        if not hasattr(model, "generate"):
            raise UserError(f"{type(model).__name__} cannot generate text")
        tokenizer, device = read_tokenizer(meta["tokenizer"]), device_of(model)
        prompts = [text_of(given) for given in inputs]
        texts: list[str] = []
        with nullcontext() if output is None else written(output) as file:
            for prompt in prompts:
                draw: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
                draw["generator"] = torch.Generator(device).manual_seed(seed)
                start = _last_tokens(tokenizer.encode(prompt), meta.get("length", 256), context)
                if log is not None and texts:
                    log("\n\n")
                try:
                    following = cast(Any, model).generate(_batched(start, tokenizer).to(device), tokens, **draw)
                    texts.append(_continued(prompt, following, tokenizer, log or (lambda piece: None)))
                except ValueError as error:
                    raise UserError(str(error)) from None
            if file is not None:
                file.write("\n\n".join(texts))
        written_to = f"\nwrote {output}" if output else ""
        if log is not None and written_to:
            log(written_to)
        return "\n\n".join(texts) + written_to

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """How well a token is predicted, over how much text stands before it."""
        from matplotlib.figure import Figure

        nats = self.nll_by_position(model, data.test).double().numpy()
        positions = np.arange(1, len(nats) + 1)
        edges = np.unique(np.geomspace(1, len(nats) + 1, 25).astype(int))
        middle = [positions[a - 1 : b - 1].mean() for a, b in pairwise(edges)]
        height = [nats[a - 1 : b - 1].mean() / math.log(2) for a, b in pairwise(edges)]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(middle, height, marker="o", markersize=3)
        axes.set(xscale="log", xlabel="tokens before", ylabel="bits a token", title=f"{data.name}: test text")
        axes.grid(alpha=0.3)
        return figure


TASK = LanguageModelling()


def continuation_nats(
    model: nn.Module, rows: Sequence[tuple[Int64[Tensor, " _"], int]], vocab: int, batch_size: int
) -> tuple[Float64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """Nats of the last tokens of each row, from a position of its own on, and whether each of them is the likeliest.

    Rows of like length are read together, padded after their end, where no token before it looks.

    Args:
        model: (batch, tokens) to (batch, tokens, vocab), causal.
        rows: tokens, and the position of the first that counts, at least 1.
        vocab: how many tokens there are.
        batch_size: rows at a time at most.
    """
    nats, greedy = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    device = device_of(model)
    with progress.bar("questions", len(rows)) as advance:
        while order:
            longest = len(rows[order[0]][0])
            size = max(1, min(batch_size, LOGITS // (vocab * longest)))
            chosen, order = order[:size], order[size:]
            tokens = nn.utils.rnn.pad_sequence([rows[index][0] for index in chosen], batch_first=True).to(device)
            ends = torch.tensor([len(rows[index][0]) for index in chosen], device=device)
            starts = torch.tensor([rows[index][1] for index in chosen], device=device)
            logits, targets = model(tokens[:, :-1]).float(), tokens[:, 1:]
            at = torch.arange(1, longest, device=device)
            counts = (at >= starts[:, None]) & (at < ends[:, None])
            each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double()
            nats[chosen] = each.masked_fill(~counts, 0).sum(1).cpu().numpy()
            greedy[chosen] = ((logits.argmax(-1) == targets) | ~counts).all(1).cpu().numpy()
            advance(len(chosen))
    return nats, greedy


def _pair(context: str, choice: str, tokenizer: Tokenizer, length: int) -> tuple[Int64[Tensor, " tokens"], int]:
    context = context.rstrip()
    before = tokenizer.encode(context)
    both = tokenizer.encode(f"{context} {choice}" if context else choice)
    start = min(len(before), len(both) - 1)  # a token may hold the end of one and the beginning of the other
    if start < 1:
        both, start = np.concatenate([[tokenizer.end], both]), 1
    cut = max(0, min(len(both) - length - 1, start - 1))
    return torch.from_numpy(both[cut:]), start - cut


def _nll(model: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, "batch tokens"]:
    return F.cross_entropy(model(x).transpose(1, 2).float(), y, reduction="none")


def _pairs(dataset: Dataset) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
    """Each token that is a target, and the one before it."""
    pairs = [(x[y >= 0], y[y >= 0]) for x, y in batches(dataset, 256, torch.device("cpu"))]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _packed(documents: Sequence[Document], tokenizer: Tokenizer) -> Int64[np.ndarray, " tokens"]:
    """The documents end to end, each after the token that ends the one before."""
    end = np.array([tokenizer.end], dtype=np.int64)
    return np.concatenate([part for document in documents for part in (tokenizer.encode(document.text), end)] or [end])


def _beside(source: str | Path, tokenizer: str) -> str:
    """The path of a tokenizer that lies with the text."""
    # Of questions, one for all sets in the folder around them.
    paths = [folder / tokenizer for folder in (Path(source), Path(source).parent)]
    inside = next((path for path in paths if path.is_file()), None)
    return str(inside) if not Path(tokenizer).exists() and inside is not None else tokenizer


def _tokenizer(name: str, train: Sequence[Document], vocab_size: int) -> Tokenizer:
    if name == "bytes":
        return Bytes()
    if name == "bpe":
        return BytePairs.learn(train, vocab_size)
    if name == "words":
        return Words.learn(train)
    if not Path(name).is_file():
        raise UserError(f"tokenizer must be bytes, bpe, words or a tokenizer.json, got {name!r}")
    try:
        tokenizer = read_tokenizer(read_text(Path(name)))
    except UserError as error:
        raise UserError(f"{name} is no tokenizer.json: {error}") from None
    if tokenizer.end is None:
        raise UserError(f"{name} has no token to end a document with: expected one of {', '.join(ENDS)}")
    return tokenizer


def _last_tokens(encoded: Int64[np.ndarray, " _"], window: int, context: int | None) -> Int64[np.ndarray, " _"]:
    """What is read of a prompt; that it is not all is said, where nobody asked for so much."""
    # A model gains little by what lies further back than any of its training did, and may take minutes to read it.
    kept = window if context is None else context
    if context is None and len(encoded) > window:
        progress.say(
            f"the prompt has {len(encoded):,} tokens: the last {window:,} are read, as many as a window of training "
            f"had; context={len(encoded)} reads them all"
        )
    return encoded[-kept:]


def _batched(encoded: Int64[np.ndarray, " _"], tokenizer: Tokenizer) -> Int64[Tensor, "1 _"]:
    """A prompt as models read it; where there is none, a document begins."""
    return torch.from_numpy(np.array([tokenizer.end]) if len(encoded) == 0 else encoded)[None]


def _continued(prompt: str, tokens: Iterator[Tensor], tokenizer: Tokenizer, log: Callable[[str], None]) -> str:
    """The prompt and what follows it, logged as it comes. The prompt is logged with the first token."""
    pieces: list[int] = []
    printed = 0
    for token in tokens:
        if int(token) == tokenizer.end:
            break
        pieces.append(int(token))
        whole = (prompt + tokenizer.decode(pieces)).rstrip("\ufffd")  # a character may take several tokens
        log(whole[printed:])
        printed = max(printed, len(whole))
    text = prompt + tokenizer.decode(pieces)
    log(text[printed:])
    return text
