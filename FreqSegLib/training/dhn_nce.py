"""Decoupled hard-negative noise contrastive estimation (DHN-NCE).

Koleilat et al., "MedCLIP-SAM" (MICCAI 2024), equations 1-3, as in the paper: the positive pair is left out of the
denominator (decoupled) and each negative is weighted by how hard it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DHNNCELoss(nn.Module):
    """L = -mean(s_ii/t) + mean log sum_j w_ij exp(s_ij/t), w_ij = n_i exp(b s_ij/t) / sum_k exp(b s_ik/t), both ways.

    n_i is the number of negatives (B - 1 in the paper, where every other pair is one). Pairs whose caption is true of
    the picture, or not known to be false, are no negatives: ``negatives`` says which are.

    Args:
        temperature: t.
        beta1, beta2: hardness for images and for texts.
    """

    def __init__(self, temperature: float = 0.6, beta1: float = 0.15, beta2: float = 0.15) -> None:
        super().__init__()
        self.temperature, self.beta1, self.beta2 = temperature, beta1, beta2

    def forward(self, images: Tensor, texts: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Args:
            images, texts: (B, D) unit vectors; row i of one belongs to row i of the other.
            negatives: (B, B) bool, image i and text j do not belong together; all but the diagonal if left out.

        Returns:
            Scalar; a row without any negative contributes its positive term alone.
        """
        scores = images @ texts.T / self.temperature
        if negatives is None:
            negatives = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        positive = scores.diagonal().mean()
        return (
            self._negative_term(scores, negatives, self.beta1)
            + self._negative_term(scores.T, negatives.T, self.beta2)
            - 2 * positive
        )

    @staticmethod
    def _negative_term(scores: Tensor, negatives: Tensor, beta: float) -> Tensor:
        rows, has_any = len(scores), negatives.any(1)
        scores, negatives = scores[has_any], negatives[has_any]
        hardness = (beta * scores).masked_fill(~negatives, -torch.inf)
        log_weight = (
            hardness
            - torch.logsumexp(hardness, 1, keepdim=True)
            + negatives.sum(1, keepdim=True).to(scores.dtype).log()
        )
        return torch.logsumexp(scores + log_weight, 1).sum() / rows
