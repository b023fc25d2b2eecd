"""Phase 1 on a user's own pairs: tables that do not fit, what is learned, and what stays as it was."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from official_layouts import write_random_biomedclip
from two_processes import run_twice

from FreqSegLib.cli import main
from FreqSegLib.clip.aligner import Aligner, AlignerConfig
from FreqSegLib.clip.open_clip_encoder import OpenCLIPEncoder
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.mamba.model_config import from_mapping
from FreqSegLib.training.contrastive_pairs import Pair, PairData, files_in_no_pair, read_pairs, read_picture
from FreqSegLib.training.contrastive_recipe import ContrastiveRecipe, PairPhase, accuracies, train_contrastive
from FreqSegLib.training.contrastive_towers import LiteTowers, OpenClipTowers, cached_embeddings
from FreqSegLib.training.dhn_nce import DHNNCELoss
from FreqSegLib.training.loop import fit
from FreqSegLib.volume import Volume

SMALL = AlignerConfig(width=32, depth=1, class_depth=1, num_heads=2, embedding_channels=6, pooled_side=8, embed_dim=16)
MEANINGS = ("bright", "dark", "striped")


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(array[None].astype(np.uint8), np.eye(4), spatial_dimension=2).write(path)


def write_table(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns or rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rows_of(folder: Path, count: int = 6) -> list[dict[str, str]]:
    """Images and lines, one group an image, three meanings in turn."""
    rows = []
    for number in range(count):
        image = np.arange(64).reshape(8, 8) * (1 + number % 3)
        write_image(folder / "images" / f"p{number}.png", image)
        rows.append(
            {"image": f"images/p{number}.png", "caption": f"a {MEANINGS[number % 3]} picture", "group": f"g{number}"}
        )
    return rows


def pairs_of(meanings: Sequence[str], splits: Sequence[str] | None = None) -> list[Pair]:
    splits = splits or ["train"] * len(meanings)
    return [
        Pair(n, Path(f"{n}.png"), None, f"{meaning} {n}", f"g{n}", meaning, split)
        for n, (meaning, split) in enumerate(zip(meanings, splits, strict=True))
    ]


# -------------------------------------------------------------------------------------------------------- the table


def test_a_table_is_read_with_groups_meanings_and_splits(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    for number, row in enumerate(rows):
        row.update(split="validation" if number < 3 else "train", meaning=MEANINGS[number % 3])
    write_table(tmp_path / "pairs.csv", rows)
    pairs = read_pairs(PairData("pairs.csv"), tmp_path)
    assert [pair.split for pair in pairs] == ["validation"] * 3 + ["train"] * 3
    assert [pair.meaning for pair in pairs] == [*MEANINGS, *MEANINGS]
    assert pairs[0].image == tmp_path / "images" / "p0.png"
    assert [pair.line for pair in pairs] == [2, 3, 4, 5, 6, 7]


def test_without_splits_whole_groups_are_held_out_by_name_alone(tmp_path: Path) -> None:
    rows = [{**row, "group": f"g{n // 3}"} for n, row in enumerate(rows_of(tmp_path, 12))]
    write_table(tmp_path / "pairs.csv", rows)
    pairs = read_pairs(PairData("pairs.csv", validation_share=0.3), tmp_path)
    held_out = {pair.group for pair in pairs if pair.split == "validation"}
    assert len(held_out) == 1
    assert all(pair.split == ("validation" if pair.group in held_out else "train") for pair in pairs)
    write_table(tmp_path / "pairs.csv", rows[::-1])
    again = read_pairs(PairData("pairs.csv", validation_share=0.3), tmp_path)
    assert {pair.group for pair in again if pair.split == "validation"} == held_out


def test_every_line_that_does_not_fit_is_listed_with_the_file_that_may_be_meant(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    rows[0]["image"] = "images/p0.jpg"
    rows[2]["caption"] = "  "
    rows[3]["image"] = ""
    write_table(tmp_path / "pairs.csv", rows)
    with pytest.raises(InputError) as caught:
        read_pairs(PairData("pairs.csv"), tmp_path)
    told = str(caught.value)
    assert "line 2: there is no file" in told
    assert "(is it 'p0.png'?)" in told
    assert "line 4 has no caption" in told
    assert "line 5 names no image" in told


def test_a_split_or_slice_that_means_nothing_is_named(tmp_path: Path) -> None:
    rows = [{**row, "split": "train", "slice": "1"} for row in rows_of(tmp_path)]
    rows[1]["split"], rows[4]["slice"] = "test", "last"
    write_table(tmp_path / "pairs.csv", rows)
    with pytest.raises(InputError, match=r"line 3: the split must be train or validation, got 'test'; line 6: the sl"):
        read_pairs(PairData("pairs.csv"), tmp_path)


def test_a_patient_in_both_splits_is_refused(tmp_path: Path) -> None:
    rows = [
        {**row, "group": "x", "split": "train" if n < 3 else "validation"} for n, row in enumerate(rows_of(tmp_path))
    ]
    write_table(tmp_path / "pairs.csv", rows)
    with pytest.raises(InputError, match="in one split only, these are in both: x"):
        read_pairs(PairData("pairs.csv"), tmp_path)


def test_empty_missing_and_misnamed_tables_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the table .*pairs\.csv"):
        read_pairs(PairData("pairs.csv"), tmp_path)
    write_table(tmp_path / "pairs.csv", [], ("image", "caption"))
    with pytest.raises(InputError, match="a heading and no pairs"):
        read_pairs(PairData("pairs.csv"), tmp_path)
    write_table(tmp_path / "pairs.csv", [{"image": "a", "captions": "b"}])
    with pytest.raises(SettingsError, match="no column 'caption'; did you mean 'captions'"):
        read_pairs(PairData("pairs.csv"), tmp_path)
    rows = [{**row, "caption": "the same"} for row in rows_of(tmp_path)]
    write_table(tmp_path / "pairs.csv", rows)
    with pytest.raises(InputError, match="at least 2 meanings in both splits; train has 1"):
        read_pairs(PairData("pairs.csv"), tmp_path)


def test_files_that_no_line_names_are_found(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    write_image(tmp_path / "images" / "forgotten.png", np.arange(64).reshape(8, 8))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 3 else "validation"
    write_table(tmp_path / "pairs.csv", rows)
    assert [path.name for path in files_in_no_pair(read_pairs(PairData("pairs.csv"), tmp_path))] == ["forgotten.png"]


def test_a_volume_needs_its_slice_named_and_gives_that_one(tmp_path: Path) -> None:
    array = np.zeros((5, 8, 8), dtype=np.float32)
    array[3] = 1
    Volume(array, np.diag([1.0, 1, 1, 1])).write(tmp_path / "v.nrrd")
    pair = Pair(7, tmp_path / "v.nrrd", None, "c", "g", "m", "train")
    with pytest.raises(InputError, match="5 slices; say in a column 'slice' which one line 7 means"):
        read_picture(pair, PairData(""), 16)
    data = PairData("", axis="axial", intensity="percentile")
    assert read_picture(Pair(7, pair.image, 3, "c", "g", "m", "train"), data, 16).min() == 1
    assert read_picture(Pair(7, pair.image, 2, "c", "g", "m", "train"), data, 16).max() == 0
    with pytest.raises(InputError, match="5 slices, line 7 asks for number 6"):
        read_picture(Pair(7, pair.image, 5, "c", "g", "m", "train"), data, 16)


def test_embeddings_are_computed_once_an_image(tmp_path: Path) -> None:
    rows_of(tmp_path, 2)
    files = [tmp_path / "images" / f"p{n}.png" for n in (0, 1, 0)]
    pairs = [Pair(n, file, None, "c", "g", "m", "train") for n, file in enumerate(files)]
    asked = []

    def embed(images: torch.Tensor) -> torch.Tensor:
        asked.append(images.shape)
        return images[:, :1, :64, :64].expand(-1, 256, -1, -1)

    first = cached_embeddings(pairs, PairData(""), tmp_path / "work", embed, lambda line: None)
    assert first.shape == (3, 256, 32, 32)
    assert asked == [(1, 3, 256, 256)] * 2
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(cached_embeddings(pairs, PairData(""), tmp_path / "work", embed, lambda line: None), first)
    assert len(asked) == 2


# ------------------------------------------------------------------------------------------------------ measurement


def test_accuracy_is_among_meanings_and_again_without_absence() -> None:
    meanings = ["tumour", "no tumour", "lesion", "tumour"]
    scores = torch.tensor([[0.9, 0.2, 0.3, 0.1], [0.5, 0.4, 0.1, 0.9], [0.1, 0.6, 0.5, 0.1], [0.2, 0.3, 0.1, 0.6]])
    negatives = torch.tensor([[meanings[i] != meanings[j] for j in range(4)] for i in range(4)])
    found = accuracies(scores, negatives, meanings, ("no tumour",))
    # 0 and 3 are right; 1 loses to "tumour"'s first caption (0.5), 2 to "no tumour", which is absence
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert found["accuracy_absence_apart"] == pytest.approx(3 / 3)
    # captions: 0 over 0.5, 1 not over 0.6, 2 over 0.3, 3 not over 0.9
    assert found["text_accuracy"] == pytest.approx(2 / 4)
    assert np.isnan(accuracies(scores[:1, :1], negatives[:1, :1], meanings[:1], ())["accuracy"])


# --------------------------------------------------------------------------------------------------------- training


def lite_towers(seed: int = 0, count: int = 48, noise: float = 0.05) -> tuple[LiteTowers, list[Pair]]:
    """Three kinds of embeddings, three kinds of sentences in several wordings."""
    rng = np.random.default_rng(1)
    pairs = pairs_of(
        [MEANINGS[n % 3] for n in range(count)], ["validation" if n % 4 == 3 else "train" for n in range(count)]
    )
    centres, said = rng.normal(size=(3, 6)), torch.from_numpy(rng.normal(size=(3, 16))).float()
    embeddings = np.stack([centres[n % 3][:, None, None] + rng.normal(0, 0.5, (6, 8, 8)) for n in range(count)])
    sentences = torch.stack([said[n % 3] for n in range(count)]) + 0.3 * torch.from_numpy(rng.normal(size=(count, 16)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        aligner = Aligner(SMALL)
    return LiteTowers(
        aligner, pairs, embeddings.astype(np.float16), F.normalize(sentences.float(), dim=1), noise, from_scratch=True
    ), pairs


def recipe_of(**training: Any) -> ContrastiveRecipe:
    values = {"epochs": 8, "batch_size": 12, "learning_rate": 3e-3, "warmup_epochs": 0.5, **training}
    return from_mapping(ContrastiveRecipe, {"name": "small", "data": {"table": "t.csv"}, "training": values}, "test")


def test_pairs_are_learned_and_a_stopped_run_repeats_itself(tmp_path: Path) -> None:
    towers, pairs = lite_towers()
    phase = PairPhase(towers, pairs, recipe_of())
    before = phase.validate()["accuracy"]
    best = fit(towers, phase.batch_loss, phase.validate, tmp_path / "whole", phase.loop_config())
    assert best["accuracy"] == 1.0
    assert before < 0.9
    broken, _ = lite_towers()
    second = PairPhase(broken, pairs, recipe_of())

    def stopped(number: int) -> torch.Tensor:
        if number == 7:
            raise KeyboardInterrupt
        return second.batch_loss(number)

    with pytest.raises(KeyboardInterrupt):
        fit(broken, stopped, second.validate, tmp_path / "broken", second.loop_config())
    other, _ = lite_towers(seed=5)
    third = PairPhase(other, pairs, recipe_of())
    fit(other, third.batch_loss, third.validate, tmp_path / "broken", third.loop_config())
    assert (tmp_path / "broken" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), towers.parameters(), strict=True))


def test_the_loss_is_dhn_nce_with_captions_of_the_same_meaning_left_out() -> None:
    towers, pairs = lite_towers(noise=0.0)
    phase = PairPhase(towers, pairs, recipe_of(batch_size=9))
    order = np.random.default_rng((0, 0)).permutation(phase.train_rows)[:9]
    images, texts = towers(order)
    meanings = [pairs[row].meaning for row in order]
    negatives = torch.tensor([[a != b for b in meanings] for a in meanings])
    assert torch.allclose(phase.batch_loss(0), DHNNCELoss(0.6, 0.15, 0.15)(images, texts, negatives), atol=1e-6)
    assert not torch.allclose(phase.batch_loss(0), DHNNCELoss(0.6, 0.15, 0.15)(images, texts), atol=1e-3)


def test_an_image_with_two_true_captions_has_neither_as_a_negative() -> None:
    pairs = [
        Pair(n, Path(image), None, meaning, image, meaning, "train")
        for n, (image, meaning) in enumerate([("a", "one"), ("a", "two"), ("b", "one"), ("c", "three")])
    ]
    towers = LiteTowers(Aligner(SMALL), pairs, np.zeros((4, 6, 8, 8), np.float16), torch.ones(4, 16))
    phase = PairPhase(towers, pairs, recipe_of())
    rows = np.arange(4)
    expected = [[0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 0]]
    assert phase._negatives(rows, rows).int().tolist() == expected


def test_each_epoch_shows_every_pair_once() -> None:
    towers, pairs = lite_towers()
    phase = PairPhase(towers, pairs, recipe_of(batch_size=12))
    assert phase.loop_config().steps == 8 * 3
    shown: list[np.ndarray] = []
    towers.images = lambda rows, noise=None: (shown.append(rows), torch.ones(len(rows), 16))[1]  # type: ignore[method-assign]
    for number in range(3):
        phase.batch_loss(number)
    assert sorted(np.concatenate(shown)) == sorted(phase.train_rows)


TWO_PROCESSES = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_contrastive_training import lite_towers, recipe_of
from FreqSegLib.training.contrastive_recipe import PairPhase
from FreqSegLib.training.processes import Team, processes
with processes(torch.device("cpu")) as (rank, world, place):
    towers, pairs = lite_towers()
    phase = PairPhase(towers, pairs, recipe_of(), place, Team(rank, world))
    loss = phase.batch_loss(1)
    loss.backward()
    found = phase.validate()
    if rank == 0:
        torch.save({"loss": loss.detach(), "score": torch.tensor(found["score"]),
                    "gradients": [p.grad for p in towers.parameters()]}, sys.argv[1])
"""


def test_two_processes_have_the_gradient_of_one(tmp_path: Path, project_root: Path) -> None:
    run_twice(TWO_PROCESSES, tmp_path / "found.pt", project_root)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    towers, pairs = lite_towers()
    phase = PairPhase(towers, pairs, recipe_of())
    loss = phase.batch_loss(1)
    loss.backward()
    assert torch.allclose(found["loss"], loss, atol=1e-6)
    assert float(found["score"]) == pytest.approx(phase.validate()["score"])
    for gradient, parameter in zip(found["gradients"], towers.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- open_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_biomedclip(tmp_path_factory.mktemp("clip") / "tiny", seed=1)


def clip_towers(folder: Path, tune: str) -> tuple[OpenClipTowers, list[Pair]]:
    pairs = pairs_of(["lung", "brain", "breast", "lung", "brain"], ["train"] * 3 + ["validation"] * 2)
    pictures = np.random.default_rng(0).integers(0, 255, (5, 224, 224), dtype=np.uint8)
    return OpenClipTowers(OpenCLIPEncoder.from_folder(folder), folder, pairs, pictures, tune), pairs


@pytest.mark.parametrize("tune", ["heads", pytest.param("all", marks=pytest.mark.slow)])
def test_an_open_clip_model_is_trained_as_far_as_asked_and_loads_as_any_other(
    clip_folder: Path, tmp_path: Path, tune: str
) -> None:
    towers, pairs = clip_towers(clip_folder, tune)
    untouched = {key: value.clone() for key, value in towers.model.state_dict().items()}
    images, texts = towers(np.arange(2))
    encoder = OpenCLIPEncoder.from_folder(clip_folder)
    pixels = torch.from_numpy(towers._pictures[:2].numpy())[:, None].float().expand(-1, 3, -1, -1) / 255
    assert torch.allclose(images, encoder.encode_image(pixels), atol=1e-5)
    assert torch.allclose(texts, encoder.encode_text(["lung 0", "brain 1"]), atol=1e-5)

    phase = PairPhase(towers, pairs, recipe_of(batch_size=3, epochs=1, learning_rate=1e-2, warmup_epochs=0))
    fit(towers, phase.batch_loss, phase.validate, tmp_path / "run", phase.loop_config())
    changed = {key for key, value in towers.model.state_dict().items() if not torch.equal(value, untouched[key])}
    heads = {key for key in untouched if key.startswith(("visual.head.", "text.proj."))}
    assert changed == heads if tune == "heads" else changed > heads
    assert "logit_scale" not in changed

    usage = towers.save(tmp_path / "mine")
    assert "--clip-folder" in usage
    loaded = OpenCLIPEncoder.from_folder(tmp_path / "mine")
    assert torch.allclose(loaded.encode_image(pixels), towers.eval().images(np.arange(2)), atol=1e-5)
    assert not torch.allclose(loaded.encode_image(pixels), encoder.encode_image(pixels), atol=1e-3)


# -------------------------------------------------------------------------------------------- configuration, command


def test_a_configuration_trains_an_open_clip_model_end_to_end(clip_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "split": "train" if n < 3 else "validation"} for n, row in enumerate(rows_of(tmp_path, 6))]
    write_table(tmp_path / "pairs.csv", rows)
    config = {
        "name": "mine",
        "data": {"table": "pairs.csv", "absence": ["a dark picture"]},
        "encoder": "open_clip",
        "start": str(clip_folder),
        "training": {"epochs": 1, "batch_size": 3},
        "work": str(tmp_path / "work"),
        "models": str(tmp_path / "models"),
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    said: list[str] = []
    folder = train_contrastive(path, said.append, device="cpu")
    assert OpenCLIPEncoder.from_folder(folder).embed_dim == 24
    card = (folder / "README.md").read_text()
    assert "3 training of 3 groups" in card
    assert "accuracy_absence_apart" in card
    assert (tmp_path / "work" / "mine" / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({**config, "training": {"epochs": 2, "batch_size": 3}}))
    with pytest.raises(SettingsError, match="run of another recipe"):
        train_contrastive(path, said.append, device="cpu")


def test_a_typo_in_the_configuration_is_answered_with_the_nearest_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"name": "x", "data": {"table": "t.csv", "captions": "text"}}))
    assert main(["train", "contrastive", str(path)]) == 2
    assert "there is no key 'captions'; did you mean 'caption'" in " ".join(capsys.readouterr().err.split())
    path.write_text(json.dumps({"name": "x", "data": {"table": "t.csv"}, "training": {"temperature": 0}}))
    assert main(["train", "contrastive", str(path)]) == 2
    assert "temperature must be above 0" in " ".join(capsys.readouterr().err.split())


def test_the_phases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("contrastive", "text-guided", "pseudo-labels"))


@pytest.mark.slow
@pytest.mark.data
def test_the_lite_aligner_learns_from_ultrasound_captions(
    shared_data: Path, lite_weights: Path, tmp_path: Path
) -> None:
    """From scratch on real images: normal breasts are told from those with a lesion better than by chance."""
    rows = []
    for image in sorted((shared_data / "segmentation" / "busi" / "train" / "images").glob("*.png")):
        kind = image.name.split("_")[0]
        said = "a breast ultrasound without a lesion" if kind == "normal" else "a breast ultrasound with a lesion"
        rows.append({"image": str(image), "caption": said, "meaning": "absent" if kind == "normal" else "lesion"})
    write_table(tmp_path / "pairs.csv", rows)
    config = {
        "name": "busi",
        "data": {"table": "pairs.csv", "absence": ["absent"], "validation_share": 0.3},
        "start": "scratch",
        "training": {"epochs": 15, "batch_size": 24},
        "work": str(tmp_path / "work"),
        "models": str(tmp_path / "models"),
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    said: list[str] = []
    folder = train_contrastive(tmp_path / "c.json", said.append, device="cpu")
    results = json.loads((tmp_path / "work" / "busi" / "results.json").read_text())
    assert results["best"]["accuracy"] > 0.7
    assert Aligner.load(folder / "lite-aligner" / "aligner.safetensors").config == AlignerConfig()
