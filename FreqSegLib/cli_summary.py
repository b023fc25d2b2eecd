"""What a run found, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from FreqSegLib import __version__
from FreqSegLib.cli_progress import readable_time

if TYPE_CHECKING:
    from rich.text import Text

    from FreqSegLib.cli_segment import Targets
    from FreqSegLib.slices import SliceStack
    from FreqSegLib.text_segmentation import PromptResult, Segmentation, TextSegmenter


@dataclass(frozen=True)
class Found:
    """One prompt's outcome in numbers.

    Attributes:
        voxels: of the mask.
        millilitres: its volume; None for a single slice.
        square_centimetres: its area in a single slice that has a spacing, else None.
        slices: how many slices hold some of it.
    """

    result: PromptResult
    voxels: int
    millilitres: float | None
    square_centimetres: float | None
    slices: int

    @classmethod
    def of(cls, result: PromptResult, stack: SliceStack) -> Found:
        import numpy as np

        voxels = int(result.mask.sum())
        placed = stack.volume.spatial_dimension == 3
        voxel = abs(float(np.linalg.det(stack.volume.affine[:3, :3])))
        pixel = stack.pixel_spacing[0] * stack.pixel_spacing[1]
        return cls(
            result=result,
            voxels=voxels,
            millilitres=voxels * voxel / 1000 if placed and stack.count > 1 else None,
            square_centimetres=voxels * pixel / 100 if placed and stack.count == 1 else None,
            slices=int(stack.displayed(result.mask).any((1, 2)).sum()),
        )

    @property
    def size(self) -> str:
        """``33.4 ml in 12 slices``, ``12.3 cm²`` or ``4,312 pixels``."""
        if self.millilitres is not None:
            return f"{readable_number(self.millilitres)} ml in {_slices(self.slices)}"
        if self.square_centimetres is not None:
            return f"{readable_number(self.square_centimetres)} cm²"
        return f"{self.voxels:,} pixels"

    @property
    def sentence(self) -> str:
        """``33.4 ml in 12 slices, score 0.97`` or ``not found (score 0.12)``."""
        score = f"score {self.result.score:.2f}"
        if self.voxels:
            return f"{self.size}, {score}"
        # Slices that the gate judged empty have no saliency at all.
        return f"not found: no place stands out ({score})" if self.result.saliency.any() else f"not found ({score})"

    def as_dict(self) -> dict[str, Any]:
        result = self.result
        return {
            "name": result.name,
            "meaning": result.meaning,
            "method": result.method,
            "found": self.voxels > 0,
            "score": round(result.score, 6),
            "voxels": self.voxels,
            "millilitres": self.millilitres,
            "square_centimetres": self.square_centimetres,
            "slices": self.slices,
            "slice_scores": [round(float(score), 6) for score in result.slice_scores],
            "color": list(result.color),
        }


@dataclass(frozen=True)
class Summary:
    """One run of ``freqseg segment``."""

    source: Path
    targets: Targets
    found: tuple[Found, ...]
    warnings: tuple[str, ...]
    written: dict[str, list[str]]
    facts: dict[str, Any]
    seconds: float

    @classmethod
    def of(
        cls,
        segmenter: TextSegmenter,
        segmentation: Segmentation,
        targets: Targets,
        *,
        source: Path,
        notes: list[str],
        seconds: float,
    ) -> Summary:
        """Gather it from a finished run; ``notes`` are warnings of the writing."""
        prepared = segmenter.prepared
        assert prepared is not None
        volume, stack = prepared.volume, prepared.stack
        outputs = {
            "segmentation": targets.segmentation,
            "saliency": targets.saliency,
            "uncertainty": targets.uncertainty,
            "sheets": () if targets.sheet is None else (targets.sheet,),
        }
        facts = {
            "preset": segmenter.preset.name,
            "device": str(segmenter.device),
            "shape": list(volume.shape),
            "spacing_mm": [float(f"{value:.6g}") for value in volume.spacing]
            if volume.spatial_dimension == 3
            else None,
            "plane": stack.axis,
            "slices": stack.count,
            "intensity": prepared.intensity.label,
            "settings": asdict(segmenter.preset.complete(segmentation.settings)),
        }
        return cls(
            source=source,
            targets=targets,
            found=tuple(Found.of(result, stack) for result in segmentation),
            warnings=tuple(dict.fromkeys((*segmentation.warnings, *notes))),
            written={kind: [str(path) for path in paths if path.exists()] for kind, paths in outputs.items()},
            facts=facts,
            seconds=seconds,
        )

    def lines(self) -> Iterator[Text]:
        """The summary as a person reads it: a line a prompt, what the labels mean, where the files are."""
        from rich.text import Text

        for found in self.found:
            red, green, blue = (round(255 * channel) for channel in found.result.color)
            yield Text.assemble(
                ("■ ", f"rgb({red},{green},{blue})") if found.voxels else ("· ", "dim"),
                (found.result.name, "bold"),
                f": {found.sentence}",
                (f", {found.result.method}", "dim"),
            )
        labels = self._labels()
        if labels:
            yield Text(labels, style="dim")
        for kind, paths in self.written.items():
            for path in paths:
                note = f" ({kind})" if kind != "segmentation" else ""
                yield Text.assemble("Wrote ", (path, "cyan"), note)
        yield Text(f"{_slices(self.facts['slices'])} in {readable_time(self.seconds)}", style="dim")

    def as_dict(self) -> dict[str, Any]:
        """The summary as a program reads it."""
        segments = [
            {**one.as_dict(), "label": None if self._keeps_names else self._label(position)}
            for position, one in enumerate(self.found)
        ]
        return {
            "freqseg": __version__,
            "volume": str(self.source),
            **self.facts,
            "seconds": round(self.seconds, 3),
            "segments": segments,
            "outputs": self.written,
            "warnings": list(self.warnings),
        }

    @property
    def _keeps_names(self) -> bool:
        from FreqSegLib.image_file import suffix_of

        return suffix_of(self.targets.output) == ".seg.nrrd"

    @property
    def _is_picture(self) -> bool:
        from FreqSegLib.image_file import PICTURES, suffix_of

        return suffix_of(self.targets.output) in PICTURES

    def _label(self, position: int) -> int:
        if self.targets.one_file_per_segment:
            return 255 if self._is_picture else 1
        return position + 1

    def _labels(self) -> str:
        """Which value in a label map is which prompt; empty where the file says so itself."""
        if self._keeps_names or self.targets.one_file_per_segment:
            return ""
        named = ", ".join(f"{self._label(position)} = {one.result.name}" for position, one in enumerate(self.found))
        dark = " Such a picture looks black; --one-file-per-segment writes white on black." if self._is_picture else ""
        overlap = " Where segments overlap, the first is kept." if len(self.found) > 1 else ""
        return f"Label values: {named}.{overlap}{dark}"


def readable_number(value: float) -> str:
    """Three significant digits: ``33.4``, ``0.052``, ``1,230``."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}"


def _slices(count: int) -> str:
    return "1 slice" if count == 1 else f"{count} slices"
