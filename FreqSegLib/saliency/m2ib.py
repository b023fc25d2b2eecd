"""M2IB: multi-modal information bottleneck attribution, exact, with the image's prefix computed once.

Wang et al., "Visual explanations of image-text representations via multi-modal information bottleneck attribution"
(NeurIPS 2023). After block ``layer_idx`` the tokens h are mixed with noise, z = lambda h + (1 - lambda) eps with
lambda = sigmoid(alpha); alpha minimises beta * mean KL(N(lambda h, (1 - lambda)^2) || N(0, 1)) - cos(image, text).
Only what stands after the bottleneck depends on alpha, so only the suffix runs in the loop; weights are frozen, the
text vector is an input. The maps are those of the published procedure, which runs everything every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INITIAL_ALPHA = 5.0


@dataclass(frozen=True)
class BottleneckSettings:
    """Published M2IB settings, and how many steps NIB's path has.

    Attributes:
        beta: weight of the information term.
        train_steps: Adam steps.
        num_noise_samples: noise draws a step.
        learning_rate: Adam's.
        path_steps: points of NIB's path.
    """

    beta: float = 0.1
    train_steps: int = 10
    num_noise_samples: int = 10
    learning_rate: float = 1.0
    path_steps: int = 10


def m2ib_information(
    suffix: Callable[[Tensor], Tensor],
    tokens: Tensor,
    texts: Tensor,
    seeds: Sequence[int],
    settings: BottleneckSettings,
) -> Tensor:
    """Information (nats) that each token carries about the text.

    Args:
        suffix: tokens (M, N, C) -> unit image vectors (M, D); frozen.
        tokens: (B, N, C) hidden states after the bottleneck's layer, class token first if there is one.
        texts: (B, D) unit vectors.
        seeds: one a item; an item's map is the same alone or in company.
        settings: see :class:`BottleneckSettings`.

    Returns:
        (B, N): KL summed over channels, before the last Adam step, as published.
    """
    with torch.inference_mode(False), torch.no_grad():
        # tensors made in a caller's inference mode cannot enter a gradient; copies can
        h, texts = (x.clone() if x.is_inference() else x.detach() for x in (tokens, texts))
        return _optimise(suffix, h, texts, seeds, settings)


def _optimise(
    suffix: Callable[[Tensor], Tensor], h: Tensor, texts: Tensor, seeds: Sequence[int], settings: BottleneckSettings
) -> Tensor:
    alpha = torch.full_like(h, INITIAL_ALPHA).requires_grad_(True)
    adam = _Adam(alpha, settings.learning_rate)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    samples, items = settings.num_noise_samples, len(h)
    information = torch.zeros_like(h)
    repeated_texts = texts.repeat_interleave(samples, 0)
    with torch.enable_grad():
        for step in range(settings.train_steps):
            keep = torch.sigmoid(alpha)
            divergence = gaussian_divergence(keep, h)
            information = divergence.detach()
            if step == settings.train_steps - 1:
                break
            noise = torch.stack([torch.randn(samples, *h.shape[1:], generator=g) for g in generators])
            noise = noise.to(h.device, h.dtype)
            z = (keep * h)[:, None] + (1 - keep)[:, None] * noise
            cosine = (suffix(z.flatten(0, 1)) * repeated_texts).sum(-1).view(items, samples).mean(1)
            # losses are summed, so that no item's gradient depends on the batch
            loss = (settings.beta * divergence.flatten(1).mean(1) - cosine).sum()
            adam.step(torch.autograd.grad(loss, alpha)[0])
    return information.sum(-1)


class _Adam:
    """Adam (Kingma and Ba, 2015) with its published constants.

    torch's own imports the compiler when it is made, which takes longer than a slice's whole map.
    """

    def __init__(self, parameter: Tensor, learning_rate: float) -> None:
        self.parameter, self.learning_rate, self.steps = parameter, learning_rate, 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.parameter.addcdiv_(self.mean, scale, value=-self.learning_rate / (1 - 0.9**self.steps))


def gaussian_divergence(keep: Tensor, h: Tensor) -> Tensor:
    """KL(N(keep h, (1 - keep)^2) || N(0, 1)) per element, in nats."""
    rest = (1 - keep).clamp_min(1e-12)
    return -torch.log(rest) + 0.5 * (rest**2 + (keep * h) ** 2 - 1)
