"""Frozen encoders of the user's: what they read of sounds, images or texts, in the splits that their tasks make."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.papers.gaam.probe import (
    StackFile,
    fingerprint_of_weights,
    load_encoder,
    load_tokenizer,
    pooled_layers,
    read_stacks,
    write_stacks,
)
from provenn.tasks import get_task, split_indices

CUT = (0.7, 0.15, 0.15)  # where data come without splits
BATCH = 16  # examples that an encoder sees at once
CACHE = "PROVENN_CACHE"
Pairs = Any  # Sequence[tuple[Any, int]], or a data set of such: what is read, and its class


class Readings(NamedTuple):
    """Examples of the three splits, each with its class, and how some of them become what an encoder takes."""

    classes: list[str]
    parts: Sequence[Pairs]
    inputs: Callable[[list[Any]], dict[str, Tensor]]


class Reading(NamedTuple):
    """How data are read for an encoder: see `LayerStacks.load`."""

    seconds: float | int | None = 5
    length: int = 512
    siblings: bool = False
    examples: int | None = None

    def check(self) -> None:
        """Raises UserError: a number out of its range."""
        if self.seconds is not None and not 0 < self.seconds < 3600:
            raise UserError(f"seconds must be more than 0 and less than an hour, got {self.seconds}")
        for name, value in (("length", self.length), ("examples", self.examples)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


class UserEncoder:
    """A frozen encoder from a folder of Hugging Face, and how it takes files of its kind.

    Args:
        folder: with config.json and weights, and what was saved with them: the tokenizer of a language model, and
            preprocessor_config.json of others, by which sounds and images are standardised.

    Raises:
        UserError: no such folder, or an encoder that takes other things.
    """

    def __init__(self, folder: Path):
        self.folder, self.model = folder, load_encoder(folder)
        self.takes = str(getattr(self.model, "main_input_name", ""))
        kinds = {"input_values": self._sounds, "pixel_values": self._images, "input_ids": self._texts}
        if self.takes not in kinds:
            raise UserError(f"{folder} takes {self.takes or 'nothing'!r}: expected an encoder of {', '.join(kinds)}")
        self.read = kinds[self.takes]
        file = folder / "preprocessor_config.json"
        try:
            self.preprocessor: dict[str, Any] = dict(parse_json(read_text(file), str(file))) if file.is_file() else {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _sounds(self, source: Path, seed: int, how: Reading) -> Readings:
        classes, parts = _audio().files(source, seed=seed, siblings=how.siblings)
        return Readings(classes, parts, lambda files: self._heard(files, how))

    def _heard(self, files: list[Path], how: Reading) -> dict[str, Tensor]:
        rate = int(self.preprocessor.get("sampling_rate", 16_000))
        waves = [_audio().waveform(file, rate, how.seconds) for file in files]
        if self.preprocessor.get("do_normalize", True):
            waves = [(wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt() for wave in waves]
        return {"input_values": nn.utils.rnn.pad_sequence(waves, batch_first=True), "attention_mask": _real(waves)}

    def _images(self, source: Path, seed: int, how: Reading) -> Readings:
        config: Any = self.model.config
        data = get_task("image-classification").load(source, seed=seed, size=int(config.image_size))
        for part in (data.train, data.val, data.test):
            part.meta, part.augment = self._seen(data.meta), False  # type: ignore[attr-defined]  # of files or CIFAR's
        return Readings(data.meta["classes"], [data.train, data.val, data.test], _pixels)

    def _seen(self, meta: dict[str, Any]) -> dict[str, Any]:
        config: Any = self.model.config
        half = [0.5] * 3
        scale = {"mean": self.preprocessor.get("image_mean") or half, "std": self.preprocessor.get("image_std") or half}
        return {**meta, **scale, "size": int(config.image_size), "channels": 3}

    def _texts(self, source: Path, seed: int, how: Reading) -> Readings:
        content = get_task("text-classification").sentences(source)  # type: ignore[attr-defined]  # that task's own
        if content.scored:
            raise UserError(f"{source} has scores: expected classes")
        classes = sorted({str(example.label) for example in (*content.train, *content.test)})
        rows = [
            [("\n".join(filter(None, (e.first, e.second))), classes.index(str(e.label))) for e in part]
            for part in (content.train, content.test)
        ]
        kept, held = split_indices(len(rows[0]), (1 - CUT[1], CUT[1]), seed)
        parts: list[Pairs] = [[rows[0][i] for i in kept], [rows[0][i] for i in held], rows[1]]
        return Readings(classes, parts, self._tokens(how.length))

    def _tokens(self, length: int) -> Callable[[list[str]], dict[str, Tensor]]:
        tokenizer = load_tokenizer(self.folder)

        def inputs(texts: list[str]) -> dict[str, Tensor]:
            rows = [torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in texts]
            return {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True), "attention_mask": _real(rows)}

        return inputs

    def stacks(self, items: Sequence[Any], inputs: Callable[[list[Any]], dict[str, Tensor]]) -> Tensor:
        """The pooled layers of all items."""
        self.model.to(self.device)
        rows = []
        starts = range(0, len(items), BATCH)
        for start in progress.track(starts, "reading layers", total=len(starts)):
            part = [items[index] for index in range(start, min(start + BATCH, len(items)))]
            given = {name: value.to(self.device) for name, value in inputs(part).items()}
            try:
                rows.append(pooled_layers(self.model, **given).cpu())
            except Exception as error:  # of whatever class the encoder raises
                line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                raise UserError(f"{self.folder} cannot read item {start + 1} of the data: {line}") from None
        return torch.cat(rows)

    def stack_of(self, file: Path, how: Reading) -> Float[Tensor, "1 layers dim"]:
        """The pooled layers of one file: a sound, an image or a text."""
        if self.takes == "input_values":
            return self.stacks([file], lambda files: self._heard(files, how))
        if self.takes == "pixel_values":
            return self.stacks([get_task("image-classification").example(file, self._seen({}))[0]], _pixels)
        return self.stacks([read_text(file)], self._tokens(how.length))


def _audio() -> Any:  # whose `files` and `waveform` other tasks have not
    return get_task("audio-classification")


def _real(rows: Sequence[Tensor]) -> Int[Tensor, "rows longest"]:
    """1 where a padded row is real."""
    return nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)


def _pixels(images: list[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(images)}


@lru_cache(maxsize=2)  # gigabytes are not loaded again for each file
def user_encoder(folder: Path) -> UserEncoder:
    """The encoder of a folder."""
    return UserEncoder(folder)


def extracted(source: Path, folder: Path, how: Reading) -> StackFile:
    """The stacks of the user's files, from where they were kept when the same encoder read the same files alike.

    Where they have no splits of their own, these are drawn once, whatever the seed of a training. Stacks are kept in
    the folder of the environment variable PROVENN_CACHE, or in ~/.cache/provenn.

    Raises:
        UserError: an encoder or data that cannot be read, or data of another kind than the encoder's.
    """
    how.check()
    encoder = user_encoder(folder.resolve())
    mark = fingerprint_of_weights(encoder.model)
    sizes = [f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(_files_of(source, how)) if f.is_file()]
    # "unpadded": stacks that an earlier version read beside padding are not taken for these.
    asked = [
        "unpadded",
        mark,
        str(source.resolve()),
        repr(how),
        json.dumps(encoder.preprocessor, sort_keys=True),
        *sizes,
    ]
    name = hashlib.sha256("\0".join(asked).encode()).hexdigest()[:24]
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "provenn")
    file = root / "stacks" / f"{name}.safetensors"
    if file.is_file():
        return read_stacks(file)
    readings = encoder.read(source, 0, how)
    features, labels, splits = [], [], []
    for number, part in enumerate(readings.parts):
        order = np.arange(len(part))
        if how.examples is not None:
            order = np.random.default_rng(0).permutation(len(part))[: how.examples]
        pairs = _Picked(part, order.tolist())
        features.append(encoder.stacks(pairs, readings.inputs))
        labels.append(torch.tensor(pairs.labels))
        splits.append(torch.full((len(pairs),), number))
    content = StackFile(torch.cat(features), torch.cat(labels).long(), readings.classes, torch.cat(splits), mark)
    write_stacks(file, content)
    progress.say(f"the layers of {source} are kept in {file}")
    return content


def _files_of(source: Path, how: Reading) -> list[Path]:
    path = source.resolve().parent if how.siblings else source
    return [path] if path.is_file() else [*path.rglob("*")]


class _Picked(Sequence):
    """What is read of some examples; their classes are noted as they pass, so that none is read twice."""

    def __init__(self, part: Pairs, order: list[int]):
        self.part, self.order, self.labels = part, order, [0] * len(order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        what, self.labels[index] = self.part[self.order[index]]
        return what
