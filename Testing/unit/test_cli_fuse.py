"""``freqseg fuse``, ``fuse-folder`` and ``evaluate-fusion``, as a shell runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_volume_fusion import SIDE, displaced, head

from FreqSegLib import cli_evaluate_fusion, cli_fuse  # noqa: F401
from FreqSegLib.cli import main
from FreqSegLib.volume import Volume
from FreqSegLib.volume_fusion import read_record


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path]:
    """A CT and an MR as files."""
    ct, mr = head()
    return ct.write(tmp_path / "ct.nrrd"), mr.write(tmp_path / "mr.nii.gz")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs of images, one of them shifted, and one image on either side that has no partner."""
    ct, mr = head()
    for folder in ("ct folder", "mr folder"):
        (tmp_path / folder).mkdir()
    for index in (2, 4, 6):
        bone = np.clip(ct.array[index] * 3, 0, 255).astype(np.uint8)
        soft = np.clip(mr.array[index] / 4, 0, 255).astype(np.uint8)
        Image.fromarray(bone).save(tmp_path / "ct folder" / f"p{index}.png")
        Image.fromarray(np.roll(soft, 12, 1) if index == 6 else soft).save(tmp_path / "mr folder" / f"p{index}.png")
    Image.fromarray(bone).save(tmp_path / "ct folder" / "alone.png")
    Image.fromarray(soft).save(tmp_path / "mr folder" / "also_alone.png")
    (tmp_path / "mr folder" / "notes.txt").write_text("not an image")
    return tmp_path / "ct folder", tmp_path / "mr folder"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_fuse_writes_the_volume_its_masks_and_a_report_with_pictures_inside(
    volumes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, masks, report = tmp_path / "out dir" / "fused.nrrd", tmp_path / "masks.nrrd", tmp_path / "report.html"
    words = ["fuse", *volumes, "-o", out, "--method", "choose-max", "--wave", "db4", "--levels", 2]
    assert run(*words, "--masks", masks, "--report", report) == 0
    said = capsys.readouterr().out
    assert "Method: choose-max, wavelet db4, 2 levels" in said
    assert f"Wrote {out}" in said
    fused = Volume.read(out)
    record = read_record(fused)
    assert record is not None
    assert (record["wave"], record["levels"]) == ("db4", 2)
    assert fused.array.dtype == np.float32
    assert 0 <= fused.array.min() < 5
    assert 200 < fused.array.max() <= 255
    low = Volume.read(tmp_path / "masks-low_band.nrrd")
    assert low.shape == fused.shape
    assert low.array.max() == 100
    assert (tmp_path / "masks-level_2_HH.nrrd").is_file()
    page = report.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 2
    assert "http" not in page
    for word in ("SSIM", "Nabf", "laplacian", "choose-max haar", "the plain average", "brain"):
        assert word in page


def test_single_images_become_8_bit_pictures_with_their_record_beside(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ct, mr = (folder / "p4.png" for folder in folders)
    out = tmp_path / "fused.png"
    assert run("fuse", ct, mr, "-o", out, "--method", "max", "--json", "-q") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [str(out), str(tmp_path / "fused.json")]
    fused = np.asarray(Image.open(out))
    assert fused.dtype == np.uint8
    assert np.array_equal(fused, np.maximum(np.asarray(Image.open(ct)), np.asarray(Image.open(mr))))
    assert json.loads((tmp_path / "fused.json").read_text())["method"] == "max"


def test_nothing_is_written_where_a_pair_is_refused_or_a_file_exists(
    volumes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    moved = displaced(Volume.read(volumes[1]), 9).write(tmp_path / "moved.nrrd")
    out = tmp_path / "fused.nrrd"
    assert run("fuse", volumes[0], moved, "-o", out, "--method", "max", "--report", tmp_path / "r.html") == 1
    assert "--register rigid" in capsys.readouterr().err
    moved.unlink()
    assert {path.name for path in tmp_path.iterdir()} == before
    out.write_text("mine")
    assert run("fuse", *volumes, "-o", out, "--method", "max") == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run("fuse", *volumes, "-o", volumes[0], "--method", "max", "--overwrite") == 1
    assert "is the input" in capsys.readouterr().err
    assert run("fuse", *volumes, "-o", tmp_path / "fused.png", "--method", "max") == 1
    assert "one slice" in capsys.readouterr().err
    assert run("fuse", *volumes, "-o", tmp_path / "x.seg.nrrd", "--method", "max") == 1
    assert run("fuse", *volumes, "-o", tmp_path / "x.nrrd", "--method", "maximum") == 2
    assert run("fuse", *volumes, "-o", tmp_path / "x.nrrd", "--method", "max", "--wave", "db4") == 2
    assert "has no wavelet" in capsys.readouterr().err


def test_a_folder_is_matched_by_name_resumed_and_tells_what_it_left_out(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fused"
    words = ["fuse-folder", *folders, "-o", out, "--method", "max"]
    assert run(*words) == 1
    captured = capsys.readouterr()
    assert "only in the CT folder: alone" in captured.err
    assert "only in the MR folder: also_alone" in captured.err
    assert "Not fused: p6" in captured.err
    assert "Fused 2 of 3 pairs" in captured.out
    assert {path.name for path in out.iterdir()} == {"p2.png", "p4.png", "fusion.json"}

    stamp = (out / "p2.png").stat().st_mtime_ns
    (out / "p4.png").unlink()
    assert run(*words, "--no-check") == 1
    assert "check was True, now False" in capsys.readouterr().err
    assert run(*words) == 1
    assert "1 of 3 pairs are finished already" in capsys.readouterr().out
    assert (out / "p2.png").stat().st_mtime_ns == stamp
    assert (out / "p4.png").is_file()

    assert run(*words, "--no-check", "--overwrite", "-q") == 0
    assert (out / "p6.png").is_file()
    assert (out / "p2.png").stat().st_mtime_ns != stamp
    assert run(*words, "--no-check") == 0
    assert "3 of 3 pairs are finished already" in capsys.readouterr().out


def test_a_folder_run_that_is_stopped_keeps_what_is_finished(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fused"
    fuse_one, calls = cli_fuse._fuse_one, []

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fuse_one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cli_fuse, "_fuse_one", stopping)
    words = ["fuse-folder", *folders, "-o", out, "--method", "max", "--no-check"]
    assert run(*words) == 130
    assert {path.name for path in out.iterdir()} == {"p2.png", "fusion.json"}
    capsys.readouterr()
    assert run(*words) == 0
    assert "1 of 3 pairs are finished already" in capsys.readouterr().out


def test_folders_that_cannot_be_used_are_named(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("fuse-folder", folders[0], empty, "-o", tmp_path / "o", "--method", "max") == 1
    assert "matched by file name" in capsys.readouterr().err
    assert run("fuse-folder", folders[0], tmp_path / "none", "-o", tmp_path / "o", "--method", "max") == 1
    assert "no such folder" in capsys.readouterr().err
    assert run("fuse-folder", *folders, "-o", folders[0], "--method", "max") == 1
    assert "is the input" in capsys.readouterr().err
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "p2.png").write_bytes(b"mine")
    assert run("fuse-folder", *folders, "-o", foreign, "--method", "max") == 1
    assert "did not make" in capsys.readouterr().err
    assert (foreign / "p2.png").read_bytes() == b"mine"
    (folders[0] / "p2.nrrd").write_bytes(b"x")
    assert run("fuse-folder", *folders, "-o", tmp_path / "o", "--method", "max") == 1
    assert "two images called 'p2'" in capsys.readouterr().err


def test_evaluate_prints_every_metric_beside_the_plain_rules_and_the_ceiling(
    volumes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fused.nrrd"
    assert run("fuse", *volumes, "-o", out, "--method", "average", "--ct-window", "40/400", "-q") == 0
    table, figure = tmp_path / "t.csv", tmp_path / "f.png"
    assert run("evaluate-fusion", out, *volumes, "--csv", table, "--figure", figure, "--slices", 2, "-q") == 0
    said = capsys.readouterr().out
    assert "average" in said
    assert "LEVEL" not in said
    assert "level 40, width 400" in said
    rows = {row["metric"]: row for row in csv.DictReader(table.open())}
    assert len(rows) == 14 + 8 + 1
    # fused is the average, stored in float32 and measured in whole levels, like the rule beside it
    for key in ("SSIM", "PSNR", "MI_CT", "Qabf"):
        assert float(rows[key]["fused"]) == pytest.approx(float(rows[key]["average"]), rel=1e-3)
    assert float(rows["PSNR"]["fused"]) == pytest.approx(float(rows["PSNR"]["ceiling"]), abs=0.05)
    assert rows["PSNR"]["why"] == "the plain average"
    assert {"max", "choose-max haar", "choose-max db4", "laplacian"} <= rows["EN"].keys()
    assert Image.open(figure).size[0] == 1600


def test_evaluate_refuses_what_is_no_fused_image_of_the_pair(
    volumes: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate-fusion", volumes[0], *volumes, "-q") == 1
    assert "grey levels 0 to 255" in capsys.readouterr().err
    small = Volume(np.zeros((9, SIDE - 1, SIDE), np.uint8), np.eye(4)).write(tmp_path / "small.nrrd")
    assert run("evaluate-fusion", small, *volumes, "-q") == 1
    assert "CT's grid" in capsys.readouterr().err
    assert run("evaluate-fusion", small, *volumes, "--figure", tmp_path / "f.jpg") == 2
