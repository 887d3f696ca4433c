"""DeiT, a Vision Transformer trained on ImageNet alone; without the distillation token it is ViT.

Touvron, Cord, Douze, Massa, Sablayrolles, Jégou, "Training data-efficient image transformers & distillation through
attention", ICML 2021. Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.

    patches --linear--[class token, tokens] + position--encoder blocks--LayerNorm--class token--linear
    block     x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))

Attention is written out as MatMul, Softmax, MatMul. Every size but the batch is a number of the module, never asked of
a tensor, so that an export with a dynamic batch has constant shapes.
"""

import torch
from torch import Tensor, nn

EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over (N, tokens, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of {heads} heads")
        self.dim, self.heads = dim, heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        split = self.qkv(x).reshape(-1, tokens, 3, self.heads, self.dim // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, tokens, dim / heads) each
        weights = torch.softmax(q * self.scale @ k.transpose(-2, -1), dim=-1)
        y = (weights @ v).transpose(1, 2).reshape(-1, tokens, self.dim)
        z: Tensor = self.proj(y)
        return z


class Block(nn.Module):
    """An encoder block, normalized before each half."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        x = x + self.attention(self.norm1(x), tokens)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class DeiT(nn.Module):
    """Images (N, channels, image_size, image_size) to logits (N, classes).

    Args:
        patch_size: Side of a patch in pixels; divides ``image_size``.
        mlp_ratio: Hidden width of the MLP as a multiple of ``dim``.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        classes: int,
        channels: int,
        image_size: int,
        patch_size: int,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        patches = (image_size // patch_size) ** 2
        self.dim, self.patches = dim, patches
        self.patch_embedding = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embedding(image).reshape(-1, self.dim, self.patches).transpose(1, 2)
        # expand_as, not expand(batch, ...): it exports as Shape and Expand alone.
        x = torch.cat([self.class_token.expand_as(patches[:, :1]), patches], dim=1) + self.position
        for block in self.blocks:
            x = block(x, self.patches + 1)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def deit_tiny(*, classes: int = 1000, channels: int = 3, image_size: int = 224, patch_size: int = 16) -> DeiT:
    return DeiT(
        dim=192,
        depth=12,
        heads=3,
        classes=classes,
        channels=channels,
        image_size=image_size,
        patch_size=patch_size,
    )


def deit_small(*, classes: int = 1000, channels: int = 3, image_size: int = 224, patch_size: int = 16) -> DeiT:
    return DeiT(
        dim=384,
        depth=12,
        heads=6,
        classes=classes,
        channels=channels,
        image_size=image_size,
        patch_size=patch_size,
    )


def deit_mini(
    *,
    classes: int = 10,
    channels: int = 1,
    image_size: int = 28,
    patch_size: int = 4,
    dim: int = 64,
    depth: int = 6,
    heads: int = 4,
    mlp_ratio: int = 3,
) -> DeiT:
    """For small images: 28x28 in patches of 4, or 8x8 in patches of 2."""
    return DeiT(
        dim=dim,
        depth=depth,
        heads=heads,
        classes=classes,
        channels=channels,
        image_size=image_size,
        patch_size=patch_size,
        mlp_ratio=mlp_ratio,
    )
