"""LiteMedSAM: the TinyViT tower with SAM's prompt encoder and mask decoder at 256x256.

Weights and architecture: Ma et al., "Segment anything in medical images" (Nat. Commun. 2024), its LiteMedSAM branch,
Apache-2.0. The prompt encoder and mask decoder are segment_anything's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from FreqSegLib.checkpoint import load_exactly, read_state_dict
from FreqSegLib.errors import WeightsError
from FreqSegLib.sam.promptable import Decoded, decode_prompts
from FreqSegLib.sam.tiny_vit import TinyViT


class LiteMedSAM(nn.Module):
    """Image tower and SAM stage of the lite preset; satisfies ``PromptableSegmenter``."""

    name = "litemedsam"
    image_size = 256
    frame_mode: Literal["pad", "stretch"] = "pad"
    embedding_shape = (256, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

        self.image_encoder = TinyViT()
        self.prompt_encoder = PromptEncoder(
            embed_dim=256, image_embedding_size=(64, 64), input_image_size=(256, 256), mask_in_chans=16
        )
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_checkpoint(cls, path: Path, device: str | torch.device = "cpu") -> LiteMedSAM:
        """Load ``lite_medsam.pth``.

        Raises:
            WeightsError: the file cannot be read, or belongs to another architecture (key and shapes are named).
        """
        state = read_state_dict(path)
        parts: dict[str, dict[str, Tensor]] = {"image_encoder": {}, "prompt_encoder": {}, "mask_decoder": {}}
        for key, tensor in state.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise WeightsError(f"'{path}' holds no LiteMedSAM weights: unknown tensor '{key}'.")
            parts[part][name] = tensor
        model = cls()
        model.image_encoder.load_checkpoint(parts["image_encoder"])
        load_exactly(model.prompt_encoder, parts["prompt_encoder"], f"{path} (prompt_encoder)")
        load_exactly(model.mask_decoder, parts["mask_decoder"], f"{path} (mask_decoder)")
        return model.to(device)

    @torch.no_grad()
    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        """(B, 3, 256, 256) in [0, 1], padded with zeros at the bottom and right -> (B, 256, 64, 64).

        Batches run one slice at a time on a CPU: a single slice's feature maps already fill the caches.
        """
        if images.is_cuda or len(images) == 1:
            return self.image_encoder(images)
        return torch.cat([self.image_encoder(image[None]) for image in images])

    @torch.no_grad()
    def decode(
        self,
        embedding: Tensor,
        *,
        boxes: Tensor | None = None,
        point_coords: Tensor | None = None,
        point_labels: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask: bool = False,
    ) -> Decoded:
        """See :func:`FreqSegLib.sam.promptable.decode_prompts`. LiteMedSAM was trained with boxes."""
        return decode_prompts(
            self.prompt_encoder,
            self.mask_decoder,
            embedding,
            boxes=boxes,
            point_coords=point_coords,
            point_labels=point_labels,
            mask_input=mask_input,
            multimask=multimask,
        )
