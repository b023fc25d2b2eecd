"""SS2D: selective scans of an image in four directions, or of a volume in six.

Names and shapes of the parameters are those of VMamba's first release (Liu et al., 2024), which VM-UNet (Ruan & Xiang,
2024) uses.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.cross_scan import merge_orders, scan_orders
from FreqSegLib.mamba.selective_scan import Backend, selective_scan

SMALLEST_STEP, LARGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class SS2D(nn.Module):
    """Projects to twice ``d_inner``, convolves a half depthwise, scans it in every direction, gates it with the other.

    Args:
        d_model: channels in and out.
        d_state: states a channel.
        ssm_ratio: d_inner / d_model.
        dt_rank: rank of the step sizes' projection; ``d_model / 16`` rounded up if None.
        d_conv: side of the depthwise convolution, odd.
        dropout: of the output.
        dimensions: 2 for images, 3 for volumes (six directions).
        backend: of :func:`selective_scan`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        dropout: float = 0.0,
        dimensions: int = 2,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if dimensions not in (2, 3):
            raise SettingsError(f"dimensions must be 2 or 3, got {dimensions}")
        if min(d_model, d_state, d_conv) < 1 or d_conv % 2 == 0 or not ssm_ratio * d_model >= 1:
            raise SettingsError(
                "d_model and d_state must be at least 1, ssm_ratio d_model at least 1 and d_conv odd, got "
                f"d_model={d_model}, d_state={d_state}, ssm_ratio={ssm_ratio}, d_conv={d_conv}"
            )
        self.d_model, self.d_state = d_model, d_state
        self.d_inner = int(ssm_ratio * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.dimensions, self.backend = dimensions, backend
        directions, inner = 2 * dimensions, self.d_inner
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv2d: nn.Module = convolution(inner, inner, d_conv, padding=d_conv // 2, groups=inner)
        rows = self.dt_rank + 2 * d_state
        bound = inner**-0.5
        self.x_proj_weight = nn.Parameter(torch.empty(directions, rows, inner).uniform_(-bound, bound))
        bound = self.dt_rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, self.dt_rank).uniform_(-bound, bound))
        self.dt_projs_bias = nn.Parameter(_initial_bias(directions, inner))
        # S4D's real initialisation: A = -1, -2, ..., -n
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(directions * inner, 1))
        self.Ds = nn.Parameter(torch.ones(directions * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *size, d_model) channels last, with size (h, w) or (z, h, w), to the same shape."""
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.movedim(-1, 1)))
        y = self.scanned(x).movedim(1, -1)
        y = self.out_norm(y.to(gate.dtype)) * F.silu(gate)
        return self.dropout(self.out_proj(y))

    def scanned(self, x: Tensor) -> Tensor:
        """Selective scans of x (b, d_inner, *size) in every direction, added up: the same shape."""
        size, n = tuple(x.shape[2:]), self.d_state
        batch, orders = x.shape[0], self.dimensions
        sequences = scan_orders(x)
        # the second half of the directions are the first half's, read backwards: their projections need no flip either
        weight = self.x_proj_weight.unflatten(0, (2, orders))
        projected = torch.einsum("bodl,rocd->brocl", sequences, weight).flatten(1, 2)
        steps, B, C = projected.split([self.dt_rank, n, n], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", steps, self.dt_projs_weight)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = selective_scan(
            sequences.flatten(1, 2).to(exact),
            delta.flatten(1, 2).to(exact),
            -self.A_logs.to(exact).exp(),
            B.to(exact),
            C.to(exact),
            self.Ds,
            self.dt_projs_bias.flatten(),
            delta_softplus=True,
            reversed_from=orders,
            backend=self.backend,
        )
        y = y.view(batch, 2, orders, self.d_inner, -1).sum(1)
        return merge_orders(y, size)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_inner={self.d_inner}, d_state={self.d_state}, dimensions={self.dimensions}"


def _initial_bias(directions: int, inner: int) -> Tensor:
    """Biases whose softplus is spread evenly in the logarithm between the smallest and the largest step (Mamba)."""
    spread = math.log(LARGEST_STEP) - math.log(SMALLEST_STEP)
    step = torch.exp(torch.rand(directions, inner) * spread + math.log(SMALLEST_STEP)).clamp(min=STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))
