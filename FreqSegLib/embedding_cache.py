"""What the image tower said about each slice, in half precision on disk, so that memory stays flat and work survives.

The first run of a volume writes here and reads back what it wrote, so a later run with the cache warm gives the same
numbers. The oldest volumes leave when the cache outgrows its size.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import SettingsError

DEFAULT_GIGABYTES = 4.0
# Only folders with this ending are ever counted or removed, wherever the user put the cache
FOLDER_ENDING = ".embeddings"
FEATURES = "dual-"
"""Names of what the trained model knows of a slice begin so; all others are the image tower's own."""
ABANDONED_SECONDS = 3600.0


class EmbeddingCache:
    """Arrays by (volume key, name); one folder a volume."""

    def __init__(self, folder: Path | None = None, gigabytes: float | None = None) -> None:
        """Args:
        folder: default FREQSEG_CACHE, else the user's cache folder.
        gigabytes: most it may take; default FREQSEG_CACHE_GB, else 4.
        """
        self.folder = folder or default_folder()
        self.limit = int((default_gigabytes() if gigabytes is None else gigabytes) * 1e9)

    def has(self, key: str, name: str) -> bool:
        return self._path(key, name).exists()

    def get(self, key: str, name: str) -> NDArray[np.float16] | None:
        """The array, or None if it was never stored, has been evicted, or cannot be read."""
        try:
            with self._path(key, name).open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None

    def put(self, key: str, name: str, array: NDArray[np.float16]) -> None:
        """Store atomically. A full disk is no error: the array is computed again when it is needed."""
        path = self._path(key, name)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(temporary, path)
        except OSError:
            _remove(temporary)
        except BaseException:
            _remove(temporary)
            raise

    def make_room(self, keep: Iterable[str]) -> None:
        """Drop the volumes used longest ago until the cache fits; ``keep`` stays whatever its size."""
        kept = set(keep)
        for key in kept:
            with suppress(OSError):
                os.utime(self._folder(key))
        for left in self.folder.glob(f"*{FOLDER_ENDING}/*.part"):
            # of a process that was killed while it wrote; one that writes now is younger
            if time.time() - _last_use(left) > ABANDONED_SECONDS:
                _remove(left)
        sizes = {path: _size(path) for path in self._folders()}
        total = sum(sizes.values())
        for path in sorted(sizes, key=_last_use):
            if total <= self.limit:
                return
            if path.name.removesuffix(FOLDER_ENDING) not in kept:
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]

    def size(self) -> int:
        """Bytes on disk."""
        return sum(_size(path) for path in self._folders())

    def clear(self) -> None:
        """Remove every stored embedding."""
        for path in self._folders():
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, key: str, name: str) -> Path:
        return self._folder(key) / f"{name}.npy"

    def _folder(self, key: str) -> Path:
        return self.folder / f"{key}{FOLDER_ENDING}"

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.glob(f"*{FOLDER_ENDING}") if path.is_dir()]


def default_folder() -> Path:
    """FREQSEG_CACHE, else ``embeddings`` in the user's cache folder."""
    given = os.environ.get("FREQSEG_CACHE")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("FreqSeg", appauthor=False)) / "embeddings"


def default_gigabytes() -> float:
    """FREQSEG_CACHE_GB, else 4.

    Raises:
        SettingsError: it is no number, or below 0.
    """
    given = os.environ.get("FREQSEG_CACHE_GB", "").strip()
    try:
        gigabytes = float(given) if given else DEFAULT_GIGABYTES
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise SettingsError(f"FREQSEG_CACHE_GB must be a number of gigabytes, 0 or more, got '{given}'.")
    return gigabytes


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
