"""The folder of a run that can be stopped: which recipe it belongs to, and texts that appear complete or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from FreqSegLib.errors import OutputError, SettingsError
from FreqSegLib.mamba.model_config import from_mapping

RECIPE_FILE = "recipe.json"


def claim(work: Path, recipe: Any) -> None:
    """Make ``work`` the folder of one recipe: checkpoints of one must not be continued with another.

    A recipe that an older version wrote down, without keys that came since, is the same one where those keys have
    their defaults.

    Args:
        work: made if it is missing.
        recipe: a frozen dataclass, without what does not matter to the result (where it goes).

    Raises:
        SettingsError: the folder holds a run of another recipe.
        OutputError: it cannot be written.
    """
    path = work / RECIPE_FILE
    if path.exists() and not _same(path, recipe):
        raise SettingsError(
            f"{work} holds a run of another recipe; give another work folder, or delete its recipe.json and run folder."
        )
    write_text(path, json.dumps(asdict(recipe), indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a text under a temporary name, then rename it; folders are made.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; choose another folder, or free some space"
        ) from error


def _same(path: Path, recipe: Any) -> bool:
    kind, where = type(recipe), str(path)
    try:
        found = from_mapping(kind, json.loads(path.read_text(encoding="utf-8")), where)
    except (SettingsError, ValueError, OSError):
        return False
    # as it would be read back: 0 and 0.0, a list and a tuple are the same there
    return bool(found == from_mapping(kind, json.loads(json.dumps(asdict(recipe))), where))
