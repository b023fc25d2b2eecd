"""The embedding cache on disk: nothing half-written, nothing foreign touched, never a reason to fail."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import SettingsError


def embedding(seed: int = 0, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float16)


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache", gigabytes=1.0)


def age(cache: EmbeddingCache, key: str, seconds: float) -> None:
    (folder,) = cache.folder.glob(f"{key}*")
    then = folder.stat().st_mtime - seconds
    os.utime(folder, (then, then))


def test_what_is_put_is_got_in_another_session(cache: EmbeddingCache) -> None:
    assert not cache.has("volume", "tokens-3-0")
    assert cache.get("volume", "tokens-3-0") is None
    cache.put("volume", "tokens-3-0", embedding())
    again = EmbeddingCache(cache.folder)
    assert again.has("volume", "tokens-3-0")
    found = again.get("volume", "tokens-3-0")
    assert found is not None
    assert found.dtype == np.float16
    assert np.array_equal(found, embedding())
    assert not cache.has("volume", "tokens-3-1")
    assert not cache.has("other", "tokens-3-0")


def test_the_last_put_counts(cache: EmbeddingCache) -> None:
    cache.put("volume", "a", embedding(1))
    cache.put("volume", "a", embedding(2))
    found = cache.get("volume", "a")
    assert found is not None
    assert np.array_equal(found, embedding(2))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00", b"not an array", b"PK\x03\x04 nor an archive"])
def test_a_damaged_file_is_as_good_as_none_and_can_be_replaced(cache: EmbeddingCache, damage: bytes) -> None:
    cache.put("volume", "a", embedding())
    (path,) = cache.folder.rglob("*.npy")
    path.write_bytes(damage)
    assert cache.get("volume", "a") is None
    cache.put("volume", "a", embedding())
    assert cache.get("volume", "a") is not None


def test_a_truncated_file_is_as_good_as_none(cache: EmbeddingCache) -> None:
    cache.put("volume", "a", embedding())
    (path,) = cache.folder.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:-10])
    assert cache.get("volume", "a") is None


def test_objects_are_never_unpickled(cache: EmbeddingCache) -> None:
    cache.put("volume", "a", embedding())
    (path,) = cache.folder.rglob("*.npy")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert cache.get("volume", "a") is None


def test_a_write_that_fails_leaves_the_old_array_and_no_rest(
    cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put("volume", "a", embedding(1))

    def full(file, array, **_) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    cache.put("volume", "a", embedding(2))
    cache.put("volume", "b", embedding(2))
    monkeypatch.undo()
    found = cache.get("volume", "a")
    assert found is not None
    assert np.array_equal(found, embedding(1))
    assert not cache.has("volume", "b")
    assert [path.name for path in cache.folder.rglob("*") if path.is_file()] == ["a.npy"]


def test_a_killed_write_is_not_taken_for_an_array(cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source, target) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.put("volume", "a", embedding())
    assert not cache.has("volume", "a")
    assert cache.get("volume", "a") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    cache = EmbeddingCache(tmp_path / "file")
    cache.put("volume", "a", embedding())
    assert cache.get("volume", "a") is None
    assert not cache.has("volume", "a")
    cache.make_room(["volume"])
    assert cache.size() == 0


def test_the_volumes_used_longest_ago_leave_first(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, gigabytes=5e-6)
    for number, key in enumerate("abc"):
        cache.put(key, "x", embedding())
        age(cache, key, 100 - 10 * number)
    assert cache.size() > 6000
    cache.make_room(keep=[])
    assert [cache.has(key, "x") for key in "abc"] == [False, True, True]


def test_the_volume_in_use_stays_and_counts_as_used(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, gigabytes=5e-6)
    for number, key in enumerate("abc"):
        cache.put(key, "x", embedding())
        age(cache, key, 100 - 10 * number)
    cache.make_room(keep=["a"])
    assert [cache.has(key, "x") for key in "abc"] == [True, False, True]
    cache.limit = 2500
    cache.make_room(keep=[])
    assert [cache.has(key, "x") for key in "abc"] == [True, False, False]
    cache.limit = 0
    cache.make_room(keep=["a"])
    assert cache.has("a", "x")


def test_nothing_but_the_caches_own_folders_is_counted_or_removed(tmp_path: Path) -> None:
    """The user may point FREQSEG_CACHE at a folder with other things in it."""
    own = tmp_path / "my thesis"
    own.mkdir()
    (own / "chapter.txt").write_text("x" * 10000, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    cache = EmbeddingCache(tmp_path, gigabytes=0)
    cache.put("a", "x", embedding())
    assert cache.size() < 3000
    cache.make_room(keep=[])
    assert not cache.has("a", "x")
    cache.put("b", "x", embedding())
    cache.clear()
    assert not cache.has("b", "x")
    assert (own / "chapter.txt").exists()
    assert (tmp_path / "notes.txt").exists()


def test_the_environment_names_folder_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREQSEG_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("FREQSEG_CACHE_GB", "0.5")
    cache = EmbeddingCache()
    assert cache.folder == tmp_path / "here"
    assert cache.limit == 500_000_000
    assert EmbeddingCache(gigabytes=0).limit == 0
    assert EmbeddingCache(tmp_path).folder == tmp_path
    monkeypatch.setenv("FREQSEG_CACHE_GB", "")
    assert EmbeddingCache().limit == 4_000_000_000
    for wrong in ("lots", "-1", "nan", "inf"):
        monkeypatch.setenv("FREQSEG_CACHE_GB", wrong)
        with pytest.raises(SettingsError, match=f"got '{wrong}'"):
            EmbeddingCache()


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache(tmp_path).put("a", "x", embedding())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_killed_process_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    cache.put("a", "x", embedding())
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    old, young = folder / "y.npy.1.part", folder / "z.npy.2.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    cache.make_room(keep=["a"])
    assert not old.exists()
    assert young.exists()
    assert cache.has("a", "x")
