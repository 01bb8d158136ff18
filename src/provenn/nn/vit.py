"""A plain vision transformer in parts that mechanisms reach into, under the parameter names of DeiT and timm."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, split_heads
from provenn.nn.backbone import pad_to_multiple
from provenn.ops.softmax_attention import softmax_attention

Tokens = Float[Tensor, "batch tokens dim"]
Heads = Float[Tensor, "batch heads tokens head_dim"]


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be those of other tokens than its queries.

    softmax(Q Kᵀ / √d) V through W_o, a head having d = dim / heads features.

    Args:
        dim: D.
        heads: h; must divide D.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D, under DeiT's names.
    """

    def __init__(self, dim: int, heads: int):
        check_whole(dim=dim, heads=heads)
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x: Tokens) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values of the same tokens."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return q, k, v

    def join(self, y: Heads) -> Tokens:
        """The heads' outputs side by side, through W_o."""
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tokens, seen: Float[Tensor, "batch seen dim"] | None = None) -> Tokens:
        """Each token of `x` attends to those of `seen`, by default to those of `x`."""
        if seen is None:
            return self.join(softmax_attention(*self.project(x)))
        dim = x.shape[-1]
        maps = zip(self.qkv.weight.split([dim, 2 * dim]), self.qkv.bias.split([dim, 2 * dim]))
        q, both = (F.linear(tokens, *linear) for tokens, linear in zip((x, seen), maps))
        return self.join(softmax_attention(*(split_heads(part, self.heads) for part in (q, *both.chunk(2, dim=-1)))))


class MLP(nn.Module):
    """W₂ GELU(W₁ x), the exact GELU; parameters under DeiT's names."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x ← x + attention(LN x); x ← x + MLP(LN x), as DeiT has it.

    Args:
        dim, heads: of the attention.
        mlp_ratio: hidden width of the MLP over `dim`.
        drop_path: probability with which a branch of an example is left out while training.

    Shapes: (batch, tokens, dim) to the same. Parameters: 12·D² + 13·D.
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float | int = 4, drop_path: float | int = 0.0):
        check_finite(mlp_ratio=mlp_ratio, drop_path=drop_path)
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden unit, got {mlp_ratio}")
        self.attn = Attention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = nn.Dropout(drop_path)

    def keep(self, branch: Tokens) -> Tokens:
        """A branch, without those of the examples that are left out."""
        return branch * self.drop(branch.new_ones(branch.shape[0], 1, 1))

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.keep(self.attn(self.norm1(x)))
        return x + self.keep(self.mlp(self.norm2(x)))


class ConvStem(nn.Sequential):
    """Patches of 4×4 pixels from three convolutions, with batch norms between: for networks from scratch. Ours."""

    def __init__(self, in_channels: int, dim: int):
        half = max(dim // 2, 1)
        super().__init__(
            nn.Conv2d(in_channels, half, 3, 2, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, 1, 1),
        )


class PatchEmbed(nn.Module):
    """Patches to tokens by one linear map, as a convolution under DeiT's name."""

    def __init__(self, in_channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        return self.proj(x)


class ViT(nn.Module):
    """A vision transformer as DeiT has it (Touvron et al., 2021), its parameters under DeiT's names.

    Args:
        dim, depth, heads: D, blocks and heads of each.
        num_classes: logits of the class token; 0 leaves the classifier out.
        in_channels: of the image.
        image: height and width that the positions are made for, in pixels; others are reached by bicubic interpolation.
        patch: side of a patch, in pixels.
        stem: "patch" for one linear map, or "conv" for `ConvStem`, whose patches are of 4.
        mlp_ratio: hidden width of the MLPs over D.
        drop_path: of the last block, rising linearly from 0.

    Shapes: (batch, in_channels, height, width), any sides, to (batch, num_classes), or without classes to the class
    token. `dim` is its width.

    Raises:
        ValueError: sizes below 1, heads that do not divide D, or sides without a whole patch.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 12,
        heads: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        image: tuple[int, int] = (224, 224),
        patch: int = 16,
        stem: str = "patch",
        mlp_ratio: float | int = 4,
        drop_path: float | int = 0.0,
    ):
        height, width = image
        whole = {"dim": dim, "depth": depth, "num_classes": num_classes, "in_channels": in_channels, "patch": patch}
        check_whole(**whole, heads=heads, height=height, width=width)
        check_finite(drop_path=drop_path)
        super().__init__()
        if num_classes < 0 or min(value for name, value in whole.items() if name != "num_classes") < 1:
            values = ", ".join(map(str, whole.values()))
            raise ValueError(f"{', '.join(whole)} must be at least 1, and num_classes at least 0, got {values}")
        if stem not in ("patch", "conv") or (stem == "conv" and patch != 4):
            raise ValueError(f"stem must be 'patch', or 'conv' with patches of 4 pixels, got {stem!r} and {patch}")
        if min(height, width) < patch:
            raise ValueError(f"image must have a patch of {patch} pixels at least, got {height}×{width}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        self.dim, self.in_channels, self.patch = dim, in_channels, patch
        self.sites = (-(-height // patch), -(-width // patch))
        self.patch_embed = ConvStem(in_channels, dim) if stem == "conv" else PatchEmbed(in_channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.sites[0] * self.sites[1], dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        initialise(self)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of an image; what a patch reaches beyond is filled with zeros."""
        rows, columns = ((side + self.patch - 1) // self.patch for side in images.shape[2:])
        return rows, columns

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """The class token and the patches, with their positions."""
        if images.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {images.shape[1]}")
        if not images.shape[2] * images.shape[3]:
            raise ValueError(f"expected images of at least 1×1 pixels, got {tuple(images.shape)}")
        patches = self.patch_embed(pad_to_multiple(images, self.patch)).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return tokens + positions_for(self.pos_embed, self.sites, self.grid(images))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def initialise(module: nn.Module) -> None:
    """Linear maps as DeiT starts them: normal of deviation 0.02, cut off, without bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


def positions_for(
    positions: Float[Tensor, "1 tokens dim"], sites: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "1 tokens2 dim"]:
    """Learned positions of the class token and of a grid, which is resized to another by bicubic interpolation."""
    if sites == grid:
        return positions
    of_grid = positions[:, 1:].unflatten(1, sites).permute(0, 3, 1, 2)
    resized = F.interpolate(of_grid, grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).mT], dim=1)
