"""One interface to vision-language models that answer and show their attention."""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.core.special_tokens import ASSISTANT, END, IMAGE, START, UNKNOWN, USER
from provenn.nn.vision_language import ImageChat
from provenn.papers.vl_sam.images import Pixels, resized, standardised

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


Heard = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # an attention module with its arguments


class HuggingFaceCaptioner:
    """A LLaVA or Qwen2-VL of transformers, with its processor, loaded with eager attention.

    Attention is computed a layer at a time, from what that layer was given: no more than one layer's is in memory. Keys
    that groups of heads share are expanded by the library. Sliding windows and sinks are what they are in the matrices;
    `notes` says of them.

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
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        if token is None:
            raise UserError(f"{type(model).__name__} names no token of images: LLaVA and Qwen2-VL are supported")
        self.image_token = int(token)
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
        heard = self._hear(again)
        named = whole[0].eq(self.image_token)
        rows, columns = self._grid(inputs, int(named.sum()))
        height, width = image.shape[1:]
        return Told(
            texts[-1],
            [(len(before), len(after)) for before, after in pairwise(texts)],
            first,
            named,
            (rows, columns),
            (0.0, 0.0, float(width), float(height)),
            len(heard),
            lambda layer: self._weights(*heard[layer]),
        )

    def _hear(self, inputs: dict[str, Tensor]) -> list[Heard]:
        """What each layer's attention is given, so that its weights can be computed one layer at a time."""
        heard: list[Heard] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard.append((module, args, kwargs))

        with ExitStack() as hooks:
            for block in self.model.get_decoder().layers:
                hooks.callback(block.self_attn.register_forward_pre_hook(keep, with_kwargs=True).remove)
            self.model(**inputs, use_cache=False)
        return heard

    @torch.no_grad()
    def _weights(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        weights = module(*args, **kwargs)[1]
        if weights is None:
            name = type(self.model).__name__
            raise UserError(f"{name} gave no attention: load it with attn_implementation='eager'")
        return weights[0].float()

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
