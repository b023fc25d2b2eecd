"""What FreqSeg installs inside Slicer: the list, what of it is missing, and the order."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement as PackagingRequirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import FreqSegLib
from FreqSegLib import slicer_packages
from FreqSegLib.errors import SettingsError
from FreqSegLib.slicer_packages import InstallPlan, Requirement, install_plan, missing_packages, requirements

PACKAGE = Path(FreqSegLib.__file__).parent
BROUGHT_BY_SLICER = {"numpy", "scipy", "SimpleITK", "pillow", "requests"}
# What the worker never runs: the command line, training, evaluation and pictures.
NOT_IN_SLICER = ("cli", "__main__", "training", "evaluation", "sheet", "band_figure", "export")
# Used where a user installed them and asks for them, such as with backend="mamba_ssm".
ON_REQUEST = {"mamba_ssm"}
FRESH_SLICER = {
    "numpy": "2.2.6",
    "scipy": "1.15.3",
    "SimpleITK": "2.5.0",
    "pillow": "11.2.1",
    "requests": "2.32.4",
    "setuptools": "80.9.0",
}


def versions(*extra: dict[str, str]) -> Callable[[str], str | None]:
    known: dict[str, str] = dict(FRESH_SLICER)
    for one in extra:
        known.update(one)
    return known.get


def everything() -> dict[str, str]:
    return {one.name: re.sub(r"[^\d.]", "", one.specifier) or "1.0" for one in requirements()}


def test_a_fresh_slicer_lacks_all_of_it_and_torch_comes_first() -> None:
    missing = missing_packages(versions=versions())
    assert missing[:2] == ["torch>=2.14", "torchvision"]
    plan = install_plan(missing)
    assert plan.torch == ">=2.14"
    assert [*plan.packages] == missing[2:]
    assert plan.names == ("torch", "torchvision", *plan.packages)
    assert not plan.empty


def test_nothing_is_planned_where_all_is_there() -> None:
    assert missing_packages(versions=versions(everything())) == []
    assert install_plan([]) == InstallPlan(torch=None, packages=())
    assert install_plan([]).empty


@pytest.mark.parametrize(
    ("change", "torch", "packages"),
    [
        ({"torch": "2.5.1+cu121"}, ">=2.14", ()),
        ({"torch": "2.14.0a0+gitabc"}, ">=2.14", ()),
        ({"torch": "2.14.0+cpu"}, None, ()),
        ({"torchvision": None}, "", ()),
        ({"monai": "1.4.0"}, None, ("monai>=1.5",)),
        ({"torch": None, "timm": None}, ">=2.14", ("timm>=1.0",)),
    ],
)
def test_only_what_is_missing_or_too_old_is_planned(
    change: dict[str, str | None], torch: str | None, packages: tuple[str, ...]
) -> None:
    have = {**everything(), **change}
    assert install_plan(missing_packages(versions=have.get)) == InstallPlan(torch, packages)


@pytest.mark.parametrize("name", ["numpy>=1", "vtk", "simpleitk>2", "SETUPTOOLS<81", "Pillow"])
def test_what_slicer_brings_is_never_installed(name: str) -> None:
    with pytest.raises(SettingsError, match="must not install"):
        install_plan(["monai>=1.5", name])
    assert not any(
        canonicalize_name(one.name) == canonicalize_name(re.split("[<>]", name)[0]) for one in requirements()
    )


def test_constraints_hold_what_is_there_and_nothing_else() -> None:
    have = versions({"torch": "2.15.0+cu130"})
    assert slicer_packages.constraints(have) == [
        *(f"{name}=={version}" for name, version in FRESH_SLICER.items()),
        "torch==2.15.0+cu130",
    ]


def test_pip_takes_the_plan_within_its_constraints() -> None:
    """With the real pip and this Python's packages: all is there, so it needs no index and changes nothing."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this Python has no pip")
    plan = install_plan([str(one) for one in requirements() if one.name in ("platformdirs", "psutil", "PyWavelets")])
    with slicer_packages.constraints_file() as path:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check"]
        arguments = slicer_packages.pip_arguments(plan, path)
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert f"numpy=={metadata.version('numpy')}" in path.read_text(encoding="utf-8").splitlines()
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout
    assert not path.exists()


def test_this_python_has_them_all() -> None:
    """The library's own dependencies in pyproject.toml cover what Slicer is given."""
    assert missing_packages() == []


def test_versions_are_those_of_pyproject(project_root: Path) -> None:
    text = (project_root / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = set(re.findall(r'"([^"]+)"', block))
    assert len(declared) > 10
    assert {str(one) for one in requirements()} <= declared


@pytest.mark.parametrize(
    "text", ["1.5", "1.5.0", "1.5.1", "1.5rc1", "1.10", "2.0+cu130", "1.4.9", "1.4.post1", "0.9.dev3"]
)
@pytest.mark.parametrize("specifier", ["", ">=1.5", ">=1.5,<2", "==1.5", "!=1.5", ">1.4.9", "<=1.5"])
def test_versions_compare_as_packaging_compares_them(text: str, specifier: str) -> None:
    expected = PackagingRequirement(f"x{specifier}").specifier.contains(text, prereleases=True)
    assert Requirement("x", specifier).met_by(text) == expected


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_at_least_means_at_least(have: list[int], wanted: list[int]) -> None:
    one, other = (".".join(map(str, numbers)) for numbers in (have, wanted))
    assert Requirement("x", f">={other}").met_by(one) == (Version(one) >= Version(other))


def test_a_version_that_is_no_version_meets_only_any_version() -> None:
    assert Requirement("x", "").met_by("unknown")
    assert not Requirement("x", ">=1").met_by("unknown")


@pytest.mark.parametrize("line", ["monai >> 1", "-r other.txt", "monai[all]>=1", "x @ https://host/x.whl", "a~=1.0"])
def test_a_line_that_cannot_be_read_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(f"# first\n{line}\n")
    with pytest.raises(SettingsError, match=re.escape(f"'{line}' in requirements.txt, line 2")):
        requirements(path)


def test_comments_and_blanks_are_skipped_and_torch_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text("# why\n\nmonai >= 1.5, <2  # reason\ntorch>=2\n")
    assert [str(one) for one in requirements(path)] == ["torch>=2", "monai>=1.5,<2"]


def test_a_missing_list_says_where_it_should_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(slicer_packages, "__file__", str(tmp_path / "FreqSegLib" / "slicer_packages.py"))
    with pytest.raises(SettingsError, match=re.escape(str(tmp_path / "Resources" / "requirements.txt"))):
        requirements()


def test_it_needs_the_standard_library_only() -> None:
    code = "import FreqSegLib.slicer_packages as s; print(len(s.missing_packages()) == len(s.requirements()))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def closure(names: set[str]) -> set[str]:
    """These distributions and all they require here, without extras."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            one = PackagingRequirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                names.add(one.name)
    return found


def third_party_imports() -> dict[str, set[str]]:
    """Top-level names that modules of the library import, with the modules that do."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - {"FreqSegLib"}:
                if name not in sys.stdlib_module_names:
                    found.setdefault(name, set()).add(module)
    return found


def test_nothing_it_pulls_in_replaces_what_slicer_brings() -> None:
    pulled = closure({one.name for one in requirements()})
    assert not pulled & {"vtk", "simpleitk", "itk", "opencv-python", "opencv-python-headless", "pyside6"}


def test_every_package_the_worker_may_import_is_there_or_installed() -> None:
    """A package that a new module imports must come with Slicer or stand in requirements.txt."""
    listed = {one.name for one in (*requirements(), *requirements(optional=True))}
    covered = closure(listed) | {canonicalize_name(one) for one in BROUGHT_BY_SLICER}
    owners = metadata.packages_distributions()
    lacking = {}
    for name, modules in third_party_imports().items():
        used = {one for one in modules if not one.startswith(NOT_IN_SLICER)}
        if (
            used
            and name not in ON_REQUEST
            and not {canonicalize_name(owner) for owner in owners.get(name, [name])} & covered
        ):
            lacking[name] = sorted(used)
    assert lacking == {}


def test_an_optional_package_is_an_extra_and_never_missed(project_root: Path) -> None:
    (numba,) = requirements(optional=True)
    assert f'fast = ["{numba}"]' in (project_root / "pyproject.toml").read_text(encoding="utf-8")
    assert numba not in requirements()
    lacking = {one.name: re.sub(r"[^\d.]", "", one.specifier) or "1.0" for one in requirements()}
    assert missing_packages(versions=lacking.get) == []
    assert missing_packages(versions=lacking.get, optional=True) == ["numba>=0.61"]


def test_nothing_is_installed_that_the_library_does_not_import() -> None:
    owners = metadata.packages_distributions()
    imported = {canonicalize_name(owner) for name in third_party_imports() for owner in owners.get(name, [])}
    assert {one.name for one in requirements() if canonicalize_name(one.name) not in imported} <= {"torchvision"}
