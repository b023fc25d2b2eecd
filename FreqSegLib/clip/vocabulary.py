"""What the lite preset knows: its meanings, how people word them, and which modality each was learned on.

A *meaning* is what a caption says about a picture; many wordings share one meaning. Target meanings can be asked for;
the others (a modality, the absence of a target) serve as captions in training and as null prompts afterwards. The
``held_out`` wordings are never trained on: tests and the model card use them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Modality:
    """A kind of picture the preset was trained on.

    Attributes:
        name: shown to the user, e.g. "brain FLAIR MR".
        wordings: captions that say no more than the modality.
    """

    name: str
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class Meaning:
    """One thing a caption can say.

    Attributes:
        name: the canonical prompt, shown to the user.
        modality: key into :data:`MODALITIES`.
        channels: target channels of the training masks whose union is this target; empty for a statement of absence.
        wordings: training captions, the canonical one first.
        held_out: wordings kept for tests.
        color: RGB in [0, 1] of the segment.
        contrasts: meanings to tell it from when asking where it is (its absence; the other side).
    """

    name: str
    modality: str
    channels: tuple[int, ...]
    wordings: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    color: tuple[float, float, float] = (0.9, 0.75, 0.3)
    contrasts: tuple[str, ...] = ()

    @property
    def is_target(self) -> bool:
        return bool(self.channels)


MODALITIES: dict[str, Modality] = {
    "flair": Modality(
        "brain FLAIR MR",
        (
            "a FLAIR MR image of the brain",
            "axial FLAIR brain MRI",
            "fluid attenuated inversion recovery MR of the head",
        ),
    ),
    "xray": Modality("chest X-ray", ("a chest X-ray", "frontal chest radiograph", "chest x-ray film of the thorax")),
    "ultrasound": Modality(
        "breast ultrasound", ("a breast ultrasound image", "ultrasound of the breast", "breast sonography")
    ),
    "t1": Modality(
        "T1 MR of the hippocampus region",
        ("a T1 MR image of the medial temporal lobe", "T1-weighted MRI around the hippocampus", "cropped T1 brain MR"),
    ),
    "ct": Modality("head CT", ("a CT of the head", "non-contrast head computed tomography", "axial brain CT slice")),
    "mr": Modality(
        "other brain MR",
        ("a T1 or T2 weighted MR image of the brain", "axial T2 brain MRI", "conventional brain MR slice"),
    ),
}

MEANINGS: tuple[Meaning, ...] = (
    Meaning(
        "brain tumour",
        "flair",
        (0,),
        (
            "brain tumour",
            "brain tumor",
            "glioma",
            "lower-grade glioma",
            "a tumour in the brain",
            "brain glioma on FLAIR MRI",
            "hyperintense brain tumour on a FLAIR MR image",
            "FLAIR MRI showing a brain tumor",
            "intracranial tumor mass",
            "brain neoplasm",
            "brain mass",
        ),
        (
            "glial tumour of the brain",
            "mass lesion in the brain",
            "low grade glioma tumor",
            "an axial MR slice with a cerebral tumor",
        ),
        (0.56, 0.93, 0.56),
        ("no brain tumour",),
    ),
    Meaning(
        "no brain tumour",
        "flair",
        (),
        (
            "a normal brain without a tumour",
            "FLAIR MRI of the brain, no tumor",
            "normal brain FLAIR MR image",
            "no glioma in this brain slice",
            "healthy brain tissue, no mass",
            "no hyperintense lesion in the brain",
        ),
        ("brain MR slice free of tumor",),
    ),
    Meaning(
        "lungs",
        "xray",
        (0, 1),
        (
            "lungs",
            "both lungs",
            "lung",
            "lung fields",
            "the lungs on a chest X-ray",
            "left and right lung",
            "chest radiograph showing the lungs",
            "pulmonary parenchyma",
            "lung area",
        ),
        ("both lung fields on the radiograph", "the two lungs", "pulmonary fields"),
        (0.77, 0.65, 0.94),
        ("no lung",),
    ),
    Meaning(
        "left lung",
        "xray",
        (0,),
        (
            "left lung",
            "the left lung",
            "left lung field",
            "left lung on a chest X-ray",
            "lung on the left side of the patient",
            "left pulmonary field",
        ),
        ("the lung on the patient's left", "chest radiograph, left lung field"),
        (0.35, 0.65, 0.90),
        ("no lung", "right lung"),
    ),
    Meaning(
        "right lung",
        "xray",
        (1,),
        (
            "right lung",
            "the right lung",
            "right lung field",
            "right lung on a chest X-ray",
            "lung on the right side of the patient",
            "right pulmonary field",
        ),
        ("the lung on the patient's right", "chest radiograph, right lung field"),
        (0.95, 0.55, 0.35),
        ("no lung", "left lung"),
    ),
    Meaning(
        "no lung",
        "xray",
        (),
        (
            "part of a chest X-ray without lung",
            "no lung in this part of the radiograph",
            "mediastinum, abdomen or background of a chest X-ray, no lung",
        ),
        ("radiograph region outside the lungs",),
    ),
    Meaning(
        "breast lesion",
        "ultrasound",
        (0,),
        (
            "breast lesion",
            "breast tumour",
            "breast tumor",
            "breast mass",
            "a lesion in the breast",
            "breast nodule on ultrasound",
            "hypoechoic mass in the breast",
            "breast cancer",
            "ultrasound image of a breast lesion",
            "benign or malignant breast tumor",
        ),
        ("a breast nodule", "mass in the breast on sonography", "breast ultrasound showing a tumour"),
        (0.90, 0.35, 0.45),
        ("no breast lesion",),
    ),
    Meaning(
        "no breast lesion",
        "ultrasound",
        (),
        (
            "normal breast tissue without a lesion",
            "breast ultrasound, no mass",
            "no tumour in the breast",
            "healthy breast sonogram",
            "no breast nodule",
        ),
        ("breast ultrasound without any lesion",),
    ),
    Meaning(
        "hippocampus",
        "t1",
        (0, 1),
        (
            "hippocampus",
            "the hippocampus",
            "hippocampal formation",
            "whole hippocampus on T1 MRI",
            "hippocampus in the medial temporal lobe",
            "hippocampal gray matter",
        ),
        ("the hippocampal structure on MR", "hippocampi"),
        (0.95, 0.82, 0.35),
        ("no hippocampus",),
    ),
    Meaning(
        "anterior hippocampus",
        "t1",
        (0,),
        (
            "anterior hippocampus",
            "hippocampal head",
            "head of the hippocampus",
            "front part of the hippocampus",
            "anterior part of the hippocampus on T1 MRI",
        ),
        ("the anterior hippocampal segment",),
        (0.40, 0.80, 0.80),
        ("no hippocampus", "posterior hippocampus"),
    ),
    Meaning(
        "posterior hippocampus",
        "t1",
        (1,),
        (
            "posterior hippocampus",
            "hippocampal body and tail",
            "body and tail of the hippocampus",
            "back part of the hippocampus",
            "posterior part of the hippocampus on T1 MRI",
        ),
        ("the posterior hippocampal segment",),
        (0.85, 0.45, 0.75),
        ("no hippocampus", "anterior hippocampus"),
    ),
    Meaning(
        "no hippocampus",
        "t1",
        (),
        (
            "T1 brain MR without hippocampus",
            "no hippocampus in this slice",
            "brain tissue next to the hippocampus, hippocampus absent",
        ),
        ("slice free of hippocampus",),
    ),
)


def targets() -> tuple[Meaning, ...]:
    """The meanings a user can ask for."""
    return tuple(meaning for meaning in MEANINGS if meaning.is_target)


def meaning(name: str) -> Meaning:
    """The meaning of that canonical name; KeyError if there is none."""
    for candidate in MEANINGS:
        if candidate.name == name:
            return candidate
    raise KeyError(name)
