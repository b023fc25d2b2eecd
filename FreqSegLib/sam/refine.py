"""From a slice's coarse mask to a refined one: the SAM-family decoder is asked, one of its candidates is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.sam.promptable import PromptableSegmenter
from FreqSegLib.sam.visual_prompts import VisualPrompt
from FreqSegLib.settings import Vote
from FreqSegLib.slices import Frame

STAPLE_ITERATIONS = 50
EPSILON = 1e-9


@dataclass(frozen=True)
class Refined:
    """A slice's mask (h, w) and the decoder's mean estimate of its IoU."""

    mask: NDArray[np.bool_]
    iou: float


@torch.inference_mode()
def refine_slice(
    model: PromptableSegmenter,
    embedding: Tensor,
    frame: Frame,
    prompts: list[VisualPrompt],
    *,
    vote: Vote = "single",
) -> Refined:
    """Union of the masks of all prompts.

    Args:
        model: decoder.
        embedding: (1, 256, 64, 64) of the slice.
        frame: how the slice sits in the model's square.
        prompts: one a component, slice coordinates.
        vote: ``single`` (the decoder's own single mask); or three candidates a prompt, and of these ``best`` by
            estimated IoU, ``mrm`` (pixels where candidates weighted by their IoU agree by more than half), ``staple``
            (Warfield 2004), or ``mean`` of the logits.

    Returns:
        An empty mask if there are no prompts.
    """
    if not prompts:
        return Refined(np.zeros(frame.slice_shape, dtype=bool), 0.0)
    multimask = vote != "single"
    decoded = model.decode(embedding, multimask=multimask, **_in_frame(prompts, frame))
    masks, ious = [], []
    for logits, iou in zip(decoded.low_res_logits, decoded.iou, strict=True):
        on_slice = frame.from_frame(logits[None].float())[0]
        masks.append(one_of(on_slice, iou.float(), vote).cpu().numpy())
        ious.append(float(iou.max()))
    return Refined(np.logical_or.reduce(masks), float(np.mean(ious)))


def one_of(logits: Tensor, iou: Tensor, vote: Vote) -> Tensor:
    """Candidates (M, h, w) -> one mask (h, w) bool."""
    if len(logits) == 1 or vote in ("single", "best"):
        return logits[int(iou.argmax())] > 0
    if vote == "mean":
        return logits.mean(0) > 0
    if vote == "mrm":
        weight = iou.clamp_min(1e-6)
        return ((logits > 0).float() * weight[:, None, None]).sum(0) > 0.5 * weight.sum()
    return _staple((logits > 0).flatten(1).double()).view(logits.shape[1:])


def _staple(votes: Tensor) -> Tensor:
    """STAPLE for binary votes (M, N): expectation maximisation over each candidate's sensitivity and specificity."""
    if not votes.any():
        return torch.zeros_like(votes[0], dtype=torch.bool)
    prior = votes.mean().clamp(EPSILON, 1 - EPSILON)
    sensitivity = torch.full_like(votes[:, :1], 0.9)
    specificity = torch.full_like(votes[:, :1], 0.9)
    for _ in range(STAPLE_ITERATIONS):
        inside = prior * torch.where(votes > 0, sensitivity, 1 - sensitivity).prod(0)
        outside = (1 - prior) * torch.where(votes > 0, 1 - specificity, specificity).prod(0)
        belief = inside / (inside + outside)
        rest = 1 - belief
        sensitivity = (votes * belief).sum(1, keepdim=True) / belief.sum().clamp_min(EPSILON)
        specificity = ((1 - votes) * rest).sum(1, keepdim=True) / rest.sum().clamp_min(EPSILON)
        sensitivity, specificity = (x.clamp(EPSILON, 1 - EPSILON) for x in (sensitivity, specificity))
    return belief > 0.5


def _in_frame(prompts: list[VisualPrompt], frame: Frame) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    if prompts[0].box is not None:
        corners = torch.tensor([prompt.box for prompt in prompts], dtype=torch.float32).view(-1, 2, 2)
        given["boxes"] = frame.points_to_frame(corners).flatten(1)
    if len(prompts[0].points):
        longest = max(len(prompt.points) for prompt in prompts)
        points = torch.zeros(len(prompts), longest, 2)
        labels = torch.full((len(prompts), longest), -1)
        for row, prompt in enumerate(prompts):
            points[row, : len(prompt.points)] = torch.from_numpy(prompt.points).float()
            labels[row, : len(prompt.labels)] = torch.from_numpy(prompt.labels)
        given["point_coords"] = frame.points_to_frame(points)
        given["point_labels"] = labels
    return given
