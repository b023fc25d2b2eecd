"""The command line, with a stand-in for the models: what it accepts, refuses, writes and says."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import typer

from FreqSegLib import __version__, weights
from FreqSegLib.cli import CANCELLED, main
from FreqSegLib.errors import InputError, OutputError, VocabularyError
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.volume import Volume

SHAPE = (3, 20, 16)
SPACING = (0.5, 0.5, 4.0)
VOXEL_ML = 0.5 * 0.5 * 4.0 / 1000


class StandIn:
    """A segmenter that finds a box wherever the prompt does not hold the word "absent", and runs no model."""

    def __init__(self, settings: TextSegmentationSettings) -> None:
        from FreqSegLib.presets import PRESETS

        self.settings, self.preset, self.device = settings, PRESETS["lite"], "cpu"
        self.matcher = SimpleNamespace(require=self._require)
        self.encoder = SimpleNamespace(image_size=32)
        self.prepared: Any = None

    @staticmethod
    def _require(prompt: str) -> None:
        if "cat" in prompt:
            raise VocabularyError(f"The lite preset does not know '{prompt}'. It knows: lungs.")

    def set_volume(self, volume: Volume, *, progress: Any, cancel: Any) -> None:
        from FreqSegLib.intensity import normalise
        from FreqSegLib.slices import SliceStack
        from FreqSegLib.text_segmentation import Progress

        self.prepared = SimpleNamespace(volume=volume, stack=SliceStack.of(volume), intensity=normalise(volume))
        progress(Progress("Reading slices", self.prepared.stack.count, self.prepared.stack.count, 0.0))

    def segment(self, prompts: Sequence[str], *, progress: Any, cancel: Any, return_intermediate: bool) -> Any:
        from FreqSegLib.text_segmentation import Segmentation

        results = tuple(self._result(prompt, return_intermediate) for prompt in prompts)
        return Segmentation(results, ("look twice", "look twice"), self.settings)

    def _result(self, prompt: str, keep: bool) -> Any:
        from FreqSegLib.text_segmentation import Intermediate, PromptResult

        stack = self.prepared.stack
        mask = np.zeros(stack.volume.shape, dtype=bool)
        if "absent" not in prompt:
            mask[:2, 4:9, 3:10] = True
        saliency = mask.astype(np.float32) * 0.5
        uncertainty = saliency / 10 if self.settings.uncertainty else None
        shown = [stack.displayed(array) for array in (stack.volume.array, mask, saliency)]
        stages = tuple(
            Intermediate(
                index=index,
                image=image.astype(np.float32) / 100,
                frequency={},
                saliency={"raw": map_},
                fused=map_,
                uncertainty=None,
                coarse=one,
                prompts=(),
                mask=one,
                probability=0.9,
            )
            for index, (image, one, map_) in enumerate(zip(*shown, strict=True))
        )
        return PromptResult(
            name=prompt,
            mask=mask,
            saliency=saliency,
            uncertainty=uncertainty,
            score=0.97 if mask.any() else 0.12,
            slice_scores=np.full(stack.count, 0.5, dtype=np.float32),
            color=(0.5, 0.25, 1.0),
            meaning=None,
            intermediates=stages if keep else (),
        )


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The stand-ins that were loaded instead of models."""
    from FreqSegLib import cli_segment
    from FreqSegLib.text_segmentation import TextSegmenter

    loaded: list[StandIn] = []

    def from_preset(name: str, *, settings: Any = None, **_: Any) -> StandIn:
        loaded.append(StandIn(settings or TextSegmentationSettings()))
        return loaded[-1]

    monkeypatch.setattr(TextSegmenter, "from_preset", from_preset)
    monkeypatch.setattr(cli_segment, "check_weights", lambda chosen: None)
    return loaded


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 100, SHAPE).astype(np.int16)
    return Volume(array, np.diag([*SPACING, 1.0])).write(tmp_path / "in" / "head.nrrd")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 100, (1, *SHAPE[1:])).astype(np.uint8)
    return Volume(array, np.eye(4), spatial_dimension=2).write(tmp_path / "in" / "film.png")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: Any) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return call


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.exists() else set()


# Help and the options made from the settings


def test_help_opens_without_torch_and_simpleitk() -> None:
    code = (
        "import sys; from FreqSegLib.cli import main; rc = main(['segment', '--help']); "
        "print(rc, [name for name in ('torch', 'SimpleITK', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines()[-1] == "0 []"


def test_every_setting_has_an_option_with_its_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = run("segment", "--help").out
    for item in fields(TextSegmentationSettings):
        assert f"--{item.name.replace('_', '-')}" in text
        if item.name != "uncertainty":
            assert item.metadata["help"] in text


def test_options_reach_the_settings_and_those_left_out_stay_with_the_preset(
    run: Run, models: list[StandIn], volume: Path, out: Path
) -> None:
    words = ("--threshold", "fixed", "--threshold-value", 0.25, "--no-gate", "--num-points", 7, "--axis", "coronal")
    assert run("segment", volume, "-p", "lungs", "-o", out / "a.nrrd", *words).code == 0
    assert models[0].settings == TextSegmentationSettings(
        threshold="fixed", threshold_value=0.25, gate=False, num_points=7, axis="coronal"
    )
    assert models[0].settings.beta is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--levels", "9"], "--levels"),
        (["--threshold", "magic"], "--threshold"),
        (["--beta", "much"], "--beta"),
        (["--promt", "x"], "--promt"),
        (["--wave", "nonesuch"], "nonesuch"),
    ],
)
def test_a_wrong_option_is_a_usage_error_that_names_it(
    run: Run, models: list[StandIn], volume: Path, out: Path, words: list[str], named: str
) -> None:
    done = run("segment", volume, "-p", "lungs", "-o", out / "a.nrrd", *words)
    assert done.code == 2
    assert named in done.err
    assert "Traceback" not in done.err
    assert files_in(out) == set()


@dataclass(frozen=True)
class Toy:
    kind: Literal["a", "b"] | None = field(default=None, metadata={"help": "Which [kind]."})
    contrast: bool | None = field(default=None, metadata={"help": "Contrast."})
    quick: bool = field(default=False, metadata={"help": "Quick."})
    count: int = field(default=3, metadata={"help": "Count.", "least": 1, "most": 5})


def test_a_switch_that_a_preset_decides_can_be_turned_both_ways() -> None:
    from typer.testing import CliRunner

    from FreqSegLib.cli_options import with_settings

    app = typer.Typer(rich_markup_mode="rich")
    seen: list[Any] = []

    @app.command()
    @with_settings(Toy)
    def command(name: Annotated[str, typer.Option()] = "n", *, settings: Toy) -> None:
        seen.append((name, settings))

    runner = CliRunner()
    for words in ([], ["--contrast"], ["--no-contrast", "--name", "m"], ["--quick", "--kind", "b", "--count", "5"]):
        assert runner.invoke(app, words).exit_code == 0
    assert seen == [
        ("n", Toy()),
        ("n", Toy(contrast=True)),
        ("m", Toy(contrast=False)),
        ("n", Toy(quick=True, kind="b", count=5)),
    ]
    assert runner.invoke(app, ["--count", "6"]).exit_code == 2
    assert runner.invoke(app, ["--no-quick"]).exit_code == 2
    assert "Which [kind]." in runner.invoke(app, ["--help"]).output


def test_version_and_no_command(run: Run) -> None:
    assert run("--version").out.strip() == f"freqseg {__version__}"
    assert "segment" in run().out


# What is refused before the work


def refused(run: Run, models: list[StandIn], *words: Any, code: int) -> str:
    """The one sentence a refused command says; no model was loaded for it."""
    done = run(*words)
    assert (done.code, done.out) == (code, "")
    assert models == []
    assert "Traceback" not in done.err
    return done.err


def test_a_missing_file_is_named(run: Run, models: list[StandIn], tmp_path: Path, out: Path) -> None:
    said = refused(run, models, "segment", tmp_path / "no.nrrd", "-p", "lungs", "-o", out / "a.nrrd", code=1)
    assert said == f"{tmp_path / 'no.nrrd'}: no such file or folder\n"


@pytest.mark.parametrize("prompt", ["", "   ", "12 34", "a\x07b", "опухоль мозга", "tumour " * 60])
def test_an_unusable_prompt_is_refused(run: Run, models: list[StandIn], volume: Path, out: Path, prompt: str) -> None:
    assert "rompt" in refused(run, models, "segment", volume, "-p", prompt, "-o", out / "a.nrrd", code=2)


def test_the_same_prompt_twice_is_refused(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    said = refused(run, models, "segment", volume, "-p", "lungs", "-p", " lungs ", "-o", out / "a.nrrd", code=2)
    assert "'lungs' was given twice" in said


def test_an_unknown_preset_offers_the_nearest(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    words = ("-p", "lungs", "-o", out / "a.nrrd", "--preset", "lit")
    assert "Did you mean 'lite'?" in refused(run, models, "segment", volume, *words, code=2)


def test_a_prompt_outside_the_vocabulary_is_refused_before_slices_are_read(
    run: Run, models: list[StandIn], volume: Path, out: Path
) -> None:
    done = run("segment", volume, "-p", "cat", "-o", out / "a.nrrd")
    assert (done.code, models[0].prepared) == (2, None)
    assert "does not know 'cat'" in done.err
    assert run("segment", volume, "-p", "cat", "-o", out / "a.nrrd", "--experimental").code == 0


def test_an_existing_output_is_kept_unless_overwriting_is_allowed(
    run: Run, models: list[StandIn], volume: Path, out: Path
) -> None:
    out.mkdir()
    (out / "a.nrrd").write_text("mine")
    words = ("segment", volume, "-p", "lungs", "-o", out / "a.nrrd")
    assert "--overwrite" in refused(run, models, *words, code=1)
    assert (out / "a.nrrd").read_text() == "mine"
    assert run(*words, "--overwrite").code == 0
    assert Volume.read(out / "a.nrrd").array.max() == 1


@pytest.mark.parametrize(
    ("option", "target", "said"),
    [
        ("-o", "a.xyz", "extension must be one of"),
        ("-o", "a", "extension must be one of"),
        ("-o", "folder.nrrd", "a folder has that name"),
        ("-o", "file.txt/a.nrrd", "is a file; choose another folder"),
        ("--saliency", "s.jpg", "extension must be one of"),
        ("--saliency", "s.seg.nrrd", ".seg.nrrd holds segments"),
        ("--uncertainty", "file.txt/u.nrrd", "is a file; choose another folder"),
        ("--sheet", "file.txt", "is a file; choose another folder"),
        ("--sheet", "old", "holds sheets already"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    run: Run, models: list[StandIn], volume: Path, tmp_path: Path, option: str, target: str, said: str
) -> None:
    (tmp_path / "folder.nrrd").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "lungs-slice-001.png").write_text("mine")
    before = files_in(tmp_path)
    words = [] if option == "-o" else ["-o", tmp_path / "ok.nrrd"]
    err = refused(run, models, "segment", volume, "-p", "lungs", *words, option, tmp_path / target, code=1)
    assert said in err
    assert files_in(tmp_path) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_write_protected_folder_is_refused_first(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    out.mkdir(mode=0o500)
    assert "cannot write" in refused(run, models, "segment", volume, "-p", "x", "-o", out / "a.nrrd", code=1)


def test_the_input_is_never_an_output(run: Run, models: list[StandIn], volume: Path) -> None:
    before = volume.read_bytes()
    said = refused(run, models, "segment", volume, "-p", "lungs", "-o", volume, "--overwrite", code=1)
    assert "is the input" in said
    assert volume.read_bytes() == before


def test_two_outputs_of_one_name_are_refused(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    words = ("-o", out / "a.nrrd", "--saliency", out / "b" / ".." / "a.nrrd")
    assert "asked for twice" in refused(run, models, "segment", volume, "-p", "lungs", *words, code=2)


@pytest.mark.parametrize("words", [["-o", "a.png"], ["-o", "a.nrrd", "--saliency", "s.png"]])
def test_a_picture_cannot_hold_a_volume(
    run: Run, models: list[StandIn], volume: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "one slice" in refused(run, models, "segment", volume, "-p", "lungs", *words, code=1)


def test_a_constant_volume_is_refused_before_the_models(
    run: Run, models: list[StandIn], tmp_path: Path, out: Path
) -> None:
    flat = Volume(np.full(SHAPE, 7, dtype=np.int16), np.eye(4)).write(tmp_path / "flat.nrrd")
    assert "value 7" in refused(run, models, "segment", flat, "-p", "lungs", "-o", out / "a.nrrd", code=1)


def test_voxels_that_are_not_numbers_are_refused_or_filled(
    run: Run, models: list[StandIn], tmp_path: Path, out: Path
) -> None:
    array = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    array[0, 0, :3] = np.nan
    holes = Volume(array, np.eye(4)).write(tmp_path / "holes.nrrd")
    words = ("segment", holes, "-p", "lungs", "-o", out / "a.nrrd")
    assert "3 of 960 voxels are NaN" in refused(run, models, *words, code=1)
    assert run(*words, "--fill-nonfinite", 0).code == 0


def test_missing_weights_are_named_with_the_way_to_get_them(
    run: Run, volume: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "search_folders", lambda: [tmp_path / "nowhere"])
    done = run("segment", volume, "-p", "lungs", "-o", out / "a.nrrd")
    assert done.code == 1
    assert "freqseg models get litemedsam" in done.err
    assert done.err.count("\n") == 1


# What is written and said


def test_segments_carry_their_names_and_colours(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    done = run("segment", volume, "-p", "left lung", "-p", "absent heart", "-o", out / "a.seg.nrrd")
    assert done.code == 0
    header = (out / "a.seg.nrrd").read_bytes().split(b"\n\n")[0].decode()
    assert "Segment0_Name:=left lung\n" in header
    assert "Segment1_Name:=absent heart\n" in header
    assert "Segment0_Color:=0.5 0.25 1\n" in header
    assert files_in(out) == {"a.seg.nrrd"}


def test_the_summary_says_how_much_was_found(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    done = run("segment", volume, "-p", "left lung", "-p", "absent heart", "-o", out / "a.nii.gz")
    millilitres = 2 * 5 * 7 * VOXEL_ML
    assert f"left lung: {millilitres:.2g} ml in 2 slices, score 0.97" in done.out
    assert "absent heart: not found (score 0.12)" in done.out
    assert "1 = left lung, 2 = absent heart" in done.out
    assert str(out / "a.nii.gz") in done.out
    assert set(np.unique(Volume.read(out / "a.nii.gz").array)) == {0, 1}


def test_a_picture_is_counted_in_pixels(run: Run, models: list[StandIn], picture: Path, out: Path) -> None:
    done = run("segment", picture, "-p", "lungs", "-o", out / "a.png", "--one-file-per-segment")
    assert "lungs: 35 pixels, score 0.97" in done.out
    assert set(np.unique(Volume.read(out / "a_lungs.png").array)) == {0, 255}


def test_a_single_slice_with_a_spacing_is_counted_as_an_area(
    run: Run, models: list[StandIn], tmp_path: Path, out: Path
) -> None:
    array = np.random.default_rng(0).integers(0, 100, (1, *SHAPE[1:])).astype(np.int16)
    one = Volume(array, np.diag([2.0, 4.0, 5.0, 1.0])).write(tmp_path / "one.nrrd")
    done = run("segment", one, "-p", "lungs", "-o", out / "a.nrrd", "--axis", "axial")
    assert f"lungs: {5 * 7 * 2 * 4 / 100:g} cm²" in done.out


def test_maps_of_several_prompts_get_a_file_each(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    words = ("--saliency", out / "s.nii.gz", "--uncertainty", out / "deep" / "u.mha", "--one-file-per-segment")
    done = run("segment", volume, "-p", "left lung", "-p", "heart (mri)", "-o", out / "a.nrrd", *words)
    assert done.code == 0
    assert models[0].settings.uncertainty
    assert files_in(out) == {
        "a_left_lung.nrrd",
        "a_heart_mri.nrrd",
        "s-left_lung.nii.gz",
        "s-heart_mri.nii.gz",
        "deep",
        "deep/u-left_lung.mha",
        "deep/u-heart_mri.mha",
    }
    saliency = Volume.read(out / "s-left_lung.nii.gz")
    assert saliency.array.max() == pytest.approx(0.5)
    np.testing.assert_allclose(saliency.affine, Volume.read(volume).affine)


def test_sheets_are_written_and_those_of_an_older_run_replaced(
    run: Run, models: list[StandIn], volume: Path, out: Path
) -> None:
    sheets = out / "sheets"
    sheets.mkdir(parents=True)
    for name in ("lungs-slice-001.png", "lungs-slice-009.png", "heart-slice-001.png", "mine.png"):
        (sheets / name).write_text("old")
    words = ("segment", volume, "-p", "lungs", "-o", out / "a.nrrd", "--sheet", sheets)
    assert run(*words).code == 1
    assert run(*words, "--overwrite").code == 0
    assert files_in(sheets) == {*(f"lungs-slice-00{n}.png" for n in (1, 2, 3)), "heart-slice-001.png", "mine.png"}
    assert (sheets / "lungs-slice-001.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_there_is_on_standard_output(run: Run, models: list[StandIn], volume: Path, out: Path) -> None:
    words = ("--saliency", out / "s.nrrd", "--json")
    done = run("segment", volume, "-p", "left lung", "-p", "absent heart", "-o", out / "a.nrrd", *words)
    found = json.loads(done.out)
    assert found["volume"] == str(volume)
    assert found["preset"] == "lite"
    assert (found["slices"], found["plane"], found["spacing_mm"]) == (3, "axial", [0.5, 0.5, 4.0])
    assert [one["name"] for one in found["segments"]] == ["left lung", "absent heart"]
    assert [one["found"] for one in found["segments"]] == [True, False]
    assert [one["label"] for one in found["segments"]] == [1, 2]
    assert found["segments"][0]["voxels"] == 70
    assert found["segments"][0]["millilitres"] == pytest.approx(70 * VOXEL_ML)
    assert found["outputs"]["segmentation"] == [str(out / "a.nrrd")]
    assert found["outputs"]["saliency"] == [str(out / "s-left_lung.nrrd"), str(out / "s-absent_heart.nrrd")]
    assert found["warnings"] == ["look twice"]
    assert found["settings"]["bottleneck"] is not None


def test_warnings_are_said_once_and_quiet_leaves_only_them(
    run: Run, models: list[StandIn], volume: Path, out: Path
) -> None:
    done = run("segment", volume, "-p", "lungs", "-o", out / "a.nrrd")
    assert done.err.count("look twice") == 1
    assert "Reading slices (3 of 3)" in done.err
    done = run("segment", volume, "-p", "lungs", "-o", out / "b.nrrd", "--quiet")
    assert (done.out, done.err) == ("", "Warning: look twice\n")


# All or nothing


def break_off(monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str) -> None:
    """Fail while the maps, or the sheets, are written: after the segmentation is."""
    import FreqSegLib.sheet

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if where == "maps":
        monkeypatch.setattr(Volume, "write", fail)
    else:
        monkeypatch.setattr(FreqSegLib.sheet, "sheet_figure", fail)


@pytest.mark.parametrize("where", ["maps", "sheets"])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, CANCELLED),
        (OSError(28, "No space left on device"), 1, "o space left on"),
        (InputError("bad luck"), 1, "bad luck"),
    ],
)
def test_a_run_that_breaks_off_leaves_everything_as_it_was(
    run: Run,
    models: list[StandIn],
    volume: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    out.mkdir()
    (out / "a.nrrd").write_text("mine")
    break_off(monkeypatch, error, where)
    words = ("--saliency", out / "new" / "s.nrrd", "--sheet", out / "deep" / "sheets", "--overwrite")
    done = run("segment", volume, "-p", "lungs", "-o", out / "a.nrrd", *words)
    assert done.code == code
    assert said in done.err
    assert ".freqseg-" not in done.err
    assert files_in(out) == {"a.nrrd"}
    assert (out / "a.nrrd").read_text() == "mine"


def test_a_file_that_cannot_be_moved_takes_the_others_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"old {name}")
    really = os.replace

    def locked(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "b.txt" and Path(source).read_text() == "new":
            raise PermissionError(13, "in use", str(source))
        really(source, target)

    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(OutputError, match="in use"):
        delivered([tmp_path / name for name in ("a.txt", "b.txt", "c.txt")], overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old a.txt", "b.txt": "old b.txt"}


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def theirs() -> None:
        (tmp_path / "a.txt").write_text("theirs")

    with pytest.raises(OutputError, match="exists already"):
        delivered([tmp_path / "a.txt", tmp_path / "b.txt"], overwrite=False, meanwhile=theirs)
    assert files_in(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_text() == "theirs"


def delivered(paths: Sequence[Path], *, overwrite: bool, meanwhile: Callable[[], None] = lambda: None) -> None:
    from FreqSegLib.cli_output import Delivery

    with Delivery.prepared(overwrite=overwrite) as delivery:
        for path in paths:
            delivery.place(path).write_text("new")
        meanwhile()
        delivery.deliver()


def test_an_unexpected_error_asks_for_a_report_and_keeps_its_traceback(
    run: Run, models: list[StandIn], volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(StandIn, "segment", fail)
    done = run("segment", volume, "-p", "lungs", "-o", out / "a.nrrd", "--quiet")
    assert done.code == 1
    assert "report" in done.err.splitlines()[0]
    assert "Traceback" in done.err
    assert done.err.rstrip().endswith("ZeroDivisionError: of all things")


def test_a_signal_while_files_are_moved_comes_too_late() -> None:
    import signal

    from FreqSegLib.cli_app import Interrupts

    interrupts = Interrupts()
    with interrupts.caught():
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.asked()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            pytest.fail("a stopped run must not deliver")
    assert interrupts.exit_code == 130


# Progress


def test_plain_progress_does_not_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from FreqSegLib import cli_progress

    now = [0.0]
    monkeypatch.setattr(cli_progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    said = io.StringIO()
    with cli_progress.progress_on(Console(file=said)) as show:
        for done in range(251):
            show("Reading slices", done, 250, 25 - done / 10)
            now[0] += 0.125
        show("Writing", 0, 0, None)
    assert said.getvalue().splitlines() == [
        "Reading slices (0 of 250, about 25 s left)",
        "Reading slices (80 of 250, about 17 s left)",
        "Reading slices (160 of 250, about 9 s left)",
        "Reading slices (240 of 250, about 1 s left)",
        "Writing",
    ]


def test_bars_show_stage_count_and_time_left() -> None:
    import io

    from rich.console import Console

    from FreqSegLib.cli_progress import progress_on

    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=100, color_system=None)
    with progress_on(console) as show:
        show("Reading slices", 9, 25, 24.0)
        console.print("x")
        show("Drawing: lungs", 2, 2, 0.0)
    assert re.search(r"Reading slices .* 9 of 25 +24 s left", said.getvalue())
    assert re.search(r"✓ Reading slices .*25", said.getvalue().split("x")[-1])
    assert re.search(r"✓ Drawing: lungs .* 2 of 2", said.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (80, "1 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_read_naturally(seconds: float, text: str) -> None:
    from FreqSegLib.cli_progress import readable_time

    assert readable_time(seconds) == text


# The other commands


CONTENT = bytes(range(256)) * 400


@pytest.fixture
def toy_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One set of weights called "toy" on a server of this computer, and an empty folder to fetch it to."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    source = weights.UrlSource(f"http://127.0.0.1:{server.server_port}/toy.bin")
    file = weights.WeightFile("toy.bin", sha256(CONTENT).hexdigest(), len(CONTENT), (source,))
    toy = weights.WeightSet("toy", "A toy", (file,), "CC0-1.0", "")
    monkeypatch.setattr(weights, "_SETS", (*weights._SETS, toy))
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(tmp_path / "w"))
    yield tmp_path / "w" / "toy"
    server.shutdown()
    server.server_close()


def test_weights_are_fetched_after_their_licence_was_shown_then_verified_and_removed(
    run: Run, toy_weights: Path
) -> None:
    done = run("models", "get", "toy", "--yes")
    assert done.code == 0, done.err
    assert (toy_weights / "toy.bin").read_bytes() == CONTENT
    for fact in ("A toy", "CC0-1.0", "102.4 kB", "127.0.0.1", sha256(CONTENT).hexdigest()):
        assert fact in done.out
    assert "here already" in run("models", "get", "toy").out
    assert "all files are sound" in run("models", "verify", "toy").out

    (toy_weights / "toy.bin").write_bytes(CONTENT[::-1])
    done = run("models", "verify", "toy")
    assert done.code == 1
    assert sha256(CONTENT).hexdigest() in done.err

    assert run("models", "remove", "toy", "--yes").code == 0
    assert not toy_weights.exists()
    assert run("models", "remove", "toy", "--yes").code == 1


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_nothing_is_fetched_without_a_yes(
    run: Run, toy_weights: Path, monkeypatch: pytest.MonkeyPatch, answer: str, fetched: bool
) -> None:
    import io

    asked = io.StringIO(answer)
    asked.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", asked)
    assert run("models", "get", "toy").code == 0
    assert (toy_weights / "toy.bin").exists() is fetched


def test_where_nobody_can_answer_yes_must_be_given(run: Run, toy_weights: Path) -> None:
    done = run("models", "get", "toy")
    assert done.code == 2
    assert "--yes" in done.err
    assert not toy_weights.exists()


def test_unknown_weights_name_the_nearest(run: Run) -> None:
    done = run("models", "get", "sam-vit-x")
    assert done.code == 2
    assert "sam-vit-b" in done.err


def test_every_set_of_weights_is_listed(run: Run) -> None:
    text = run("models", "list").out
    for one in weights.catalogue():
        assert one in text


def test_info_tells_programs_versions_devices_weights_and_cache(run: Run, cache_folder: Path) -> None:
    import torch

    found = json.loads(run("info", "--json").out)
    assert found["freqseg"] == __version__
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["compute"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["compute"]["threads"] == torch.get_num_threads()
    assert set(found["presets"]["lite"]) == {"litemedsam", "minilm", "lite-aligner"}
    assert found["cache"]["folder"] == str(cache_folder)
    assert "threads" in run("info").out


def test_the_cache_is_shown_and_cleared_without_touching_other_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from FreqSegLib.embedding_cache import EmbeddingCache

    monkeypatch.setenv("FREQSEG_CACHE", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.npy").write_text("precious")
    EmbeddingCache().put("0" * 32, "tokens", np.zeros(5000, dtype=np.float16))
    assert "10.1 kB" in run("cache").out
    assert "10.1 kB" in run("cache", "--clear").out
    assert files_in(tmp_path) == {"mine", "mine/thesis.npy"}


def test_the_demo_says_simulated_and_that_an_absent_target_is_left_empty(
    run: Run, models: list[StandIn], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from FreqSegLib import cli_demo, samples

    def small(name: str) -> Path:
        array = np.random.default_rng(0).integers(0, 100, SHAPE).astype(np.int16)
        if name == samples.LESION:
            array = np.zeros(SHAPE, dtype=np.int16)
            array[:2, 4:9, 3:17] = 1
        return Volume(array, np.diag([*SPACING, 1.0])).write(tmp_path / name, overwrite=True)

    monkeypatch.setattr(samples, "sample", small)
    monkeypatch.setattr(cli_demo, "check_weights", lambda chosen: None)
    monkeypatch.setattr(cli_demo, "ABSENT", "absent lungs")
    out.mkdir()
    (out / "demo.png").write_text("of an earlier demo")
    done = run("demo", "-o", out)
    assert done.code == 0, done.err
    assert f"DSC {2 * 70 / (70 + 2 * 5 * 13):.2f}" in done.out
    assert "simulated" in done.out
    assert "absent lungs: not found (score 0.12), as it should be" in done.out
    assert files_in(out) == {
        "demo.png",
        "result.seg.nrrd",
        "saliency.nrrd",
        "sheets",
        *(f"sheets/brain_tumour-slice-00{number}.png" for number in (1, 2, 3)),
    }
    assert Image.open(out / "demo.png").width == 1600


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "utf-8"}
