"""SAM (Kirillov et al., "Segment Anything", 2023) and MedSAM (Ma et al., Nature Communications, 2024) for refinement.

The model is segment_anything's own; only the attention of its image encoder is replaced, by one that gives the same
numbers in less time and a tenth of the memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn

from FreqSegLib.checkpoint import StateDict, load_exactly, read_state_dict
from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.sam.promptable import Decoded, decode_prompts

ModelType = Literal["auto", "vit_b", "vit_l", "vit_h", "medsam"]
Normalisation = Literal["sam", "unit"]

# Mean and standard deviation of 8-bit RGB that SAM was trained with.
_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)
_WIDTH_KEY = "image_encoder.patch_embed.proj.weight"
_TYPE_OF_WIDTH = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


class SegmentAnything:
    """A frozen SAM: ``embed`` images once, ``decode`` visual prompts as often as wanted.

    Args:
        model: a ``Sam`` of segment_anything; its attention is replaced in place, its state-dict keys stay.
        name: shown to the user and part of the embedding cache's key.
        normalisation: ``"sam"`` for mean and standard deviation of SAM's training; ``"unit"`` for MedSAM, whose image
            encoder was trained on, and takes, intensities scaled to [0, 1] as they are.

    Example::

        sam = SegmentAnything.from_checkpoint("sam_vit_b_01ec64.pth")
        embedding = sam.embed(images, valid=(1024, 768))
        masks = sam.decode(embedding[:1], boxes=torch.tensor([[100.0, 120.0, 300.0, 280.0]])).low_res_logits > 0
    """

    def __init__(self, model: Sam, name: str, normalisation: Normalisation = "sam") -> None:
        if normalisation not in get_args(Normalisation):
            raise SettingsError(f"normalisation must be 'sam' or 'unit', got {normalisation!r}.")
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.normalisation = normalisation
        self.frame_mode: Literal["pad", "stretch"] = "pad" if normalisation == "sam" else "stretch"
        self.image_size: int = model.image_encoder.img_size
        encoder = model.prompt_encoder
        self.embedding_shape: tuple[int, int, int] = (encoder.embed_dim, *encoder.image_embedding_size)
        use_fused_attention(model.image_encoder)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, model_type: ModelType = "vit_b", device: str | torch.device = "cpu"
    ) -> SegmentAnything:
        """Load SAM or MedSAM weights in the layout segment_anything saves.

        Args:
            path: e.g. ``sam_vit_b_01ec64.pth`` or ``medsam_vit_b.pth``; a training checkpoint's nesting is undone.
            model_type: ``"medsam"`` is ``vit_b`` with MedSAM's intensities. ``"auto"`` tells vit_b, vit_l and vit_h
                apart by their shapes; MedSAM has vit_b's, and is taken for MedSAM if the file's name contains
                "medsam".
            device: where the model runs.

        Raises:
            SettingsError: unknown ``model_type``.
            WeightsError: the file cannot be read or holds another architecture; names the key and both shapes.
        """
        if model_type not in get_args(ModelType):
            raise SettingsError(f"SAM model type must be one of {', '.join(get_args(ModelType))}, got {model_type!r}.")
        path = Path(path)
        state = read_state_dict(path)
        if model_type == "auto":
            architecture = guess_model_type(state, path)
            medical = architecture == "vit_b" and "medsam" in path.name.lower()
        else:
            medical = model_type == "medsam"
            architecture = "vit_b" if medical else model_type
        model = build_sam(architecture)
        load_exactly(model, state, path)
        name = f"medsam_{architecture}" if medical else f"sam_{architecture}"
        return cls(model.to(device), name, "unit" if medical else "sam")

    @torch.no_grad()
    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        """Image embeddings.

        Args:
            images: ``(B, 3, S, S)`` in [0, 1], padded at bottom and right; S is ``image_size``.
            valid: ``(rows, columns)`` of the frame that hold image. SAM pads after normalising, so with it the padding
                is zero in the encoder's own input; without it the padding is black.

        Returns:
            ``(B, *embedding_shape)`` on the model's device.

        Raises:
            InputError: wrong shape.
        """
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise InputError(f"{self.name} takes images of shape (B, 3, {side}, {side}), got {tuple(images.shape)}.")
        weight = self.model.image_encoder.patch_embed.proj.weight
        pixels = images.to(device=weight.device, dtype=weight.dtype)
        if self.normalisation == "sam":
            pixels = (pixels * 255 - self.model.pixel_mean) / self.model.pixel_std
        if valid is not None:
            rows, columns = valid
            pixels = F.pad(pixels[..., :rows, :columns], (0, side - columns, 0, side - rows))
        return self.model.image_encoder(pixels)

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
        """Masks for P prompts in frame pixels; arguments and errors are those of :func:`decode_prompts`."""
        return decode_prompts(
            self.model.prompt_encoder,
            self.model.mask_decoder,
            embedding,
            boxes=boxes,
            point_coords=point_coords,
            point_labels=point_labels,
            mask_input=mask_input,
            multimask=multimask,
        )


def build_sam(architecture: str) -> Sam:
    """segment_anything's ``vit_b``, ``vit_l`` or ``vit_h`` on the meta device: shapes without memory, to be loaded."""
    with torch.device("meta"):
        model = sam_model_registry[architecture]()
    # Not part of the state dict, so no checkpoint brings them.
    model.pixel_mean = torch.tensor(_PIXEL_MEAN).view(3, 1, 1)
    model.pixel_std = torch.tensor(_PIXEL_STD).view(3, 1, 1)
    return model


def guess_model_type(state: StateDict, source: str | Path = "the checkpoint") -> str:
    """``vit_b``, ``vit_l`` or ``vit_h``, by the width of the patch embedding.

    Raises:
        WeightsError: not SAM's image encoder, or a width that no published SAM has.
    """
    if _WIDTH_KEY not in state:
        raise WeightsError(
            f"{source} is no SAM checkpoint: key '{_WIDTH_KEY}' is missing. "
            "Give the weights of SAM vit_b, vit_l or vit_h, or of MedSAM."
        )
    shape = tuple(state[_WIDTH_KEY].shape)
    if shape[0] not in _TYPE_OF_WIDTH:
        expected = " or ".join(f"({width}, 3, 16, 16)" for width in _TYPE_OF_WIDTH)
        raise WeightsError(
            f"{source} is no SAM that FreqSeg knows: key '{_WIDTH_KEY}' has shape {shape}, expected {expected}."
        )
    return _TYPE_OF_WIDTH[shape[0]]


def use_fused_attention(image_encoder: ImageEncoderViT) -> None:
    """Replace the attention of a segment_anything image encoder by :class:`FusedAttention`, keeping its weights."""
    for block in image_encoder.blocks:
        if isinstance(block.attn, Attention):
            block.attn = FusedAttention(block.attn)


class FusedAttention(nn.Module):
    """SAM's attention with decomposed relative positions (Li et al., MViTv2, 2022), one head at a time.

    The bias of all heads at once takes 0.8 GB in a global block at 1024 pixels, and segment_anything holds three such
    arrays. One head needs 64 MB, which is also faster, as it stays nearer to the processor.

    Args:
        attention: segment_anything's ``Attention``, whose weights are shared.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.use_rel_pos = attention.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h = attention.rel_pos_h
            self.rel_pos_w = attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        batch, rows, columns, channels = x.shape
        qkv = self.qkv(x).reshape(batch, rows * columns, 3, self.num_heads, -1).permute(2, 3, 0, 1, 4).unsqueeze(3)
        if self.use_rel_pos:
            row_offsets = get_rel_pos(rows, rows, self.rel_pos_h)
            column_offsets = get_rel_pos(columns, columns, self.rel_pos_w)
        heads = []
        for query, key, value in zip(*qkv.unbind(0), strict=True):
            bias = None
            if self.use_rel_pos:
                grid = query.reshape(batch, rows, columns, -1)
                by_row = torch.einsum("bhwc,hkc->bhwk", grid, row_offsets).contiguous()
                by_column = torch.einsum("bhwc,wkc->bhwk", grid, column_offsets).contiguous()
                bias = (by_row[..., :, None] + by_column[..., None, :]).view(batch, 1, rows * columns, rows * columns)
            heads.append(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
        return self.proj(torch.cat(heads, dim=-1).reshape(batch, rows, columns, channels))
