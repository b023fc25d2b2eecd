"""Install the extension with CMake against the stand-in for Slicer's macros, and run tests from what was installed.

``python Testing/unit/extension_install.py FOLDER`` installs it by hand; with names of test files after the folder, it
runs these from the installed tree. How tests find the tree under test: ``Testing/packaging_stand_in/README.md``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "Testing" / "packaging_stand_in"
MODULES = Path("lib", "Slicer-5.10", "qt-scripted-modules")
"""Where Slicer looks for scripted modules, in a build tree and in an installed extension."""


class CMakeMissing(Exception):
    """CMake or Ninja is not on this machine."""


class InstallFailed(Exception):
    """CMake refused; the message is what it said."""


@dataclass(frozen=True)
class Installed:
    """An installed extension.

    Attributes:
        prefix: what CMake installed to; an extension's own folder in Slicer.
        build: CMake's build tree, with what the stand-in recorded.
    """

    prefix: Path
    build: Path

    @property
    def tree(self) -> Path:
        """The folder of scripted modules: FreqSeg.py, FreqSegLib/ and Resources/; it goes on Python's path."""
        return self.prefix / MODULES

    def files(self) -> list[str]:
        """Every installed file, relative to :attr:`prefix`, but for compiled Python."""
        found = (path.relative_to(self.prefix).as_posix() for path in self.prefix.rglob("*") if path.is_file())
        return sorted(name for name in found if "__pycache__" not in name)

    def metadata(self) -> dict[str, str]:
        """What the extension says of itself: HOMEPAGE, CATEGORY, ICONURL ..."""
        lines = (self.build / "stand_in_metadata.txt").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def tests(self) -> list[str]:
        """Names of the tests that ctest would run in Slicer."""
        return (self.build / "stand_in_tests.txt").read_text(encoding="utf-8").splitlines()


def install_extension(folder: Path, source: Path = ROOT) -> Installed:
    """Configure and install an extension.

    Args:
        folder: gets ``build`` and ``installed``; made where it is missing.
        source: the extension's checkout.

    Raises:
        CMakeMissing: no CMake here.
        InstallFailed: configuring or installing failed.
    """
    cmake, ninja = _program("cmake"), _program("ninja")
    installed = Installed(prefix=folder / "installed", build=folder / "build")
    configure = [
        *(cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(source), "-B", str(installed.build)),
        *(f"-DSlicer_DIR={STAND_IN}", f"-DCMAKE_INSTALL_PREFIX={installed.prefix}", "-DBUILD_TESTING=ON"),
        # Nothing is compiled, so no compiler need be here; CMake takes any program when told not to try it.
        *(f"-DCMAKE_{language}_COMPILER={Path(sys.executable).as_posix()}" for language in ("C", "CXX")),
        *(f"-DCMAKE_{language}_COMPILER_FORCED=ON" for language in ("C", "CXX")),
    ]
    _run(configure)
    # The components that Slicer packs: a file installed under another one would be lost.
    for component in ("Runtime", "RuntimeLibraries"):
        _run([cmake, "--install", str(installed.build), "--component", component])
    return installed


def run_tests_from(
    tree: Path, tests: Sequence[Path | str], folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run tests in a child process that can see the installed tree but not the checkout's FreqSegLib.

    The tests are copied to ``folder``, and the tree to ``folder/FreqSeg``: so ``FreqSeg/FreqSeg.py`` of what a test
    takes for the project is the installed module, and there is no other library in it.

    Args:
        tree: :attr:`Installed.tree`.
        tests: files or folders of tests, relative to the project.
        folder: where to work; made where it is missing.
        options: more for pytest.
    """
    under_test = folder / "FreqSeg"
    shutil.copytree(tree, under_test)
    shutil.copytree(ROOT / "Testing", folder / "Testing", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    data = Path(os.environ.get("FREQSEG_DATA", ROOT.parent / "shared" / "data"))
    environment = {
        **os.environ,
        "FREQSEG_TREE": str(under_test),
        "FREQSEG_DATA": str(data),
        # Before the checkout that an editable install puts on the path; and not the current folder, from 3.11 on.
        "PYTHONPATH": os.pathsep.join([str(under_test), str(folder / "Testing" / "unit")]),
        "PYTHONSAFEPATH": "1",
    }
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "extension_install", "-q"),
        *("--rootdir", str(folder), "-c", str(folder / "pyproject.toml")),
        *(str(folder / test) for test in tests),
        *options,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def pytest_collection_finish() -> None:
    """As a plugin of that child: refuse to test any other library than the installed one."""
    import FreqSegLib

    tree, tested = Path(os.environ["FREQSEG_TREE"]).resolve(), Path(FreqSegLib.__file__).resolve()
    if tree not in tested.parents:
        raise RuntimeError(f"these tests would run on {tested}, not on the installed tree {tree}")


def _program(name: str) -> str:
    """CMake's program, beside this Python (the packages ``cmake`` and ``ninja`` put it there) or on the path."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=beside) or shutil.which(name)
    if found is None:
        raise CMakeMissing(f"{name} is not installed: pip install cmake ninja")
    return found


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InstallFailed(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="*", help="test files to run from the installed tree, relative to the project")
    asked = parser.parse_args()
    installed = install_extension(asked.folder.absolute())
    print(f"{len(installed.files())} files in {installed.tree}")
    if not asked.tests:
        return 0
    done = run_tests_from(installed.tree, asked.tests, asked.folder.absolute() / "run")
    print(done.stdout, done.stderr, sep="\n")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
