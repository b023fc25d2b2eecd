"""What the user typed: checked, and matched to a meaning the preset knows."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from FreqSegLib.clip.vocabulary import MEANINGS, MODALITIES, Meaning, targets
from FreqSegLib.errors import SettingsError, VocabularyError

if TYPE_CHECKING:
    from FreqSegLib.clip.mini_lm import MiniLM

LONGEST_PROMPT = 300
MATCH_THRESHOLD = 0.72

# Neighbours in meaning that the preset does not know. A prompt nearer to one of these than to a known wording is
# refused.
STRANGERS: tuple[str, ...] = (
    "liver",
    "liver tumour",
    "kidney",
    "kidney tumour",
    "spleen",
    "pancreas",
    "heart",
    "prostate",
    "prostate cancer",
    "bladder",
    "stomach",
    "bone",
    "spine vertebra",
    "rib",
    "skull",
    "brain",
    "white matter of the brain",
    "brain ventricles",
    "brain stem",
    "cerebellum",
    "cerebral cortex",
    "brain haemorrhage",
    "brain tumour edema",
    "stroke lesion",
    "multiple sclerosis lesion",
    "brain aneurysm",
    "pituitary tumour",
    "meningioma",
    "brain metastasis",
    "amygdala",
    "thalamus",
    "caudate nucleus",
    "temporal lobe",
    "hippocampal sclerosis",
    "lung nodule",
    "lung cancer",
    "lung tumour",
    "lung mass",
    "lung lesion",
    "lung apex",
    "lung base",
    "heart and lungs",
    "pneumonia",
    "pneumothorax",
    "pleural effusion",
    "lung vessels",
    "trachea",
    "lung lobe",
    "upper lobe of the lung",
    "heart on a chest x-ray",
    "breast",
    "breast implant",
    "nipple",
    "breast fat tissue",
    "lymph node",
    "skin lesion",
    "tumour",
    "lesion",
    "cancer",
    "cat",
    "tooth",
    "eye",
    "blood vessel",
    "colon polyp",
    "thyroid nodule",
    "ovarian mass",
)

_SIDES = (("left", "right"), ("anterior", "posterior"), ("upper", "lower"))
_NEGATIONS = frozenset(
    re.findall(r"\w+", "no not nor none neither without free lack lacks lacking absent absence outside negative")
)
# These deny a lesion, but only describe an organ: "normal brain" has no tumour, "normal lungs" are lungs
_SOUND = frozenset(("normal", "healthy"))
_ORGANS = frozenset(("lung", "lungs", "pulmonary", "hippocampus", "hippocampi", "hippocampal"))
# Words that say how a picture was made or shown, not what is in it
_FRAMING = frozenset(
    re.findall(
        r"\w+",
        "a an the on in of with at s this please find segment showing shows show seen image images picture scan slice "
        "slices axial coronal sagittal frontal patient area region structure mr mri mrs ct flair t1 t2 weighted x ray "
        "xray radiograph radiography film chest ultrasound sonography sonogram us computed tomography",
    )
)


@dataclass(frozen=True)
class MatchedPrompt:
    """A checked prompt, the meaning it was matched to (None: outside the vocabulary) and how near it is, in [-1, 1]."""

    text: str
    meaning: Meaning | None
    similarity: float


def clean_prompt(text: str) -> str:
    """Whitespace tidied, invisible marks left out.

    Raises:
        SettingsError: nothing to read, control characters, longer than 300 characters, or no letters of English.
    """
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in text):
        shown = text.encode("unicode_escape").decode("ascii")
        raise SettingsError(
            f"The prompt holds control characters: '{shown[:80]}'. Type plain words, like \"brain tumour\"."
        )
    # soft hyphens and zero-width marks come along when text is pasted
    tidy = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    if not tidy:
        raise SettingsError('The prompt is empty. Type what to look for, like "brain tumour".')
    if len(tidy) > LONGEST_PROMPT:
        raise SettingsError(
            f"The prompt has {len(tidy)} characters; at most {LONGEST_PROMPT} are read. Name the target alone, like "
            '"brain tumour".'
        )
    letters = [c for c in tidy if c.isalpha()]
    if not letters:
        raise SettingsError(f"The prompt '{tidy}' holds no words. Type what to look for, like \"brain tumour\".")
    if sum("LATIN" not in unicodedata.name(c, "") for c in letters) > len(letters) / 4:
        raise SettingsError(f"The prompt '{tidy}' is not in English, the only language the text encoder knows.")
    return tidy


class PromptMatcher:
    """Matches prompts to the lite preset's meanings by MiniLM's similarity, before any training."""

    def __init__(self, text: MiniLM) -> None:
        self._text = text
        known = [(m, w) for m in MEANINGS for w in m.wordings]
        general = [w for modality in MODALITIES.values() for w in modality.wordings]
        self._owners: list[Meaning | None] = [m for m, _ in known] + [None] * (len(general) + len(STRANGERS))
        self._wordings = [w for _, w in known] + general + list(STRANGERS)
        self._vectors = text.encode([_core(w) for w in self._wordings])

    def match(self, prompt: str) -> MatchedPrompt:
        """The meaning whose wording is nearest, or none. See :func:`require` for the refusing form."""
        vector = self._text.encode([_core(prompt)])[0]
        scores = self._vectors @ vector
        for row, wording in enumerate(self._wordings):
            # what the preset does not know stays unknown, whatever its side
            if _contradicts(prompt, wording, sides=self._owners[row] is not None):
                scores[row] = -1
        best = int(scores.argmax())
        similarity = float(scores[best])
        owner = self._owners[best]
        return MatchedPrompt(prompt, owner if similarity >= MATCH_THRESHOLD else None, similarity)

    def require(self, prompt: str) -> MatchedPrompt:
        """Like :meth:`match`.

        Raises:
            VocabularyError: the prompt names nothing the preset knows, or the absence of something.
        """
        found = self.match(prompt)
        listed = ", ".join(f"{m.name} ({MODALITIES[m.modality].name})" for m in targets())
        if found.meaning is None:
            raise VocabularyError(
                f"The lite preset does not know '{prompt}'. It knows: {listed}. Use one of these, the preset "
                "biomedclip-sam, or --experimental to try all the same."
            )
        if not found.meaning.is_target:
            raise VocabularyError(f"'{prompt}' says that something is absent; name a target. Known: {listed}.")
        return found


def _core(text: str) -> str:
    """Lower case, without the words that frame a picture; the whole text if nothing else is there."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    silent = _FRAMING if _denies(set(words)) else _FRAMING | _SOUND
    return " ".join(word for word in words if word not in silent) or text.lower()


def _denies(words: set[str]) -> bool:
    """Do they say that something is not there?"""
    return bool(words & _NEGATIONS) or (bool(words & _SOUND) and not words & _ORGANS)


def _contradicts(prompt: str, wording: str, *, sides: bool) -> bool:
    """Does one deny what the other states? With ``sides``: or name another side, or a side where the other has none?"""
    words, other = _words(prompt), _words(wording)
    if _denies(words) != _denies(other):
        return True
    for pair in _SIDES if sides else ():
        mine, theirs = words & set(pair), other & set(pair)
        # "left and right lung" names both sides, which is as good as none
        if mine != theirs and 1 in (len(mine), len(theirs)):
            return True
    return False


def _words(text: str) -> set[str]:
    """Lower-grade tumours are not the lower ones."""
    return set(re.findall(r"[a-z]+", re.sub(r"lower[- ]grade", "low grade", text.lower())))
