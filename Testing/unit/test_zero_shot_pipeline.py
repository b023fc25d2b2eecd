"""The pipeline with the zero-shot path's trained modules: used where they were trained for, said where not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_text_segmentation import PRESET, box_volume, make  # noqa: F401

from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.vocabulary import meaning
from FreqSegLib.errors import SettingsError
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion, ZeroShotFusionConfig
from FreqSegLib.presets import Tuning
from FreqSegLib.saliency.amortised import AmortisedBottleneck, AmortisedConfig, amortised_information
from FreqSegLib.saliency.nib import nib_contribution
from FreqSegLib.settings import TextSegmentationSettings

ON = TextSegmentationSettings(frequency_branches="on")
CONFIG = ZeroShotFusionConfig(width=3, num_heads=1, hidden_channels=4, layer_idx=1)
KEEP = {"threshold": "fixed", "threshold_value": 0.35}


class Matcher:
    """Takes "bright" for a brain tumour, knows nothing else."""

    def match(self, prompt: str) -> MatchedPrompt:
        return MatchedPrompt(prompt, meaning("brain tumour") if "bright" in prompt else None, 0.9)

    require = match


def fusion(gate: float = 1.0, **changes) -> ZeroShotFusion:
    """Random weights, the last gate as given."""
    torch.manual_seed(0)
    model = ZeroShotFusion(replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        model.fusion.gate.fill_(gate)
    return model.requires_grad_(False).eval()


def built(make, model: ZeroShotFusion, switch: str = "off", **given):  # noqa: F811
    tuning = {"brain tumour": Tuning({"frequency_branches": switch, **KEEP})}
    parts = make(fusion=model, branch_tuning=tuning, matcher=Matcher(), **given)
    parts.segmenter.set_volume(box_volume()[0])
    return parts.segmenter


def test_an_untrained_fusion_changes_nothing_and_says_so(make) -> None:  # noqa: F811
    segmenter = built(make, fusion(gate=0.0))
    same = TextSegmentationSettings(**KEEP)
    raw = segmenter.segment(["bright"], settings=same)
    both = segmenter.segment(["bright"], settings=ON)
    assert np.array_equal(raw[0].saliency, both[0].saliency)
    assert np.array_equal(raw[0].mask, both[0].mask)
    assert any("no fusion weights are trained" in warning for warning in both.warnings)
    assert not raw.warnings


def test_a_trained_fusion_gets_saliencies_and_tokens_of_the_slices_that_passed(make) -> None:  # noqa: F811
    model = fusion()
    segmenter = built(make, model)
    found = segmenter.segment(["bright"], settings=replace(ON, contrast=False))
    assert not found.warnings
    # rebuilt from the cached tokens: the frame is the volume's own size, so nothing but enlarging lies between
    prepared = segmenter.prepared
    settings = segmenter.preset.complete(ON)
    tokens = {
        branch: torch.stack([segmenter.tokens(prepared, settings, branch, i) for i in (2, 3)])
        for branch in ("low", "high")
    }
    encoder = segmenter.encoder
    maps = {}
    for branch in ("raw", "low", "high"):
        own = torch.stack([segmenter.tokens(prepared, settings, branch, i) for i in (2, 3)])
        text = encoder.encode_text(["bright"])[0].clone().expand(2, -1)
        values = nib_contribution(lambda z: encoder.suffix(z, 1), own, text).view(2, 1, 16, 16)
        maps[branch] = (values - values.min()) / (values.max() - values.min())
    expected = model(maps["raw"], maps["low"], maps["high"], tokens["low"], tokens["high"])
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found[0].saliency[2:4], expected[:, 0].numpy(), atol=1e-4)
    # what did not pass the gate is not lit by the heads' biases
    assert not found[0].saliency[[0, 1, 4, 5]].any()


@pytest.mark.parametrize("switch", ["on", "off"])
def test_the_targets_own_tuning_says_what_auto_means(make, switch: str) -> None:  # noqa: F811
    segmenter = built(make, fusion(), switch)
    auto = segmenter.segment(["bright"])
    asked = segmenter.segment(["bright"], settings=TextSegmentationSettings(frequency_branches=switch))
    assert np.array_equal(auto[0].saliency, asked[0].saliency)
    other = segmenter.segment(
        ["bright"], settings=TextSegmentationSettings(frequency_branches="off" if switch == "on" else "on")
    )
    assert np.abs(other[0].saliency - auto[0].saliency).max() > 0.01


def test_the_tuning_for_the_branches_holds_only_where_they_are_computed(make) -> None:  # noqa: F811
    segmenter = built(make, fusion(), tuning={"brain tumour": Tuning({"threshold_value": 0.8, "num_contours": 2})})
    run = segmenter._with_branches(Matcher().match("bright"), ON, segmenter.tuning["brain tumour"])
    assert run[1].settings == {"num_contours": 2, "frequency_branches": "off", **KEEP}
    off = segmenter._with_branches(
        Matcher().match("bright"), TextSegmentationSettings(), segmenter.tuning["brain tumour"]
    )
    assert off[1].settings == {"threshold_value": 0.8, "num_contours": 2}


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ("dark", {"gate": False}, "for 'dark'"),
        ("bright", {"fusion": "simple"}, "for fusion 'simple' \\(it is 'adaptive' that is\\)"),
        ("bright", {"wave": "db2"}, "for wave db2 \\(they are for haar\\)"),
        ("bright", {"layer_idx": 2}, "for layer_idx 2 \\(they are for 1\\)"),
    ],
)
def test_what_the_fusion_was_not_trained_for_keeps_the_raw_saliency(
    make,  # noqa: F811
    prompt: str,
    changes: dict,
    words: str,
) -> None:
    import re

    segmenter = built(make, fusion())
    raw = segmenter.segment([prompt], settings=replace(ON, **changes, frequency_branches="off"))
    both = segmenter.segment([prompt], settings=replace(ON, **changes))
    assert np.array_equal(raw[0].saliency, both[0].saliency)
    assert any(re.search(f"no fusion weights are trained {words}", warning) for warning in both.warnings)


def test_replicas_are_fused_one_by_one(make) -> None:  # noqa: F811
    settings = TextSegmentationSettings(
        bottleneck="m2ib", train_steps=3, num_noise_samples=2, uncertainty=True, replicas=2, frequency_branches="on"
    )
    found = built(make, fusion()).segment(["bright"], settings=settings)
    assert found[0].uncertainty is not None
    assert found[0].uncertainty[2:4].max() > 0


def test_the_amortised_bottleneck_is_refused_until_it_is_trained(make) -> None:  # noqa: F811
    asked = TextSegmentationSettings(bottleneck="amortised")
    parts = make()
    parts.segmenter.set_volume(box_volume()[0])
    with pytest.raises(SettingsError, match="not trained for the preset bright: set bottleneck to m2ib or nib"):
        parts.segmenter.segment(["bright"], settings=asked)


def test_the_amortised_bottleneck_gives_the_map(make) -> None:  # noqa: F811
    torch.manual_seed(0)
    model = AmortisedBottleneck(AmortisedConfig(width=3, text_width=4, hidden=8, layer_idx=1))
    torch.nn.init.normal_(model.head.weight)
    parts = make(amortised=model.requires_grad_(False).eval())
    segmenter = parts.segmenter
    prepared = segmenter.set_volume(box_volume()[0])
    asked = TextSegmentationSettings(bottleneck="amortised", beta=0.2)
    found = segmenter.segment(["bright"], settings=asked)
    again = segmenter.segment(["bright"], settings=replace(asked, batch_size=1, seed=7))
    np.testing.assert_allclose(found[0].saliency, again[0].saliency, atol=1e-5)
    tokens = torch.stack([segmenter.tokens(prepared, PRESETTLED, "raw", i) for i in (2, 3)])
    text = segmenter.encoder.encode_text(["bright"])[0].clone().expand(2, -1)
    values = amortised_information(model, tokens, text, 0.2).view(2, 1, 16, 16)
    values = (values - values.min()) / (values.max() - values.min())
    expected = torch.nn.functional.interpolate(values, (64, 64), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found[0].saliency[2:4], expected[:, 0].numpy(), atol=1e-4)
    with pytest.raises(SettingsError, match="beta"):
        segmenter.segment(["bright"], settings=replace(asked, beta=50.0))


PRESETTLED = PRESET.complete(TextSegmentationSettings())
