"""Phase 2 in parts: accumulated batches, activations computed again, several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_text_guided import SMALL, STILL, made, wordings
from torch import Tensor
from two_processes import run_twice

from FreqSegLib.errors import SettingsError
from FreqSegLib.interaction.dual_stream import DualStreamModel
from FreqSegLib.training.processes import Team
from FreqSegLib.training.text_guided import PhaseTwo, TextGuidedConfig

SHORT = replace(STILL, batch_size=2, prompts=1)


class Apart(Team):
    """One of several processes that does not wait for the others."""

    def averaging(self, module):  # type: ignore[no-untyped-def]
        """Its own gradients."""
        return module


def phase(config: TextGuidedConfig = SHORT, **more) -> PhaseTwo:  # type: ignore[no-untyped-def]
    data, pictures = made(6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PhaseTwo(DualStreamModel(SMALL), data, pictures, *wordings(), config, 0, **more)


def gradients(one: PhaseTwo, number: int = 3) -> list[Tensor]:
    one.model.zero_grad()
    one.batch_loss(number).backward()
    return [parameter.grad.clone() for parameter in one.model.model.parameters() if parameter.grad is not None]


def test_activations_computed_again_give_the_same_gradients() -> None:
    plain, again = phase(), phase(replace(SHORT, checkpointing=True))
    plain.model.model.dropout.p = again.model.model.dropout.p = 0.3
    for one, other in zip(gradients(plain), gradients(again), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_average_follows_once_a_step_however_many_batches_it_has() -> None:
    accumulating = phase(accumulate=2)
    followed: list[int] = []
    accumulating.model.follow = followed.append  # type: ignore[method-assign, assignment]
    for number in range(5):
        accumulating.batch_loss(number)
    assert followed == [1, 2]


def test_processes_make_different_halves_of_a_batch() -> None:
    first, second = phase(team=Apart(0, 2)), phase(team=Apart(1, 2))
    batches: list[Tensor] = []
    for one in (first, second):
        draw = one.batch
        one.batch = lambda rng, draw=draw: (found := draw(rng), batches.append(found.embedding))[0]  # type: ignore[method-assign]
        one.batch_loss(0)
    assert [len(batch) for batch in batches] == [1, 1]
    assert not torch.equal(batches[0], batches[1])
    with pytest.raises(SettingsError, match="multiple of the 3 processes, got 2"):
        phase(team=Apart(0, 3))


CHILD = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_text_guided_processes import gradients, phase
from FreqSegLib.training.processes import Team, processes
with processes(torch.device("cpu")) as (rank, world, place):
    one = phase(device=place, team=Team(rank, world))
    found = gradients(one)
    score = one.validate()["score"]
    torch.save({"gradients": found, "score": torch.tensor(score)}, sys.argv[1] + str(rank))
"""


def test_two_processes_average_their_gradients_and_agree_on_the_score(tmp_path: Path, project_root: Path) -> None:
    run_twice(CHILD, tmp_path / "found", project_root)
    found = [torch.load(tmp_path / f"found{rank}", weights_only=True) for rank in range(2)]
    assert torch.equal(found[0]["score"], found[1]["score"])
    parts = [gradients(phase(team=Apart(rank, 2))) for rank in range(2)]
    for one, other, first, second in zip(*parts, found[0]["gradients"], found[1]["gradients"], strict=True):
        assert torch.allclose(first, (one + other) / 2, atol=1e-6)
        assert torch.equal(first, second)
