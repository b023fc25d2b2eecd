"""What the encoder is asked about a meaning: its null prompts, and what sets it apart from its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from FreqSegLib.clip.vocabulary import MEANINGS, MODALITIES, Meaning, meaning

if TYPE_CHECKING:
    from torch import Tensor

GENERAL_NULLS = ("a normal scan", "a healthy patient without any finding")


def null_prompts(target: Meaning | None) -> list[str]:
    """What the picture may show instead: the target's absence, and everything of other modalities."""
    if target is None:
        return list(GENERAL_NULLS)
    absent = [m.wordings[0] for m in MEANINGS if m.modality == target.modality and not m.is_target]
    others = [m.wordings[0] for m in MEANINGS if m.modality != target.modality]
    modalities = [m.wordings[0] for key, m in MODALITIES.items() if key != target.modality]
    return absent + others + modalities


def apart_from_contrasts(
    text: Tensor, target: Meaning | None, encode_text: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """The direction (D) from the mean of the target's contrasts to ``text`` (D), unit length.

    Captions of one modality lie close together in the space of sentences; what tells "left lung" from "right lung" and
    from no lung is their difference. Without contrasts ``text`` comes back as it is.
    """
    import torch.nn.functional as F

    if target is None or not target.contrasts:
        return text
    others = encode_text([meaning(name).wordings[0] for name in target.contrasts])
    return F.normalize(text - others.mean(0), dim=0)
