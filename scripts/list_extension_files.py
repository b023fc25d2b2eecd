"""Write the lists of files that the extension installs into its CMakeLists.txt files, from the tree.

Slicer's modules name every file they install; this keeps the names right. Run it after adding, moving or removing a
file of FreqSeg/, FreqSegLib/, Resources/Models or Resources/Samples; ``--check`` only says what differs.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = (".nrrd", ".md")
"""What of Resources/Samples travels; the script that simulated them stays behind."""


@dataclass(frozen=True)
class FileList:
    """One ``set(variable ...)`` of a CMakeLists.txt.

    Attributes:
        cmake: the folder of the CMakeLists.txt, relative to the project; file names are relative to it.
        variable: the CMake variable.
        belongs: whether a file of that folder, as a relative path, is in the list.
    """

    cmake: str
    variable: str
    belongs: Callable[[PurePosixPath], bool]

    def files(self, root: Path = ROOT) -> list[str]:
        """The names that should stand there, sorted."""
        return sorted(str(name) for name in walk(root / self.cmake) if self.belongs(name))

    def written(self, root: Path = ROOT) -> list[str]:
        """The names that stand there."""
        return self._block(self._path(root).read_text(encoding="utf-8")).group("names").split()

    def write(self, root: Path = ROOT) -> bool:
        """Bring the list up to date; True when it was not."""
        path = self._path(root)
        before = path.read_text(encoding="utf-8")
        found = self._block(before)
        lines = "".join(f"  {name}\n" for name in self.files(root))
        after = before[: found.start("names")] + "\n" + lines + before[found.end("names") :]
        if after == before:
            return False
        part = path.with_name(path.name + ".part")
        part.write_text(after, encoding="utf-8", newline="\n")
        os.replace(part, path)
        return True

    def _path(self, root: Path) -> Path:
        return root / self.cmake / "CMakeLists.txt"

    def _block(self, text: str) -> re.Match[str]:
        found = re.search(rf"^set\({self.variable}(?P<names>[^()]*)^  \)$", text, re.MULTILINE)
        if found is None:
            raise SystemExit(f"{self.cmake}/CMakeLists.txt has no set({self.variable} ...) that ends in a line '  )'.")
        return found


def walk(folder: Path) -> Iterator[PurePosixPath]:
    """Every file below a folder, but for what Python, editors and interrupted downloads leave behind."""
    for path in folder.rglob("*"):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden and name.suffix not in (".pyc", ".part"):
            yield name


def _is_code(name: PurePosixPath) -> bool:
    return name.suffix == ".py"


def _is_resource(name: PurePosixPath) -> bool:
    return not _is_code(name) and name.name != "CMakeLists.txt"


def _is_shipped(name: PurePosixPath) -> bool:
    return name.parts[0] == "Models" or (name.parts[0] == "Samples" and name.suffix in SAMPLES)


FILE_LISTS = (
    FileList("FreqSegLib", "MODULE_PYTHON_SCRIPTS", _is_code),
    FileList("FreqSegLib", "MODULE_PYTHON_RESOURCES", _is_resource),
    FileList("FreqSeg", "MODULE_PYTHON_SCRIPTS", _is_code),
    FileList("FreqSeg", "MODULE_PYTHON_RESOURCES", _is_resource),
    FileList("Resources", "EXTENSION_RESOURCES", _is_shipped),
)


def differences(lists: Iterable[FileList] = FILE_LISTS, root: Path = ROOT) -> list[str]:
    """One line for every file that is listed but gone, or there but not listed."""
    found = []
    for one in lists:
        here, listed = one.files(root), one.written(root)
        found += [f"{one.cmake}/CMakeLists.txt does not list {name}" for name in here if name not in listed]
        found += [f"{one.cmake}/CMakeLists.txt lists {name}, which is not there" for name in listed if name not in here]
        found += [
            f"{one.cmake}/CMakeLists.txt lists {name} twice" for name in sorted(set(listed)) if listed.count(name) > 1
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a list is out of date")
    if parser.parse_args().check:
        for line in differences():
            print(line)
        return 1 if differences() else 0
    for one in FILE_LISTS:
        if one.write():
            print(f"{one.cmake}/CMakeLists.txt: {one.variable} written, {len(one.files())} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
