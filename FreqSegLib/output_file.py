"""Results appear under their name complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from FreqSegLib.errors import OutputError


@contextmanager
def replacing(paths: Sequence[Path], *, overwrite: bool = False) -> Iterator[list[Path]]:
    """Write files beside their final place, then rename them all.

    The block gets one temporary path for each of ``paths``, with the same file name, in a hidden folder beside the
    first one. When the block ends well they replace the final files; when it raises, nothing has changed. Other files
    the block leaves in that folder (the ``.raw`` of a detached header) are moved along.

    Args:
        paths: final paths, all in one folder, which is made if it is missing.
        overwrite: whether existing files may be replaced.

    Raises:
        OutputError: a file exists and may not be replaced, the folder cannot be written, or the disk is full.
    """
    folder = paths[0].parent
    for path in paths:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: a folder has that name; give a file name")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=".freqseg-", dir=folder))
    except OSError as problem:
        raise OutputError(f"cannot write into {folder}: {_reason(problem)}; choose another folder") from problem
    try:
        yield [workspace / path.name for path in paths]
        written = sorted(workspace.iterdir(), key=lambda path: path.name in {final.name for final in paths})
        for temporary in written:
            if (folder / temporary.name).exists() and not overwrite:
                raise OutputError(f"{folder / temporary.name} exists already; choose another name or allow overwriting")
        for temporary in written:
            os.replace(temporary, folder / temporary.name)
    except OSError as problem:
        raise OutputError(f"cannot write {paths[0]}: {_reason(problem)}") from problem
    finally:
        with suppress(OSError):
            shutil.rmtree(workspace)


def _reason(problem: OSError) -> str:
    if problem.errno == errno.ENOSPC:
        return "no space left on the disk; free some, or write elsewhere"
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission to write there"
    return problem.strerror or str(problem)
