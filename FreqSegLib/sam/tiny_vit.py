"""LiteMedSAM's TinyViT image tower, written for inference.

TinyViT (Wu et al., ECCV 2022) as MobileSAM and LiteMedSAM use it: a 1x1 stem that keeps the full 256x256 grid, two
inverted-bottleneck convolution blocks, three stages of window attention, and SAM's neck. The tower is always frozen
here, so batch norms are folded into the convolutions while the checkpoint is read, feature maps stay channels-last
(a 1x1 convolution is then one matrix product), attention goes through ``scaled_dot_product_attention``, and the two
full-resolution blocks, whose hidden maps of 64 MB a slice would stream through memory four times, work on strips of
rows that stay in cache. None of this changes the result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import WeightsError

EMBED_DIMS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
NUM_HEADS = (2, 4, 5, 10)
WINDOW_SIZES = (7, 7, 14, 7)
BATCH_NORM_EPS = 1e-5
BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
# Checkpoints may hold these; nothing is computed from them
NOT_WEIGHTS = (".num_batches_tracked", ".attention_bias_idxs")
STRIP_ROWS = 16


class TinyViT(nn.Module):
    """LiteMedSAM's image encoder: (B, 3, S, S) in [0, 1] -> (B, 256, S/4, S/4), S a multiple of 4 (256 as trained)."""

    def __init__(self) -> None:
        super().__init__()
        width = EMBED_DIMS[0]
        stem = nn.Sequential(Conv(3, width // 2), nn.GELU(), Conv(width // 2, width))
        self.patch_embed = nn.ModuleDict({"seq": stem})
        stages: list[nn.Module] = []
        sizes = zip(EMBED_DIMS, DEPTHS, NUM_HEADS, WINDOW_SIZES, strict=True)
        for index, (dim, depth, heads, window) in enumerate(sizes):
            blocks = [MBConv(dim) if index == 0 else TinyViTBlock(dim, heads, window) for _ in range(depth)]
            last = index == len(EMBED_DIMS) - 1
            # LiteMedSAM halves the grid twice only: the last merging keeps its size
            merging = None if last else PatchMerging(dim, EMBED_DIMS[index + 1], stride=2 if index < 2 else 1)
            stages.append(Stage(blocks, merging))
        self.layers = nn.ModuleList(stages)
        self.neck = nn.ModuleList(
            [
                nn.Conv2d(EMBED_DIMS[-1], 256, 1, bias=False),
                ChannelNorm(256),
                nn.Conv2d(256, 256, 3, padding=1, bias=False),
                ChannelNorm(256),
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["seq"](images.permute(0, 2, 3, 1))
        for stage in self.layers:
            x = stage(x)
        reduce, norm_a, mix, norm_b = self.neck
        assert isinstance(reduce, nn.Conv2d)
        x = norm_a(F.linear(x, reduce.weight.flatten(1)))
        x = norm_b(mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """Read LiteMedSAM's own ``image_encoder.*`` tensors (prefix already removed), folding batch norms.

        Raises:
            WeightsError: a tensor is missing, unknown, or has another shape; it is named with both shapes.
        """
        state = {key: tensor for key, tensor in state.items() if not key.endswith(NOT_WEIGHTS)}
        expected = self.checkpoint_shapes()
        for key, shape in expected.items():
            if key not in state:
                raise WeightsError(
                    f"These are not LiteMedSAM weights: '{key}' of shape {shape} is missing from the image tower."
                )
            if tuple(state[key].shape) != shape:
                raise WeightsError(
                    f"These are not LiteMedSAM weights: '{key}' has shape {tuple(state[key].shape)}, expected {shape}."
                )
        unknown = sorted(set(state) - set(expected))
        if unknown:
            raise WeightsError(
                f"These are not LiteMedSAM weights: unknown tensor '{unknown[0]}' of shape "
                f"{tuple(state[unknown[0]].shape)} in the image tower."
            )
        self.load_state_dict(fold_batch_norms(state))

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint, where convolutions and batch norms are still apart."""
        shapes: dict[str, tuple[int, ...]] = {}
        for key, tensor in self.state_dict().items():
            name, _, kind = key.rpartition(".")
            if not isinstance(self.get_submodule(name), Conv):
                shapes[key] = tuple(tensor.shape)
            elif kind == "weight":
                shapes[f"{name}.c.weight"] = tuple(tensor.shape)
                shapes.update({f"{name}.bn.{part}": (len(tensor),) for part in BATCH_NORM_PARTS})
        return shapes


def fold_batch_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge every ``X.c`` (convolution without bias) and ``X.bn`` into ``X.weight`` and ``X.bias``, in float64."""
    folded: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(".c.weight"):
            name = key.removesuffix(".c.weight")
            gamma, beta, mean, var = (state[f"{name}.bn.{part}"].double() for part in BATCH_NORM_PARTS)
            scale = gamma / torch.sqrt(var + BATCH_NORM_EPS)
            folded[f"{name}.weight"] = (tensor.double() * scale[:, None, None, None]).to(tensor.dtype)
            folded[f"{name}.bias"] = (beta - mean * scale).to(tensor.dtype)
        elif ".bn." not in key:
            folded[key] = tensor
    return folded


class Conv(nn.Module):
    """A convolution with its batch norm folded in, on channels-last maps (B, H, W, C)."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = kernel > 1
        self.stride = stride
        group = out_channels if self.depthwise else 1
        self.weight = nn.Parameter(torch.empty(out_channels, channels // group, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, *, pad_rows: int = 1) -> Tensor:
        if not self.depthwise:
            return F.linear(x, self.weight.flatten(1), self.bias)
        y = F.conv2d(
            x.permute(0, 3, 1, 2), self.weight, self.bias, self.stride, (pad_rows, 1), groups=self.weight.shape[0]
        )
        return y.permute(0, 2, 3, 1)


class MBConv(nn.Module):
    """Inverted bottleneck (expansion 4) at full resolution, in strips of rows with a halo of one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = Conv(dim, hidden)
        self.conv2 = Conv(hidden, hidden, kernel=3)
        self.conv3 = Conv(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))
        height = x.shape[1]
        out = torch.empty_like(x)
        for top in range(0, height, STRIP_ROWS):
            bottom = min(top + STRIP_ROWS, height)
            above, below = max(top - 1, 0), min(bottom + 1, height)
            hidden = F.gelu(self.conv1(x[:, above:below]))
            # the image border is padded with zeros AFTER the expansion, as a whole-image convolution would
            hidden = F.pad(hidden, (0, 0, 0, 0, int(top == 0), int(bottom == height)))
            hidden = F.gelu(self.conv2(hidden, pad_rows=0))
            out[:, top:bottom] = F.gelu(x[:, top:bottom] + self.conv3(hidden))
        return out


class PatchMerging(nn.Module):
    """1x1, depthwise 3x3 (stride 2 or 1), 1x1: (B, H, W, C) -> (B, H/stride, W/stride, C')."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv(dim, out_dim)
        self.conv2 = Conv(out_dim, out_dim, kernel=3, stride=stride)
        self.conv3 = Conv(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Attention(nn.Module):
    """Window attention with a learned bias a pair of offsets (LeViT)."""

    offsets: Tensor

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        # |dy| * window + |dx| numbers the offsets in the order the checkpoint stores them (first row of tokens)
        offsets = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, dim = x.shape
        # the checkpoint interleaves q, k and v head by head
        qkv = self.qkv(self.norm(x)).view(windows, tokens, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        bias = self.attention_biases[:, self.offsets][None]
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(windows, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, depthwise 3x3 convolution, MLP on (B, H, W, C).

    Borders are filled with zero tokens that take part in attention, unmasked, as LiteMedSAM was trained.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, num_heads, window)
        self.local_conv = Conv(dim, dim, kernel=3)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        w = self.window
        down, right = -height % w, -width % w
        y = F.pad(x, (0, 0, 0, right, 0, down))
        rows, columns = y.shape[1] // w, y.shape[2] // w
        y = y.view(batch, rows, w, columns, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
        y = self.attn(y)
        y = y.view(batch, rows, columns, w, w, dim).transpose(2, 3).reshape(batch, rows * w, columns * w, dim)
        x = self.local_conv(x + y[:, :height, :width])
        return x + self.mlp(x)


class Stage(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class ChannelNorm(nn.Module):
    """SAM's LayerNorm2d (eps 1e-6), on channels-last maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-6)
