"""FFBI, its efficient form, their way into saliency, and the fusion of saliencies."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.interaction import FFBI, METHODS, AdaptiveFusion, EfficientFFBI, SaliencyInteraction, compare_fusion


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saliency(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


Network = TypeVar("Network", bound=nn.Module)


def trained(module: Network, seed: int = 0) -> Network:
    """The module in evaluation mode with no parameter left at zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


class TestFFBI:
    def test_untrained_it_returns_what_it_was_given_even_in_training_mode(self) -> None:
        low, high = noise(2, 9, 32), noise(2, 5, 48)
        for module in (FFBI(32, 48), FFBI(32, 48).eval()):
            low_out, high_out = module(low, high)
            assert torch.equal(low_out, low)
            assert torch.equal(high_out, high)

    def test_each_stream_equals_torchs_own_multihead_attention_on_the_original_inputs(self) -> None:
        module = trained(FFBI(16, 24, num_heads=4)).double()
        low, high = noise(2, 7, 16).double(), noise(2, 5, 24, seed=1).double()
        low_out, high_out = module(low, high)
        for ours, x, context, x_norm, context_norm, part in (
            (low_out, low, high, module.low_norm, module.high_norm, module.low_from_high),
            (high_out, high, low, module.high_norm, module.low_norm, module.high_from_low),
        ):
            width, context_width = x.shape[2], context.shape[2]
            reference = nn.MultiheadAttention(
                width, 4, kdim=context_width, vdim=context_width, batch_first=True, dtype=torch.float64
            )
            with torch.no_grad():
                reference.q_proj_weight.copy_(part.query.weight)
                reference.k_proj_weight.copy_(part.key.weight)
                reference.v_proj_weight.copy_(part.value.weight)
                reference.in_proj_bias.copy_(torch.cat([part.query.bias, part.key.bias, part.value.bias]))
                reference.out_proj.weight.copy_(part.output.weight)
                reference.out_proj.bias.copy_(part.output.bias)
            seen = context_norm(context)
            torch.testing.assert_close(ours, x + reference(x_norm(x), seen, seen)[0])

    def test_an_item_alone_gives_what_it_gives_in_a_batch(self) -> None:
        module = trained(FFBI(16, 16))
        low, high = noise(3, 6, 16), noise(3, 6, 16, seed=1)
        for together, alone in zip(module(low, high), module(low[1:2], high[1:2]), strict=True):
            torch.testing.assert_close(together[1:2], alone)

    def test_dropout_acts_in_training_only(self) -> None:
        module = trained(FFBI(16, 16, dropout=0.5))
        low, high = noise(1, 6, 16), noise(1, 6, 16, seed=1)
        assert torch.equal(module(low, high)[0], module(low, high)[0])
        module.train()
        torch.manual_seed(0)
        assert not torch.equal(module(low, high)[0], module(low, high)[0])

    def test_training_starts_at_the_output_projections(self) -> None:
        module = FFBI(16, 24)
        low, high = module(noise(2, 6, 16), noise(2, 6, 24))
        (low.square().sum() + high.square().sum()).backward()
        assert module.low_from_high.output.weight.grad.abs().sum() > 0
        assert module.high_from_low.output.weight.grad.abs().sum() > 0

    def test_settings_that_do_not_fit_are_named(self) -> None:
        with pytest.raises(SettingsError, match=r"num_heads=8 must divide high_channels=20: choose one of 1, 2, 4$"):
            FFBI(16, 20)
        with pytest.raises(SettingsError, match="num_heads must be at least 1, got 0"):
            FFBI(16, 16, num_heads=0)
        with pytest.raises(SettingsError, match=r"below 1, got 1\.0"):
            FFBI(16, 16, dropout=1.0)

    def test_tokens_of_the_wrong_shape_are_named(self) -> None:
        with pytest.raises(InputError, match=r"high-frequency tokens must be \(B, N, 24\), got \(2, 6, 16\)"):
            FFBI(16, 24)(noise(2, 6, 16), noise(2, 6, 16))


class TestEfficientFFBI:
    def test_untrained_it_returns_what_it_was_given_for_maps_and_tokens(self) -> None:
        module = EfficientFFBI(3, 40)
        for low, high in ((noise(2, 3, 4, 5), noise(2, 40, 2, 2)), (noise(2, 7, 3), noise(2, 40, 2, 2))):
            low_out, high_out = module(low, high)
            assert torch.equal(low_out, low)
            assert torch.equal(high_out, high)

    def test_tokens_give_what_the_same_values_give_as_maps(self) -> None:
        module = trained(EfficientFFBI(8, 12, reduction=2))
        low, high = noise(2, 8, 4, 5), noise(2, 12, 3, 3, seed=1)
        maps = module(low, high)
        tokens = module(low.flatten(2).mT, high.flatten(2).mT)
        for as_map, as_tokens in zip(maps, tokens, strict=True):
            torch.testing.assert_close(as_map.flatten(2).mT, as_tokens)

    def test_a_streams_gains_depend_on_the_other_stream_only(self) -> None:
        module = trained(EfficientFFBI(8, 12))
        low, high = noise(2, 8, 4, 4), noise(2, 12, 4, 4, seed=1)
        torch.testing.assert_close(module(2 * low, high)[0], 2 * module(low, high)[0])
        assert not torch.allclose(module(low, 2 * high)[0], module(low, high)[0])

    def test_a_large_reduction_leaves_small_widths_able_to_learn(self) -> None:
        module = EfficientFFBI(4, 4, reduction=64)
        low, high = module(noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1))
        (low.square().sum() + high.square().sum()).backward()
        assert module.low_from_high[-1].bias.grad.abs().sum() > 0
        assert module.low_from_high[0].out_features == 4

    def test_features_of_the_wrong_width_are_named(self) -> None:
        with pytest.raises(InputError, match=r"high-frequency features must be tokens .* got \(2, 8, 4, 4\)"):
            EfficientFFBI(8, 12)(noise(2, 8, 4, 4), noise(2, 8, 4, 4))
        with pytest.raises(SettingsError, match="reduction must be at least 1, got 0"):
            EfficientFFBI(8, 12, reduction=0)


class TestSaliencyInteraction:
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return noise(2, 9, 16), noise(2, 9, 24, seed=1), saliency(2, 1, 12, 10), saliency(2, 1, 12, 10, seed=1)

    def test_closed_gates_return_the_saliencies_to_the_last_bit(self) -> None:
        module = SaliencyInteraction(16, 24)
        assert module.is_identity
        low_tokens, high_tokens, low, high = self.arguments()
        low[:, :, :3] = 0
        high[:, :, :3] = 1
        for one, other in ((low, high), (low.mT, high.mT), (low[:, :, ::3], high[:1].expand(2, 1, 12, 10))):
            low_out, high_out = module(low_tokens, high_tokens, one, other)
            assert torch.equal(low_out, one)
            assert torch.equal(high_out, other)

    def test_an_open_gate_adds_the_heads_map_to_the_logit(self) -> None:
        module = trained(SaliencyInteraction(16, 24))
        low_tokens, high_tokens, low, high = self.arguments()
        low, high = low * 0.9 + 0.05, high * 0.9 + 0.05
        assert not module.is_identity
        low_out, high_out = module(low_tokens, high_tokens, low, high)
        features = module.interaction(low_tokens, high_tokens)
        for ours, before, tokens, head, gate in (
            (low_out, low, features[0], module.low_head, module.low_gate),
            (high_out, high, features[1], module.high_head, module.high_gate),
        ):
            evidence = (tokens @ head.weight[0] + head.bias).reshape(2, 1, 3, 3)
            evidence = nn.functional.interpolate(evidence, (12, 10), mode="bilinear")
            torch.testing.assert_close(ours, (torch.log(before / (1 - before)) + gate * evidence).sigmoid())

    def test_the_result_stays_within_zero_and_one(self) -> None:
        module = trained(SaliencyInteraction(16, 24))
        low_tokens, high_tokens, low, high = self.arguments()
        for result in module(100 * low_tokens, 100 * high_tokens, low.round(), high.round()):
            assert result.min() >= 0
            assert result.max() <= 1

    def test_a_grid_that_is_not_square_lies_row_by_row(self) -> None:
        module = SaliencyInteraction(1, 1, num_heads=1)
        with torch.no_grad():
            module.low_gate.fill_(1)
            module.low_head.weight.fill_(1)
            module.low_head.bias.zero_()
        tokens = torch.zeros(1, 6, 1)
        tokens[0, 2] = 5  # the last column of the first of two rows
        half = torch.full((1, 1, 2, 3), 0.5)
        low, high = module(tokens, tokens, half, half, grid=(2, 3))
        expected = half.clone()
        expected[0, 0, 0, 2] = torch.tensor(5.0).sigmoid()
        torch.testing.assert_close(low, expected)
        assert torch.equal(high, half)
        with pytest.raises(InputError, match="6 tokens do not fill a grid of 2 x 2"):
            module(tokens, tokens, half, half)

    @pytest.mark.parametrize("efficient", [False, True], ids=["FFBI", "EfficientFFBI"])
    def test_gates_learn_first_then_the_interaction(self, efficient: bool) -> None:
        torch.manual_seed(0)
        module = SaliencyInteraction(16, 24, interaction=EfficientFFBI(16, 24) if efficient else None)
        target = saliency(2, 1, 12, 10, seed=5)

        def gradients() -> dict[str, float]:
            module.zero_grad()
            for result in module(*self.arguments()):
                (result - target).square().mean().backward(retain_graph=True)
            return {name: float(p.grad.abs().sum()) for name, p in module.named_parameters() if p.grad is not None}

        closed = gradients()
        assert closed["low_gate"] > 0
        assert closed["high_gate"] > 0
        assert all(closed[name] == 0 for name in closed if name.startswith("interaction"))
        with torch.no_grad():
            module.low_gate.fill_(0.1)
            module.high_gate.fill_(-0.1)
        opened = gradients()
        outputs = [name for name in opened if name.endswith(("output.weight", "2.weight"))]
        assert len(outputs) == 2
        assert all(opened[name] > 0 for name in outputs)


@pytest.mark.parametrize("method", METHODS)
class TestAdaptiveFusion:
    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        raw, low, high = (saliency(2, 1, 11, 8, seed=seed) for seed in range(3))
        raw[0, 0, 0], raw[0, 0, 1] = 0, 1
        return raw, low, high

    def test_untrained_it_returns_the_raw_saliency_to_the_last_bit(self, method: str) -> None:
        raw, low, high = self.maps()
        module = AdaptiveFusion(method)
        assert module.is_identity
        assert torch.equal(module(raw, low, high), raw)
        assert module(raw) is raw

    def test_the_gate_learns_first_then_the_fusion(self, method: str) -> None:
        raw, low, high = self.maps()
        target = saliency(2, 1, 11, 8, seed=3).round()
        module = AdaptiveFusion(method)
        losses = []
        for step in range(60):
            module.zero_grad()
            loss = (module(raw, low, high) - target).square().mean()
            loss.backward()
            if step == 0:
                assert module.gate.grad.abs() > 0
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= parameter.grad
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert not module.is_identity
        for parameter in module.parameters():
            assert parameter.grad.abs().sum() > 0

    def test_the_result_stays_within_zero_and_one_whichever_way_the_gate_opens(self, method: str) -> None:
        raw, low, high = self.maps()
        module = trained(AdaptiveFusion(method))
        for gate in (-3.0, 0.5, 3.0):
            nn.init.constant_(module.gate, gate)
            result = module(raw, low, high)
            assert result.min() >= 0
            assert result.max() <= 1
            expected = (raw + np.tanh(gate) * (module.fuse(low, high) - raw)).clamp(0, 1)
            torch.testing.assert_close(result, expected)

    def test_an_open_gate_asks_for_both_branches(self, method: str) -> None:
        module = trained(AdaptiveFusion(method))
        with pytest.raises(InputError, match=f"gate of the {method} fusion is open"):
            module(self.maps()[0])

    def test_maps_of_different_shapes_are_named(self, method: str) -> None:
        raw, low, high = self.maps()
        with pytest.raises(InputError, match=r"raw \(2, 1, 11, 8\), low \(2, 1, 11, 7\)"):
            AdaptiveFusion(method)(raw, low[..., :-1], high)


def test_the_fusions_are_what_they_are_called() -> None:
    low, high = saliency(1, 1, 6, 6), saliency(1, 1, 6, 6, seed=1)
    mean = (low + high) / 2
    torch.testing.assert_close(AdaptiveFusion("simple").fuse(low, high), mean)
    torch.testing.assert_close(AdaptiveFusion("adaptive").fuse(low, high), mean)  # weights start at one half
    adaptive = trained(AdaptiveFusion("adaptive"))
    first, _, last = adaptive.conv
    hidden = nn.functional.conv2d(torch.cat([high, low], 1), first.weight, first.bias, padding=1).relu()
    weight = (last.weight[0, :, 0, 0, None, None] * hidden).sum(1, keepdim=True).add(last.bias).sigmoid()
    torch.testing.assert_close(adaptive.fuse(low, high), weight * high + (1 - weight) * low)
    nn.init.constant_(last.bias, 50.0)
    torch.testing.assert_close(adaptive.fuse(low, high), high)
    concatenated = trained(AdaptiveFusion("cat_conv"))
    concatenated.conv.load_state_dict(adaptive.conv.state_dict())
    torch.testing.assert_close(concatenated.fuse(low, high), torch.ones_like(low))


def test_an_unknown_fusion_is_named() -> None:
    with pytest.raises(SettingsError, match="fusion method 'maximum' does not exist; choose one of simple, cat_conv"):
        AdaptiveFusion("maximum")


class TestCompareFusion:
    def test_dice_is_the_hand_worked_one(self) -> None:
        target = torch.zeros(1, 1, 4, 4)
        target[..., :2, :] = 1  # 8 pixels
        half = torch.full((1, 1, 4, 4), 0.1)
        half[..., 0, :] = 0.9  # 4 of the 8: Dice 2*4/(4+8)
        wrong = (1 - target) * 0.8  # none of the 8
        result = compare_fusion(raw=target * 0.7, low=half, high=wrong, target=target)
        # the mean is 0.05 in the second row and 0.45 in the others: 12 pixels, 4 of them right
        assert result == pytest.approx({"raw": 1, "low": 2 * 4 / (4 + 8), "high": 0, "simple": 2 * 4 / (12 + 8)})
        assert list(result) == ["raw", "low", "high", "simple"]

    def test_a_fixed_threshold_is_strict_and_maps_are_averaged(self) -> None:
        target = torch.zeros(2, 1, 2, 2)
        target[0, 0, 0] = 1
        raw = target * 0.5
        assert compare_fusion(raw, raw, raw, target, threshold=0.49)["raw"] == 1  # the empty pair counts 1
        assert compare_fusion(raw, raw, raw, target, threshold=0.5)["raw"] == 0.5

    def test_a_trained_fusion_is_run_with_its_own_gate_and_left_in_its_mode(self) -> None:
        target = (saliency(3, 1, 8, 8) > 0.7).float()
        raw, low, high = saliency(3, 1, 8, 8, seed=1), target * 0.8, target * 0.6
        fusion = AdaptiveFusion("adaptive")
        assert compare_fusion(raw, low, high, target, {"closed": fusion})["closed"] == pytest.approx(
            compare_fusion(raw, low, high, target)["raw"]
        )
        nn.init.constant_(fusion.gate, 20.0)
        result = compare_fusion(raw, low, high, target, {"open": fusion})
        assert result["open"] == 1 > result["raw"]
        assert fusion.training

    def test_otsus_cut_is_the_one_of_largest_between_class_variance(self) -> None:
        values = saliency(1, 1, 6, 7).square().mul(20).round().div(20)
        flat = values.flatten().double().numpy()

        def between_class_variance(cut: float) -> float:
            below, above = flat[flat <= cut], flat[flat > cut]
            return below.size * above.size * (below.mean() - above.mean()) ** 2

        best = max(np.unique(flat)[:-1], key=between_class_variance)
        target = (values > best).float()
        assert compare_fusion(values, values, values, target)["raw"] == 1
        constant = torch.full_like(values, 0.4)
        assert compare_fusion(constant, constant, constant, torch.zeros_like(values))["raw"] == 1
        assert compare_fusion(constant, constant, constant, target)["raw"] == 0
