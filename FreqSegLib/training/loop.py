"""The one training loop: AdamW, cosine rate, best checkpoint by validation, early stop, exact resume, a log as CSV."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn

from FreqSegLib.device import first_line
from FreqSegLib.errors import FreqSegError, OutputError, SettingsError, WeightsError

_UNWRITTEN = (
    "cannot write {path}; the last checkpoint is intact. Free some space on the disk, then start the same command again"
)


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps.
        learning_rate: AdamW's, reached after ``warmup`` steps, then a cosine down to ``final_rate``.
        validate_every: steps between validations (each also writes the checkpoint to resume from).
        patience: validations without a better score before stopping.
        accumulate: batches whose gradients are averaged for one step. Where the loss is a mean over the batch this is
            the gradient of one batch that is so many times as large; a contrastive loss still sees the negatives of one
            batch only.
        keep: which weights the run ends with: those with the ``best`` score, or the ``last``, where validation is too
            small to tell steps apart.
    """

    steps: int = 1500
    learning_rate: float = 1e-3
    final_rate: float = 1e-6
    warmup: int = 50
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    validate_every: int = 100
    patience: int = 6
    seed: int = 0
    accumulate: int = 1
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "patience", "accumulate"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, got {getattr(self, name)}")


def fit(
    model: nn.Module,
    batch_loss: Callable[[int], Tensor],
    validate: Callable[[], dict[str, float]],
    folder: Path,
    config: LoopConfig,
    report: Callable[[dict[str, float]], None] | None = None,
    schedule: Callable[[int], float] | None = None,
    *,
    writes: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train ``model``; it ends with the best validated weights, or the last ones where ``config.keep`` says so.

    Args:
        model: trained in place.
        batch_loss: number of the batch -> scalar loss. It must draw its randomness from that number, so that a resumed
            run repeats it. Batches are numbered by steps, or ``accumulate`` of them a step.
        validate: -> numbers; ``score`` (higher is better) chooses the checkpoint.
        folder: gets ``last.pt`` (resume), ``best.pt`` and ``log.csv``.
        config: see LoopConfig.
        report: called with every logged row.
        schedule: step -> learning rate, in place of the warm-up and cosine of ``config``.
        writes: whether this process writes the files; one of several that train together does.
        wait: returns when all processes have called it. Their batches may differ, their validations must not.

    Returns:
        The row of the weights it ends with.

    Raises:
        FreqSegError: the loss is not finite; the step is named and the last checkpoint is intact.
        OutputError: a file cannot be written, as on a full disk; the last checkpoint is intact.
        WeightsError: the checkpoint to go on from is damaged.
        SettingsError: it is of another network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )
    state: dict[str, Any] = {"step": 0, "best": None, "last": None, "stale": 0, "seconds": 0.0}
    last, best_file, log = folder / "last.pt", folder / "best.pt", folder / "log.csv"
    if last.exists():
        state = _resume(last, model, optimiser)
        if writes:
            _keep_rows(log, state["step"])
    wait()
    started = time.monotonic() - state["seconds"]
    running: list[float] = []
    rate_at = schedule or (lambda step: rate(step, config))
    while state["step"] < config.steps and state["stale"] < config.patience:
        step = state["step"]
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step)
        model.train()
        optimiser.zero_grad(set_to_none=True)
        running.append(_backward(batch_loss, step, config.accumulate, last))
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimiser.step()
        state["step"] = step + 1
        if state["step"] % config.validate_every == 0 or state["step"] == config.steps:
            model.eval()
            row = {
                "step": float(step + 1),
                "rate": rate_at(step),
                "loss": sum(running) / len(running),
                **validate(),
            }
            running = []
            # a score that is NaN is beaten by any other
            better = state["best"] is None or not row["score"] <= state["best"]["score"]
            state.update(
                best=row if better else state["best"],
                last=row,
                stale=0 if better else state["stale"] + 1,
                seconds=time.monotonic() - started,
            )
            if better and writes:
                _save({"model": model.state_dict(), "row": row}, best_file)
            if writes:
                _append(log, row)
                _save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "state": state}, last)
            wait()
            if report:
                report(row)
    if config.keep == "best":
        model.load_state_dict(_read(best_file, "model")["model"])
    model.eval()
    return {**state[config.keep], "seconds": state["seconds"]}


def _backward(batch_loss: Callable[[int], Tensor], step: int, accumulate: int, last: Path) -> float:
    """Gradients of one step, added to the parameters; the mean loss of its batches."""
    values = []
    for number in range(step * accumulate, (step + 1) * accumulate):
        loss = batch_loss(number)
        if not torch.isfinite(loss):
            kept = "; the last checkpoint is intact" if last.exists() else ""
            raise FreqSegError(f"The loss became {loss.item()} at step {step}{kept}. Lower the learning rate.")
        (loss if accumulate == 1 else loss / accumulate).backward()
        values.append(loss.item())
    return sum(values) / accumulate


def rate(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine to ``final_rate``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_rate + (config.learning_rate - config.final_rate) * 0.5 * (1 + math.cos(math.pi * share))


def _resume(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Give model and optimiser what a run had at its last checkpoint; its counters come back."""
    saved = _read(path, "model", "optimiser", "state")
    try:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"{path} is of another network ({str(error).splitlines()[-1].strip()}). Give another folder, or delete "
            "this one to start anew."
        ) from error
    state: dict[str, Any] = saved["state"]
    return state


def _read(path: Path, *keys: str) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    # what torch raises for a damaged file depends on where the damage is
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"the checkpoint {path} is damaged ({first_line(error)}). Put back a copy of it, or delete its folder to "
            "start anew."
        ) from error


def _save(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    # torch reports a full disk as a RuntimeError
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{_UNWRITTEN.format(path=path)} ({error})") from error


def _append(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise OutputError(f"{_UNWRITTEN.format(path=path)} ({error})") from error


def _keep_rows(path: Path, step: int) -> None:
    """Drop rows written after the checkpoint, so that the resumed curve has each step once."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if float(row["step"]) <= step]
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    for row in kept:
        _append(temporary, {key: float(value) for key, value in row.items()})
    if kept:
        os.replace(temporary, path)
    else:
        path.unlink()
