"""What an evaluation found, in every form it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from FreqSegLib.evaluation import report_csv
from FreqSegLib.evaluation.evaluate import CaseRow
from FreqSegLib.evaluation.report import (
    Block,
    calibration_block,
    calibrations,
    markdown,
    summaries,
    target_block,
    terminal_tables,
    wording_block,
)
from FreqSegLib.evaluation.wordings import WordingKind, wording_differences

if TYPE_CHECKING:
    from rich.table import Table

    from FreqSegLib.settings import TextSegmentationSettings
    from FreqSegLib.text_segmentation import TextSegmenter


class EvaluationResult:
    """The rows of ``evaluate_cases`` and the tables made of them."""

    def __init__(
        self,
        title: str,
        rows: Sequence[CaseRow],
        available: Mapping[str, int],
        kinds: Sequence[WordingKind],
        notes: Sequence[str],
    ) -> None:
        """Make the tables.

        Args:
            title: of the main table.
            rows: of ``evaluate_cases``.
            available: cases of the split by modality.
            kinds: of wordings that were asked.
            notes: what the numbers of the main table mean, a sentence each.
        """
        self.rows, self.kinds, self.notes = rows, kinds, notes
        self.targets = summaries(rows, available)
        self.calibrations = calibrations(rows)
        self.differences = wording_differences(rows, kinds)
        self.main = target_block(self.targets, title)
        self.others: list[Block] = []
        if self.differences:
            self.others.append(wording_block(self.differences))
        if self.calibrations:
            self.others.append(calibration_block(self.calibrations))

    def terminal(self, width: int) -> list[Table]:
        """Tables for rich's console."""
        return [table for block in (self.main, *self.others) for table in terminal_tables(block, width)]

    def csv(self, name: str) -> str:
        """A table with numbers in full: "" for the main one, cases, calibration, reliability or wordings."""
        made: dict[str, Callable[[], str]] = {
            "": lambda: report_csv.summary_csv(self.targets),
            "cases": lambda: report_csv.case_csv(self.rows),
            "calibration": lambda: report_csv.calibration_csv(self.calibrations),
            "reliability": lambda: report_csv.reliability_csv(self.calibrations),
            "wordings": lambda: report_csv.wording_csv(self.differences),
        }
        return made[name]()

    def markdown(self) -> str:
        """All tables with their notes."""
        return markdown(self.main, self.notes, self.others)

    def html(
        self,
        segmenter: TextSegmenter,
        settings: TextSegmentationSettings,
        cases: Sequence[str],
        changed: str,
        *,
        uncertainty: bool,
    ) -> str:
        """A page of its own with pictures.

        Args:
            segmenter: that ran.
            settings: it ran with.
            cases: of which split, and how many of each kind.
            changed: the settings that differ from their defaults.
            uncertainty: whether it was computed.
        """
        from FreqSegLib.evaluation.run_facts import not_measured, run_facts, settings_block
        from FreqSegLib.evaluation.segmentation_report import report_page

        views = f"spread over {settings.replicas} views of each slice, in an answer of its own"
        facts = run_facts(
            segmenter,
            self.targets,
            cases=cases,
            kinds=self.kinds,
            changed=changed,
            uncertainty=views if uncertainty else "not computed",
        )
        missing = not_measured(self.targets, self.calibrations, self.kinds, uncertainty=uncertainty)
        return report_page(
            self.main,
            facts,
            self.notes,
            self.rows,
            self.targets,
            self.calibrations,
            self.others,
            settings_block(segmenter, settings, self.targets),
            missing,
        )
