"""Which kind of picture a volume seems to be, by what it is called: to warn, never to refuse."""

from __future__ import annotations

import re

_PATTERNS = (
    ("flair", r"flair|dark.?fluid|tirm"),
    ("t1 with contrast agent", r"t1.*(\+c|\bce\b|post|gad|gd\b|contrast|km\b)|(post|gad|gd|ce).{0,3}t1|t1(ce|gd|c)\b"),
    ("t2", r"(?<![a-z0-9])t2(?!\*)"),
    ("t1", r"(?<![a-z0-9])t1|mprage|bravo|spgr"),
    ("diffusion", r"\bdwi\b|\badc\b|diffusion"),
    ("ct", r"(?<![a-z])ct(?![a-z])"),
    ("ultrasound", r"ultrasound|sonogra|busi"),
    ("x-ray", r"x.?ray|radiograph|\bcxr\b"),
)
_MODALITIES = {
    "flair": ("MR",),
    "t1 with contrast agent": ("MR",),
    "t2": ("MR",),
    "t1": ("MR",),
    "diffusion": ("MR",),
    "ct": ("CT",),
    "ultrasound": ("US",),
    "x-ray": ("CR", "DX", "RG", "RF"),
}
"""DICOM's names of the machines that make these."""


def contrast_in(text: str) -> str | None:
    """The kind of picture a text speaks of, such as "flair"; None if of none."""
    text = text.lower().replace("_", " ")
    return next((name for name, pattern in _PATTERNS if re.search(pattern, text)), None)


def contrast_name(contrast: str) -> str:
    """A kind of picture as people write it."""
    return contrast.upper() if contrast in ("t1", "t2", "ct", "flair") else contrast.replace("t1", "T1")


def other_contrast(text: str, modality: str | None, wanted: str | None) -> str:
    """What kind of picture a volume seems to be where that is not the wanted one, else "".

    Args:
        text: the volume's name and description.
        modality: as in DICOM; None or empty when unknown.
        wanted: of :func:`contrast_in`; None warns of nothing.
    """
    if wanted is None:
        return ""
    modality = (modality or "").upper()
    if modality and modality not in _MODALITIES[wanted]:
        return modality
    found = contrast_in(text)
    return contrast_name(found) if found not in (None, wanted) else ""
