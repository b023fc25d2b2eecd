"""The dual-stream model and its parts: what is the identity until trained, what reaches what, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.interaction.dual_decoder import EdgeRefinement, FusionHead
from FreqSegLib.interaction.dual_stream import DualStreamConfig, DualStreamModel, read_metadata
from FreqSegLib.interaction.feature_normaliser import FeatureNormaliser
from FreqSegLib.interaction.film import FiLM
from FreqSegLib.interaction.fpn import VIT_SCALES, FPNAdapter
from FreqSegLib.interaction.frequency_pyramid import FrequencyPyramid
from FreqSegLib.interaction.lffi import LanguageGate, LFFIBlock
from FreqSegLib.interaction.text_adapter import TextConditionedAdapter

SMALL = DualStreamConfig(
    embedding_channels=8,
    text_dim=12,
    semantic_width=16,
    frequency_widths=(4, 8, 8, 16),
    frequency_depths=(1, 1, 1),
    decoder_widths=(8, 8),
    text_width=16,
    adapter_width=8,
    num_heads=4,
    dropout=0.0,
)
ABLATIONS = {
    "none": {"bands": "none"},
    "HF": {"bands": "high", "interaction": "none", "language_gate": False, "fusion": "mean"},
    "LF": {"bands": "low", "interaction": "none", "language_gate": False, "fusion": "mean"},
    "HF+LF": {"interaction": "none", "language_gate": False, "fusion": "mean"},
    "+FFBI": {"language_gate": False, "fusion": "mean"},
    "+EfficientFFBI": {"interaction": "efficient", "language_gate": False, "fusion": "mean"},
    "+LFFI": {"fusion": "mean"},
    "+adaptive": {},
}


def inputs(batch: int = 2, config: DualStreamConfig = SMALL, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, config.embedding_channels, 32, 32, generator=generator),
        torch.rand(batch, 1, 256, 256, generator=generator),
        torch.nn.functional.normalize(torch.randn(batch, config.text_dim, generator=generator), dim=1),
    )


def model_of(config: DualStreamConfig = SMALL, seed: int = 0) -> DualStreamModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DualStreamModel(config).eval()


def opened(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight away from its start, zeros included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return module


# ----------------------------------------------------------------------------------------------- what starts closed


def test_what_listens_to_text_changes_nothing_until_it_is_trained() -> None:
    maps, text = torch.randn(2, 8, 6, 6), torch.randn(2, 5)
    for module in (FiLM(5, 8), TextConditionedAdapter(8, 5, 4), LanguageGate(8, 5)):
        torch.testing.assert_close(module(maps, text), maps, rtol=0, atol=1e-6)
        changed = opened(module)(maps, text)
        assert (changed - maps).abs().max() > 1e-3
        assert (opened(module)(maps, text) - opened(module)(maps, text + 1)).abs().max() > 1e-4


def test_film_is_a_scale_and_a_shift_of_channels() -> None:
    film = FiLM(2, 3)
    with torch.no_grad():
        film.modulation.weight.copy_(torch.arange(12.0).reshape(6, 2))
    maps, text = torch.randn(1, 3, 2, 2), torch.tensor([[1.0, -2.0]])
    values = film.modulation.weight @ text[0]
    wanted = maps * (1 + values[:3, None, None]) + values[3:, None, None]
    torch.testing.assert_close(film(maps, text), wanted)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(film(tokens, text), wanted.flatten(2).transpose(1, 2))
    with pytest.raises(InputError, match=r"maps \(B, 3, H, W\)"):
        film(torch.randn(1, 4, 2, 2), text)


def test_both_fusions_start_as_the_mean_and_the_adaptive_one_can_choose_a_decoder() -> None:
    semantic, frequency = ((torch.randn(1, 4, 5, 5), torch.randn(1, 1, 5, 5)) for _ in range(2))
    mean = (semantic[1] + frequency[1]) / 2
    torch.testing.assert_close(FusionHead("mean", 4)(semantic, frequency), mean)
    adaptive = FusionHead("adaptive", 4)
    torch.testing.assert_close(adaptive(semantic, frequency), mean)
    with torch.no_grad():
        adaptive.conv[-1].bias.copy_(torch.tensor([20.0, 0.0]))
    torch.testing.assert_close(adaptive(semantic, frequency), frequency[1])
    with pytest.raises(SettingsError, match="fusion must be one of mean, adaptive, got 'max'"):
        FusionHead("max", 4)  # type: ignore[arg-type]


def test_edges_start_as_plain_enlargement() -> None:
    edges, logits = EdgeRefinement(6, 3), torch.randn(2, 1, 8, 8)
    found = edges(torch.randn(2, 6, 8, 8), logits, torch.randn(2, 3, 16, 16))
    wanted = torch.nn.functional.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, wanted)


def test_a_decoder_step_doubles_the_size_and_listens_either_way() -> None:
    coarse, skip, text = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    for gate in (True, False):
        block = opened(LFFIBlock(8, 3, 6, 5, language_gate=gate))
        found = block(coarse, skip, text)
        assert found.shape == (2, 6, 8, 8)
        assert (found - block(coarse, skip, text.flip(0))).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- parts


def test_the_pyramid_adapter_makes_strides_4_to_32_of_a_vits_layers() -> None:
    adapter = FPNAdapter(12, (4, 5, 6, 7), VIT_SCALES)
    maps = [torch.randn(2, 12, 14, 14) for _ in range(4)]
    assert [tuple(x.shape) for x in adapter(maps)] == [
        (2, 4, 56, 56),
        (2, 5, 28, 28),
        (2, 6, 14, 14),
        (2, 7, 7, 7),
    ]
    with pytest.raises(InputError, match="4 levels, got 3 maps"):
        adapter(maps[:3])
    with pytest.raises(SettingsError, match=r"scale must be 4, 2, 1, 0\.5 or 0\.25, got 3"):
        FPNAdapter(12, (4,), (3,))


@pytest.mark.parametrize("wave", ["haar", "db4"])
def test_the_frequency_pyramid_has_strides_2_to_16_and_sees_only_its_bands(wave: str) -> None:
    images = torch.rand(2, 1, 64, 64)
    for bands in ("low", "high", "both"):
        pyramid = FrequencyPyramid(bands, wave, (4, 6, 8, 10), (1, 1, 1))
        found = pyramid(images)
        assert [tuple(x.shape) for x in found] == [(2, 4, 32, 32), (2, 6, 16, 16), (2, 8, 8, 8), (2, 10, 4, 4)]
        # details do not know how bright an image is
        brighter = pyramid(images + 0.2)
        difference = max((a - b).abs().max() for a, b in zip(found, brighter, strict=True))
        assert (difference < 1e-4) == (bands == "high")


def test_the_low_band_alone_keeps_the_images_scale() -> None:
    """A grey image stays that grey at every level, in [-1, 1]."""
    pyramid = FrequencyPyramid("both", "haar", (4, 6, 8, 10), (1, 1, 1))
    for level in pyramid._decomposed(torch.full((1, 1, 32, 32), 0.75)):
        torch.testing.assert_close(level[:, :1], torch.full_like(level[:, :1], 0.5))
        torch.testing.assert_close(level[:, 1:], torch.zeros_like(level[:, 1:]), atol=1e-6, rtol=0)


def test_normalisers_take_their_mean_over_what_they_say() -> None:
    maps = torch.randn(3, 4, 5, 5) * 3 + 7
    axes = {"layer": (1,), "instance": (2, 3), "batch": (0, 2, 3)}
    for kind, over in axes.items():
        found = FeatureNormaliser(kind, 4).train()(maps)  # type: ignore[arg-type]
        torch.testing.assert_close(found.mean(over), torch.zeros_like(found.mean(over)), atol=1e-4, rtol=0)
        wanted = (maps - maps.mean(over, keepdim=True)) / (maps.var(over, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(SettingsError, match="layer, batch, instance, got 'group'"):
        FeatureNormaliser("group", 4)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_step_of_the_ablation_is_a_model(name: str, tmp_path: Path) -> None:
    model = model_of(replace(SMALL, **ABLATIONS[name]))
    embedding, images, text = inputs()
    output = model(embedding, images, text)
    assert output.logits.shape == (2, 1, 256, 256)
    assert output.presence.shape == (2,)
    assert (output.frequency is None) == (name == "none")
    path = tmp_path / "model.safetensors"
    model.save(path, {"meanings": "[]"})
    again = DualStreamModel.load(path)
    assert again.config == model.config
    assert read_metadata(path)["meanings"] == "[]"
    torch.testing.assert_close(again(embedding, images, text).logits, output.logits, atol=2e-2, rtol=2e-2)
    features = model.encode_image(embedding, images)
    shapes = [tuple(x.shape[1:]) for x in (features.semantic, *features.frequency)]
    assert shapes == model.feature_shapes()


def test_the_full_model_has_the_size_that_was_allowed(tmp_path: Path) -> None:
    model = DualStreamModel()
    model.save(tmp_path / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) < 6e6
    assert (tmp_path / "model.safetensors").stat().st_size < 12e6


def test_an_item_in_company_is_the_item_alone() -> None:
    model = opened(model_of())
    embedding, images, text = inputs(3)
    together = model(embedding, images, text)
    for row in range(3):
        alone = model(embedding[row : row + 1], images[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.presence[row], alone.presence[0], atol=1e-4, rtol=1e-4)


def test_prompts_share_what_is_known_of_the_slice() -> None:
    model = opened(model_of())
    embedding, images, text = inputs(2)
    features = model.encode_image(embedding, images).for_prompts(torch.tensor([2, 1]))
    output = model.segment(features, text[[0, 1, 0]])
    pairs = [(0, 0), (0, 1), (1, 0)]
    for row, (image, prompt) in enumerate(pairs):
        alone = model(embedding[[image]], images[[image]], text[[prompt]])
        torch.testing.assert_close(output.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)


def test_the_towers_own_embedding_is_averaged_as_in_training() -> None:
    model = opened(model_of())
    _, images, text = inputs()
    whole = torch.randn(2, 8, 64, 64)
    pooled = torch.nn.functional.avg_pool2d(whole, 2)
    torch.testing.assert_close(model(whole, images, text).logits, model(pooled, images, text).logits)


def test_gradients_reach_every_weight_and_ffbi_among_them() -> None:
    """Output projections start at zero, so what lies behind them follows once they have moved."""
    model = model_of().train()
    embedding, images, text = inputs()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        output = model(embedding, images, text)
        assert output.frequency is not None
        target = (images > 0.5).float()
        loss = nn.functional.binary_cross_entropy_with_logits(output.logits, target)
        loss = (
            loss + output.semantic.square().mean() + output.frequency.square().mean() + output.presence.square().mean()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # a key's bias moves all scores of a softmax alike
    assert [name for name in still if not name.endswith("key.bias")] == []
    assert model.interaction.low_from_high.query.weight.grad.abs().max() > 0


def test_without_ffbi_the_streams_do_not_hear_of_each_other_before_the_fusion() -> None:
    embedding, images, text = inputs()
    for interaction, heard in (("none", False), ("ffbi", True), ("efficient", True)):
        model = opened(model_of(replace(SMALL, interaction=interaction)))
        change = model(embedding, images, text).semantic - model(embedding, 1 - images, text).semantic
        assert bool(change.abs().max() > 1e-5) == heard


def test_wrong_shapes_and_settings_are_refused(tmp_path: Path) -> None:
    model = model_of()
    embedding, images, text = inputs()
    with pytest.raises(InputError, match=r"embedding must be \(B, 8, H, W\)"):
        model(embedding[:, :4], images, text)
    with pytest.raises(InputError, match=r"images must be \(2, 1, 256, 256\)"):
        model(embedding, images[..., :128], text)
    with pytest.raises(InputError, match=r"text must be \(2, 12\)"):
        model(embedding, images, text[:1])
    with pytest.raises(SettingsError, match="bands must be one of none, low, high, both, got 'all'"):
        DualStreamConfig(bands="all")  # type: ignore[arg-type]
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="holds no text-guided weights"):
        DualStreamModel.load(damaged)
