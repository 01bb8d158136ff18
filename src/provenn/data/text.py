"""Text: the standard library's source, which every Python has, and the user's own; bytes and byte pairs as tokens."""

import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from jaxtyping import Int64

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.inputs import parse_json, read_text
from provenn.core.progress import quiet_loggers

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".tokens", ".raw")
NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo"}
END = "<|end|>"
ENDS = (END, "<|endoftext|>", "</s>")  # ours, and what others end a document with
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"  # of WikiText
# The splits that a folder may name: train.jsonl, valid.txt, test/, wiki.train.tokens, …
SPLIT = re.compile(r"(?:wiki\.)?(train|valid|validation|val|test)(?:\.(?:tokens|raw|txt|jsonl))?")


class Document(NamedTuple):
    """One text and where it comes from."""

    name: str
    text: str


@cache
def standard_library() -> tuple[Document, ...]:
    """Python's own standard library, about 11 MB of source in 580 files, without its tests; read once a process.

    The text depends on the version of Python, so its fingerprint belongs in a record.

    Raises:
        UserError: an installation without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if not NO_LIBRARY & {*file.relative_to(folder).parts[:-1]})
    texts = [Document(str(file.relative_to(folder)), file.read_text("utf-8", "replace")) for file in files]
    texts = [document for document in texts if document.text]
    if len(texts) < 100:
        raise UserError(f"{folder} holds too few of the standard library's sources; use a Python that has them")
    return tuple(texts)


def read_documents(path: Path) -> list[Document]:
    """The texts of a file or of a folder, in the order of their names. A line of a `.jsonl` is a text of its own.

    Args:
        path: a text file in UTF-8, a `.jsonl` whose lines have a key "text", or a folder of such files, searched whole.

    Raises:
        UserError: nothing to read, no UTF-8, a line that is no JSON, or no text at all.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no text: expected files that end in {', '.join(SUFFIXES)}")
    else:
        files = [path]
    documents = [document for file in files for document in _read(file)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UserError(f"{path} is empty: expected text")
    return documents


def read_splits(folder: Path) -> list[list[Document]] | None:
    """The texts for training, validation and the test of a folder that names all three; None of any other."""
    entries: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := SPLIT.fullmatch(entry.name):
            entries.setdefault({"valid": "val", "validation": "val"}.get(match[1], match[1]), entry)
    if set(entries) != {"train", "val", "test"}:
        return None
    return [read_documents(entries[name]) for name in ("train", "val", "test")]


def text_of(given: str | Path) -> str:
    """What a user gave to a model: the text of a file, where there is one of that name, or the words themselves.

    Raises:
        UserError: a file that cannot be read, or words in bytes that are no text.
    """
    try:
        is_there = (Path(given).exists() and not Path(given).is_dir()) or (
            Path(given).is_symlink() and not Path(given).exists()
        )
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        is_there = False
    if is_there:
        return read_text(Path(given))
    words = str(given)
    if (stray := next((letter for letter in words if "\ud800" <= letter <= "\udfff"), None)) is not None:
        # Python has a byte of the command line that is no UTF-8 as U+DC00 and the byte.
        byte = f"the byte {ord(stray) - 0xDC00:#04x}" if "\udc80" <= stray <= "\udcff" else "half a character"
        raise UserError(f"{words[:40]!r} holds {byte}, which is no text: give words in UTF-8, or a file of them")
    return words


def _read(file: Path) -> list[Document]:
    text = read_text(file)
    if file.suffix.lower() != ".jsonl":
        return [Document(file.name, text)]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand in a JSON text
        if not line.strip():
            continue
        entry = parse_json(line, f"{file}, line {number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise UserError(f'{file}, line {number}: expected an object with a text, such as {{"text": "…"}}')
        documents.append(Document(f"{file.name}:{number}", entry["text"]))
    return documents


def read_hub(name: str) -> list[Document]:
    """The texts of a data set of the Hugging Face hub: its column "text", or its only column of strings.

    Args:
        name: as the hub writes it, with a configuration after a colon, such as "Salesforce/wikitext:wikitext-2-raw-v1".

    Raises:
        UserError: without the package `datasets`, the network or such a data set.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("a data set of the hub needs the package datasets: pip install 'provenn[hf]'") from None
    path, _, configuration = name.partition(":")
    if not path:
        raise UserError("a data set of the hub is named after hf:, such as hf:Salesforce/wikitext:wikitext-2-raw-v1")
    try:
        with quiet_loggers("datasets", "huggingface_hub"):  # which report every attempt
            rows: Any = load_dataset(path, configuration or None, split="train")
    except Exception as error:
        raise UserError(f"the data set {name!r} cannot be loaded: {str(error).partition(chr(10))[0]}") from None
    texts = [column for column in rows.column_names if isinstance(rows[0][column], str)]
    column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column is None:
        raise UserError(f"the data set {name!r} has no column 'text'; it has: {', '.join(rows.column_names)}")
    return [Document(f"{name}:{i}", text) for i, text in enumerate(rows[column]) if text.strip()]


@contextmanager
def written(file: Path) -> Iterator[TextIO]:
    """A text file to write to, which takes its name once all is written; where none can be made is said before.

    Raises:
        UserError: a folder of that name, or a file that cannot be written.
    """
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8") as handle:
        yield handle


def split_documents(documents: Sequence[Document], seed: int = 0) -> list[list[Document]]:
    """Texts for training (90 %), validation and test (5 % each), by whole documents; fewer than 20 are cut inside.

    Of one long text, the beginning is trained on, so that nothing tested stands before what is learned.
    """
    if len(documents) < 20:
        parts: list[list[Document]] = [[], [], []]
        for name, text in documents:
            cuts = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
            for part, start, end in zip(parts, cuts, cuts[1:]):
                part.append(Document(name, text[start:end]))
        return parts
    order = np.random.default_rng(seed).permutation(len(documents))
    twentieth = max(1, round(0.05 * len(documents)))
    splits = [order[2 * twentieth :], order[:twentieth], order[twentieth : 2 * twentieth]]
    return [[documents[i] for i in sorted(part)] for part in splits]


class Bytes:
    """Every byte of UTF-8 is a token; 0, which no text holds, ends a document.

    >>> Bytes().encode("é").tolist(), Bytes().decode([195, 169])
    ([195, 169], 'é')
    """

    vocab, end = 256, 0

    def encode(self, text: str) -> Int64[np.ndarray, " tokens"]:
        """The bytes of a text."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some bytes; what is no UTF-8 becomes �."""
        return bytes(tokens).decode("utf-8", "replace")

    def lengths(self) -> Int64[np.ndarray, " vocab"]:
        """How many bytes each token stands for."""
        return np.ones(256, dtype=np.int64)

    def dump(self) -> str:
        """The tokenizer as text, for `read_tokenizer`."""
        return "bytes"


class BytePairs:
    """Byte pairs merged as often as they occur (Sennrich et al., 2016), over bytes, by the package `tokenizers`."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.vocab = inner.get_vocab_size()
        self.end = next((inner.token_to_id(end) for end in ENDS if inner.token_to_id(end) is not None), None)

    @classmethod
    def learn(cls, documents: Sequence[Document], vocab: int) -> "BytePairs":
        """The merges that shorten these texts most.

        Raises:
            UserError: fewer tokens than there are bytes, or without the package.
        """
        if vocab < 257:
            raise UserError(f"vocab_size must be at least 257 (256 bytes and the end of a document), got {vocab}")
        package = _tokenizers()
        inner = package.Tokenizer(package.models.BPE())
        inner.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            # Room is taken for all that are asked for, and there are no more merges than characters.
            vocab_size=min(vocab, 257 + sum(len(document.text) for document in documents)),
            special_tokens=[END],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((document.text for document in documents), trainer)
        return cls(inner)

    def encode(self, text: str) -> Int64[np.ndarray, " tokens"]:
        """The tokens of a text, without an end."""
        return np.array(self.inner.encode(text).ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return self.inner.decode(list(tokens))

    def lengths(self) -> Int64[np.ndarray, " vocab"]:
        # In the byte level's alphabet one character stands for one byte.
        """How many bytes each token stands for."""
        names = [self.inner.id_to_token(i) for i in range(self.vocab)]
        return np.array([1 if name in ENDS else len(name) for name in names], dtype=np.int64)

    def dump(self) -> str:
        """The tokenizer as JSON, for `read_tokenizer`."""
        return self.inner.to_str()


class Words:
    """Words between blanks are tokens, as in WikiText, where punctuation stands apart; so is the end of each line.

    >>> words = Words.learn([Document("", "a b a")])
    >>> words.encode("b a\\nc").tolist(), words.decode([2, 3])
    ([3, 2, 1, 0, 1], 'a b')
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.vocab, self.end = len(self.words), self.numbers[END_OF_LINE]

    @classmethod
    def learn(cls, documents: Sequence[Document]) -> "Words":
        """Every word of these texts, the commonest first."""
        counts = Counter(word for document in documents for line in document.text.splitlines() for word in line.split())
        common = [word for word, _ in counts.most_common() if word not in (UNKNOWN, END_OF_LINE)]
        return cls([UNKNOWN, END_OF_LINE, *common])

    def encode(self, text: str) -> Int64[np.ndarray, " tokens"]:
        """The tokens of a text, an end after each line."""
        unknown = self.numbers[UNKNOWN]
        lines = (line.split() for line in text.splitlines())
        numbers = (self.numbers.get(word, unknown) for line in lines for word in (*line, END_OF_LINE))
        return np.fromiter(numbers, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return " ".join(self.words[token] for token in tokens).replace(f" {END_OF_LINE} ", "\n")

    def lengths(self) -> Int64[np.ndarray, " vocab"]:
        """How many bytes each token stands for, its blank included."""
        return np.array([1 if word == END_OF_LINE else len(word.encode()) + 1 for word in self.words], dtype=np.int64)

    def dump(self) -> str:
        """The tokenizer as JSON, for `read_tokenizer`."""
        return json.dumps({"words": self.words})


Tokenizer = Bytes | BytePairs | Words


def read_tokenizer(text: str) -> Tokenizer:
    """What `dump` wrote.

    Raises:
        UserError: something else, or without the package `tokenizers`.
    """
    if text == "bytes":
        return Bytes()
    if text.startswith('{"words"'):
        return _read_words(text)
    package = _tokenizers()
    try:
        return BytePairs(package.Tokenizer.from_str(text))
    except Exception as error:  # the package's own kind is the plain one
        raise UserError(f"no tokenizer that can be read: {' '.join(str(error).split())}") from None


def _read_words(text: str) -> Words:
    try:
        words = json.loads(text)["words"]
    except (ValueError, KeyError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or END_OF_LINE not in words:
        raise UserError(f"no tokenizer that can be read: expected a list of words, {END_OF_LINE} among them")
    return Words(words)


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError(
            "byte pairs need the package tokenizers: pip install 'provenn[hf]'; or tokenizer=bytes"
        ) from None
    return tokenizers
