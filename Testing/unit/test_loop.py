"""The training loop: resumed exactly, stopped early, never past a loss that is not finite."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from FreqSegLib.errors import FreqSegError, OutputError, SettingsError
from FreqSegLib.training import loop
from FreqSegLib.training.curves import draw_curves
from FreqSegLib.training.loop import LoopConfig, fit, rate
from FreqSegLib.training.processes import Team
from FreqSegLib.training.work_folder import claim

CONFIG = LoopConfig(steps=12, learning_rate=0.05, warmup=2, validate_every=3, patience=10)


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def task(
    model: nn.Module, stop_at: int | None = None
) -> tuple[Callable[[int], Tensor], Callable[[], dict[str, float]]]:
    """Regression on batches drawn from the step; ``stop_at`` interrupts the run there."""

    def batch_loss(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()

    def validate() -> dict[str, float]:
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(999))
        with torch.no_grad():
            error = float(((model(x) - x.sum(1, keepdim=True)) ** 2).mean())
        return {"score": -error, "error": error}

    return batch_loss, validate


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture
def unbroken(tmp_path: Path) -> tuple[nn.Module, dict[str, float], Path]:
    model = new_model()
    best = fit(model, *task(model), tmp_path / "unbroken", CONFIG)
    return model, best, tmp_path / "unbroken"


def without_time(best: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in best.items() if key != "seconds"}


def test_another_networks_checkpoint_is_named_in_one_sentence_and_kept(unbroken, tmp_path: Path) -> None:
    _, _, folder = unbroken
    before = (folder / "last.pt").read_bytes()
    wider = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 1))
    said = r"last\.pt is of another network \(size mismatch for .*Give another folder"
    with pytest.raises(SettingsError, match=said) as told:
        fit(wider, *task(wider), folder, CONFIG)
    assert "\n" not in str(told.value)
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize("stop_at", [0, 2, 3, 7, 11])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(unbroken, tmp_path: Path, stop_at: int) -> None:
    folder = tmp_path / "broken"
    first = new_model()
    with pytest.raises(KeyboardInterrupt):
        fit(first, *task(first, stop_at), folder, CONFIG)
    # a new process starts from other random weights, unless nothing was saved yet
    second = new_model(0 if stop_at < 3 else 1)
    best = fit(second, *task(second), folder, CONFIG)
    model, expected, whole = unbroken
    assert without_time(best) == without_time(expected)
    assert same_weights(second, model)
    assert rows(folder) == rows(whole)
    last = [torch.load(place / "last.pt", weights_only=True)["model"] for place in (folder, whole)]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[1])


@pytest.mark.parametrize("lost", ["last.pt", "best.pt"])
def test_a_run_killed_while_it_saves_has_each_step_once_in_its_log(
    unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    folder = tmp_path / "killed"
    save, calls = loop._save, []

    def killed(content: dict, path: Path) -> None:
        calls.append(path.name)
        if calls.count(lost) == 2 and path.name == lost:
            raise KeyboardInterrupt
        save(content, path)

    monkeypatch.setattr(loop, "_save", killed)
    first = new_model()
    with pytest.raises(KeyboardInterrupt):
        fit(first, *task(first), folder, CONFIG)
    monkeypatch.undo()
    second = new_model(1)
    fit(second, *task(second), folder, CONFIG)
    assert rows(folder) == rows(unbroken[2])
    assert same_weights(second, unbroken[0])


def test_a_finished_run_is_not_trained_further(unbroken) -> None:
    model, best, folder = unbroken
    again = new_model(1)

    def never(step: int) -> Tensor:
        raise AssertionError(step)

    assert without_time(fit(again, never, lambda: {"score": 1e9}, folder, CONFIG)) == without_time(best)
    assert same_weights(again, model)


@pytest.mark.parametrize(("keep", "step"), [("best", 3), ("last", 12)])
def test_a_run_ends_with_the_weights_it_is_told_to_keep(tmp_path: Path, keep: str, step: int) -> None:
    # the first validation is the best, whatever is learned after it
    config = replace(CONFIG, keep=keep)
    scores = iter(range(0, -100, -1))
    model = new_model()
    found = fit(model, task(model)[0], lambda: {"score": float(next(scores))}, tmp_path, config)
    assert found["step"] == step
    saved = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"] for name in ("best", "last")}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in saved[keep].items())
    assert not all(torch.equal(saved["best"][key], value) for key, value in saved["last"].items())
    again = new_model(1)
    assert fit(again, *task(again, 0), tmp_path, config)["step"] == step
    assert same_weights(again, model)


def test_the_log_has_every_validation_with_its_rate_and_mean_loss(unbroken) -> None:
    _, best, folder = unbroken
    found = rows(folder)
    assert [float(row["step"]) for row in found] == [3, 6, 9, 12]
    assert [float(row["rate"]) for row in found] == [rate(step, CONFIG) for step in (2, 5, 8, 11)]
    assert max(float(row["score"]) for row in found) == best["score"]
    model, losses = new_model(), []
    batch_loss, _ = task(model)
    # the first three losses, by torch's own optimiser at the logged rates
    groups = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() <= 1]]
    decay = [CONFIG.weight_decay, 0.0]
    optimiser = torch.optim.AdamW([{"params": g, "weight_decay": d} for g, d in zip(groups, decay, strict=True)])
    for step in range(3):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, CONFIG)
        loss = batch_loss(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_norm)
        optimiser.step()
        losses.append(loss.item())
    assert float(found[0]["loss"]) == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_the_rate_warms_up_and_ends_at_the_final_rate() -> None:
    config = LoopConfig(steps=110, warmup=10, learning_rate=1.0, final_rate=1e-3)
    assert rate(0, config) == pytest.approx(0.1)
    assert rate(9, config) == pytest.approx(1.0)
    assert rate(10, config) == pytest.approx(1.0)
    assert rate(60, config) == pytest.approx((1 + 1e-3) / 2)
    assert rate(110, config) == pytest.approx(1e-3)
    assert all(rate(step, config) > rate(step + 1, config) for step in range(10, 109))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_by_name_and_keeps_the_checkpoint(tmp_path: Path, value: float) -> None:
    model = new_model()
    batch_loss, validate = task(model)
    with pytest.raises(FreqSegError, match=rf"became {value} at step 7.*learning rate"):
        fit(model, lambda step: batch_loss(step) * (value if step == 7 else 1), validate, tmp_path, CONFIG)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["state"]["step"] == 6
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def scripted(scores: list[float]) -> Callable[[], dict[str, float]]:
    left = iter(scores)
    return lambda: {"score": next(left)}


def test_it_stops_early_and_ends_with_the_best_weights(tmp_path: Path) -> None:
    model = new_model()
    batch_loss, _ = task(model)
    weights_at: list[dict[str, Tensor]] = []
    config = LoopConfig(steps=100, validate_every=2, patience=2, warmup=0, learning_rate=0.05)

    def keep(row: dict[str, float]) -> None:
        weights_at.append({key: value.clone() for key, value in model.state_dict().items()})

    best = fit(model, batch_loss, scripted([0.1, 0.5, 0.3, 0.6, 0.6, 0.2, 0.9]), tmp_path, config, keep)
    assert best["score"] == 0.6
    assert best["step"] == 8
    assert len(weights_at) == 6
    assert all(torch.equal(value, weights_at[3][key]) for key, value in model.state_dict().items())
    assert not model.training


def test_a_score_that_is_nan_at_first_is_beaten_by_the_next(tmp_path: Path) -> None:
    model = new_model()
    batch_loss, _ = task(model)
    best = fit(model, batch_loss, scripted([float("nan"), 0.2, 0.1, 0.15]), tmp_path, CONFIG)
    assert best["score"] == 0.2


def test_the_last_step_is_validated_where_it_does_not_fall_on_a_multiple(tmp_path: Path) -> None:
    model = new_model()
    batch_loss, validate = task(model)
    fit(model, batch_loss, validate, tmp_path, LoopConfig(steps=5, validate_every=3, warmup=0))
    assert [float(row["step"]) for row in rows(tmp_path)] == [3, 5]


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = new_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, *task(model), tmp_path, LoopConfig(steps=3, validate_every=3, learning_rate=0.5))
    assert torch.equal(model[0].weight, before)


# ------------------------------------------------------------------------------------------------------ accumulation


def plain_model() -> nn.Module:
    """Without batch norm, whose statistics are those of the small batches."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def mean_loss(model: nn.Module, rows: range) -> Tensor:
    x = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(row)) for row in rows]).double()
    return ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()


def test_small_batches_that_are_accumulated_train_as_one_large_batch(tmp_path: Path) -> None:
    small, large = plain_model(), plain_model()
    values = {"steps": 6, "validate_every": 3, "warmup": 0, "learning_rate": 0.05, "clip_norm": 0.5}
    scores = {"score": 0.0}
    fit(
        small,
        lambda number: mean_loss(small, range(4 * number, 4 * number + 4)),
        lambda: scores,
        tmp_path / "small",
        LoopConfig(**values, accumulate=3),
    )
    fit(
        large,
        lambda step: mean_loss(large, range(12 * step, 12 * step + 12)),
        lambda: scores,
        tmp_path / "large",
        LoopConfig(**values),
    )
    last = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("small", "large")]
    for key, value in last[0].items():
        assert torch.allclose(value, last[1][key], atol=1e-12), key
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("small", "large")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_an_interrupted_run_goes_on_with_the_batch_it_was_at(tmp_path: Path) -> None:
    config = LoopConfig(steps=4, validate_every=2, warmup=0, accumulate=2)
    asked: list[int] = []

    def batch_loss(model: nn.Module, stop_at: int | None) -> Callable[[int], Tensor]:
        def loss(number: int) -> Tensor:
            if number == stop_at:
                raise KeyboardInterrupt
            asked.append(number)
            return mean_loss(model, range(number, number + 2))

        return loss

    model = plain_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, batch_loss(model, 5), lambda: {"score": 0.0}, tmp_path, config)
    fit(model, batch_loss(model, None), lambda: {"score": 0.0}, tmp_path, config)
    assert asked == [0, 1, 2, 3, 4, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["steps", "validate_every", "patience", "accumulate"])
def test_numbers_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be at least 1, got 0"):
        LoopConfig(**{name: 0})


# -------------------------------------------------------------------------------------------------------- the folder


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    save, written = torch.save, []

    def full(content: Any, path: Path) -> None:
        written.append(Path(path).name)
        if written.count("last.pt.part") == 2 and written[-1] == "last.pt.part":
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"last\.pt; the last checkpoint is intact.*No space left"):
        fit(model, *task(model), tmp_path, CONFIG)
    monkeypatch.undo()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["state"]["step"] == 3
    assert not list(tmp_path.glob("*.part"))
    again = new_model(1)
    whole = new_model()
    fit(again, *task(again), tmp_path, CONFIG)
    fit(whole, *task(whole), tmp_path / "whole", CONFIG)
    assert same_weights(again, whole)
    assert rows(tmp_path) == rows(tmp_path / "whole")


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    sizes: tuple[int, ...] = (1, 2)
    loop: LoopConfig = field(default_factory=LoopConfig)


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    claim(tmp_path / "new", Recipe())
    claim(tmp_path / "new", Recipe())
    with pytest.raises(SettingsError, match="run of another recipe"):
        claim(tmp_path / "new", Recipe(loop=LoopConfig(steps=7)))
    (tmp_path / "new" / "recipe.json").write_text("{")
    with pytest.raises(SettingsError, match="run of another recipe"):
        claim(tmp_path / "new", Recipe())


def test_a_recipe_written_before_a_key_existed_is_the_same_where_the_key_has_its_default(tmp_path: Path) -> None:
    old = asdict(Recipe(loop=LoopConfig(steps=50)))
    del old["loop"]["accumulate"]
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    with pytest.raises(SettingsError, match="another recipe"):
        claim(tmp_path, Recipe(loop=LoopConfig(steps=50, accumulate=2)))
    claim(tmp_path, Recipe(loop=LoopConfig(steps=50)))
    assert json.loads((tmp_path / "recipe.json").read_text())["loop"]["accumulate"] == 1


def test_curves_are_drawn_of_the_columns_there_are(unbroken, tmp_path: Path) -> None:
    panels = {"loss": ("loss",), "score": ("score", "error"), "nothing": ("dice ",)}
    draw_curves(unbroken[2] / "log.csv", tmp_path / "c.png", panels)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.glob("c.*")] == ["c.png"]


def test_a_batch_is_shared_out_evenly_or_not_at_all() -> None:
    assert Team(1, 2).share(8) == 4
    with pytest.raises(SettingsError, match="batch_size must be a multiple of the 3 processes, got 8"):
        Team(0, 3).share(8)
    alone = nn.Linear(2, 1)
    assert Team().averaging(alone) is alone
    assert torch.equal(Team().gathered(alone.weight), alone.weight)
