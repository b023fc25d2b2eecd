"""SpectralVMUNet: any size, published layouts, equal gradients with checkpointing, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from network_forms import FORMS
from torch import Tensor

from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.mamba.residual import ResidualBlock, ResidualFeatures, halvings
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet, load_vmamba_encoder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(**changes: object) -> SpectralVMUNet:
    given = {"base_channels": 8, "num_stages": 3, "depth": 1, "img_size": 32, "d_state": 2, "detail_channels": 4}
    return SpectralVMUNet(**{**given, **changes})  # type: ignore[arg-type]


def open_gates(model: SpectralVMUNet) -> SpectralVMUNet:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("spectral_gate"):
                parameter.fill_(0.5)
    return model


def test_the_defaults_have_the_parameters_they_should() -> None:
    with torch.device("meta"):
        model = SpectralVMUNet(1, 3, 256, 64, 4, 2)
    assert 15e6 < sum(parameter.numel() for parameter in model.parameters()) < 30e6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(4, 4), (5, 9), (32, 32), (35, 50), (1, 40)])
def test_any_image_size_comes_back_or_is_refused(size: tuple[int, int], form: str) -> None:
    model = small(**FORMS[form]).eval()
    image = torch.randn(2, 1, *size)
    if min(size) < 4:
        with pytest.raises(InputError, match="at least one patch"):
            model(image)
        return
    found = model(image)
    assert found.shape == (2, 3, *size)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 4, 4)])
def test_volumes_with_a_coarse_axis(form: str, patch: tuple[int, ...]) -> None:
    model = small(dimensions=3, patch_size=patch, num_stages=2, out_channels=2, **FORMS[form]).eval()
    found = model(torch.randn(1, 1, 5, 9, 10))
    assert found.shape == (1, 2, 5, 9, 10)
    found.sum().backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_in_use_it_is_deterministic_and_a_batch_changes_nothing(form: str) -> None:
    model = open_gates(small(dropout=0.3, drop_path=0.2, **FORMS[form])).eval()
    images = torch.randn(3, 1, 20, 24)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        one_by_one = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), one_by_one, atol=1e-5)


def test_dropout_leaves_out_whole_channels_in_training_only() -> None:
    model = small(dropout=0.5)
    image = torch.randn(1, 1, 16, 16)
    assert not torch.equal(model(image), model(image))
    features = torch.ones(2, 3, 3, 64)
    kept = model._drop_channels(features)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert 0.2 < float((kept == 0).float().mean()) < 0.8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_checkpointing_gives_the_same_gradients(dimensions: int, form: str) -> None:
    model = open_gates(small(dimensions=dimensions, num_stages=2, dropout=0.2, drop_path=0.2, **FORMS[form]))
    image = torch.randn(1, 1, *(8,) * dimensions)
    gradients = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(7)
        model(image).square().sum().backward()
        gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_keeps_fewer_activations(form: str) -> None:
    model = small(**FORMS[form], detail_channels=8)
    image = torch.randn(1, 1, 32, 32)
    kept = []
    for on in (False, True):
        model.set_checkpointing(on)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model(image)
        kept.append(sum(sizes))
    assert kept[1] < (0.9 if form == "patches" else 0.6) * kept[0]


@pytest.mark.parametrize("form", FORMS)
def test_it_learns_a_shape(form: str) -> None:
    model = small(out_channels=2, **FORMS[form])
    image = torch.zeros(1, 1, 16, 16)
    image[..., 3:9, 5:12] = 1
    target = image[:, 0].long()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(image), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_float64_stays_and_autocast_gives_nearly_the_same(form: str) -> None:
    model = open_gates(small(**FORMS[form])).eval()
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        exact = model.double()(image.double())
        assert exact.dtype == torch.float64
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            short = model(image)
    assert float((short.double() - exact).square().mean()) < 0.1**2 * float(exact.square().mean())


def vmamba_layout(depths: tuple[int, ...] = (2, 2, 9, 2), channels: int = 96) -> dict[str, Tensor]:
    """Keys and shapes of VMamba's first release (tiny: 2, 2, 9, 2 blocks from 96 channels), random values."""
    state = {
        "patch_embed.proj.weight": (channels, 3, 4, 4),
        "patch_embed.proj.bias": (channels,),
        "patch_embed.norm.weight": (channels,),
        "patch_embed.norm.bias": (channels,),
    }
    for stage, depth in enumerate(depths):
        c = channels * 2**stage
        inner, rank = 2 * c, -(-c // 16)
        for block in range(depth):
            shapes = {
                "ln_1.weight": (c,),
                "ln_1.bias": (c,),
                "self_attention.x_proj_weight": (4, rank + 32, inner),
                "self_attention.dt_projs_weight": (4, inner, rank),
                "self_attention.dt_projs_bias": (4, inner),
                "self_attention.A_logs": (4 * inner, 16),
                "self_attention.Ds": (4 * inner,),
                "self_attention.in_proj.weight": (2 * inner, c),
                "self_attention.conv2d.weight": (inner, 1, 3, 3),
                "self_attention.conv2d.bias": (inner,),
                "self_attention.out_norm.weight": (inner,),
                "self_attention.out_norm.bias": (inner,),
                "self_attention.out_proj.weight": (c, inner),
            }
            state |= {f"layers.{stage}.blocks.{block}.{name}": shape for name, shape in shapes.items()}
        if stage < len(depths) - 1:
            state[f"layers.{stage}.downsample.reduction.weight"] = (2 * c, 4 * c)
            state[f"layers.{stage}.downsample.norm.weight"] = (4 * c,)
            state[f"layers.{stage}.downsample.norm.bias"] = (4 * c,)
    last = channels * 2 ** (len(depths) - 1)
    state |= {"norm.weight": (last,), "norm.bias": (last,), "head.weight": (1000, last), "head.bias": (1000,)}
    made = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=made) * 0.02 for key, shape in state.items()}


@pytest.mark.parametrize("depth", [(2, 2, 9, 2), 2])
def test_vmambas_published_layout_fits_the_encoder(depth: int | tuple[int, ...]) -> None:
    model = SpectralVMUNet(3, 2, 32, 96, 4, depth)
    state = vmamba_layout()
    known = list(model.encoder.parameters())
    left_out = load_vmamba_encoder(model, state)
    own = model.encoder.state_dict()
    taken = [key for key in state if key not in left_out]
    assert all(torch.equal(own[key], state[key]) for key in taken)
    deeper = {key for key in state if key.startswith("layers.2.blocks.") and int(key.split(".")[3]) > 1}
    expected = {"norm.weight", "norm.bias", "head.weight", "head.bias"} | (deeper if depth == 2 else set())
    assert set(left_out) == expected
    assert all("spectral" in key for key in set(own) - set(taken))
    # an optimiser that knows the parameters goes on training them, and the source is left alone
    assert all(one is other for one, other in zip(known, model.encoder.parameters(), strict=True))
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()
    assert state["patch_embed.proj.weight"].abs().sum() > 0


def test_a_vm_unet_checkpoint_file_fits(tmp_path: Path) -> None:
    model = SpectralVMUNet(3, 2, 32, 96, 2, 2)
    state = {f"vmunet.{key}": value for key, value in vmamba_layout((2, 2)).items()}
    state["vmunet.layers_up.0.blocks.0.ln_1.weight"] = torch.zeros(96)
    torch.save({"model": state, "epoch": 3}, tmp_path / "best.pth")
    left_out = load_vmamba_encoder(model, tmp_path / "best.pth")
    assert "layers_up.0.blocks.0.ln_1.weight" in left_out
    assert torch.equal(
        model.encoder.state_dict()["layers.0.blocks.0.ln_1.weight"], state["vmunet.layers.0.blocks.0.ln_1.weight"]
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "patches"])
def test_a_network_with_convolutions_has_no_place_for_vmambas_weights(form: str) -> None:
    with pytest.raises(SettingsError, match="build it with stem='patches'"):
        load_vmamba_encoder(small(**FORMS[form]), vmamba_layout((2, 2)))


def test_convolutions_stand_before_each_scan_of_every_stage() -> None:
    model = small(stem="convolutions", stage_convolutions=2, depth=(1, 2, 1))
    stages: list[Any] = [*model.encoder.layers, model.bottleneck, *(one.stage for one in model.decoder)]
    kinds = ["".join("C" if isinstance(block, ResidualFeatures) else "S" for block in one.blocks) for one in stages]
    assert kinds == ["CCS", "CCSCCS", "CCS", "CCS", "CCS", "CCS"]


def test_the_detail_branch_and_stochastic_depth_take_part() -> None:
    model = open_gates(small(detail_channels=4, drop_path=0.5)).eval()
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        before = model(image)
        assert model.detail is not None
        model.detail[0].weight.add_(1.0)  # type: ignore[union-attr, operator]
        assert not torch.allclose(model(image), before)
        model.train()
        assert not torch.equal(model(image), model(image))
    rates = [block.drop_path.p for layer in model.encoder.layers for block in layer.blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.25, 0.5])


def test_other_sizes_are_refused_by_key_and_shape() -> None:
    state = vmamba_layout((2, 2))
    with pytest.raises(
        WeightsError, match=r"patch_embed.proj.weight' has shape \(96, 3, 4, 4\), expected \(8, 1, 4, 4\)"
    ):
        load_vmamba_encoder(small(num_stages=2, depth=2, d_state=16), state)
    del state["layers.1.blocks.0.self_attention.Ds"]
    with pytest.raises(WeightsError, match=r"layers.1.blocks.0.self_attention.Ds' of shape \(1536,\) is missing"):
        load_vmamba_encoder(SpectralVMUNet(3, 2, 32, 96, 2, 2), state)
    with pytest.raises(WeightsError, match=r"layers.1.downsample.reduction.weight' .* is unknown"):
        load_vmamba_encoder(SpectralVMUNet(3, 2, 32, 96, 2, 2), vmamba_layout((2, 2, 2)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out_channels": 1}, "out_channels must be at least 2"),
        ({"depth": (1, 2)}, "for each of 3 stages"),
        ({"patch_size": (4, 4, 4)}, "patch_size must be 2 numbers"),
        ({"dropout": 1.0}, "dropout and drop_path"),
        ({"dimensions": 4}, "dimensions must be 2 or 3"),
        ({"stem": "patch"}, "stem must be one of patches, convolutions, got 'patch'"),
        ({"stem": "convolutions", "detail_channels": 0}, "detail_channels must be at least 1, got 0"),
        ({"stage_convolutions": -1}, "stage_convolutions must be at least 0, got -1"),
        ({"stage_convolutions": 1}, "stage_convolutions need the stem 'convolutions', got 'patches'"),
        ({"detail_channels": -1}, "detail_channels must be at least 0, got -1"),
        ({"stem": "convolutions", "patch_size": 6}, r"patches of 2, 4, 8, ... pixels, got \(6, 6\)"),
        ({"stem": "convolutions", "patch_size": 1}, r"patches of 2, 4, 8, ... pixels, got \(1, 1\)"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        small(**changes)


def test_a_wrong_number_of_channels_is_named() -> None:
    with pytest.raises(InputError, match=r"\(b, 1, h, w\), got \(1, 3, 16, 16\)"):
        small()(torch.zeros(1, 3, 16, 16))


def test_a_patch_is_halved_step_by_step_and_its_coarse_axis_last() -> None:
    assert halvings((4, 4)) == [(2, 2), (2, 2)]
    assert halvings((1, 2, 2)) == [(1, 2, 2)]
    assert halvings((2, 8, 4)) == [(1, 2, 1), (1, 2, 2), (2, 2, 2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grey", [0.0, 0.3])
def test_an_image_of_one_grey_is_no_rounding_noise(form: str, grey: float) -> None:
    model = open_gates(small(base_channels=16, **FORMS[form])).eval()
    image = torch.full((1, 1, 48, 48), grey)
    with torch.no_grad():
        short = model(image)
        exact = model.double()(image.double())
    assert float((short - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_a_stage_of_a_single_pixel_is_normed_to_its_shift() -> None:
    model = small(**FORMS["convolutions in every stage"]).eval()
    assert torch.isfinite(model(torch.randn(1, 1, 4, 4))).all()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_residual_block_is_monais(dimensions: int) -> None:
    from monai.networks.blocks.segresnet_block import ResBlock

    ours = ResidualBlock(16, dimensions)
    theirs = ResBlock(dimensions, 16, norm=("INSTANCE", {"affine": True}))
    theirs.load_state_dict(
        {
            key.replace("conv1", "conv1.conv").replace("conv2", "conv2.conv"): value
            for key, value in ours.state_dict().items()
        }
    )
    image = torch.randn(2, 16, *(7,) * dimensions)
    assert torch.allclose(ours(image), theirs(image.clone()), atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", FORMS)
def test_torch_compile_takes_the_network_in_use_and_in_training(form: str) -> None:
    model = open_gates(small(num_stages=2, **FORMS[form])).eval()
    image = torch.randn(1, 1, 18, 15)
    compiled = torch.compile(model)
    answers = []
    for network in (model, compiled):
        model.zero_grad()
        found = network(image)
        found.square().mean().backward()
        answers.append([found.detach(), *(value.grad.clone() for value in model.parameters())])  # type: ignore[union-attr]
    for one, other in zip(*answers, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-3)
