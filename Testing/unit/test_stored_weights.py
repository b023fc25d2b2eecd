"""Weights in a file: what comes back, how far off it may be, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from FreqSegLib.errors import WeightsError
from FreqSegLib.mamba.stored_weights import KINDS, SCALE, packed, unpacked


def state(scale: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "wide": scale * torch.randn(64, 8, 3, 4, generator=generator),
        "bias": scale * torch.randn(64, generator=generator),
        "small": scale * torch.randn(8, 8, generator=generator),
        "count": torch.tensor(7),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_comes_back_in_its_shape_and_close(kind: str) -> None:
    given_state = state()
    found = unpacked(packed(given_state, kind), "here")
    assert found.keys() == given_state.keys()
    assert int(found["count"]) == 7
    bound = {"float32": 0.0, "float16": 2.0**-11, "int8": 2.0**-11}[kind]
    for key in ("bias", "small"):
        assert float(((found[key].float() - given_state[key]) / given_state[key]).abs().max()) <= bound
    if kind == "float32":
        assert torch.equal(found["wide"], given_state["wide"])


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-4, 1e3), st.integers(0, 1000))
def test_int8_is_off_by_half_a_step_of_its_channel_at_most(scale: float, seed: int) -> None:
    given_state = state(scale, seed)
    stored = packed(given_state, "int8")
    assert stored["wide"].dtype == torch.int8
    assert stored["small"].dtype == stored["bias"].dtype == torch.float16
    error = (unpacked(stored, "here")["wide"] - given_state["wide"]).flatten(1).abs().amax(1)
    largest = given_state["wide"].flatten(1).abs().amax(1)
    assert bool((error <= largest * (0.5 / 127) * (1 + 1e-5)).all())


def test_a_channel_of_zeros_stays_zero() -> None:
    given_state = {"wide": torch.zeros(64, 128)}
    given_state["wide"][1] = 1.0
    found = unpacked(packed(given_state, "int8"), "here")["wide"]
    assert torch.equal(found[0], torch.zeros(128))
    torch.testing.assert_close(found[1], torch.ones(128), rtol=1e-3, atol=0)


def test_whole_numbers_without_their_scales_are_refused() -> None:
    stored = packed(state(), "int8")
    del stored["wide" + SCALE]
    with pytest.raises(WeightsError, match=r"model.safetensors: wide is stored .* and needs 64 scales, got"):
        unpacked(stored, Path("model.safetensors"))
    stored["wide" + SCALE] = torch.ones(3)
    with pytest.raises(WeightsError, match=r"needs 64 scales, got \(3,\)"):
        unpacked(stored, Path("model.safetensors"))
