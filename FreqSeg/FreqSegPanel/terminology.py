"""From a prompt to the code and colour Slicer and DICOM know it by.

Codes are SNOMED CT's, colours those Slicer recommends, as in its General Anatomy list. A prompt that fits nothing is
left without a code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import slicer

GENERAL_ANATOMY = "Segmentation category and type - 3D Slicer General Anatomy list"
ANATOMIC_CODES = "Anatomic codes - DICOM master list"


@dataclass(frozen=True)
class Code:
    """A coded word: SNOMED CT value and meaning."""

    value: str
    meaning: str

    def __str__(self) -> str:
        return f"SCT^{self.value}^{self.meaning}"


ANATOMICAL = Code("123037004", "Anatomical Structure")
ALTERED = Code("49755003", "Morphologically Altered Structure")
LEFT, RIGHT = Code("7771000", "Left"), Code("24028007", "Right")
ANTERIOR, POSTERIOR = Code("255549009", "Anterior"), Code("255551008", "Posterior")


@dataclass(frozen=True)
class Term:
    """What a segment is: category, type and its modifier, the region it lies in, and a colour (RGB, 0 to 255)."""

    category: Code
    type: Code
    color: tuple[int, int, int]
    modifier: Code | None = None
    region: Code | None = None

    @property
    def rgb(self) -> tuple[float, float, float]:
        """The colour in [0, 1]."""
        red, green, blue = self.color
        return red / 255, green / 255, blue / 255

    @property
    def entry(self) -> str:
        """As Slicer keeps it in a segment."""
        empty = "^^"
        parts = (
            GENERAL_ANATOMY,
            self.category,
            self.type,
            self.modifier or empty,
            ANATOMIC_CODES,
            self.region or empty,
            empty,
        )
        return "~".join(str(part) for part in parts)


_BRAIN = Code("12738006", "Brain")
_BREAST = Code("76752008", "Breast")
_LUNG = Code("39607008", "Lung")
_LIVER = Code("10200004", "Liver")
_KIDNEY = Code("64033007", "Kidney")
_HIPPOCAMPUS = Code("5366008", "Hippocampus")
_MASS = Code("4147007", "Mass")
_GREEN = (144, 238, 144)

_ORGANS: dict[str, tuple[Code, tuple[int, int, int]]] = {
    "brain": (_BRAIN, (250, 250, 225)),
    "breast": (_BREAST, (255, 224, 199)),
    "hippocampus": (_HIPPOCAMPUS, (242, 209, 89)),
    "heart": (Code("80891009", "Heart"), (206, 110, 84)),
    "kidney": (_KIDNEY, (185, 102, 83)),
    "lateral ventricle": (Code("66720007", "Lateral ventricle"), (88, 106, 215)),
    "liver": (_LIVER, (221, 130, 101)),
    "lung": (_LUNG, (197, 165, 145)),
    "spleen": (Code("78961009", "Spleen"), (157, 108, 162)),
}
_ALTERATIONS: dict[str, tuple[Code, tuple[int, int, int]]] = {
    "mass": (_MASS, _GREEN),
    "cyst": (Code("367643001", "Cyst"), (205, 205, 100)),
    "edema": (Code("79654002", "Edema"), (140, 224, 228)),
    "hemorrhage": (Code("50960005", "Hemorrhage"), (188, 65, 28)),
    "necrosis": (Code("6574001", "Necrosis"), (216, 191, 216)),
}
_WORDS = {
    # one spelling a thing; what people write for it
    "mass": (
        "tumour", "tumor", "tumours", "tumors", "lesion", "lesions", "masses", "neoplasm", "nodule", "nodules",
        "cancer", "carcinoma", "metastasis", "metastases",
    ),
    "brain mass": ("glioma", "gliomas", "glioblastoma", "astrocytoma", "meningioma", "oligodendroglioma"),
    "brain": ("cerebral", "intracranial", "cerebrum"),
    "edema": ("oedema",),
    "hemorrhage": ("haemorrhage", "bleeding", "bleed", "haematoma", "hematoma"),
    "cyst": ("cysts",),
    "lung": ("lungs", "pulmonary"),
    "kidney": ("kidneys", "renal"),
    "liver": ("hepatic",),
    "heart": ("cardiac",),
    "hippocampus": ("hippocampi", "hippocampal"),
    "breast": ("breasts", "mammary"),
    "lateral ventricle": ("lateral ventricles",),
    "spleen": ("splenic",),
    "anterior": ("front", "head"),
    "posterior": ("back", "tail"),
}  # fmt: skip
_SYNONYMS = {synonym: word for word, synonyms in _WORDS.items() for synonym in synonyms}
_SIDES = {"left": LEFT, "right": RIGHT}
_PARTS = {"anterior": ANTERIOR, "posterior": POSTERIOR}


def find_term(prompt: str) -> Term | None:
    """The term a prompt means, or None. Case, spelling and common synonyms don't matter."""
    words = _plain_words(prompt)
    text = f" {' '.join(words)} "
    if " no " in text or " without " in text:
        return None
    organ = next((name for name in sorted(_ORGANS, key=len, reverse=True) if f" {name} " in text), None)
    change = next((name for name in _ALTERATIONS if f" {name} " in text), None)
    side = next((code for word, code in _SIDES.items() if word in words), None)
    part = next((code for word, code in _PARTS.items() if word in words), None)
    if change is not None:
        code, color = _ALTERATIONS[change]
        return Term(ALTERED, code, color, region=_ORGANS[organ][0] if organ else None)
    if organ is not None:
        code, color = _ORGANS[organ]
        return Term(ANATOMICAL, code, color, modifier=part if organ == "hippocampus" and part else side)
    return None


def loaded_entry(prompt: str) -> tuple[str, tuple[float, float, float] | None] | None:
    """The entry of Slicer's own General Anatomy list that is called as the prompt, with its colour; None without one.

    Slicer's list has hundreds of structures; those a prompt names exactly need no table of ours.
    """
    modules = getattr(slicer, "modules", None)
    module = getattr(modules, "terminologies", None)
    logic = module.logic() if module is not None else None
    if not prompt.strip() or not hasattr(logic, "FindTypeInTerminologyBy3dSlicerLabel"):
        return None
    entry = slicer.vtkSlicerTerminologyEntry()
    if not logic.FindTypeInTerminologyBy3dSlicerLabel(GENERAL_ANATOMY, prompt.strip().lower(), entry):
        return None
    found = entry.GetTypeObject()
    modifier = entry.GetTypeModifierObject()
    shown = modifier if modifier is not None and modifier.GetCodeValue() else found
    color = tuple(value / 255 for value in shown.GetRecommendedDisplayRGBValue()) if shown is not None else None
    return logic.SerializeTerminologyEntry(entry), color


def entry_and_color(prompt: str) -> tuple[str | None, tuple[float, float, float] | None]:
    """Terminology entry and colour (RGB in [0, 1]) of a prompt; None for what is not known."""
    term = find_term(prompt)
    if term is not None:
        return term.entry, term.rgb
    return loaded_entry(prompt) or (None, None)


def _plain_words(prompt: str) -> list[str]:
    words: list[str] = []
    for word in re.findall(r"[a-z]+", prompt.lower()):
        words += _SYNONYMS.get(word, word).split()
    return words
