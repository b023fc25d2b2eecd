"""The zero-shot path's trained fusion: nothing until it is trained, then every part of it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.interaction.ffbi import SaliencyInteraction
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion, ZeroShotFusionConfig

CONFIG = ZeroShotFusionConfig(width=16, num_heads=4, hidden_channels=4)


def inputs(count: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Raw, low and high saliency (B, 1, 4, 4); low and high tokens (B, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand(count, 1, 4, 4, generator=generator) for _ in range(3)]
    return (*maps, *(torch.randn(count, 16, 16, generator=generator) for _ in range(2)))


def opened(config: ZeroShotFusionConfig = CONFIG) -> ZeroShotFusion:
    """A fusion with random weights and all gates open."""
    torch.manual_seed(0)
    model = ZeroShotFusion(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model.eval()


@pytest.mark.parametrize("interaction", ["none", "heads", "ffbi", "efficient"])
@pytest.mark.parametrize("branches", ["low", "high", "both"])
def test_untrained_it_returns_the_raw_saliency_to_the_last_bit(interaction: str, branches: str) -> None:
    model = ZeroShotFusion(replace(CONFIG, interaction=interaction, branches=branches)).eval()
    raw, low, high, *tokens = inputs()
    raw[0, 0, 0, 0], raw[0, 0, 0, 1] = 0.0, 1.0
    assert model.is_identity
    assert torch.equal(model(raw, low, high, *tokens), raw)


def test_trained_it_is_the_correction_and_then_the_fusion() -> None:
    model = opened()
    raw, low, high, low_tokens, high_tokens = inputs()
    assert not model.is_identity
    correction = SaliencyInteraction(16, 16, num_heads=4)
    correction.load_state_dict(model.correction.state_dict())
    fusion = AdaptiveFusion("adaptive", 4)
    fusion.load_state_dict(model.fusion.state_dict())
    corrected = correction.eval()(low_tokens, high_tokens, low, high)
    expected = fusion(raw, *corrected)
    found = model(raw, low, high, low_tokens, high_tokens)
    torch.testing.assert_close(found, expected)
    assert (found - raw).abs().max() > 0.05
    assert found.min() >= 0
    assert found.max() <= 1
    alone = model(*(x[1:2] for x in (raw, low, high, low_tokens, high_tokens)))
    torch.testing.assert_close(alone, found[1:2])


@pytest.mark.parametrize(("branches", "other"), [("low", 2), ("high", 1)])
def test_one_branch_alone_does_not_look_at_the_other(branches: str, other: int) -> None:
    model = opened(replace(CONFIG, interaction="none", branches=branches))
    given = list(inputs()[:3])
    before = model(*given)
    given[other] = torch.rand_like(given[other])
    assert torch.equal(model(*given), before)
    given[3 - other] = torch.rand_like(given[3 - other])
    assert not torch.equal(model(*given), before)


@pytest.mark.parametrize("interaction", ["ffbi", "efficient"])
def test_after_a_few_steps_every_part_of_the_interaction_has_moved(interaction: str) -> None:
    torch.manual_seed(0)
    model = ZeroShotFusion(replace(CONFIG, interaction=interaction, dropout=0.0))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    raw, low, high, *tokens = inputs(8)
    truth = (tokens[0].mean(-1).view(8, 1, 4, 4) > 0).float()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy(model(raw, low, high, *tokens).clamp(1e-4, 1 - 1e-4), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    # a bias in front of a softmax over tokens adds the same to all: no gradient ever reaches it
    still = [n for n, v in model.state_dict().items() if torch.equal(v, start[n]) and not n.endswith("key.bias")]
    assert not still


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    model = opened()
    model.save(tmp_path / "fusion.safetensors", {"licence": "none"})
    loaded = ZeroShotFusion.load(tmp_path / "fusion.safetensors")
    assert loaded.config == CONFIG
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(*inputs()), model(*inputs()), atol=5e-3, rtol=0)
    (tmp_path / "fusion.safetensors").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=r"fusion\.safetensors' holds no fusion weights"):
        ZeroShotFusion.load(tmp_path / "fusion.safetensors")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingsError, match="branches must be one of low, high, both, got 'all'"):
        ZeroShotFusionConfig(branches="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give both"):
        ZeroShotFusion(CONFIG)(*inputs()[:3])
