"""NIB: the narrowing information bottleneck, deterministic and without a loop of optimisation.

Zhu et al., "Narrowing information bottleneck theory for multimodal image-text representations interpretability"
(ICLR 2025). One scalar lambda narrows the tokens of a layer, z = lambda h, from everything (1) to nothing (0). What a
token contributes to the score is the gradient along that path times the token itself, so contributions sum to the
change of the score between both ends. No noise, no seed, no beta.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nib_contribution(suffix: Callable[[Tensor], Tensor], tokens: Tensor, texts: Tensor, path_steps: int = 10) -> Tensor:
    """Contribution of each token to cos(image, text); negative ones are set to 0.

    Args:
        suffix: tokens (M, N, C) -> unit image vectors (M, D); frozen.
        tokens: (B, N, C) hidden states after the bottleneck's layer.
        texts: (B, D) unit vectors.
        path_steps: points of the path, at the middle of equal intervals of lambda.

    Returns:
        (B, N), >= 0.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # tensors made in a caller's inference mode cannot enter a gradient; copies can
        h, texts = (x.clone() if x.is_inference() else x.detach() for x in (tokens, texts))
        gradient = torch.zeros_like(h)
        for step in range(path_steps):
            z = (h * ((step + 0.5) / path_steps)).requires_grad_(True)
            score = (suffix(z) * texts).sum()
            gradient += torch.autograd.grad(score, z)[0]
        return (h.detach() * gradient / path_steps).sum(-1).clamp_min(0)
