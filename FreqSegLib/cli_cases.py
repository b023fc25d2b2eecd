"""Options of every command that measures on the labelled cases, declared once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class SplitName(str, Enum):
    """Choices of ``--split``."""

    test = "test"
    train_validation = "train-validation"


MaxCases = Annotated[
    int | None, typer.Option(help="At most so many cases a modality, evenly spaced, always the same.", min=1)
]
MaxSlices = Annotated[
    int, typer.Option(help="Thin volumes out evenly to at most so many slices (0: whole volumes).", min=0)
]
Split = Annotated[SplitName, typer.Option(help="The test folders, or the validation patients of the training folders.")]
WrongPrompts = Annotated[
    int, typer.Option("--wrong-prompts", help="Targets of other modalities each case is asked for.", min=0, max=3)
]
TrainingData = Annotated[
    Path | None,
    typer.Option(
        help="Folder that holds segmentation/ and fusion/.",
        metavar="FOLDER",
        show_default="FREQSEG_DATA, else ../shared/data",
    ),
]
