"""The amortised bottleneck: M2IB's interface in one pass, trained on M2IB's own objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.saliency.amortised import (
    AmortisedBottleneck,
    AmortisedConfig,
    amortised_information,
    bottleneck_objective,
    require_amortised,
)
from FreqSegLib.saliency.m2ib import INITIAL_ALPHA, BottleneckSettings, gaussian_divergence, m2ib_information

CONFIG = AmortisedConfig(width=6, text_width=4, hidden=16, layer_idx=1)


def suffix(z: Tensor) -> Tensor:
    """(M, N, 6) -> (M, 4): what the first four channels hold together."""
    return F.normalize(z[..., :4].mean(1), dim=-1)


def items(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of which a few carry one of four signals, and the unit vector that asks for it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 9, 6, generator=generator) * 0.3
    kind = torch.randint(4, (count,), generator=generator)
    tokens[torch.arange(count), torch.randint(9, (count,), generator=generator), kind] += 4.0
    return tokens, torch.eye(4)[kind]


def trained(steps: int = 0) -> AmortisedBottleneck:
    torch.manual_seed(0)
    model = AmortisedBottleneck(CONFIG)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(steps):
        tokens, texts = items(16, step)
        noise = torch.randn(2, *tokens.shape)
        beta = torch.full((16,), 0.3)
        loss = bottleneck_objective(suffix, model(tokens, texts, beta), tokens, texts, beta, noise).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def test_untrained_it_stands_where_m2ib_starts() -> None:
    tokens, texts = items(3)
    model = trained()
    assert not model.is_trained
    keep = model(tokens, texts, 0.1)
    torch.testing.assert_close(keep, torch.full_like(keep, INITIAL_ALPHA).sigmoid())
    one_step = BottleneckSettings(train_steps=1)
    expected = m2ib_information(suffix, tokens, texts, [0, 1, 2], one_step)
    torch.testing.assert_close(amortised_information(model, tokens, texts, 0.1), expected, rtol=1e-4, atol=1e-4)


def test_the_map_has_m2ibs_shape_and_range_and_an_item_does_not_see_the_others() -> None:
    tokens, texts = items(5)
    model = trained(30)
    assert model.is_trained
    found = amortised_information(model, tokens, texts, 0.3)
    assert found.shape == m2ib_information(suffix, tokens, texts, range(5), BottleneckSettings(train_steps=2)).shape
    assert found.min() >= 0
    assert not found.requires_grad
    for i in range(5):
        alone = amortised_information(model, tokens[i : i + 1], texts[i : i + 1], 0.3)
        torch.testing.assert_close(alone[0], found[i], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(amortised_information(model, tokens, texts, 0.3), found)


def test_the_objective_is_m2ibs_computed_by_hand() -> None:
    tokens, texts = items(2)
    keep = torch.rand(tokens.shape)
    noise = torch.randn(3, *tokens.shape)
    beta = torch.tensor([0.1, 2.0])
    found = bottleneck_objective(suffix, keep, tokens, texts, beta, noise)
    for i in range(2):
        cosines = [
            float((suffix((keep[i] * tokens[i] + (1 - keep[i]) * noise[s, i])[None])[0] * texts[i]).sum())
            for s in range(3)
        ]
        normal = torch.distributions.Normal(keep[i] * tokens[i], 1 - keep[i])
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
        assert float(found[i]) == pytest.approx(float(beta[i] * kl) - sum(cosines) / 3, rel=1e-4)


def test_training_on_the_objective_lowers_it_and_finds_what_is_asked_for() -> None:
    tokens, texts = items(64, seed=1000)
    noise = torch.randn(4, *tokens.shape, generator=torch.Generator().manual_seed(1))
    beta = torch.full((64,), 0.3)
    start, model = trained(), trained(150)
    with torch.no_grad():
        before, after = (
            float(bottleneck_objective(suffix, m(tokens, texts, beta), tokens, texts, beta, noise).mean())
            for m in (start, model)
        )
    assert after < before - 0.2
    keep = model(tokens, texts, beta).detach()
    assert float(gaussian_divergence(keep, tokens).mean()) < float(
        gaussian_divergence(torch.tensor(0.99), tokens).mean()
    )
    place = (tokens[..., :4] * texts[:, None]).sum(-1).argmax(1)
    found = amortised_information(model, tokens, texts, 0.3).argmax(1)
    assert float((found == place).float().mean()) > 0.9


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    model = trained(5)
    model.save(tmp_path / "bottleneck.safetensors")
    loaded = AmortisedBottleneck.load(tmp_path / "bottleneck.safetensors")
    assert loaded.config == CONFIG
    tokens, texts = items(2)
    torch.testing.assert_close(loaded(tokens, texts, 0.1), model(tokens, texts, 0.1), atol=5e-3, rtol=0)
    with pytest.raises(WeightsError, match="holds no bottleneck weights"):
        AmortisedBottleneck.load(tmp_path / "absent.safetensors")


def test_it_is_refused_with_a_way_out_where_it_was_not_trained() -> None:
    model = trained(5)
    require_amortised(model, "lite", 1, 0.1)
    with pytest.raises(
        SettingsError, match=r"not trained for the preset biomedclip-sam: set bottleneck to m2ib or nib"
    ):
        require_amortised(None, "biomedclip-sam", 1, 0.1)
    with pytest.raises(SettingsError, match="not trained for the preset lite"):
        require_amortised(trained(), "lite", 1, 0.1)
    with pytest.raises(SettingsError, match="after encoder block 1, got layer_idx 2"):
        require_amortised(model, "lite", 2, 0.1)
    with pytest.raises(SettingsError, match=r"beta 0\.05 to 3\.0, got 10"):
        require_amortised(model, "lite", 1, 10)
