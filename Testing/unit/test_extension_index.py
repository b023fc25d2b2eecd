"""FreqSeg.json, the entry in Slicer's extensions index, and the rules the index checks an extension by."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

# Version 1.0.2 of the catalogue entry's schema: what may stand there, and as what.
SCHEMA = (
    "https://raw.githubusercontent.com/Slicer/Slicer/main/Schemas/slicer-extension-catalog-entry-schema-v1.0.2.json#"
)
TYPES: dict[str, type] = {
    "$schema": str,
    "category": str,
    "scm_url": str,
    "scm_revision": str,
    "scm_type": str,
    "build_dependencies": list,
    "dicom_support_rule": str,
    "build_subdirectory": str,
    "enabled": bool,
    "tier": int,
}
REQUIRED = ("$schema", "category", "scm_url")
LARGEST_CHECKOUT = 60_000_000
"""Bytes with history; the index allows 100 MB."""


@pytest.fixture(scope="module")
def entry(project_root: Path) -> dict[str, Any]:
    return json.loads((project_root / "FreqSeg.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cmake(project_root: Path) -> str:
    return (project_root / "CMakeLists.txt").read_text(encoding="utf-8")


def literal(cmake: str, name: str) -> str:
    """A variable as the index reads it: literal, in quotes, on one line."""
    found = re.findall(rf'set\s*\({name}\s*"([^"]+)"[ ]*\)', cmake)
    assert len(found) == 1, f"{name} must be set once, to a literal in quotes"
    return found[0]


def git(project_root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=project_root, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout with history")
    return done.stdout


def test_the_entry_follows_the_schema(entry: dict[str, Any]) -> None:
    assert entry["$schema"] == SCHEMA
    assert set(REQUIRED) <= set(entry) <= set(TYPES)
    for name, value in entry.items():
        assert type(value) is TYPES[name], name
    assert all(isinstance(name, str) for name in entry["build_dependencies"])
    assert 1 <= entry["tier"] <= 5


def test_the_entry_is_named_as_the_project(cmake: str, project_root: Path) -> None:
    names = re.findall(r"project\s*\(\s*([^\s)]+)", cmake, re.IGNORECASE)
    assert [f"{names[0]}.json"] == [path.name for path in project_root.glob("*.json")]


def test_category_and_dependencies_are_the_same_in_entry_and_cmake(entry: dict[str, Any], cmake: str) -> None:
    assert entry["category"] == literal(cmake, "EXTENSION_CATEGORY") == "Segmentation"
    assert entry["build_dependencies"] == literal(cmake, "EXTENSION_DEPENDS").split() == ["PyTorch"]


def test_the_repository_is_named_for_slicer_and_is_the_homepage(entry: dict[str, Any], cmake: str) -> None:
    url = urlsplit(entry["scm_url"])
    assert url.scheme in ("https", "git")
    assert "slicer" in url.path.split("/")[-1].lower()
    assert entry["scm_url"].removesuffix(".git") == literal(cmake, "EXTENSION_HOMEPAGE")


def test_icon_and_screenshots_are_pictures_of_this_tree(entry: dict[str, Any], cmake: str, project_root: Path) -> None:
    base = entry["scm_url"].replace("https://github.com/", "https://raw.githubusercontent.com/").removesuffix(".git")
    base = f"{base}/{entry['scm_revision']}/"
    screenshots = literal(cmake, "EXTENSION_SCREENSHOTURLS").split()
    assert screenshots
    for address in (literal(cmake, "EXTENSION_ICONURL"), *screenshots):
        assert address.startswith(base)
        path = project_root / address.removeprefix(base)
        assert path.is_file(), f"{path.name}: make it with scripts/make_icon.py or make screenshots"
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            picture.verify()


def test_the_icons_are_square_and_see_through(project_root: Path) -> None:
    for folder, size in (("Resources", 256), ("FreqSeg/Resources", 128)):
        with Image.open(project_root / folder / "Icons" / "FreqSeg.png") as icon:
            assert icon.size == (size, size)
            assert icon.convert("RGBA").getpixel((0, 0))[3] == 0


def test_the_icons_are_what_the_script_draws(project_root: Path) -> None:
    """Drawn small here; reduced to the same size, the stored icon must look the same."""
    namespace: dict[str, Any] = {"__file__": str(project_root / "scripts" / "make_icon.py"), "__name__": "make_icon"}
    code = (project_root / "scripts" / "make_icon.py").read_text(encoding="utf-8")
    exec(compile(code, namespace["__file__"], "exec"), namespace)
    namespace["DRAWN"] = 512
    drawn = namespace["draw"](64).convert("RGBa")
    with Image.open(project_root / "Resources" / "Icons" / "FreqSeg.png") as icon:
        stored = icon.convert("RGBa").resize((64, 64), Image.Resampling.LANCZOS)
    differences = [abs(a - b) for a, b in zip(drawn.tobytes(), stored.tobytes(), strict=True)]
    assert sum(differences) / len(differences) < 2


def test_the_licence_and_the_readme_are_in_the_root(project_root: Path) -> None:
    assert "Apache License" in (project_root / "LICENSE").read_text(encoding="utf-8")
    readme = (project_root / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in readme
    assert "not for" in readme


def test_a_checkout_with_history_is_small(project_root: Path) -> None:
    assert int(git(project_root, "rev-list", "--disk-usage", "--objects", "HEAD")) < LARGEST_CHECKOUT


def test_text_files_have_unix_line_endings(project_root: Path) -> None:
    listed = git(project_root, "ls-files", "--eol", "--cached", "--others", "--exclude-standard").splitlines()
    assert len(listed) > 50
    assert [line for line in listed if re.match(r"\S*(crlf|mixed)|\S+\s+\S*(crlf|mixed)", line)] == []
