"""Which Python packages FreqSeg needs inside Slicer, which of them are missing, and in what order they are installed.

Slicer's Python comes without torch. The packages stand in ``FreqSeg/Resources/requirements.txt`` and nowhere else. This
module reads and compares; it imports nothing beyond the standard library and installs nothing. Slicer's side does so,
once, after asking:

1. ``plan = install_plan(missing_packages())``; nothing to do when ``plan.empty``;
2. ``plan.torch`` goes to ``PyTorchUtilsLogic.installTorch`` as ``torchVersionRequirement`` (torchvision comes with it);
3. ``plan.packages`` go to pip within :func:`constraints_file`, so that pip fails rather than replaces what Slicer or
   another extension relies on.

``pytorch-wavelets`` asks for ``pkg_resources``, which newer setuptools lack. :mod:`FreqSegLib.wavelet` stands in for it
in the process, so setuptools is neither required nor downgraded.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import operator
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from FreqSegLib.errors import SettingsError

REQUIREMENTS_FILE = "requirements.txt"
TORCH = ("torch", "torchvision")
"""Installed by PyTorchUtils, before the rest: most of the rest would otherwise have pip choose a torch."""
KEPT = ("numpy", "scipy", "SimpleITK", "vtk", "pillow", "requests", "setuptools", *TORCH)
"""Never replaced by an installation of ours: what Slicer brings, and torch once it is there."""

_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?P<specifier>[^;@\[\]]*)")
_CLAUSE = re.compile(r"(?P<sign>>=|<=|==|!=|>|<)\s*(?P<version>\d+(\.\d+)*)")
_VERSION = re.compile(
    r"v?(?:\d+!)?(?P<release>\d+(?:\.\d+)*)[-_.]?(?P<early>(?:a|b|c|rc|alpha|beta|pre|preview|dev)[-_.]?\d*)?",
    re.IGNORECASE,
)
Comparable = tuple[tuple[int, ...], bool]
_COMPARE: dict[str, Callable[[Comparable, Comparable], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}

Versions = Callable[[str], "str | None"]
"""The installed version of a distribution, or None when it is not installed."""


@dataclass(frozen=True)
class Requirement:
    """One line of the requirements file.

    Attributes:
        name: of the distribution, as on the package index.
        specifier: such as ``">=1.5"`` or ``">=1,<2"``; empty for any version.
    """

    name: str
    specifier: str

    def __str__(self) -> str:
        return f"{self.name}{self.specifier}"

    def met_by(self, version: str | None) -> bool:
        """Whether that installed version will do; None, not installed, never does.

        A pre-release counts as older than its release. Local versions (``2.14.0+cu130``) and post-releases count as the
        version itself.
        """
        if version is None:
            return False
        found = _VERSION.match(version)
        if found is None:
            return not self.specifier
        have = _comparable(found["release"], early=found["early"] is not None)
        clauses = (clause.strip() for clause in self.specifier.split(",") if clause.strip())
        return all(_holds(have, clause) for clause in clauses)


@dataclass(frozen=True)
class InstallPlan:
    """What to install, in this order.

    Attributes:
        torch: the version PyTorchUtils is asked for, such as ``">=2.14"`` (empty: any); None when torch and torchvision
            are there.
        packages: requirements for pip.
    """

    torch: str | None
    packages: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """Nothing is missing."""
        return self.torch is None and not self.packages

    @property
    def names(self) -> tuple[str, ...]:
        """Everything the plan installs by itself, for a sentence to the user."""
        return (*(TORCH if self.torch is not None else ()), *self.packages)


def requirements_file() -> Path:
    """The requirements, in an installed extension or in a checkout.

    Raises:
        SettingsError: neither is there, as in a wheel, whose own metadata name its packages.
    """
    root = Path(__file__).resolve().parents[1]
    for folder in (root / "Resources", root / "FreqSeg" / "Resources"):
        if (folder / REQUIREMENTS_FILE).is_file():
            return folder / REQUIREMENTS_FILE
    raise SettingsError(
        f"FreqSeg's list of packages is missing: {root / 'Resources' / REQUIREMENTS_FILE}. Reinstall the extension."
    )


def requirements(path: Path | None = None, *, optional: bool = False) -> tuple[Requirement, ...]:
    """Every package FreqSeg needs inside Slicer, torch first.

    Args:
        path: another file of the same kind; by default :func:`requirements_file`.
        optional: in their place those that only make it faster, whose lines end with ``# optional``.

    Raises:
        SettingsError: there is no such file, or a line is not ``name`` or ``name>=version``.
    """
    path = path or requirements_file()
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        wanted, _, remark = line.partition("#")
        wanted = wanted.strip()
        if wanted and optional == (remark.strip() == "optional"):
            found.append(_requirement(wanted, f"{path.name}, line {number}"))
    return tuple(sorted(found, key=lambda one: one.name not in TORCH))


def missing_packages(
    path: Path | None = None, versions: Versions | None = None, *, optional: bool = False
) -> list[str]:
    """The requirements that are not met, as pip takes them; empty when all are.

    Only versions are looked up: nothing is imported.

    Args:
        path, optional: as for :func:`requirements`.
        versions: another way to look up versions; by default what this Python has installed, looked up anew.
    """
    if versions is None:
        importlib.invalidate_caches()
        versions = installed_version
    return [str(one) for one in requirements(path, optional=optional) if not one.met_by(versions(one.name))]


def install_plan(missing: Sequence[str]) -> InstallPlan:
    """The order in which missing packages are installed: torch by PyTorchUtils, then the rest by pip.

    Raises:
        SettingsError: a requirement that would replace what Slicer brings, or cannot be read.
    """
    wanted = [_requirement(one, "the missing packages") for one in missing]
    torch = [one for one in wanted if _same(one.name, TORCH)]
    rest = [one for one in wanted if one not in torch]
    for one in rest:
        if _same(one.name, KEPT):
            raise SettingsError(f"FreqSeg must not install '{one}': Slicer brings its own {one.name}.")
    asked = next((one.specifier for one in torch if one.name == "torch"), "")
    return InstallPlan(torch=asked if torch else None, packages=tuple(str(one) for one in rest))


def constraints(versions: Versions | None = None) -> list[str]:
    """Lines for pip's ``--constraint``: what is installed of :data:`KEPT`, at just the version it has.

    Ask after torch was installed, right before pip.
    """
    versions = versions or installed_version
    found = {name: versions(name) for name in KEPT}
    return [f"{name}=={version}" for name, version in found.items() if version is not None]


@contextlib.contextmanager
def constraints_file() -> Iterator[Path]:
    """A file of :func:`constraints`, there within the ``with`` block."""
    importlib.invalidate_caches()
    with tempfile.TemporaryDirectory(prefix="freqseg-") as folder:
        path = Path(folder) / "constraints.txt"
        path.write_text("".join(f"{line}\n" for line in constraints()), encoding="utf-8")
        yield path


def pip_arguments(plan: InstallPlan, constraints_path: Path) -> list[str]:
    """What ``slicer.util.pip_install`` takes as a list, where there is no ``slicer.packaging.pip_ensure``."""
    return ["--constraint", str(constraints_path), *plan.packages]


def installed_version(name: str) -> str | None:
    """The version of a distribution installed for this Python, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement(text: str, where: str) -> Requirement:
    found = _LINE.fullmatch(text.strip())
    specifier = re.sub(r"\s+", "", found["specifier"]) if found else ""
    clauses = [clause for clause in specifier.split(",") if clause]
    if found is None or not all(_CLAUSE.fullmatch(clause) for clause in clauses):
        raise SettingsError(f"'{text}' in {where} is not a package name with versions such as 'monai>=1.5,<2'.")
    return Requirement(found["name"], specifier)


def _holds(have: Comparable, clause: str) -> bool:
    found = _CLAUSE.fullmatch(clause)
    if found is None:
        raise SettingsError(f"'{clause}' is not a version to compare with, such as '>=1.5'.")
    return _COMPARE[found["sign"]](have, _comparable(found["version"]))


def _comparable(release: str, *, early: bool = False) -> Comparable:
    """A value that compares as versions do: 1.5 and 1.5.0 are equal, and a pre-release comes before its release."""
    numbers = [int(part) for part in release.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), not early


def _same(name: str, names: Iterable[str]) -> bool:
    return _normalised(name) in {_normalised(one) for one in names}


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
