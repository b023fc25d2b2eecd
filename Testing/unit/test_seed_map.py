"""The map of the seeds: every name of ours that it gives exists, and no name of the seeds is forgotten."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from FreqSegLib.cli import main

MAP = Path(__file__).resolve().parents[2] / "docs" / "seed_map.md"
TEXT = MAP.read_text(encoding="utf-8")
OURS = sorted(set(re.findall(r"`(FreqSegLib(?:\.\w+)+)`", TEXT)))
COMMANDS = sorted(set(re.findall(r"`freqseg ((?:train )?[a-z][a-z-]+)", TEXT)))
# what every class has, and functions inside functions
UNNAMED = {"forward", "__init__", "__getitem__", "__call__", "_gaussian", "_create_window", "_ssim"}


@cache
def found(name: str) -> Any:
    """A module, or what it holds.

    Raises:
        AttributeError: there is none.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


@pytest.mark.parametrize("name", OURS)
def test_every_name_of_ours_exists(name: str) -> None:
    assert found(name) is not None


def test_a_name_that_is_not_there_would_be_noticed() -> None:
    assert len(OURS) > 100
    with pytest.raises(AttributeError):
        found("FreqSegLib.wavelet.dwt3")
    with pytest.raises(AttributeError):
        found("FreqSegLib.nothing")


def test_every_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        assert main([*command.split(), "--help"]) == 0, command
    capsys.readouterr()


@pytest.mark.data
def test_no_class_or_function_of_the_seeds_is_forgotten(project_root: Path) -> None:
    seeds = sorted((project_root.parent / "shared" / "seeds").glob("*.txt"))
    if not seeds:
        pytest.skip("the seeds are not beside the checkout")
    for seed in seeds:
        names = set(re.findall(r"^\s*(?:class|def) (\w+)", seed.read_text(encoding="utf-8"), re.MULTILINE))
        names |= set(re.findall(r"\bargs\.(\w+)", seed.read_text(encoding="utf-8")))
        missing = sorted(name for name in names - UNNAMED if not re.search(rf"\b{name}\b", TEXT))
        assert missing == [], seed.name
