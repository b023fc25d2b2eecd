"""In which words a target is asked for: its name, the wordings that were trained on, or those kept from training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.errors import SettingsError
from FreqSegLib.evaluation.paired import PairedTest, paired_test

if TYPE_CHECKING:
    from FreqSegLib.evaluation.evaluate import CaseRow

WordingKind = Literal["canonical", "trained", "held-out"]
KINDS: tuple[WordingKind, ...] = get_args(WordingKind)


@dataclass(frozen=True)
class WordingDifference:
    """A target asked for in other words, against the words of ``base``, on the same cases.

    Attributes:
        target, base, other: what, and the kinds of wordings.
        test: of the cases' DSC, other minus base.
        refused: cases of ``other`` whose words the preset did not understand.
        misread: cases of ``other`` whose words were taken for another target.
    """

    target: str
    base: str
    other: str
    test: PairedTest
    refused: int
    misread: int


def wordings_of(meaning: Meaning, kind: WordingKind) -> tuple[str, ...]:
    """The wordings of one kind; ``canonical`` is the target's name alone.

    Raises:
        SettingsError: there is no such kind.
    """
    if kind not in KINDS:
        raise SettingsError(f"wordings must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "canonical":
        return (meaning.name,)
    return meaning.wordings if kind == "trained" else meaning.held_out or (meaning.name,)


def wording(meaning: Meaning, kind: WordingKind, number: int) -> str:
    """The words for case ``number``: the wordings take turns over the cases."""
    known = wordings_of(meaning, kind)
    return known[number % len(known)]


def wording_differences(rows: Sequence[CaseRow], kinds: Sequence[str], *, seed: int = 0) -> list[WordingDifference]:
    """Every other kind of wordings against the first, a target each, over the cases that hold the target."""
    found = []
    for other in kinds[1:]:
        for meaning in targets():
            own = [row for row in rows if row.belongs and row.prompt == meaning.name]
            by_kind = {kind: {r.group: r for r in own if r.wordings == kind} for kind in (kinds[0], other)}
            shared = [group for group, row in by_kind[kinds[0]].items() if row.overlap and group in by_kind[other]]
            if not shared:
                continue
            dsc = {kind: [r.overlap.dsc for g in shared if (r := by[g]).overlap] for kind, by in by_kind.items()}
            asked = by_kind[other].values()
            found.append(
                WordingDifference(
                    meaning.name,
                    kinds[0],
                    other,
                    paired_test(dsc[other], dsc[kinds[0]], seed=seed),
                    sum(row.refused for row in asked),
                    sum(row.misread for row in asked),
                )
            )
    return found
