"""The files one command writes: checked before the work, moved to their places together after it, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from FreqSegLib.errors import OutputError, SettingsError


def check_target(path: Path, *, overwrite: bool) -> None:
    """Whether a file may be written at ``path``, as far as that can be told before the work.

    Raises:
        OutputError: it exists and may not be replaced, is a folder or write-protected, or its folder cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: a folder has that name; give a file name")
    if path.exists():
        if not overwrite:
            raise OutputError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")
        if not os.access(path, os.W_OK):
            raise OutputError(f"cannot write {path}: the file is write-protected; choose another name")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Whether files may be made in ``folder``, or the folder itself where it does not exist yet.

    Raises:
        OutputError: they may not.
    """
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise OutputError(f"cannot write into {folder}: {nearest} is a file; choose another folder")
    try:
        with tempfile.TemporaryFile(prefix=".freqseg-", dir=nearest):
            pass
    except OSError as problem:
        raise OutputError(
            f"cannot write into {folder}: {problem.strerror or problem}; choose another folder"
        ) from problem


def check_apart(targets: Sequence[Path], sources: Sequence[Path] = ()) -> None:
    """Whether no file is written twice, and none over an input.

    Raises:
        SettingsError: two targets are the same file.
        OutputError: a target is one of ``sources``.
    """
    seen: set[str] = set()
    inputs = {_identity(path) for path in sources}
    for path in targets:
        if _identity(path) in inputs:
            raise OutputError(f"cannot write {path}: this is the input, which is never changed; choose another name")
        if _identity(path) in seen:
            raise SettingsError(f"{path} is asked for twice; give every output a name of its own")
        seen.add(_identity(path))


class Delivery:
    """Files written aside and moved to their places together.

    Example:
        >>> with Delivery.prepared(overwrite=False) as delivery:
        ...     Path(delivery.place(Path("a/one.txt"))).write_text("1")
        ...     Path(delivery.place(Path("b/two.txt"))).write_text("2")
        ...     delivery.deliver()
    """

    def __init__(self, overwrite: bool) -> None:
        self._overwrite = overwrite
        self._aside: dict[Path, Path] = {}
        self._made: list[Path] = []
        self._retired: list[Path] = []
        self._delivered = False
        self._keep = False

    @classmethod
    @contextmanager
    def prepared(cls, *, overwrite: bool) -> Iterator[Delivery]:
        """A delivery whose temporary files, and folders made in vain, are gone when the block ends.

        Raises:
            OutputError: a file cannot be written; the message names the final place.
        """
        delivery = cls(overwrite)
        try:
            yield delivery
        except OutputError as error:
            raise OutputError(delivery.named_finally(str(error))) from error
        except OSError as error:
            raise OutputError(f"cannot write the results: {delivery.named_finally(str(error))}") from error
        finally:
            delivery._clean()

    def place(self, final: Path) -> Path:
        """Where to write what will be ``final``: the same name in a hidden folder beside it.

        Other files left in that folder (the ``.raw`` of a detached header) are delivered too.
        """
        folder = final.parent
        if folder not in self._aside:
            self._make(folder)
            self._aside[folder] = Path(tempfile.mkdtemp(prefix=".freqseg-", dir=folder))
        return self._aside[folder] / final.name

    def retire(self, path: Path) -> None:
        """Delete an old file when the new ones take their places."""
        self._retired.append(path)

    def deliver(self) -> None:
        """Move everything to its place; if one move fails, all are undone.

        Raises:
            OutputError: a file appeared meanwhile and may not be replaced.
            OSError: a file cannot be moved.
        """
        moves = [
            (source, folder / source.name)
            for folder, aside in self._aside.items()
            for source in sorted(aside.iterdir())
        ]
        for _, final in moves:
            if final.exists() and not self._overwrite:
                raise OutputError(f"{final} exists already; choose another name or allow overwriting (--overwrite)")
        done: list[tuple[Path, Path]] = []
        try:
            for final in [*(final for _, final in moves), *self._retired]:
                if final.exists():
                    self._move(final, self._backup(final), done)
            for source, final in moves:
                self._move(source, final, done)
        except BaseException:
            for source, final in reversed(done):
                try:
                    os.replace(final, source)
                except OSError:
                    # What cannot go back must not be deleted with the temporary files.
                    self._keep = True
            raise
        self._delivered = True

    def named_finally(self, message: str) -> str:
        """A message about temporary files, with the names the user knows."""
        for folder, aside in self._aside.items():
            message = message.replace(str(aside), str(folder))
        return message

    @staticmethod
    def _move(source: Path, final: Path, done: list[tuple[Path, Path]]) -> None:
        os.replace(source, final)
        done.append((source, final))

    def _backup(self, final: Path) -> Path:
        aside = self.place(final).parent / ".before"
        aside.mkdir(exist_ok=True)
        return aside / final.name

    def _make(self, folder: Path) -> None:
        """Make a folder, remembering which of its parents are new."""
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += new

    def _clean(self) -> None:
        for aside in self._aside.values() if not self._keep else ():
            shutil.rmtree(aside, ignore_errors=True)
        if not self._delivered:
            for folder in sorted(self._made, key=lambda path: len(path.parts), reverse=True):
                with suppress(OSError):
                    folder.rmdir()


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest of its parents that exists."""
    absolute = folder.absolute()
    return next((path for path in (absolute, *absolute.parents) if path.exists()), absolute)


def _identity(path: Path) -> str:
    return os.path.normcase(path.resolve())
