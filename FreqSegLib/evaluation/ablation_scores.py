"""What several ways to segment score on the same cases: kept case by case, compared case by case."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isnan
from pathlib import Path
from typing import Literal, get_args

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.errors import InputError
from FreqSegLib.evaluation.evaluate import CaseRow
from FreqSegLib.evaluation.paired import PairedTest, paired_test
from FreqSegLib.evaluation.segmentation_metrics import Summary, summarise

Metric = Literal["dsc", "nsd", "hd95"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class CaseScore:
    """One way, one case, one prompt; the names are those of ``freqseg evaluate``'s table of cases.

    Attributes:
        method: the way.
        group: the case, like ``lgg/TCGA_CS_4941``.
        modality: of the case.
        prompt: the target asked for.
        belongs: whether it is one of this modality.
        unit: of ``hd95`` and of NSD's tolerance, ``mm`` or ``px``.
        dsc, nsd, hd95: against the truth; None where the target is absent.
        absent_slices, absent_empty: slices without the target, and those of them that came out empty.
        empty: the whole mask is empty.
    """

    method: str
    group: str
    modality: str
    prompt: str
    belongs: bool
    unit: str
    dsc: float | None
    nsd: float | None
    hd95: float | None
    absent_slices: int
    absent_empty: int
    empty: bool

    @classmethod
    def of(cls, method: str, row: CaseRow) -> CaseScore:
        """From a row of ``evaluate_cases``."""
        found = row.overlap
        return cls(
            method=method,
            group=row.group,
            modality=row.modality,
            prompt=row.prompt,
            belongs=row.belongs,
            unit=row.unit,
            dsc=None if found is None else found.dsc,
            nsd=None if found is None else found.nsd,
            hd95=None if found is None else found.hd95,
            absent_slices=row.absent_slices,
            absent_empty=row.absent_empty,
            empty=row.empty,
        )


@dataclass(frozen=True)
class Standing:
    """One way on one target.

    Attributes:
        method, target, unit: see :class:`CaseScore`.
        dsc, nsd, hd95: over cases that hold the target.
        absent_slices, absent_empty: slices without the target, and those that came out empty.
        wrong, wrong_empty: prompts for targets of other modalities, and those that came out empty.
    """

    method: str
    target: str
    unit: str
    dsc: Summary
    nsd: Summary
    hd95: Summary
    absent_slices: int
    absent_empty: int
    wrong: int
    wrong_empty: int


def standings(scores: Sequence[CaseScore], *, seed: int = 0) -> list[Standing]:
    """A row a target and way: targets as in the vocabulary, ways in the order they come in.

    Args:
        scores: of any number of ways.
        seed: of the bootstrap.
    """
    found = []
    for meaning in targets():
        for method in dict.fromkeys(score.method for score in scores):
            own = [s for s in scores if s.method == method and s.belongs and s.prompt == meaning.name]
            if not own:
                continue
            wrong = [s for s in scores if s.method == method and not s.belongs and s.modality == meaning.modality]
            dsc, nsd, hd95 = (summarise(list(by_case(own, metric).values()), seed=seed) for metric in METRICS)
            found.append(
                Standing(
                    method=method,
                    target=meaning.name,
                    unit=own[0].unit,
                    dsc=dsc,
                    nsd=nsd,
                    hd95=hd95,
                    absent_slices=sum(s.absent_slices for s in own),
                    absent_empty=sum(s.absent_empty for s in own),
                    wrong=len(wrong),
                    wrong_empty=sum(s.empty for s in wrong),
                )
            )
    return found


def compared(
    scores: Sequence[CaseScore], target: str, method: str, against: str, metric: Metric = "dsc"
) -> PairedTest | None:
    """``method`` minus ``against`` on the cases that both were measured on; None where there are none.

    Args:
        scores: of any number of ways.
        target: which prompt.
        method, against: two ways.
        metric: which number.
    """
    first, second = (
        by_case([s for s in scores if s.method == name and s.belongs and s.prompt == target], metric)
        for name in (method, against)
    )
    both = [group for group in first if group in second]
    if not both:
        return None
    return paired_test([first[group] for group in both], [second[group] for group in both])


def by_case(scores: Sequence[CaseScore], metric: Metric) -> dict[str, float]:
    """A number a case, of cases that hold the target."""
    return {score.group: value for score in scores if (value := getattr(score, metric)) is not None}


def write_scores(path: Path, scores: Sequence[CaseScore]) -> None:
    """As CSV, a line a score, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[item.name for item in fields(CaseScore)], lineterminator="\n")
        writer.writeheader()
        for score in scores:
            line = {item.name: getattr(score, item.name) for item in fields(CaseScore)}
            writer.writerow({name: "" if value is None else value for name, value in line.items()})
    os.replace(temporary, path)


def read_scores(path: Path, method: str | None = None) -> list[CaseScore]:
    """What :func:`write_scores` wrote, or the canonical wordings' rows in the table of cases of ``freqseg evaluate``.

    Args:
        path: the CSV.
        method: the way, in place of what the table calls it.

    Raises:
        InputError: it cannot be read, a column is missing, or a value is not what its column holds.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the table of cases {path}: {error}") from error
    given = {} if method is None else {"method": method}
    return [
        _score({**line, **given}, path, number)
        for number, line in enumerate(lines, start=2)
        if line.get("wordings", "canonical") == "canonical"
    ]


def _score(line: dict[str, str], path: Path, number: int) -> CaseScore:
    missing = [item.name for item in fields(CaseScore) if line.get(item.name) is None]
    if missing:
        raise InputError(
            f"{path}, line {number}: there is no column {', '.join(missing)}; give the table of cases that 'freqseg "
            "evaluate --csv NAME.csv' writes as NAME_cases.csv"
        )
    try:
        dsc, nsd, hd95 = (_measured(line[name]) for name in METRICS)
        return CaseScore(
            method=line["method"],
            group=line["group"],
            modality=line["modality"],
            prompt=line["prompt"],
            belongs=_TRUTH[line["belongs"]],
            unit=line["unit"],
            dsc=dsc,
            nsd=nsd,
            hd95=hd95,
            absent_slices=int(line["absent_slices"]),
            absent_empty=int(line["absent_empty"]),
            empty=_TRUTH[line["empty"]],
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}, line {number}: a value does not fit its column ({error})") from error


_TRUTH = {"True": True, "False": False}


def _measured(text: str) -> float | None:
    value = float(text) if text else float("nan")
    return None if isnan(value) else value
