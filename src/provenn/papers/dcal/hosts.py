"""Vision transformers as DCAL sees them: ours, and ViT and DeiT of transformers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.attention import split_heads
from provenn.nn.vit import Block
from provenn.papers.dcal.layers import Parts


class Host(NamedTuple):
    """A vision transformer in parts, which stay its own.

    Args:
        embed: images to tokens, with positions, as they enter the first block.
        blocks: the encoder's.
        norm, head: what follows the last block, of tokens and of the class token.
        dim, heads, hidden: width, heads and width of the MLP of a block.
        prefix: how many tokens stand before the patches, the class token first.
        classes: the classifier's outputs.
        grid: rows and columns of the patches of an image.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: list[Parts]
    norm: nn.Module
    head: nn.Module
    dim: int
    heads: int
    hidden: int
    prefix: int
    classes: int
    grid: Callable[[Tensor], tuple[int, int]]


def host_of(model: Any) -> Host:
    """The parts of a vision transformer.

    Knows this paper's `ViT`, and `ViTForImageClassification` and `DeiTForImageClassification` of transformers.

    Raises:
        UserError: another network: windows, stages or class attention have no rollout, or no class token.
    """
    blocks = getattr(model, "blocks", None)
    ours = [block for block in blocks if isinstance(block, Block)] if isinstance(blocks, nn.ModuleList) else []
    if ours and isinstance(blocks, nn.ModuleList) and len(ours) == len(blocks):
        return _ours(model, ours)
    for name in ("vit", "deit"):
        body = getattr(model, name, None)
        if hasattr(body, "layers") and hasattr(body, "embeddings") and hasattr(model, "classifier"):
            return _of_transformers(body, model.classifier)
    raise UserError(
        f"{type(model).__name__}: expected a vision transformer with a class token and global attention in all blocks: "
        "ViT of this paper, or ViTForImageClassification or DeiTForImageClassification of transformers 5"
    )


def _outputs_of(head: nn.Module, model: nn.Module) -> int:
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear classifier: build it with the number of its classes")
    return head.out_features


def _ours(model: Any, blocks: list[Block]) -> Host:
    parts = [
        Parts(block.norm1, block.norm2, block.mlp, block.attn.project, block.attn.join, block.keep) for block in blocks
    ]
    first = blocks[0]
    return Host(
        embed=model.embed,
        blocks=parts,
        norm=model.norm,
        head=model.head,
        dim=first.attn.proj.in_features,
        heads=first.attn.heads,
        hidden=first.mlp.fc1.out_features,
        prefix=1,
        classes=_outputs_of(model.head, model),
        grid=model.grid,
    )


def _of_transformers(body: Any, head: nn.Module) -> Host:
    config, embeddings = body.config, body.embeddings
    sides = config.patch_size
    high, wide = (sides, sides) if isinstance(sides, int) else sides

    def embed(images: Tensor) -> Tensor:
        trained = tuple(embeddings.patch_embeddings.image_size)
        return embeddings(images, interpolate_pos_encoding=tuple(images.shape[2:]) != trained)

    return Host(
        embed=embed,
        blocks=[_layer_of_transformers(layer) for layer in body.layers],
        norm=body.layernorm,
        head=head,
        dim=config.hidden_size,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        prefix=2 if hasattr(embeddings, "distillation_token") else 1,
        classes=_outputs_of(head, body),
        grid=lambda images: (images.shape[2] // high, images.shape[3] // wide),
    )


def _layer_of_transformers(layer: Any) -> Parts:
    attention = layer.attention
    maps, heads = (attention.q_proj, attention.k_proj, attention.v_proj), attention.num_attention_heads

    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(linear(x), heads) for linear in maps)
        return q, k, v

    def join(y: Tensor) -> Tensor:
        return attention.o_proj(y.transpose(1, 2).flatten(2))

    return Parts(layer.layernorm_before, layer.layernorm_after, layer.mlp, project, join, layer.dropout)
