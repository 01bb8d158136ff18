"""Learners for a decoder that exists: attached, trained in stages, kept in a file of their own, and taken out."""

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.narrowing import present
from provenn.nn.decoder import Decoder, DecoderBlock
from provenn.nn.vision_language import ImageChat, VisionLanguageModel
from provenn.papers.wings.layers import (
    AttentionRouter,
    Learners,
    LowRankResidualAttention,
    Query,
    Routing,
    SplitStreams,
    WingsBlock,
    learner_parameters,
)

Model = TypeVar("Model", bound=nn.Module)
KEY = "wings"


@dataclass(frozen=True)
class LearnerOptions:
    """What learners are made with; see `WingsBlock` and `SplitStreams`.

    Args:
        layers: which layers have learners; None for all.
    """

    rank: int = 64
    max_len: int = 4096
    learners: Learners = "both"
    routing: Routing = "attention"
    activation: Literal["silu", "none"] = "silu"
    query: Query = "sequential"
    system_length: int = 0
    as_released: bool = False
    layers: tuple[int, ...] | None = None


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder of a model that reads text, or images and text.

    Raises:
        UserError: neither.
    """
    decoder = model.decoder if isinstance(model, VisionLanguageModel | ImageChat) else model
    if not isinstance(decoder, Decoder):
        raise UserError(
            f"learners need a provenn.nn.decoder.Decoder, got {type(model).__name__}: load a folder of Llama, Qwen2 or "
            "LLaVA with provenn.huggingface.decoders.from_huggingface"
        )
    return decoder


def wings_blocks(model: nn.Module) -> list[WingsBlock]:
    """The layers that have learners."""
    return [block for block in decoder_of(model).blocks if isinstance(block, WingsBlock)]


def attach(model: Model, options: LearnerOptions | None = None, **changes: Any) -> Model:
    """Put learners beside the attention of a decoder's layers, in place. The model's answers stay as they were.

    Args:
        model: a `Decoder`, a `VisionLanguageModel` or an `ImageChat`, such as
            `provenn.huggingface.decoders.from_huggingface` loads.
        options: of the learners; by default the paper's.
        changes: fields of `LearnerOptions`.

    Raises:
        UserError: another model, layers that are not there, or learners that it has already.

    >>> from provenn.nn.decoder import Decoder
    >>> model = attach(Decoder(vocab=9, dim=32, layers=2, heads=4), rank=2, max_len=64)
    >>> len(wings_blocks(model))
    2
    """
    options = LearnerOptions(**{**({} if options is None else asdict(options)), **changes})
    decoder = decoder_of(model)
    count = len(decoder.blocks)
    chosen = range(count) if options.layers is None else options.layers
    if wrong := [layer for layer in chosen if not 0 <= layer < count]:
        raise UserError(f"layer {wrong[0]} is not there: the decoder has layers 0 to {count - 1}")
    if other := next((block for block in decoder.blocks if not isinstance(block, DecoderBlock)), None):
        what = "has learners already: detach them" if isinstance(other, WingsBlock) else f"has a {type(other).__name__}"
        raise UserError(f"learners are attached to plain layers, and the decoder {what}")
    base = decoder.rotary.base if options.as_released and decoder.rotary.stretch is not None else None
    decoder.sharing = SplitStreams(options.system_length, as_released=options.as_released, base=base)
    for layer in chosen:
        plain = decoder.blocks[layer]
        block = WingsBlock(
            plain,
            rank=options.rank,
            max_len=options.max_len,
            learners=options.learners,
            routing=options.routing,
            activation=options.activation,
            query=options.query,
            as_released=options.as_released,
        )
        for part in _parts(block):
            part.to(plain.norm1.weight)  # device and precision
        decoder.blocks[layer] = block.train(plain.training)
    return model


def detach(model: Model) -> Model:
    """Take all learners out, in place: the plain decoder."""
    decoder = decoder_of(model)
    for index, block in enumerate(decoder.blocks):
        if isinstance(block, WingsBlock):
            plain = DecoderBlock.__new__(DecoderBlock)
            nn.Module.__init__(plain)
            plain.norm1, plain.attention, plain.norm2, plain.feedforward = (
                block.norm1,
                block.attention,
                block.norm2,
                block.feedforward,
            )
            decoder.blocks[index] = plain.train(block.training)
    decoder.sharing = None
    return model


def options_of(model: nn.Module) -> LearnerOptions:
    """What the learners of a model were made with.

    Raises:
        UserError: it has none.
    """
    decoder, blocks = decoder_of(model), wings_blocks(model)
    if not blocks or not isinstance(decoder.sharing, SplitStreams):
        raise UserError("the model has no learners: attach them first")
    first = blocks[0]
    learner = present(first.visual or first.textual, "learner")
    layers = tuple(index for index, block in enumerate(decoder.blocks) if isinstance(block, WingsBlock))
    return LearnerOptions(
        rank=learner.query.down.out_features,
        max_len=first.max_len,
        learners="both" if first.visual and first.textual else "visual" if first.visual else "textual",
        routing=first.routing,
        activation=first.activation,
        query=first.query,
        system_length=decoder.sharing.system_length,
        as_released=first.as_released,
        layers=None if len(layers) == len(decoder.blocks) else layers,
    )


def add_textual(model: Model, *, max_len: int | None = None, routing: Routing = "attention") -> Model:
    """From the first stage to the second: textual learners and routers join visual ones, in place.

    The textual learners start at zero. With an image the answers change all the same: what a visual learner gives had
    the weight 1 and now has the router's, about a half.

    Args:
        model: of visual learners alone.
        max_len: of the routers. Default: what the visual learners were attached with.
        routing: "attention" or "fixed".

    Raises:
        UserError: the model's learners are no visual ones alone.
    """
    options = options_of(model)
    if options.learners != "visual":
        raise UserError(
            f"textual learners join a model of visual ones alone, got one with learners={options.learners!r}"
        )
    for block in wings_blocks(model):
        visual = present(block.visual, "visual")
        weight = block.norm1.weight
        dim = weight.shape[0]
        block.textual = LowRankResidualAttention(dim, visual.heads, options.rank).to(weight)
        block.routing, block.max_len = routing, options.max_len if max_len is None else max_len
        block.router = (
            AttentionRouter(block.max_len, activation=options.activation).to(weight) if routing == "attention" else None
        )
        block.train(block.training)
    return model


def stage_parameters(model: nn.Module, stage: int) -> Iterator[nn.Parameter]:
    """What a stage trains: projector and visual learners in the first, all but the vision tower in the second.

    Raises:
        UserError: another stage.
    """
    if stage not in (1, 2):
        raise UserError(f"stage must be 1 or 2, got {stage!r}")
    plain = model.model if isinstance(model, ImageChat) else model  # names are those of what it wraps
    for name, parameter in plain.named_parameters():
        first = name.startswith("projector.") or ".visual." in name
        if first if stage == 1 else not name.startswith("vision."):
            yield parameter


def freeze_for_stage(model: Model, stage: int) -> Model:
    """Let what a stage trains ask for gradients, and nothing else."""
    learning = set(stage_parameters(model, stage))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in learning)
    return model


def save_learners(model: nn.Module, file: str | Path) -> None:
    """Write learners and routers alone, with their options, as safetensors."""
    options = asdict(options_of(model))
    tensors = {name: value.detach().contiguous() for name, value in learner_parameters(decoder_of(model)).items()}
    with atomic_write(Path(file)) as temporary:
        save_file(tensors, str(temporary), metadata={KEY: json.dumps(options)})


def load_learners(model: Model, file: str | Path) -> Model:
    """Attach learners that `save_learners` wrote, in place.

    Raises:
        UserError: no such file, options that cannot be read, or learners of a model of other sizes.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            said = (handle.metadata() or {}).get(KEY)
            names = handle.keys()
            tensors = {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no readable safetensors file: {str(error).partition(chr(10))[0]}") from None
    if said is None:
        raise UserError(f"{file} holds no learners alone: expected a file of save_learners")
    try:
        given = json.loads(said)
        layers = given.pop("layers")
        options = LearnerOptions(**given, layers=None if layers is None else tuple(layers))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{file} has options of learners that cannot be read: write it again by save_learners"
        ) from None
    attach(model, options)
    own = learner_parameters(decoder_of(model))
    odd = sorted(own.keys() ^ tensors.keys()) + [
        n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape
    ]
    if odd:
        detach(model)
        raise UserError(f"{file} holds learners of a model of other sizes: they differ in {odd[0]}")
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])
    return model


def _parts(block: WingsBlock) -> Collection[nn.Module]:
    return [part for part in (block.visual, block.textual, block.router) if part is not None]
