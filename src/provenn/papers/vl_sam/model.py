"""VL-SAM: a vision-language model names what it sees, its attention prompts a segmenter, and nothing is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder
from provenn.nn.detection.nms import nms
from provenn.nn.promptable import VIT_H, PromptableSegmenter, boxes_of
from provenn.nn.shipped import about, pretrained
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import ImageChat, MLPProjector, TowerTokens, VisionLanguageModel
from provenn.papers.vl_sam.captioners import Captioner, ChatCaptioner, Frame, Told, load_captioner
from provenn.papers.vl_sam.images import Pixels
from provenn.papers.vl_sam.layers import (
    Form,
    Keys,
    Length,
    Norm,
    Place,
    aggregate,
    column_factor,
    flatness,
    flow_rows,
    min_max,
)
from provenn.papers.vl_sam.names import Named, overlapping, parse_names
from provenn.papers.vl_sam.prompts import point_pair
from provenn.papers.vl_sam.segmenters import SamSegmenter, Segmenter, open_segmenter

Refine = Literal["erase", "keep", "keep+erase", "off"]
Row = Literal["token", "emit"]
QUESTION = "list the objects ."  # that the small captioner was taught
ROUNDS = 5  # of refinement at most
SAME = 0.9  # IoU from which a new mask repeats an old one
ASK = "If all objects of this image are to be listed, which ten questions should be asked? Write one a line."


@dataclass(frozen=True)
class Flow:
    """How attention becomes a map; the defaults are the paper's, and where it is silent, ours (see the README).

    Args:
        form: "equation" (3), "figure" (4) or the "rollout" that the paper cites.
        place: of the column factor: "layer" in each S′, "final", "accumulated" or "none".
        length: what L of the factor is: of the "sequence", or the number of "layers".
        weighted: whether heads have weights.
        keys: over which keys a head's largest attention is taken: "all", or "visual" ones.
        norm: "max" divides the weights by the largest head's.
        first: layers before this one are left out.
        row: where a name's rows are: its own "token", or the one before that did "emit" it.
        naive: the last layer's mean over heads instead.
    """

    form: Form = "equation"
    place: Place = "layer"
    length: Length = "sequence"
    weighted: bool = True
    keys: Keys = "all"
    norm: Norm = "none"
    first: int = 0
    row: Row = "token"
    naive: bool = False

    def maps(self, told: Told, names: Sequence[Named]) -> Float[Tensor, "names rows columns"]:
        """The map of each name over the image's tokens, from 0 to 1, the mean over its tokens.

        Raises:
            UserError: the sequence has no token of an image, or fewer layers than `first`.
        """
        if not bool(told.images.any()):
            raise UserError("the sequence has no token of the image, so that attention says nothing of it")
        if not 0 <= self.first < told.depth:
            raise UserError(f"first_layer={self.first}: the model has {told.depth} layers")
        count = len(told.images)
        rows = torch.zeros(len(names), count, device=told.images.device)
        for k, named in enumerate(names):
            at = [told.first + number - (self.row == "emit") for number in overlapping(told.pieces, named)]
            rows[k, at] = 1 / max(1, len(at))
        if self.naive:
            found = rows @ told.layer(told.depth - 1).mean(0).to(rows)
        else:
            found = self.through(told.layer, told.depth, rows, told.images)
        return min_max(found[:, told.images].unflatten(1, told.grid).float())

    def through(
        self,
        attention: Callable[[int], Tensor],
        depth: int,
        rows: Float[Tensor, "*batch rows tokens"],
        images: Bool[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "*batch rows tokens"]:
        """Rows of the flow through all layers.

        Args:
            attention: the attention of a layer by its number, by head.
            depth: the number of layers.
            rows: weights of the tokens whose rows are taken together.
            images: which tokens are of the image; only keys="visual" asks.
        """
        seen = images if self.keys == "visual" else None
        return flow_rows(
            lambda number: aggregate(attention(number), weighted=self.weighted, images=seen, norm=self.norm),
            depth,
            rows,
            form=self.form,
            place=self.place,
            factor=column_factor(rows.shape[-1], depth, length=self.length, like=rows),
            first=self.first,
        )


class Found(NamedTuple):
    """What was found in an image, the surest first.

    Args:
        boxes: left, top, right, bottom in its pixels.
        masks: at its size.
        scores: the segmenter's expected IoU × the mean of the map inside the mask.
        names: of the objects, in the words of the model.
        notes: how they were found, and what was left out.
    """

    boxes: Float[Tensor, "objects 4"]
    masks: Bool[Tensor, "objects height width"]
    scores: Float[Tensor, " objects"]
    names: list[str]
    notes: dict[str, Any]


class View(NamedTuple):
    """A part of an image: its left and top in the whole, and its pixels."""

    left: int
    top: int
    pixels: Pixels


def views_of(image: Pixels, crops: bool = True) -> list[View]:
    """The whole image, and its four quarters where crops are asked for and it is large enough.

    >>> [view.pixels.shape[1:] for view in views_of(torch.zeros(3, 5, 8, dtype=torch.uint8))]
    [torch.Size([5, 8]), torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([3, 4]), torch.Size([3, 4])]
    """
    height, width = image.shape[1:]
    found = [View(0, 0, image)]
    if crops and min(height, width) >= 2:
        y, x = height // 2, width // 2
        spans = [(0, y, 0, x), (0, y, x, width), (y, height, 0, x), (y, height, x, width)]
        found += [View(left, top, image[:, top:bottom, left:right]) for top, bottom, left, right in spans]
    return found


class Mask(NamedTuple):
    """A mask of a view, at its size, with its score."""

    mask: Bool[Tensor, "height width"]
    score: float


class VLSAM(nn.Module):
    """Two frozen models joined: names from the first, places from its attention, masks from the second.

    It has no parameters of its own. The two models are no part of its state: nothing of them is trained or saved.

    Args:
        captioner: answers and shows its attention; see `provenn.papers.vl_sam.captioners`.
        segmenter: gives masks for points.
        flow: how attention becomes a map.
        question: what is asked of each view.
        questions: asked in its place, each of each view; "auto" lets the model write them.
        crops: whether the four quarters are looked at as well.
        threshold: share of a map's maximum from which a cell is in its positive area.
        refine: what becomes of the map once a mask is found: it is "erase"d there, or only that is "keep"ed, or both in
            turn; "off" decodes one mask once.
        pairs: whether a negative point is given as well.
        flat: entropy of a map, as a share of the largest, above which a name is left out as seen nowhere.
        max_objects: detections of an image at most.
        iou_same, iou_any: overlap above which the less sure of two goes, of one name and of any.
        numerals: whether words of numbers are names.
        temperature, top_p, seed: of the answers; 0 takes the likeliest token. The paper's are 0.8 and 0.1.

    Shapes: images (batch, 3, size, size), standardised, to the maps of the prompt's last token, (batch, rows, columns).
    """

    def __init__(
        self,
        captioner: Captioner,
        segmenter: Segmenter,
        *,
        flow: Flow = Flow(),  # it is frozen
        question: str = "List all objects in the image.",
        questions: Sequence[str] | Literal["auto"] = (),
        crops: bool = True,
        threshold: float | int = 0.5,
        refine: Refine = "erase",
        pairs: bool = True,
        flat: float | int = 0.999,
        max_objects: int = 100,
        iou_same: float | int = 0.7,
        iou_any: float | int = 0.9,
        numerals: bool = False,
        temperature: float | int = 0.0,
        top_p: float | int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if refine not in ("erase", "keep", "keep+erase", "off"):
            raise ValueError(f"refine must be erase, keep, keep+erase or off, got {refine!r}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
        if max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, got {max_objects}")
        # In a tuple, where torch registers nothing: no parameter, no state, nothing to save.
        self._frozen = (captioner, segmenter)
        self.flow, self.question, self.questions, self.crops = flow, question, questions, crops
        self.threshold, self.refine, self.pairs, self.flat = float(threshold), refine, pairs, float(flat)
        self.max_objects, self.iou_same, self.iou_any = max_objects, iou_same, iou_any
        self.numerals, self.temperature, self.top_p, self.seed = numerals, temperature, top_p, seed

    @property
    def captioner(self) -> Captioner:
        """The model that names."""
        return self._frozen[0]

    @property
    def segmenter(self) -> Segmenter:
        """The model that cuts out."""
        return self._frozen[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VLSAM":
        """Move or cast both models with this one."""
        for part in self._frozen:
            model = getattr(part, "model", None)
            if isinstance(model, nn.Module):
                model._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows columns"]:
        """Where a chat of ours looks before it answers: the flow's row of the prompt's last token."""
        captioner = self.captioner
        if not isinstance(captioner, ChatCaptioner):
            raise TypeError(f"forward is for chats of ours; of {type(captioner).__name__} take `attention_maps`")
        chat, prompt = captioner.model.model, captioner.tokens.prompt(self.question)
        at = prompt.index(captioner.tokens.image)
        features = chat.projector(chat.vision(images))
        side = int(features.shape[1] ** 0.5)
        words = chat.decoder.embed(torch.tensor(prompt, device=features.device)).expand(images.shape[0], -1, -1)
        x = torch.cat([words[:, :at], features.to(words.dtype), words[:, at + 1 :]], dim=1)
        reading = chat.decoder.read(x, layers=True)
        rows = x.new_zeros(x.shape[0], 1, x.shape[1])
        rows[..., -1] = 1
        read = partial(chat.decoder.attention_weights, reading)
        found = self.flow.through(read, len(chat.decoder.blocks), rows)
        return found[:, 0, at : at + side * side].unflatten(1, (side, side))

    @torch.no_grad()
    def attention_maps(self, image: Pixels, words: Sequence[str] = (), **flow: Any) -> dict[str, Tensor]:
        """The map of each name that the model gives an image, or of words among its answer, at the image's size.

        Args:
            image: of 8 bits.
            words: of the answer; by default all names in it.
            flow: options of `Flow` in place of this system's.

        Raises:
            UserError: a word that the answer has not.
        """
        told = self._tell([image], self.question)[0]
        names = self._names(told)
        if words:
            lower = told.text.lower()
            missing = next((word for word in words if word.lower() not in lower), None)
            if missing is not None:
                raise UserError(f"the answer has no {missing!r}: {told.text!r}")
            starts = [(word, lower.index(word.lower())) for word in words]
            names = [Named(word, start, start + len(word)) for word, start in starts]
        if not names:
            return {}
        maps = Flow(**{**vars(self.flow), **flow}).maps(told, names)
        height, width = image.shape[1:]
        return {named.name: sampled(each[None], told.frame, height, width)[0] for named, each in zip(names, maps)}

    def _tell(self, images: Sequence[Pixels], question: str) -> list[Told]:
        draw: dict[str, Any] = {"temperature": float(self.temperature)}
        if self.temperature > 0:
            draw |= {"top_p": self.top_p, "generator": torch.Generator().manual_seed(self.seed)}
        return self.captioner.tell(images, question, **draw)

    def _names(self, told: Told) -> list[Named]:
        return [named for named in parse_names(told.text, self.numerals) if overlapping(told.pieces, named)]

    def _asked(self, image: Pixels) -> list[str]:
        if self.questions != "auto":
            return list(self.questions) or [self.question]
        text = self._tell([image], ASK)[0].text
        lines = [line.strip(" -*•0123456789.)") for line in text.replace("?", "?\n").splitlines()]
        return list(dict.fromkeys(line for line in lines if line.endswith("?")))[:10] or [self.question]

    @torch.no_grad()
    def detect(self, image: Pixels) -> Found:
        """Find and name what is in an image.

        Args:
            image: of 8 bits, of any size.
        """
        views = views_of(image, self.crops)
        seen = self.segmenter.encode([view.pixels for view in views])  # once a view, whatever is asked of it
        asked = self._asked(image)
        maps: list[list[tuple[str, Tensor, Frame]]] = [[] for _ in views]
        notes: dict[str, Any] = {"questions": asked, "views": len(views), "flow": vars(self.flow), "answers": [],
                                 "nowhere": []}  # fmt: skip
        for question in asked:
            for number, told in enumerate(self._tell([view.pixels for view in views], question)):
                notes["answers"].append(told.text)
                names = self._names(told)
                if not names:
                    continue
                heat = self.flow.maps(told, names)
                for named, each, entropy in zip(names, heat, flatness(heat).tolist()):
                    if entropy > self.flat:
                        notes["nowhere"].append(named.name)
                    else:
                        maps[number].append((named.name, each, told.frame))
        found: list[tuple[str, View, Mask]] = []
        for view, embedding, listed in zip(views, seen, maps):
            if listed:
                cut = self._masks(view, embedding, listed)
                found += [(name, view, mask) for (name, *_), masks in zip(listed, cut) for mask in masks]
        return self._merged(found, image, notes)

    def _masks(self, view: View, embedding: Any, listed: list[tuple[str, Tensor, Frame]]) -> list[list[Mask]]:
        """Masks of each map of a view, all maps' points decoded together, round by round."""
        size, side = self.segmenter.mask_side, self.segmenter.side
        height, width = view.pixels.shape[1:]
        part = self.segmenter.fitted(height, width)
        tall, wide = (-(-length * size // side) for length in part)
        cell = side / size
        scale = height * cell / part[0], width * cell / part[1]  # of a cell, in pixels of the view
        heat = torch.cat([sampled(each[None], frame, tall, wide, scale) for _, each, frame in listed])
        start = heat.clone()
        found: list[list[Mask]] = [[] for _ in listed]
        before: list[list[Tensor]] = [[] for _ in listed]
        active = list(range(len(listed)))
        for number in range(ROUNDS):
            drawn = [(k, point_pair(heat[k], self.threshold)) for k in active if heat[k].amax() >= self.threshold]
            pairs = [(k, pair) for k, pair in drawn if pair is not None]
            if not pairs:
                break
            points = torch.tensor(
                [[pair.positive, pair.negative or pair.positive] for _, pair in pairs], dtype=torch.float
            )
            points = (points + 0.5) * cell - 0.5
            labels = torch.tensor([[1, 0 if self.pairs and pair.negative else -1] for _, pair in pairs])
            decoded = self.segmenter.decode(embedding, points=points, labels=labels).best()
            if self.refine != "off":
                decoded = self.segmenter.decode(embedding, points=points, labels=labels, masks=decoded.logits).best()
            logits = decoded.logits[:, 0, :tall, :wide].to(heat)
            inside = logits > 0
            large = F.interpolate(decoded.logits.float(), (side, side), mode="bilinear")
            full = F.interpolate(large[:, :, : part[0], : part[1]], (height, width), mode="bilinear")[:, 0] > 0
            active = []
            for row, (k, pair) in enumerate(pairs):
                mask = inside[row]
                if not bool(full[row].any()) or any(_iou(mask, old) > SAME for old in before[k]):
                    continue
                before[k].append(mask)
                sure = float(decoded.scores[row, 0].clamp(0, 1)) * float(start[k][mask].mean()) if mask.any() else 0.0
                found[k].append(Mask(full[row], sure))
                keeps = self.refine == "keep" or (self.refine == "keep+erase" and number % 2 == 0)
                # What held the point goes too: an erased map must lose its maximum.
                gone = mask | (pair.area & (heat[k] >= heat[k].amax()))
                heat[k] = torch.where(mask, heat[k], 0) if keeps else torch.where(gone, 0, heat[k])
                if self.refine != "off":
                    active.append(k)
            if not active:
                break
        return found

    def _merged(self, found: list[tuple[str, View, Mask]], image: Pixels, notes: dict[str, Any]) -> Found:
        """All masks in the pixels of the whole image, without those that a surer one repeats."""
        height, width = image.shape[1:]
        masks = torch.zeros(len(found), height, width, dtype=torch.bool)
        for k, (_, view, mask) in enumerate(found):
            tall, wide = mask.mask.shape
            masks[k, view.top : view.top + tall, view.left : view.left + wide] = mask.mask.cpu()
        names = [name for name, *_ in found]
        scores = torch.tensor([mask.score for *_, mask in found])
        boxes = boxes_of(masks)
        numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
        labels = torch.tensor([numbers[name] for name in names], dtype=torch.long)
        kept = nms(boxes, scores, labels, self.iou_same)
        kept = kept[nms(boxes[kept], scores[kept], None, self.iou_any, self.max_objects)]
        return Found(boxes[kept], masks[kept], scores[kept], [names[k] for k in kept.tolist()], notes)


def _iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum()) / max(1.0, float((one | other).sum()))


def sampled(
    maps: Float[Tensor, "maps rows columns"],
    frame: Frame,
    height: int,
    width: int,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Float[Tensor, "maps height width"]:
    """Maps over an image, read between their cells' middles.

    Args:
        maps: on a grid that covers `frame`.
        frame: left, top, width and height of the grid in pixels of the image.
        height, width: how many numbers are read.
        scale: pixels of the image between two of them, down and across.
    """
    left, top, wide, tall = frame
    y = ((torch.arange(height, device=maps.device) + 0.5) * scale[0] - top) / tall * 2 - 1
    x = ((torch.arange(width, device=maps.device) + 0.5) * scale[1] - left) / wide * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(maps)
    return F.grid_sample(maps[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


# Presets


def vl_sam_scenes(
    vlm: str | None = None,
    segmenter: str | None = None,
    *,
    question: str | None = None,
    questions: int = 1,
    crops: bool = False,
    form: Form = "equation",
    place: Place = "layer",
    length: Length = "sequence",
    weighted: bool = True,
    keys: Keys = "all",
    norm: Norm = "none",
    first_layer: int = 0,
    row: Row = "token",
    naive: bool = False,
    threshold: float | int = 0.5,
    refine: Refine = "erase",
    pairs: bool = True,
    flat: float | int = 0.999,
    max_objects: int = 100,
    temperature: float | int = 0.0,
    top_p: float | int | None = None,
    seed: int = 0,
) -> VLSAM:
    """VL-SAM from the small models that ship, or from folders of Hugging Face.

    Args:
        vlm: a folder with a LLaVA or a Qwen2-VL. Default: `provenn.nn.pretrained("tiny-lister")`.
        segmenter: a folder with a SAM or a SAM 2. Default: `provenn.nn.pretrained("tiny-sam")`.
        question: what is asked. Default: what the small model was taught, or "List all objects in the image."
        questions: 1, or more, which the model then writes itself, up to 10.
        first_layer: layers before this one are left out of the flow.
        crops, threshold, refine, pairs, flat, max_objects, temperature, top_p, seed: as in `VLSAM`.
        form, place, length, weighted, keys, norm, row, naive: as in `Flow`.
    """
    if not 1 <= questions <= 10:
        raise ValueError(f"questions must be from 1 to 10, got {questions}")
    captioner: Captioner
    sam: Segmenter
    if vlm is None:
        captioner = ChatCaptioner(cast(ImageChat, _placed(pretrained("tiny-lister"))), about("tiny-lister"))
        question = question or QUESTION
    else:
        captioner = load_captioner(vlm)
        question = question or "List all objects in the image."
    if segmenter is None:
        said = about("tiny-sam")
        sam = SamSegmenter(cast(PromptableSegmenter, _placed(pretrained("tiny-sam"))), said["mean"], said["std"])
    else:
        sam = open_segmenter(segmenter)
    return VLSAM(
        captioner,
        sam,
        flow=Flow(form, place, length, weighted, keys, norm, first_layer, row, naive),
        question=question,
        questions="auto" if questions > 1 else (),
        crops=crops,
        threshold=threshold,
        refine=refine,
        pairs=pairs,
        flat=flat,
        max_objects=max_objects,
        numerals=vlm is None,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def _placed(model: nn.Module) -> nn.Module:
    """On the device that is the default: what is read from a file is on none other than the CPU."""
    return model.to(torch.empty(0).device)


class ChatAndSegmenter(nn.Module):
    """The two models of the paper's size, for their counts; `VLSAM` joins what folders hold.

    Args:
        chat: the vision-language model.
        sam: the segmenter.

    Shapes: tokens (batch, tokens) to the chat's logits (batch, tokens, vocab).
    """

    def __init__(self, chat: VisionLanguageModel, sam: PromptableSegmenter):
        super().__init__()
        self.chat, self.sam = chat, sam

    def forward(self, tokens: Tensor) -> Tensor:
        return self.chat.decoder(tokens)


def vl_sam_llava_7b(*, vocab_size: int = 32_064, layers: int = 32, dim: int = 4096) -> ChatAndSegmenter:
    """LLaVA-1.5-7B with SAM ViT-H, of which table 5 has 37.2 mAR on CODA.

    Args:
        vocab_size, layers, dim: of the decoder.
    """
    decoder = Decoder(vocab_size, dim, layers, dim // 128, hidden=11_008, tied=False, eps=1e-5)
    tower = VisionTower(VisionConfig("clip", 1024, 24, 16, image=336, patch=14))
    chat = VisionLanguageModel(decoder, TowerTokens(tower, -2), MLPProjector(1024, dim), image_token=32_000)
    return ChatAndSegmenter(chat, PromptableSegmenter(VIT_H))
