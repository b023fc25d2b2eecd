"""The amortised bottleneck: a small trained module says in one pass what M2IB finds by optimising every picture.

M2IB (Wang et al., NeurIPS 2023) looks for the lambda that minimises beta * mean KL - cos(image, text), picture by
picture. Here a network reads the tokens at the bottleneck and the text vector and gives lambda = sigmoid(alpha); it was
trained on that same objective through the encoder's frozen suffix, over many pictures, texts and betas. What it
gives is used as M2IB's is: the KL of each token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from FreqSegLib.checkpoint import module_of, save_half
from FreqSegLib.errors import SettingsError
from FreqSegLib.saliency.m2ib import INITIAL_ALPHA, gaussian_divergence

LARGEST_ALPHA = 9.0


@dataclass(frozen=True)
class AmortisedConfig:
    """Sizes of the module, and what it was trained for; stored in the weights' file.

    Attributes:
        width: of the tokens.
        text_width: of the text vectors.
        hidden: units between.
        layer_idx: encoder block that the tokens stand after.
        least_beta, most_beta: weights of information it was trained with.
    """

    width: int = 160
    text_width: int = 384
    hidden: int = 192
    layer_idx: int = 3
    least_beta: float = 0.05
    most_beta: float = 3.0


class AmortisedBottleneck(nn.Module):
    """lambda from tokens, text and beta.

    Each token is projected, multiplied by a projection of text and beta (what the text asks of a token), joined with
    the mean of all tokens so asked (what else is in the picture), and a head turns that into one alpha a channel. The
    head starts at zero: untrained, alpha is M2IB's own start everywhere, and next to nothing is held back.

    Args:
        config: see :class:`AmortisedConfig`.
    """

    def __init__(self, config: AmortisedConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AmortisedConfig()
        self.norm = nn.LayerNorm(config.width)
        self.token_projection = nn.Linear(config.width, config.hidden)
        self.text_projection = nn.Linear(config.text_width + 1, config.hidden)
        self.mixing = nn.Linear(3 * config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.width)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, LARGEST_ALPHA * math.atanh(INITIAL_ALPHA / LARGEST_ALPHA))

    @property
    def is_trained(self) -> bool:
        """Whether the head has left its start."""
        return bool(self.head.weight.detach().abs().max() > 0)

    def forward(self, tokens: Tensor, texts: Tensor, beta: Tensor | float) -> Tensor:
        """The share of each token's channel that passes the bottleneck.

        Args:
            tokens: (B, N, width) hidden states after the bottleneck's layer, without a class token.
            texts: (B, text_width) unit vectors.
            beta: weight of information, > 0; one number, or (B).

        Returns:
            lambda (B, N, width) in (0, 1).
        """
        weight = torch.as_tensor(beta, dtype=tokens.dtype, device=tokens.device).log10().expand(len(tokens))
        asked = self.text_projection(torch.cat([texts, weight[:, None]], 1))[:, None]
        seen = self.token_projection(self.norm(tokens))
        answer = seen * asked
        around = answer.mean(1, keepdim=True).expand_as(answer)
        mixed = nn.functional.gelu(self.mixing(torch.cat([seen, answer, around], -1)))
        return (LARGEST_ALPHA * torch.tanh(self.head(mixed) / LARGEST_ALPHA)).sigmoid()

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights in half precision with their configuration, atomically."""
        save_half(self, path, {"config": json.dumps(asdict(self.config)), **(metadata or {})})

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> AmortisedBottleneck:
        """Read what :meth:`save` wrote, as float32, frozen.

        Raises:
            WeightsError: unreadable, or tensors that do not fit (key and shapes are named).
        """
        return module_of(path, "bottleneck", lambda config: cls(AmortisedConfig(**config))).to(device)


def amortised_information(model: AmortisedBottleneck, tokens: Tensor, texts: Tensor, beta: float) -> Tensor:
    """Information (nats) that each token carries about the text, in one pass; as ``m2ib_information`` gives it.

    Args:
        model: trained.
        tokens: (B, N, C) hidden states after the bottleneck's layer.
        texts: (B, D) unit vectors.
        beta: weight of information.

    Returns:
        (B, N), >= 0: KL summed over channels.
    """
    with torch.no_grad():
        return gaussian_divergence(model(tokens, texts, beta), tokens).sum(-1)


def bottleneck_objective(
    suffix: Callable[[Tensor], Tensor], keep: Tensor, tokens: Tensor, texts: Tensor, beta: Tensor, noise: Tensor
) -> Tensor:
    """What M2IB minimises: beta * mean KL - cos(image, text), one number an item.

    Args:
        suffix: tokens (M, N, C) -> unit image vectors (M, D); frozen.
        keep: lambda (B, N, C) in [0, 1].
        tokens: (B, N, C).
        texts: (B, D) unit vectors.
        beta: (B).
        noise: (S, B, N, C) draws of N(0, 1).

    Returns:
        (B).
    """
    z = keep * tokens + (1 - keep) * noise
    cosine = (suffix(z.flatten(0, 1)).unflatten(0, noise.shape[:2]) * texts).sum(-1).mean(0)
    return beta * gaussian_divergence(keep, tokens).flatten(1).mean(1) - cosine


def require_amortised(model: AmortisedBottleneck | None, preset: str, layer_idx: int, beta: float) -> None:
    """Whether the amortised bottleneck can be used as asked.

    Raises:
        SettingsError: there is none for the preset, or it was trained for another layer or another beta.
    """
    if model is None or not model.is_trained:
        raise SettingsError(
            f"The amortised bottleneck is not trained for the preset {preset}: set bottleneck to m2ib or nib, which "
            "need no training (for the lite preset 'make train-zero-shot' in a checkout trains it)."
        )
    c = model.config
    if layer_idx != c.layer_idx:
        raise SettingsError(
            f"The amortised bottleneck was trained after encoder block {c.layer_idx}, got layer_idx {layer_idx}: leave "
            "layer_idx out, or set bottleneck to m2ib or nib."
        )
    if not (math.isclose(beta, c.least_beta) or math.isclose(beta, c.most_beta) or c.least_beta < beta < c.most_beta):
        raise SettingsError(
            f"The amortised bottleneck was trained for beta {c.least_beta} to {c.most_beta}, got {beta}: give one in "
            "this range, or set bottleneck to m2ib."
        )
