"""Conversations with images: what is answered, word by word.

A system is called as `model(tokens, images, mask=mask)` and gives logits (batch, length, vocab). Its texts have one
`<image>` for each image, wherever it stands, and as many of the images' own tokens take its place as the system likes.
The logits at an `<image>` are those after its last token: see `provenn.nn.vision_language.ImageChat`. The images of all
rows come one after the other; None where no row has any. For answers in its own words it has
`generate(tokens, count, images, mask=mask, ends=…, temperature=…)`, as a `Decoder` has it.

The loss is the mean over the tokens of answers and their ends; a question is read and never learned.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.chat_pieces import placed_tokens_of, read_pieces, read_placed
from provenn.data.chat_tokens import ChatTokens, Encoded
from provenn.data.composed import SIDE
from provenn.data.composed_talk import composed_talk, talk_words
from provenn.data.conversations import PLACEHOLDER, Conversation, Exchange, read_conversations
from provenn.data.images import SUFFIXES, read_pixels, resize_pixels
from provenn.data.tables import check_table, write_table
from provenn.tasks.base import (
    CUT,
    IGNORED,
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    check_share,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD, MEMORY
from provenn.tasks.meta import Chats
from provenn.tasks.portable import standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 224  # side at which the user's own images are seen, in pixels
LONGEST = 256  # tokens of a conversation that are read; an image is one
LONGEST_OF_OTHERS = 2048  # of weights that were not trained here, whose tokens are pieces
ANSWER = 32  # tokens of an answer at most
FITS = ("stretch", "pad", "keep")
ORDER = 4  # tokens of a context that the dummy baseline counts
TOKENIZERS = ("words", "bytes")
Images = Float[Tensor, "images 3 height width"] | tuple[Float[Tensor, "3 _ _"], ...] | None


class PieceChats(Chats):
    """With the text of a tokenizer.json, where its pieces are the vocabulary.

    `image` is the placeholder of weights that were not trained here, such as −200; these bring no tokenizer.
    """

    tokenizer: str | None = None
    image: int | None = None


class Chat(NamedTuple):
    """A batch of conversations.

    Args:
        tokens: filled up with `<pad>` at the end; an image is one `<image>`.
        mask: True where a token is no padding.
        targets: the next token where it is of an answer or its end; elsewhere −100.
        images: of all rows, one after the other; a tuple where they keep their shapes, None where there are none.
    """

    tokens: Int64[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]
    images: Images


class Talks(Dataset):
    """Conversations with their images.

    Args:
        conversations: whose images are files, or numbers of `pictures`.
        meta: see `provenn.tasks.meta.Chats`.
        pictures: in memory.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        meta: dict[str, Any],
        pictures: UInt8[Tensor, "pictures 3 height width"] | None = None,
    ):
        self.conversations, self.meta, self.pictures = list(conversations), meta, pictures
        self.chat_tokens = placed_tokens_of(meta)
        self.encoded: list[Encoded] = [self.chat_tokens.encode(each, meta["longest"]) for each in self.conversations]
        self.kept: dict[Path, Tensor] = {}
        self.room = MEMORY

    def __len__(self) -> int:
        return len(self.conversations)

    def image(self, source: Path | int) -> Float[Tensor, "3 height width"]:
        """What a network sees of an image."""
        if isinstance(source, int):
            if self.pictures is None:
                raise IndexError(f"there is no picture number {source} in memory")
            seen = self.pictures[source]
        elif source in self.kept:
            seen = self.kept[source]
        else:
            seen = fitted(read_pixels(source), self.meta)
            if seen.nbytes <= self.room:
                self.kept[source] = seen
                self.room -= seen.nbytes
        return standardise(seen.float() / 255, self.meta)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Int64[Tensor, " length"], Int64[Tensor, " length"]]:
        """Images, tokens and targets of a conversation."""
        encoded = self.encoded[index]
        images = [self.image(source) for source in self.conversations[index].images[: encoded.images]]
        return images, torch.tensor(encoded.tokens), torch.tensor(encoded.targets)

    @property
    def cut(self) -> int:
        """Exchanges that did not fit."""
        return sum(encoded.cut for encoded in self.encoded)


def fitted(image: UInt8[Tensor, "3 height width"], meta: dict[str, Any]) -> UInt8[Tensor, "3 height2 width2"]:
    """An image at the size that is seen, as `meta["fit"]` says.

    stretch makes it a square. pad makes it one by bands of the mean colour on both sides, as LLaVA does. keep leaves
    its shape, and makes its longer side no longer than the size.
    """
    size, (height, width) = int(meta["size"]), image.shape[1:]
    if meta["fit"] == "stretch":
        return image if (height, width) == (size, size) else resize_pixels(image, size, size)
    longer = max(height, width)
    scale = size / longer if meta["fit"] == "pad" or longer > size else 1.0
    tall, wide = (max(1, round(side * scale)) for side in (height, width))
    image = image if scale == 1 else resize_pixels(image, tall, wide)
    if meta["fit"] == "keep":
        return image
    colour = torch.tensor([round(255 * mean) for mean in meta["mean"]], dtype=torch.uint8).clamp(0, 255)
    square = colour[:, None, None].expand(3, size, size).clone()
    top, left = (size - tall) // 2, (size - wide) // 2
    square[:, top : top + tall, left : left + wide] = image
    return square


def join_chats(pad: int) -> Callable[[Sequence[Any]], Chat]:
    """What joins conversations to a batch."""

    def join(examples: Sequence[Any]) -> Chat:
        images, tokens, targets = zip(*examples)
        width = max(map(len, tokens))
        rows = torch.full((len(tokens), width), pad)
        wanted = torch.full((len(tokens), width), IGNORED)
        for row, (text, target) in enumerate(zip(tokens, targets)):
            rows[row, : len(text)], wanted[row, : len(text)] = text, target
        mask = torch.arange(width) < torch.tensor([len(text) for text in tokens])[:, None]
        return Chat(rows, mask, wanted, stack_images([image for some in images for image in some]))

    return join


def stack_images(images: Sequence[Float[Tensor, "3 _ _"]]) -> Images:
    """Images as one tensor where they have one size, as a tuple else; None of none."""
    if not images:
        return None
    return torch.stack(list(images)) if len({image.shape for image in images}) == 1 else tuple(images)


class MultimodalChat(Task):
    """The perplexity of answers, and the share that is written word for word."""

    name = "multimodal-chat"
    metric = "perplexity"
    higher_is_better = False
    takes_words = True
    meta_schema = PieceChats
    embedded = {  # noqa: RUF012
        "composed": "5,400 scenes of 64×64 pixels of coloured digits and shapes on photographs and textures, with "
        "questions, captions and answers that are true by construction; no glyph, photograph or pair of words is in "
        "two splits (scikit-image, scikit-learn)",
    }
    reads = "a .jsonl or .json of conversations in the form of LLaVA or ShareGPT, or a folder of train, val and test"

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        layout: str | None = None,
        size: int | None = None,
        fit: str = "stretch",
        tokenizer: str = "words",
        longest: int = LONGEST,
        answer: int = ANSWER,
        at_least: int = 1,
        val_share: float | int = CUT,
        pictures: int = 1,
        text_share: float | int = 0.0,
        examples: int | None = None,
    ) -> TaskData:
        """The embedded scenes, or the user's conversations.

        Args:
            source: "composed", a file, or a folder.
            seed: of the scenes, or of what is cut off where a folder has no splits.
            layout: of a file, see `provenn.data.conversations.LAYOUTS`. Default: what each entry looks like.
            size: side of the square at which images are seen, in pixels. Default: 224, of the scenes 64.
            fit: how an image becomes a square: stretch, pad or keep, which leaves its shape.
            tokenizer: words of the training, bytes, or a tokenizer.json or a folder of Hugging Face that holds one,
                also beside the conversations.
            longest: tokens of a conversation at most, an image counted once. Exchanges beyond are left out.
            answer: tokens of an answer that are written at most.
            at_least: how often a word must occur in the training to be known.
            val_share: of the conversations, what is cut off for each split that a folder lacks.
            pictures: of the scenes, how many pictures a conversation has.
            text_share: of the scenes, the share that is told in words and not shown.
            examples: of the scenes, how many are trained on. Default: 4,000.
        """
        named = self._named(source)
        _check_options(fit=fit, longest=longest, answer=answer, at_least=at_least, size=size)
        reading = {"fit": fit, "longest": longest, "answer": answer}
        if tokenizer not in TOKENIZERS:
            beside = None if isinstance(named, str) else named if named.is_dir() else named.parent
            reading["tokenizer"] = read_pieces(tokenizer, beside).tokenizer
        if isinstance(named, str):
            if size not in (None, SIDE):
                raise UserError(f"composed scenes have {SIDE}×{SIDE} pixels: leave size out, got {size}")
            return self._composed(seed, examples, tokenizer, reading, pictures, text_share)
        check_share(val_share)
        if examples is not None or pictures != 1 or text_share:
            raise UserError("examples, pictures and text_share are of the composed scenes: leave them out for a file")
        parts = _with_splits(named, self._read(named, layout), val_share, seed)
        return self._files(named, parts, {**reading, "size": size or SIZE}, tokenizer, at_least)

    def _read(self, path: Path, layout: str | None) -> dict[str, list[Conversation]]:
        return read_conversations(path, layout)

    def _talk(
        self, split: str, seed: int, count: int | None, pictures: int, text_share: float | int
    ) -> tuple[Tensor, list[Conversation]]:
        return _drawn(split, seed, count, pictures, text_share)

    def _composed(
        self,
        seed: int,
        examples: int | None,
        tokenizer: str,
        reading: dict[str, Any],
        pictures: int,
        text_share: float | int,
    ) -> TaskData:
        splits = (("train", examples), ("val", None), ("test", None))
        try:
            drawn = {split: self._talk(split, seed, count, pictures, text_share) for split, count in splits}
        except ValueError as error:
            raise UserError(str(error)) from None
        parts = drawn["train"][0].float() / 255
        meta = {
            "words": talk_words() if tokenizer == "words" else [],
            "size": SIDE,
            "mean": parts.mean((0, 2, 3)).tolist(),
            "std": parts.std((0, 2, 3)).tolist(),
            **reading,
        }
        sets = {split: Talks(talks, meta, pixels) for split, (pixels, talks) in drawn.items()}
        told = f"{text_share:.0%} of the scenes are told in words and not shown. " if text_share else ""
        return self._data("composed", sets, meta, {"image_size": SIDE},
            f"{len(sets['train']):,} conversations to train on, {len(sets['val'])} to validate, {len(sets['test']):,} "
            f"to test, about coloured digits and shapes on photographs, textures and paper. {told}Answers are true by "
            "construction. No glyph, photograph or pair of a colour and an object is in two splits. Objects lie flat, "
            "and none is covered.")  # fmt: skip

    def _files(
        self,
        path: Path,
        parts: dict[str, list[Conversation]],
        reading: dict[str, Any],
        tokenizer: str,
        at_least: int,
    ) -> TaskData:
        words = ChatTokens.of_texts(_texts(parts["train"]), at_least).words if tokenizer == "words" else []
        meta = {"words": words, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **reading}
        sets = {split: Talks(talks, meta) for split, talks in parts.items()}
        return self._data(str(path), sets, meta, {"image_size": meta["size"]},
            f"{len(sets['train']):,} conversations to train on, {len(sets['val']):,} to validate, "
            f"{len(sets['test']):,} to test; {len(sets['train'].chat_tokens):,} tokens are known.")  # fmt: skip

    def _data(
        self, name: str, sets: dict[str, Talks], meta: dict[str, Any], known: dict[str, Any], about: str
    ) -> TaskData:
        for split, talks in sets.items():
            if talks.cut:
                progress.say(
                    f"{name}: {talks.cut:,} exchanges at the end of conversations of {split} are left out, since they "
                    f"reach beyond longest={meta['longest']} tokens"
                )
        tokens = sets["train"].chat_tokens
        marks = (f"{split} {talks.encoded} {_sizes(talks)}" for split, talks in sets.items())
        return TaskData(
            name,
            sets["train"],
            sets["val"],
            sets["test"],
            fingerprint=fingerprint(*marks, *(talks.pictures for talks in sets.values() if talks.pictures is not None)),
            options={"vocab_size": len(tokens), "image_token": tokens.image, **known},
            meta=meta,
            collate=join_chats(tokens.pad),
            about=about,
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """−mean log p of the tokens of answers and their ends, over all of the batch."""
        chat = Chat(*batch)
        logits = logits_of(model, chat)
        return F.cross_entropy(logits.flatten(0, 1).float(), chat.targets.flatten(), ignore_index=IGNORED)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 64) -> Scores:
        """Of each conversation `nats` and `tokens` of its answers, and how many of its `answers` are `exact`.

        An answer is exact where each of its tokens and its end is the likeliest after those before it: so is what
        greedy writing gives. One with a word that the vocabulary has not, `<unk>`, is never exact.
        """
        talks: Talks = dataset  # type: ignore[assignment]  # a data set of this task
        pad, end, unknown, rows = talks.chat_tokens.pad, talks.chat_tokens.end, talks.chat_tokens.unknown, []
        for batch in batches(talks, batch_size, device_of(model), join_chats(pad)):
            logits = logits_of(model, batch).float()
            wanted = batch.targets != IGNORED
            nats = F.cross_entropy(logits.mT, batch.targets, ignore_index=IGNORED, reduction="none")
            ends = (batch.targets == end) & wanted
            wrong = ((logits.argmax(-1) != batch.targets) | ((batch.targets == unknown) & ~ends)) & wanted
            which = ends.long().cumsum(1) - ends.long()  # the exchange that a token's answer belongs to
            faults = torch.zeros(len(wrong), int(ends.sum(1).max()) + 1, device=wrong.device)
            faults.scatter_add_(1, which.clamp_max(faults.shape[1] - 1), wrong.float())
            there = torch.arange(faults.shape[1], device=wrong.device) < ends.sum(1, keepdim=True)
            rows.append([nats.sum(1).double(), wanted.sum(1).double(), ((faults == 0) & there).sum(1).double(),
                         ends.sum(1).double()])  # fmt: skip
        return join_scores(["nats", "tokens", "exact", "answers"], rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """exp of the mean loss of a token of an answer, and the share of answers that are exact."""
        nats = scores["nats"].sum() / scores["tokens"].sum()
        return {
            "perplexity": float(torch.tensor(nats).exp()),
            "exact_match": float(scores["exact"].sum() / scores["answers"].sum()),
        }

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        layout: str | None = None,
        val_share: float | int = CUT,
        pictures: int = 1,
        text_share: float | int = 0.0,
        tokenizer: str | None = None,
        system: str | None = None,
    ) -> HeldOut:
        """As in `Task`, in the tokens that the weights know; a file without splits whole where all is wanted.

        Args:
            source, meta, seed, whole: as in `Task`.
            layout, val_share, pictures, text_share: as in `load`.
            tokenizer, system: as in `predict`; a conversation that has its own system prompt keeps it.
        """
        named = self._named(source)
        meta = with_tokenizer(meta, tokenizer)
        if isinstance(named, str):
            pixels, talks = self._talk("test", seed, None, pictures, text_share)
            talks = _introduced(talks, system)
            return HeldOut(Talks(talks, meta, pixels), f"the test split of {named}", self._overlap(talks))
        parts = self._read(named, layout)
        split = next((name for name in ("test", "val") if name in parts), None)
        if split is None and not whole:
            parts, split = _with_splits(named, parts, val_share, seed), "test"
        about = f"{split} split of {named}" if split else f"all of {named}"
        part = _introduced(parts[split or "train"], system)
        return HeldOut(Talks(part, meta), about, self._overlap(part))

    def _overlap(self, talks: Sequence[Conversation]) -> int:
        """How many conversations in a row are about the same pictures."""
        return 1

    def dummy_baseline(self, data: TaskData) -> float:
        """The perplexity of answers by counts of tokens, which see no image: see `counted_nats`."""
        nats, tokens = counted_nats(data)
        return float(torch.tensor(nats / tokens).exp())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        meta = {
            "words": talk_words(),
            "longest": LONGEST,
            "answer": ANSWER,
            "size": options.get("image_size") or SIZE,
            "fit": options.get("fit", "stretch"),
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        }
        if (
            options.get("image_token", 0) < 0
        ):  # no vocabulary has it: weights of others, whose tokenizer has to be given
            return {**meta, "words": [], "longest": LONGEST_OF_OTHERS, "image": options["image_token"]}
        return meta

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 3 height width"]:
        return standardise(fitted(read_pixels(file), meta).float() / 255, meta)[None]

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[str],
        output: Path | None,
        *,
        answer: int | None = None,
        choices: str | None = None,
        temperature: float | int = 0.0,
        seed: int = 0,
        tokenizer: Path | None = None,
        system: str | None = None,
    ) -> str:
        """What a model answers: each question is a turn of one conversation about the pictures.

        Args:
            model, meta: as in `Task.predict`.
            inputs: pictures, all of which stand before the first question, and questions; pictures may be left out.
            output: a table (.csv) of questions and answers.
            answer: tokens of an answer at most. Default: as many as in training.
            choices: the answer is the likeliest of these, which a comma parts; by default it is free.
            temperature: of the draw of each token; 0 takes the likeliest.
            seed: of the draw.
            tokenizer: a tokenizer.json or a folder that holds one, for weights of the authors, which bring none.
            system: what is said before all, such as "You are a helpful assistant." Default: nothing.
        """
        if temperature < 0:
            raise UserError(f"temperature must be at least 0, got {temperature}")
        if answer is not None and answer < 1:
            raise UserError(f"answer must be at least 1 token, got {answer}")
        files, questions = divide(inputs)
        check_table(output, files)
        meta = with_tokenizer(meta, tokenizer)
        check_vocabulary(model, placed_tokens_of(meta))
        images = [self.example(file, meta)[0] for file in files]
        rows = self._answered(
            model, meta, images, questions, answer or int(meta["answer"]), chosen_among(choices), temperature, seed,
            system or "",
        )  # fmt: skip
        if output is not None:
            shown = " ".join(map(str, files))
            columns = ["pictures", "question", "answer", *(["probability"] if choices else [])]
            write_table(output, columns, [(shown, asked, told, *more) for asked, told, *more in rows])
        told = [spoken(answer) for _, answer, *_ in rows]
        lines = [
            f"{asked} {said}" + "".join(f" ({share:.1%})" for share in more)
            for (asked, _, *more), said in zip(rows, told, strict=True)
        ]
        return "\n".join([*(lines if len(lines) > 1 or choices else told), *([f"wrote {output}"] if output else [])])

    def _answered(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        images: Sequence[Tensor],
        questions: Sequence[str],
        count: int,
        choices: Sequence[str],
        temperature: float | int,
        seed: int,
        system: str = "",
    ) -> list[tuple[Any, ...]]:
        """Question, answer, and its probability where there are choices, of each turn."""
        tokens, rows = placed_tokens_of(meta), list[tuple[Any, ...]]()
        say_unknown(tokens, [*questions, *choices])
        exchanges = [Exchange(question, ("",)) for question in questions]
        exchanges[0] = exchanges[0]._replace(asked=f"{PLACEHOLDER} " * len(images) + exchanges[0].asked)
        generator = torch.Generator(device_of(model)).manual_seed(seed)
        for number in range(len(questions)):
            # Of another form the questions do not hang together, and each is asked by itself.
            first = number if self.alone else 0
            asked = tuple(self._with_images(exchanges[first : number + 1], len(images)))
            talk = Conversation(asked, system=system)
            prompt = tokens.prompt(talk, [row[1] for row in rows[first:number]])
            _check_length(prompt, count, meta)
            if choices:
                shares = likelihoods(model, tokens, [prompt], [list(images)], [choices])[0].softmax(0)
                best = int(shares.argmax())
                rows.append((questions[number], choices[best], shares[best].item()))
                continue
            said = write(model, tokens, [prompt], [list(images)], count, temperature=temperature, generator=generator)
            rows.append((questions[number], said[0]))
        return rows

    alone = False  # whether each question is asked by itself

    def _with_images(self, exchanges: list[Exchange], images: int) -> list[Exchange]:
        first = exchanges[0]
        if images and PLACEHOLDER not in first.asked:
            return [first._replace(asked=f"{PLACEHOLDER} " * images + first.asked), *exchanges[1:]]
        return exchanges

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Any:
        """Refused: an answer is written token by token.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.name} writes its answers token by token, with a cache, which is no single graph of ONNX: a "
            "decoder of Llama's or Qwen2's layout without a paper's layers goes by provenn.huggingface.save_huggingface"
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """Pictures of the test with a question, what is answered and what is right."""
        return evaluated(model, data.test, {})


def logits_of(model: nn.Module, batch: Chat) -> Float[Tensor, "batch length vocab"]:
    """What a system gives of a batch.

    Raises:
        UserError: logits of another length than the tokens: an `<image>` is one token outside of the system.
    """
    logits = model(batch.tokens, batch.images, mask=batch.mask)
    if logits.shape[:2] != batch.tokens.shape:
        raise UserError(
            f"{type(model).__name__} gives logits of {tuple(logits.shape[:2])} for tokens of "
            f"{tuple(batch.tokens.shape)}: it must give one row for each, and for an image that after its last token"
        )
    return logits


def with_tokenizer(meta: dict[str, Any], name: str | Path | None) -> dict[str, Any]:
    """What weights say of themselves, and the tokenizer of a file or a folder, where one is given.

    Raises:
        UserError: what `read_pieces` refuses, or no tokenizer for weights that were not trained here and bring none.
    """
    image = meta.get("image")
    if name is not None:
        read = read_pieces(str(name)) if image is None else read_placed(str(name), image)
        return {**meta, "tokenizer": read.tokenizer}
    if image is not None and not meta.get("tokenizer"):
        raise UserError(
            "these weights bring no tokenizer: give the one that they were trained with, by --set tokenizer=FOLDER"
        )
    return meta


def check_vocabulary(model: nn.Module, tokens: ChatTokens) -> None:
    """Does the model know as many tokens as these are?

    A large model's table has rows to spare behind its tokenizer's last piece.

    Raises:
        UserError: it knows fewer.
    """
    table = getattr(getattr(getattr(model, "decoder", None), "embed", None), "weight", None)
    if table is not None and len(tokens) > len(table):
        raise UserError(
            f"the model has {len(table):,} tokens, and {len(tokens):,} are known here: give the tokenizer that "
            "it was trained with, by --set tokenizer=FOLDER"
        )


def _introduced(talks: Sequence[Conversation], system: str | None) -> list[Conversation]:
    """The conversations, and what is said before all in those that say nothing there."""
    return [talk if talk.system or not system else replace(talk, system=system) for talk in talks]


def divide(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Pictures and questions among what was given.

    Raises:
        UserError: a picture that is not there, or no question.
    """
    files = [Path(given) for given in map(str, inputs) if Path(given).suffix.lower() in SUFFIXES]
    questions = [str(given).strip() for given in inputs if Path(str(given)).suffix.lower() not in SUFFIXES]
    if (missing := next((file for file in files if not file.is_file()), None)) is not None:
        raise UserError(f"no file at {missing}")
    for question in questions:
        # A name of a file has no more than 255 bytes; longer words are no file.
        if len(question.encode()) < 256 and Path(question).is_file():
            raise UserError(f"{question} is no picture that is read: expected {', '.join(sorted(SUFFIXES))}")
    if not any(questions):
        raise UserError("there is no question: give it in quotes, after the picture, such as photo.jpg 'what is it ?'")
    if (marked := next((question for question in questions if PLACEHOLDER in question), None)) is not None:
        raise UserError(f"{marked!r}: leave {PLACEHOLDER} out, the pictures stand before the first question")
    return files, questions


def chosen_among(choices: str | None) -> list[str]:
    """Choices that were typed, which commas part.

    Raises:
        UserError: fewer than two, or one twice.
    """
    named = [word.strip() for word in (choices or "").split(",") if word.strip()]
    if choices is not None and (len(named) < 2 or len(set(named)) < len(named)):
        raise UserError(f"choices must be two or more that differ, parted by commas, got {choices!r}")
    return named


def say_unknown(tokens: ChatTokens, texts: Sequence[str]) -> None:
    """Say which words a model does not know."""
    unknown = tokens.unknown_words(texts)
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        progress.say(f"the model does not know the words {', '.join(unknown[:5])}{more}: it reads <unk> for them")


def _check_length(prompt: Sequence[int], count: int, meta: dict[str, Any]) -> None:
    if len(prompt) + count > int(meta["longest"]):
        raise UserError(
            f"the question and what was said before have {len(prompt)} tokens, and the answer up to {count}: the model "
            f"reads {meta['longest']}; shorten it, or begin a new conversation"
        )


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens filled up at their ends, and which are none of the padding."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts])
    mask = torch.arange(width) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
    return tokens, mask


def _moved(images: Sequence[Sequence[Tensor]], device: torch.device) -> Images:
    return stack_images([image.to(device) for row in images for image in row])


@torch.no_grad()
def write(
    model: nn.Module,
    tokens: ChatTokens,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[Tensor]],
    count: int,
    *,
    temperature: float | int = 0.0,
    generator: torch.Generator | None = None,
) -> list[str]:
    """What a system answers to each of several prompts, in one batch.

    Args:
        model: has `generate`.
        tokens: of its vocabulary.
        prompts: each ends in `<assistant>`.
        images: of each prompt.
        count: tokens at most.
        temperature, generator: of the draw.

    Raises:
        UserError: it cannot generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise UserError(f"{type(model).__name__} has no generate(tokens, count, images): it cannot answer in words")
    device = device_of(model)
    rows, mask = padded(prompts, tokens.pad)
    draw = {"temperature": temperature, **({"generator": generator} if temperature else {})}
    steps = generate(rows.to(device), count, _moved(images, device), mask=mask.to(device), ends=(tokens.end,), **draw)
    written = torch.stack(list(steps), 1).tolist()
    return [tokens.decode(row) for row in written]


def spoken(answer: str) -> str:
    """An answer as it is printed, where an empty one would look as if nothing had come.

    >>> spoken("red"), spoken(" ")
    ('red', '(an empty answer)')
    """
    return answer if answer.strip() else "(an empty answer)"


@torch.no_grad()
def likelihoods(
    model: nn.Module,
    tokens: ChatTokens,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[Tensor]],
    choices: Sequence[Sequence[str]],
) -> list[Float[Tensor, " choices"]]:
    """Of each prompt and each of its choices the mean log p of a token of the choice and of its end.

    Args:
        model: a system.
        tokens: of its vocabulary.
        prompts, images: as of `write`.
        choices: of each prompt.
    """
    device = device_of(model)
    rows, targets, shown = [], [], []
    for prompt, some, named in zip(prompts, images, choices):
        for choice in named:
            answer = [*tokens.text(choice), tokens.end]
            rows.append([*prompt, *answer[:-1]])
            targets.append([*[IGNORED] * (len(prompt) - 1), *answer])
            shown.append(some)
    read, mask = padded(rows, tokens.pad)
    wanted, _ = padded(targets, IGNORED)
    batch = Chat(read.to(device), mask.to(device), wanted.to(device), _moved(shown, device))
    nats = F.cross_entropy(logits_of(model, batch).float().mT, batch.targets, ignore_index=IGNORED, reduction="none")
    means = -nats.sum(1) / (batch.targets != IGNORED).sum(1)
    return list(means.cpu().split([len(named) for named in choices]))


def counted_nats(data: TaskData, order: int = ORDER) -> tuple[float, int]:
    """Nats and number of the tokens of answers in the test, by counts of the training: no image is looked at.

        p_n(y | x₁…x_n) = (c(x, y) + d(x) p_{n−1}(y | x₂…x_n)) / (c(x) + d(x))

    d(x) is how many tokens were seen after a context (Witten and Bell, 1991). Under all stands the share of each token
    among those of answers, to which one is added. The contexts are the last tokens read, up to `order` of them, and
    with them the second and third token of the question, which say its form.
    """
    train, test = (part for part in (data.train, data.test))
    vocab = len(train.chat_tokens)  # type: ignore[attr-defined]  # data sets of this task
    counts: dict[tuple[int, ...], dict[int, int]] = {}
    for contexts, target in _contexts(train, order):
        for context in contexts:
            seen = counts.setdefault(context, {})
            seen[target] = seen.get(target, 0) + 1
    singles = counts.get((), {})
    total = sum(singles.values()) + vocab
    nats, tokens = 0.0, 0
    for contexts, target in _contexts(test, order):
        share = (singles.get(target, 0) + 1) / total
        for context in contexts[1:]:
            seen = counts.get(context, {})
            if seen:
                share = (seen.get(target, 0) + len(seen) * share) / (sum(seen.values()) + len(seen))
        nats -= float(torch.tensor(share, dtype=torch.float64).log())
        tokens += 1
    return nats, tokens


def _contexts(dataset: Any, order: int) -> Iterator[tuple[list[tuple[int, ...]], int]]:
    """For each token of an answer what stands before it, from nothing to the most, and the token."""
    tokens: ChatTokens = dataset.chat_tokens
    user = tokens.turns.user
    for encoded in dataset.encoded:
        form: tuple[int, ...] = ()
        for place, target in enumerate(encoded.targets):
            if tuple(encoded.tokens[max(0, place + 1 - len(user)) : place + 1]) == user:
                words = [t for t in encoded.tokens[place + 1 : place + 12] if t != tokens.image]
                form = tuple(words[:2])
            if target != IGNORED:
                last = [tuple(encoded.tokens[place + 1 - n : place + 1]) for n in range(order + 1)]
                yield [*last, (-1, *form, *last[2])], target


@lru_cache(maxsize=4)  # a study asks for them once a trial
def _drawn(
    split: str, seed: int, count: int | None, pictures: int, text_share: float | int
) -> tuple[Tensor, list[Conversation]]:
    pixels, talks = composed_talk(split, seed, count, pictures=pictures, text_share=text_share)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), list(talks)


def _check_options(fit: str, longest: int, answer: int, at_least: int, size: int | None) -> None:
    if fit not in FITS:
        raise UserError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    for name, number, least in (
        ("longest", longest, 8),
        ("answer", answer, 1),
        ("at_least", at_least, 1),
        ("size", SIZE if size is None else size, 8),
    ):
        if number < least:
            raise UserError(f"{name} must be at least {least}, got {number}")


def _texts(talks: Sequence[Conversation]) -> Iterator[str]:
    for talk in talks:
        yield talk.system
        for exchange in talk.exchanges:
            yield exchange.asked
            yield exchange.answers[0]
            yield from exchange.choices


def _sizes(talks: Talks) -> list[Any]:
    """What stands for files in a fingerprint."""
    files = sorted({file for talk in talks.conversations for file in talk.images if isinstance(file, Path)})
    return [(file.name, file.stat().st_size) for file in files]


def _with_splits(
    path: Path, parts: dict[str, list[Conversation]], share: float, seed: int
) -> dict[str, list[Conversation]]:
    """With splits that are cut from the training where a folder lacks them: by pictures, so that none is in two."""
    missing = [split for split in ("val", "test") if split not in parts]
    if "train" not in parts:
        raise UserError(f"{path} has the splits {', '.join(parts)} and none to train on")
    if not missing:
        return parts
    whole = parts["train"]
    groups = _by_pictures(whole)
    if len(groups) < 4:
        raise UserError(
            f"{path}: conversations about {len(groups)} pictures: expected at least 4, to train, validate and test"
        )
    cut = max(1, round(share * len(groups))) / len(groups)
    chosen = split_indices(len(groups), [1 - cut * len(missing), *[cut] * len(missing)], seed)
    divided = [[whole[row] for group in sorted(some) for row in groups[group]] for some in chosen]
    return {**parts, **dict(zip(("train", *missing), divided))}


def _by_pictures(talks: Sequence[Conversation]) -> list[list[int]]:
    """Numbers of conversations, together where they share a picture; one of text alone stands by itself."""
    first: dict[str | int, int] = {}
    parent = list(range(len(talks)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    for row, talk in enumerate(talks):
        for image in talk.images:
            # A path can be spelled in several ways, and a link can stand for it.
            parent[root(row)] = root(
                first.setdefault(image if isinstance(image, int) else os.path.realpath(image), row)
            )
    groups: dict[int, list[int]] = {}
    for row in range(len(talks)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Conversations in even steps through the test: the picture, a question, the answer and what is right.

    Args:
        model, dataset: what was evaluated.
        scores: not needed.
    """
    import textwrap

    from matplotlib.figure import Figure

    talks: Talks = dataset  # type: ignore[assignment]  # a data set of this task
    chosen = torch.linspace(0, len(talks) - 1, min(8, len(talks))).long().tolist()
    tokens, count = talks.chat_tokens, int(talks.meta["answer"])
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, row in zip(axes, chosen):
        talk = talks.conversations[row]
        exchange = talk.exchanges[0]
        images = [talks.image(source) for source in talk.images]
        prompt = tokens.prompt(Conversation((exchange,), talk.images, talk.system))
        said = write(model, tokens, [prompt], [images], count)[0]
        if images:
            mean, std = (torch.tensor(talks.meta[key])[:, None, None] for key in ("mean", "std"))
            axis.imshow((images[0] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        asked = " ".join(exchange.asked.replace(PLACEHOLDER, "").split())
        lines = [*textwrap.wrap(asked, 42)[:2], *textwrap.wrap(f"→ {said}", 42)[:2]]
        right = said == tokens.decode(tokens.text(exchange.answers[0]))
        if not right:
            lines += textwrap.wrap(f"right: {exchange.answers[0]}", 42)[:2]
        axis.set_title("\n".join(lines), fontsize=8, color="#2a8f3c" if right else "#b00020", loc="left")
    return figure


TASK = MultimodalChat()
