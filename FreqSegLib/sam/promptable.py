"""What the refinement stage asks of a SAM-family model, and the prompt decoding all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from FreqSegLib.errors import InputError

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder, PromptEncoder
    from torch import Tensor


@dataclass(frozen=True)
class Decoded:
    """Masks for P visual prompts, M candidates each (M = 3 with ``multimask``, else 1).

    Attributes:
        low_res_logits: ``(P, M, 256, 256)``, positive inside; spans the whole square frame, padding included.
        iou: ``(P, M)``, the model's own estimate of each mask's intersection over union, about [0, 1].
    """

    low_res_logits: Tensor
    iou: Tensor


@runtime_checkable
class PromptableSegmenter(Protocol):
    """A frozen SAM-family model: the expensive ``embed`` once an image, the cheap ``decode`` once a set of prompts.

    Attributes:
        name: which architecture and weights, e.g. ``sam_vit_b``.
        image_size: side of the square input in pixels.
        embedding_shape: ``(channels, rows, columns)`` of one image's embedding, (256, 64, 64) for the published models.
        frame_mode: how a slice is brought into the square: "pad" keeps its aspect, "stretch" fills it (MedSAM).
    """

    @property
    def name(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    @property
    def embedding_shape(self) -> tuple[int, int, int]: ...

    @property
    def frame_mode(self) -> Literal["pad", "stretch"]: ...

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        """Image embeddings ``(B, *embedding_shape)`` of ``images (B, 3, S, S)`` in [0, 1], padded at bottom and right.

        ``valid`` is the ``(rows, columns)`` that hold image; the rest is padding.
        """
        ...

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
        """Masks for P prompts on one image, or on P images; see :func:`decode_prompts`."""
        ...


def decode_prompts(
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
    embedding: Tensor,
    *,
    boxes: Tensor | None = None,
    point_coords: Tensor | None = None,
    point_labels: Tensor | None = None,
    mask_input: Tensor | None = None,
    multimask: bool = False,
) -> Decoded:
    """Decode P prompts in one batch with segment_anything's prompt encoder and mask decoder (Kirillov et al., 2023).

    Args:
        prompt_encoder: segment_anything's; its input image size is the frame the coordinates are in.
        mask_decoder: segment_anything's.
        embedding: ``(1, C, h, w)`` for all prompts, or ``(P, C, h, w)`` with one image a prompt; any float dtype.
        boxes: ``(P, 4)`` as x0, y0, x1, y1 in frame pixels, pixel centres at whole numbers.
        point_coords: ``(P, N, 2)`` as x, y in frame pixels.
        point_labels: ``(P, N)``, 1 inside, 0 outside, -1 no point (to fill up to N).
        mask_input: ``(P, 1, 4h, 4w)`` logits of an earlier mask.
        multimask: three candidate masks a prompt in place of one.

    Raises:
        InputError: no prompt at all, or shapes that do not go together.
    """
    import torch

    _check_prompts(prompt_encoder, embedding, boxes, point_coords, point_labels, mask_input)
    weight = mask_decoder.iou_token.weight

    def here(prompt: Tensor | None) -> Tensor | None:
        return None if prompt is None else prompt.to(device=weight.device, dtype=torch.float32)

    coords, labels = here(point_coords), here(point_labels)
    sparse, dense = prompt_encoder(
        points=None if coords is None else (coords, labels), boxes=here(boxes), masks=here(mask_input)
    )
    # segment_anything repeats every image for every prompt, which cannot pair P images with P prompts. The decoder only
    # ever uses the sum of image and dense prompt embedding, so the image goes in through the latter.
    image = embedding.to(device=weight.device, dtype=weight.dtype)
    logits, iou = mask_decoder(
        image_embeddings=torch.zeros_like(image[:1]),
        image_pe=prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + image,
        multimask_output=multimask,
    )
    return Decoded(low_res_logits=logits, iou=iou)


def _check_prompts(
    prompt_encoder: PromptEncoder,
    embedding: Tensor,
    boxes: Tensor | None,
    point_coords: Tensor | None,
    point_labels: Tensor | None,
    mask_input: Tensor | None,
) -> None:
    mask_size = tuple(prompt_encoder.mask_input_size)
    _check_shape("boxes", boxes, 2, (4,), "(P, 4)")
    _check_shape("point_coords", point_coords, 3, (2,), "(P, N, 2)")
    _check_shape("mask_input", mask_input, 4, (1, *mask_size), f"(P, 1, {mask_size[0]}, {mask_size[1]})")
    if (point_coords is None) != (point_labels is None):
        raise InputError("point_coords and point_labels go together: give both, or neither.")
    if point_coords is not None and point_labels is not None and point_labels.shape != point_coords.shape[:2]:
        raise InputError(
            f"point_labels must have one label a point, shape {tuple(point_coords.shape[:2])}, "
            f"got {tuple(point_labels.shape)}."
        )
    given = {"boxes": boxes, "point_coords": point_coords, "mask_input": mask_input}
    counts = {name: prompt.shape[0] for name, prompt in given.items() if prompt is not None}
    if not counts:
        raise InputError("nothing to decode: give boxes, points or a mask.")
    if len(set(counts.values())) > 1:
        raise InputError(f"every kind of prompt must come P times, got {counts}.")
    count = next(iter(counts.values()))
    size = (prompt_encoder.embed_dim, *prompt_encoder.image_embedding_size)
    if embedding.shape not in ((1, *size), (count, *size)):
        raise InputError(f"embedding must be (1 or {count}, *{size}), got {tuple(embedding.shape)}.")


def _check_shape(name: str, value: Tensor | None, ndim: int, tail: tuple[int, ...], wanted: str) -> None:
    if value is not None and (value.ndim != ndim or tuple(value.shape[ndim - len(tail) :]) != tail):
        raise InputError(f"{name} must have shape {wanted}, got {tuple(value.shape)}.")
