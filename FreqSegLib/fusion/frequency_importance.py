"""Which bands and levels matter, judged from the pair itself. Both start neutral and know no order of the sources."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from FreqSegLib.fusion.pyramid import PairPyramid


class FrequencyImportance(nn.Module):
    """Four factors a level, for the logits of LL, LH, HL and HH: 4 softmax(parameter + linear(log band energy)).

    A factor above 1 sharpens a band's mask, one below 1 moves it towards an even mix; either way the mask stays
    between 0 and 1, so the mix stays convex. The factors of a level have mean 1, and all are 1 before training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(4))
        self.from_energy = nn.Linear(4, 4)
        nn.init.zeros_(self.from_energy.weight)
        nn.init.zeros_(self.from_energy.bias)

    def forward(self, pyramid: PairPyramid, level: int) -> Tensor:
        """Factors (B, 4), positive, of level ``level`` counted from 0, the finest."""
        ct = torch.cat([pyramid.ct_low[level], pyramid.ct_details[level]], 1)
        mr = torch.cat([pyramid.mr_low[level], pyramid.mr_details[level]], 1)
        energy = ct.square().mean((2, 3)) + mr.square().mean((2, 3))
        # a black pair has no energy at all, and its logarithm must stay finite
        content = torch.log10(energy + 1e-6)
        return 4 * (self.offset + self.from_energy(content)).softmax(1)


class GlobalController(nn.Module):
    """One look at the whole pair that weighs the levels: how far each may depart from choose-max.

    Args:
        levels: number of levels, J.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(self, levels: int, width: int = 8) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.weigh = nn.Linear(2 * width, levels)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)

    def forward(self, ct_low: Tensor, mr_low: Tensor) -> Tensor:
        """Low bands of the coarsest level, (B, 1, h, w) -> weights (B, J), positive, of sum 1."""
        seen = self.look(torch.cat([torch.cat([ct_low, mr_low], 1), torch.cat([mr_low, ct_low], 1)])).mean((2, 3))
        return self.weigh(seen[: len(ct_low)] + seen[len(ct_low) :]).softmax(1)
