"""The lite preset's image-text encoder: LiteMedSAM's tower, the aligner trained here, MiniLM for text.

The tower belongs to the SAM stage. One pass a slice serves the aligner and, later, the mask decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.encoder import token_maps
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.sam.promptable import PromptableSegmenter


class LiteEncoder:
    """Satisfies ``ImageTextEncoder``; besides, it takes embeddings that the tower has made already."""

    num_prefix_tokens = 0

    def __init__(self, tower: PromptableSegmenter, aligner: Aligner, text: MiniLM) -> None:
        self.tower, self.aligner, self.text = tower, aligner, text
        self.image_size = tower.image_size
        self.token_grid = (aligner.config.grid, aligner.config.grid)
        self.width = aligner.config.width
        self.num_layers = aligner.config.depth
        self.embed_dim = aligner.config.embed_dim

    def prefix(self, images: Tensor, layer_idx: int) -> Tensor:
        """(B, 3, 256, 256) in [0, 1] -> tokens (B, 256, width)."""
        return self.prefix_from_embedding(self.tower.embed(images), layer_idx)

    def prefix_from_embedding(self, embedding: Tensor, layer_idx: int) -> Tensor:
        """(B, 256, 64, 64) of the tower -> tokens (B, 256, width)."""
        with torch.no_grad():
            return self.aligner.prefix(self.aligner.pool(embedding), layer_idx)

    def suffix(self, tokens: Tensor, layer_idx: int) -> Tensor:
        return self.aligner.suffix(tokens, layer_idx)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.suffix(self.prefix(images, self.num_layers), self.num_layers)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return self.aligner.align_text(self.text.encode(prompts))

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token maps (B, width, 16, 16) after each of ``layers``."""
        embedding = self.tower.embed(images)
        return [token_maps(self.prefix_from_embedding(embedding, layer), self.token_grid, 0) for layer in layers]
