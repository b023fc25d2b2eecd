"""The simulated head that comes with FreqSeg (``Resources/Samples``), wherever FreqSeg is installed."""

from __future__ import annotations

import sys
from pathlib import Path

from FreqSegLib.errors import InputError

FLAIR, CT, LESION = "simulated_flair.nrrd", "simulated_ct.nrrd", "simulated_lesion.nrrd"


def sample_folders() -> list[Path]:
    """Where they may lie: checkout and installed extension, then inside a wheel."""
    package = Path(__file__).resolve().parent
    return [
        package.parent / "Resources" / "Samples",
        package / "Resources" / "Samples",
        package / "_samples",
        Path(sys.prefix) / "share" / "freqseg" / "samples",
    ]


def sample(name: str) -> Path:
    """The path of one sample, such as :data:`FLAIR`.

    Raises:
        InputError: it is not installed.
    """
    for folder in sample_folders():
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in sample_folders())
    raise InputError(f"The sample '{name}' is not installed. Run this in a checkout of FreqSeg. Looked in: {looked}.")
