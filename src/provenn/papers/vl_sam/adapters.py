"""One interface to vision-language models that answer and show their attention, and one to promptable segmenters."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.core.special_tokens import ASSISTANT, END, IMAGE, START, UNKNOWN, USER
from provenn.nn.promptable import Decoded, PromptableSegmenter
from provenn.nn.vision_language import ImageChat

Pixels = UInt8[Tensor, "3 _ _"]  # images of a list have any sizes
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
Frame = tuple[float, float, float, float]


class Told(NamedTuple):
    """What a model answered about an image, and its attention over the whole sequence.

    Args:
        text: the answer.
        pieces: of each of its tokens the characters that it stands for.
        first: where the answer's first token stands in the sequence.
        images: True where a token of the sequence is one of the image.
        grid: rows and columns of these.
        frame: left, top, width and height of that grid in the pixels of the image.
        depth: how many layers there are.
        layer: attention of a layer, (heads, tokens, tokens), computed when asked for.
    """

    text: str
    pieces: list[tuple[int, int]]
    first: int
    images: Bool[Tensor, " tokens"]
    grid: tuple[int, int]
    frame: Frame
    depth: int
    layer: Callable[[int], Tensor]


@runtime_checkable
class Captioner(Protocol):
    """A model that answers a question about each of some images."""

    def tell(self, images: Sequence[Pixels], question: str, **draw: Any) -> list[Told]:
        """An answer for each image, with its attention."""

    def to(self, *args: Any) -> Any:
        """Move or cast the model."""


def resized(image: Float[Tensor, "3 height width"], tall: int, wide: int) -> Float[Tensor, "3 tall wide"]:
    """An image at another size, averaged where it becomes smaller."""
    if tuple(image.shape[1:]) == (tall, wide):
        return image
    return F.interpolate(image[None], (tall, wide), mode="bilinear", antialias=True)[0]


def standardised(image: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x − mean) / std of a channel, of x in 0…1."""
    return (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]


class Words:
    """The words of a small chat, to numbers and back."""

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self.numbers = {word: k for k, word in enumerate(words)}
        self.end, self.image = self.numbers[END], self.numbers[IMAGE]
        self._marks = {self.numbers[mark] for mark in (START, END, IMAGE, USER, ASSISTANT)}

    def prompt(self, question: str) -> list[int]:
        """The tokens of a question about one image."""
        asked = re.findall(r"[^\W_]+|[^\w\s]", question.lower())
        known = [self.numbers.get(word, self.numbers[UNKNOWN]) for word in asked]
        return [self.numbers[START], self.numbers[USER], self.image, *known, self.numbers[ASSISTANT]]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of an answer, without marks."""
        return " ".join(self.words[number] for number in numbers if number not in self._marks)


class ChatCaptioner:
    """A decoder of ours in the layout of Llama or Qwen2 that reads images: see `provenn.nn.vision_language`.

    Args:
        model: the chat.
        meta: `words`, `size`, `mean`, `std` and `answer`, as a training of conversations keeps them beside the weights.
    """

    def __init__(self, model: ImageChat, meta: dict[str, Any]):
        if meta.get("fit", "stretch") != "stretch" or not meta["words"]:
            raise UserError("the chat must read words, and images that are stretched to a square: train it so")
        self.model, self.meta = model.eval().requires_grad_(False), meta
        self.tokens = Words(meta["words"])

    def to(self, *args: Any) -> "ChatCaptioner":
        """Move or cast the model."""
        self.model.to(*args)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.decoder.embed.weight.device

    def seen(self, image: Pixels) -> Float[Tensor, "3 size size"]:
        """An image as the model sees it."""
        size = int(self.meta["size"])
        return standardised(resized(image.float() / 255, size, size), self.meta["mean"], self.meta["std"])

    @torch.no_grad()
    def tell(self, images: Sequence[Pixels], question: str, **draw: Any) -> list[Told]:
        """An answer for each image, all written together; each is read once more as a whole for its attention.

        Args:
            images: of any sizes.
            question: about each of them.
            draw: temperature, top_p and a generator; by default the likeliest token.
        """
        weight = self.model.decoder.embed.weight
        seen = torch.stack([self.seen(image) for image in images]).to(weight)
        prompt = self.tokens.prompt(question)
        tokens = torch.tensor([prompt] * len(images), device=weight.device)
        drawn = {"temperature": 0.0, **draw}
        steps = list(self.model.generate(tokens, int(self.meta["answer"]), seen, ends=(self.tokens.end,), **drawn))
        written = torch.stack(steps, dim=1).tolist()
        return [self._read(prompt, row, image[None], given) for row, image, given in zip(written, seen, images)]

    @torch.no_grad()
    def read(self, image: Pixels, question: str, answer: str) -> Told:
        """As `tell`, of an answer that is given."""
        prompt = self.tokens.prompt(question)
        row = [self.tokens.numbers.get(word, self.tokens.numbers[UNKNOWN]) for word in answer.split()]
        return self._read(prompt, row, self.seen(image)[None].to(self.model.decoder.embed.weight), image)

    def _read(self, prompt: list[int], row: list[int], image: Tensor, given: Pixels) -> Told:
        answer = row[: row.index(self.tokens.end)] if self.tokens.end in row else row
        features, sizes = self.model.model.features(image)
        side = math.isqrt(sizes[0])
        if side * side != sizes[0]:
            raise UserError(f"{sizes[0]} tokens of an image are no square grid, which the map needs")
        at = prompt.index(self.tokens.image)
        ids = [*prompt[:at], *[self.tokens.image] * sizes[0], *prompt[at + 1 :], *answer]
        reading = self.model.model.read_features(torch.tensor([ids], device=image.device), features, sizes, layers=True)
        texts = [self.tokens.decode(answer[:k]) for k in range(len(answer) + 1)]
        named = torch.zeros(len(ids), dtype=torch.bool, device=image.device)
        named[at : at + sizes[0]] = True
        height, width = given.shape[1:]
        return Told(
            texts[-1],
            [(len(before), len(after)) for before, after in pairwise(texts)],
            len(ids) - len(answer),
            named,
            (side, side),
            (0.0, 0.0, float(width), float(height)),
            len(self.model.decoder.blocks),
            lambda layer: self.model.decoder.attention_weights(reading, layer)[0],
        )


class HuggingFaceCaptioner:
    """A LLaVA or Qwen2-VL of transformers, with its processor, loaded with eager attention.

    Keys that groups of heads share are expanded by the library. Sliding windows and sinks are what they are in the
    matrices; `notes` says of them.

    Args:
        model: loaded with attn_implementation="eager".
        processor: of the model; gives pixel_values and input_ids with a token for each of the image's.
        answer: tokens of an answer at most.
    """

    def __init__(self, model: Any, processor: Any, *, answer: int = 256):
        config = model.config
        kind = getattr(config, "_attn_implementation", "eager")
        if kind != "eager":
            raise UserError(f"the model's attention is {kind!r}, which shows no weights: load it with 'eager'")
        self.model, self.processor, self.answer = model.eval().requires_grad_(False), processor, answer
        self.image_token: int | None = getattr(config, "image_token_id", None) or getattr(
            config, "image_token_index", None
        )
        if self.image_token is None:
            raise UserError(f"{type(model).__name__} names no token of images: LLaVA and Qwen2-VL are supported")
        text = getattr(config, "text_config", config)
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
        self.notes = {"sliding window": window, "heads": heads, "heads of keys": shared}

    def to(self, *args: Any) -> "HuggingFaceCaptioner":
        """Move or cast the model."""
        self.model.to(*args)
        return self

    def _inputs(self, image: Pixels, question: str) -> dict[str, Tensor]:
        from PIL import Image

        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(said, add_generation_prompt=True)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        return dict(self.processor(images=[picture], text=[text], return_tensors="pt").to(self.model.device))

    @torch.no_grad()
    def tell(self, images: Sequence[Pixels], question: str, **draw: Any) -> list[Told]:
        """As in `ChatCaptioner`, an image at a time; a generator seeds transformers' own draw."""
        temperature = float(draw.get("temperature", 0.0))
        options: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": draw.get("top_p") or 1.0}
        found = []
        for image in images:
            inputs = self._inputs(image, question)
            with torch.random.fork_rng():
                if (generator := draw.get("generator")) is not None:
                    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                whole = self.model.generate(**inputs, max_new_tokens=self.answer, **options)
            found.append(self._read(inputs, whole, image))
        return found

    def _read(self, inputs: dict[str, Tensor], whole: Tensor, image: Pixels) -> Told:
        first = inputs["input_ids"].shape[1]
        ids = whole[0, first:].tolist()
        tokenizer = self.processor.tokenizer
        texts = [tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(len(ids) + 1)]
        again = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in again:
                again[name] = F.pad(again[name], (0, whole.shape[1] - first))
        weights = self.model(**again, output_attentions=True, use_cache=False).attentions
        if not weights:
            raise UserError(f"{type(self.model).__name__} gave no attention: load it with attn_implementation='eager'")
        named = whole[0] == self.image_token
        rows, columns = self._grid(inputs, int(named.sum()))
        height, width = image.shape[1:]
        return Told(
            texts[-1],
            [(len(before), len(after)) for before, after in pairwise(texts)],
            first,
            named,
            (rows, columns),
            (0.0, 0.0, float(width), float(height)),
            len(weights),
            lambda layer: weights[layer][0].float(),
        )

    def _grid(self, inputs: dict[str, Tensor], count: int) -> tuple[int, int]:
        """Rows and columns of the image's tokens.

        Raises:
            UserError: there are none, or they are no single grid, as where an image is cut into crops.
        """
        if not count:
            raise UserError("the sequence has no token of the image: is the processor that of the model?")
        if (grids := inputs.get("image_grid_thw")) is not None:
            side = self.model.config.vision_config.spatial_merge_size
            rows, columns = (int(size) // side for size in grids[0, 1:])
        else:
            rows = columns = math.isqrt(count)
        if rows * columns != count:
            raise UserError(
                f"{count} tokens of an image are no grid of {rows}×{columns}: models that cut it in crops are not read"
            )
        return rows, columns


@runtime_checkable
class Segmenter(Protocol):
    """A model that gives masks for prompts, after one look at an image."""

    side: int
    mask_side: int

    def encode(self, images: Sequence[Pixels]) -> Sequence[Any]:
        """What is kept of each image."""

    def decode(self, seen: Any, **prompts: Any) -> Decoded:
        """Masks of prompts about one image; see `provenn.nn.promptable.PromptableSegmenter.decode`."""

    def to(self, *args: Any) -> Any:
        """Move or cast the model."""


class SamSegmenter:
    """A SAM as it was trained: the longer side brought to the model's, the other filled up below or on the right.

    Args:
        model: the segmenter.
        mean, std: what images are standardised by; by default those of SAM.
    """

    def __init__(
        self,
        model: PromptableSegmenter,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ):
        self.model = model.eval().requires_grad_(False)
        self.mean, self.std = list(mean), list(std)
        self.side, self.mask_side = model.config.image, model.config.mask_side

    def to(self, *args: Any) -> "SamSegmenter":
        """Move or cast the model."""
        self.model.to(*args)
        return self

    @torch.no_grad()
    def encode(self, images: Sequence[Pixels]) -> list[Float[Tensor, "1 channels rows columns"]]:
        """What is kept of each image, all encoded together."""
        like = self.model.mask_decoder.iou_token.weight
        batch = torch.stack([self._prepared(image) for image in images]).to(like)
        return list(self.model.encode(batch).split(1))

    def _prepared(self, image: Pixels) -> Float[Tensor, "3 side side"]:
        tall, wide = scaled_size(image.shape[1], image.shape[2], self.side)
        small = standardised(resized(image.float() / 255, tall, wide), self.mean, self.std)
        return F.pad(small, (0, self.side - wide, 0, self.side - tall))

    @torch.no_grad()
    def decode(self, seen: Any, **prompts: Any) -> Decoded:
        """Masks of prompts about one image."""
        like = self.model.mask_decoder.iou_token.weight
        moved: dict[str, Any] = {k: v.to(like.device) if isinstance(v, Tensor) else v for k, v in prompts.items()}
        return self.model.decode(seen, **moved)


def scaled_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of an image whose longer side is brought to `side`."""
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def load_captioner(folder: str | Path) -> Captioner:
    """A LLaVA or Qwen2-VL from a folder of Hugging Face, through transformers.

    Raises:
        UserError: transformers is missing, or the folder cannot be read.
    """
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError:
        raise UserError("models of Hugging Face need a package: pip install 'provenn[hf]'") from None
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder: give a folder of Hugging Face, such as a LLaVA's")
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            str(folder), local_files_only=True, attn_implementation="eager"
        )
        processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no vision-language model: {' '.join(str(error).split())[:200]}") from None
    return HuggingFaceCaptioner(model, processor)
