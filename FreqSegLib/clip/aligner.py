"""The lite preset's aligner: LiteMedSAM's image embedding into MiniLM's text space.

Patchify to 16 x 16 tokens, a few transformer blocks, a norm, then class attention (CaiT: Touvron et al., ICCV 2021):
from there on only the class token is updated, so what follows the bottleneck costs one query a layer instead of 256.
M2IB's loop runs a hundred times through that suffix, and the norm in front of it gives the tokens the unit scale that
its N(0, 1) prior assumes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.checkpoint import module_of, save_half


@dataclass(frozen=True)
class AlignerConfig:
    """Sizes of the aligner; stored in the weights' file."""

    width: int = 160
    depth: int = 3
    class_depth: int = 2
    num_heads: int = 5
    mlp_ratio: int = 4
    embedding_channels: int = 256
    pooled_side: int = 32
    patch: int = 2
    embed_dim: int = 384

    @property
    def grid(self) -> int:
        return self.pooled_side // self.patch


class Aligner(nn.Module):
    """Image embedding (B, 256, 64, 64) -> unit vector (B, 384) in one space with MiniLM's sentences."""

    channel_mean: Tensor
    channel_std: Tensor

    def __init__(self, config: AlignerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AlignerConfig()
        self.register_buffer("channel_mean", torch.zeros(config.embedding_channels, 1, 1))
        self.register_buffer("channel_std", torch.ones(config.embedding_channels, 1, 1))
        self.patchify = nn.Conv2d(2 * config.embedding_channels, config.width, config.patch, config.patch)
        self.position = nn.Parameter(torch.randn(1, config.grid**2, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.class_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.class_blocks = nn.ModuleList(ClassBlock(config) for _ in range(config.class_depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.embed_dim)
        self.text_head = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        nn.init.zeros_(self.text_head.weight)

    def pool(self, embedding: Tensor) -> Tensor:
        """(B, 256, 64, 64) averaged to the side the aligner was trained on, (B, 256, 32, 32)."""
        return F.adaptive_avg_pool2d(embedding, self.config.pooled_side)

    def prefix(self, pooled: Tensor, layer_idx: int) -> Tensor:
        """(B, 256, 32, 32) -> tokens (B, 256, width) after ``layer_idx`` blocks (after the last one: normed)."""
        standard = (pooled - self.channel_mean) / self.channel_std
        # beside the features as they are (what kind of picture is it?) what stands out within this picture
        own = F.instance_norm(pooled)
        x = self.patchify(torch.cat([standard, own], 1))
        x = x.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks[:layer_idx]:
            x = block(x)
        return self._bottleneck_norm(x) if layer_idx == self.config.depth else x

    def suffix(self, tokens: Tensor, layer_idx: int) -> Tensor:
        """Tokens of :meth:`prefix` -> (B, 384) unit vectors."""
        if layer_idx < self.config.depth:
            for block in self.blocks[layer_idx:]:
                tokens = block(tokens)
            tokens = self._bottleneck_norm(tokens)
        x = self.class_token.expand(len(tokens), -1, -1)
        for block in self.class_blocks:
            x = block(x, tokens)
        return F.normalize(self.head(self.norm(x[:, 0])), dim=-1)

    def align_text(self, sentences: Tensor) -> Tensor:
        """MiniLM's sentence vectors (P, 384), turned a little (residual, identity before training), as unit vectors."""
        return F.normalize(sentences + self.text_head(sentences), dim=-1)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.suffix(self.prefix(pooled, self.config.depth), self.config.depth)

    @staticmethod
    def _bottleneck_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights in half precision with their configuration, atomically."""
        save_half(self, path, {"config": json.dumps(asdict(self.config)), **(metadata or {})})

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> Aligner:
        """Read what :meth:`save` wrote, as float32, frozen.

        Raises:
            WeightsError: unreadable, or tensors that do not fit (key and shapes are named).
        """
        return module_of(path, "aligner", lambda config: cls(AlignerConfig(**config))).to(device)


class Block(nn.Module):
    """Pre-norm transformer block on tokens (B, N, width)."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class ClassBlock(nn.Module):
    """Class attention: the class token (B, 1, width) reads the tokens (B, N, width), which stay as they are."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        q = self.query(self.norm1(x)).view(batch, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.key_value(tokens).view(batch, count, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 1, width)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


def mlp(config: AlignerConfig) -> nn.Sequential:
    hidden = config.mlp_ratio * config.width
    return nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.width))
