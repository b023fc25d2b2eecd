"""LiteMedSAM's image encoder written plainly, as the yardstick: batch norms, channels first, no fused attention.

It holds the checkpoint's own tensors under their own names, so it loads strictly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

EMBED_DIMS, DEPTHS, NUM_HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)


class ConvNorm(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class InvertedBottleneck(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, 4 * dim)
        self.conv2 = ConvNorm(4 * dim, 4 * dim, 3, groups=4 * dim)
        self.conv3 = ConvNorm(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Merging(nn.Module):
    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, out)
        self.conv2 = ConvNorm(out, out, 3, stride, groups=out)
        self.conv3 = ConvNorm(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        cells = [(row, column) for row in range(window) for column in range(window)]
        numbers: dict[tuple[int, int], int] = {}
        offsets = [[(abs(a - c), abs(b - d)) for c, d in cells] for a, b in cells]
        indices = [[numbers.setdefault(offset, len(numbers)) for offset in row] for row in offsets]
        self.register_buffer("attention_bias_idxs", torch.tensor(indices), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(windows, tokens, self.heads, 3 * dim // self.heads).chunk(3, dim=3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (
            q @ k.transpose(2, 3) * (dim // self.heads) ** -0.5 + self.attention_biases[:, self.attention_bias_idxs]
        )
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, dim))


class Perceptron(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class AttentionBlock(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, heads, window)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)
        self.mlp = Perceptron(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        size = self.window
        tokens = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = tokens.shape[1] // size, tokens.shape[2] // size
        cut = tokens.view(batch, rows, size, columns, size, dim).transpose(2, 3).reshape(-1, size * size, dim)
        back = self.attn(cut).view(batch, rows, columns, size, size, dim).transpose(2, 3)
        whole = back.reshape(batch, rows * size, columns * size, dim)[:, :height, :width]
        x = self.local_conv(x + whole.permute(0, 3, 1, 2))
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.mlp(tokens)).transpose(1, 2).reshape(batch, dim, height, width)


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * (x - mean) / torch.sqrt(spread + 1e-6) + self.bias[:, None, None]


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PlainTinyViT(nn.Module):
    """(B, 3, 256, 256) in [0, 1] -> (B, 256, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(ConvNorm(3, EMBED_DIMS[0] // 2), nn.GELU(), ConvNorm(EMBED_DIMS[0] // 2, EMBED_DIMS[0]))
        self.patch_embed = nn.ModuleDict({"seq": stem})
        stages: list[nn.Module] = []
        for index, (dim, depth, heads, window) in enumerate(zip(EMBED_DIMS, DEPTHS, NUM_HEADS, WINDOWS, strict=True)):
            blocks = [AttentionBlock(dim, heads, window) if index else InvertedBottleneck(dim) for _ in range(depth)]
            merging = Merging(dim, EMBED_DIMS[index + 1], 2 if index < 2 else 1) if index < 3 else None
            stages.append(Stage(blocks, merging))
        self.layers = nn.ModuleList(stages)
        self.neck = nn.Sequential(
            nn.Conv2d(EMBED_DIMS[-1], 256, 1, bias=False),
            ChannelNorm(256),
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            ChannelNorm(256),
        )
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["seq"](images)
        for stage in self.layers:
            x = stage(x)
        return self.neck(x)

    def load(self, state: dict[str, Tensor]) -> None:
        """The checkpoint's image encoder, strictly; buffers that every program computes itself are left out."""
        self.load_state_dict({key: value for key, value in state.items() if not key.endswith("attention_bias_idxs")})


def with_folded_norms(model: nn.Module) -> nn.Module:
    """Batch norms merged into their convolutions, in place."""
    for name, child in model.named_children():
        if isinstance(child, ConvNorm):
            setattr(model, name, fuse_conv_bn_eval(child.c, child.bn))
        else:
            with_folded_norms(child)
    return model
