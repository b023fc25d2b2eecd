"""The bottlenecks against plain implementations: the whole encoder every step, one item at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.clip.aligner import Aligner, AlignerConfig
from FreqSegLib.saliency.m2ib import BottleneckSettings, gaussian_divergence, m2ib_information
from FreqSegLib.saliency.nib import nib_contribution

CONFIG = AlignerConfig(
    width=20, depth=3, class_depth=2, num_heads=2, embedding_channels=6, pooled_side=8, patch=2, embed_dim=12
)
SETTINGS = BottleneckSettings(beta=0.3, train_steps=5, num_noise_samples=3)


@pytest.fixture(params=[2, 3], ids=["before a block", "after the last block"])
def layer(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    torch.manual_seed(1)
    model = Aligner(CONFIG).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(3, 6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def texts() -> Tensor:
    return F.normalize(torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=-1)


def published(
    aligner: Aligner, layer: int, picture: Tensor, text: Tensor, noises: list[Tensor], settings: BottleneckSettings
) -> Tensor:
    """M2IB of one picture as published: a hook in the running encoder, Adam on the whole loss, then the capacity kept
    from the last forward pass. ``noises`` holds one (samples, N, C) a step."""
    state: dict[str, Tensor] = {}
    alpha = torch.full((1, CONFIG.grid**2, CONFIG.width), 5.0, dtype=picture.dtype, requires_grad=True)
    noise_of_step = iter(noises)

    def bottleneck(hidden: Tensor) -> Tensor:
        keep = torch.sigmoid(alpha).expand_as(hidden)
        mean, variance = keep * hidden, (1 - keep) ** 2
        state["capacity"] = -0.5 * (1 + torch.log(variance) - mean**2 - variance)
        return mean + torch.sqrt(variance) * next(noise_of_step)

    encoder = HookedEncoder(aligner, layer, bottleneck)
    optimiser = torch.optim.Adam([alpha], lr=settings.learning_rate)
    batch = picture[None].expand(settings.num_noise_samples, -1, -1, -1)
    for _ in range(settings.train_steps):
        optimiser.zero_grad()
        similarity = torch.cosine_similarity(encoder(batch), text[None].expand(len(batch), -1)).mean()
        (settings.beta * state["capacity"].mean() - similarity).backward()
        optimiser.step()
    aligner.zero_grad()
    return state["capacity"].mean(0).sum(-1).detach()


class HookedEncoder:
    """The aligner from picture to unit vector, written out, with something done to the tokens after block ``layer``."""

    def __init__(self, aligner: Aligner, layer: int, hook: Callable[[Tensor], Tensor]) -> None:
        self.aligner, self.layer, self.hook = aligner, layer, hook

    def __call__(self, pooled: Tensor) -> Tensor:
        model = self.aligner
        spread = torch.sqrt(pooled.var((2, 3), unbiased=False, keepdim=True) + 1e-5)
        within = (pooled - pooled.mean((2, 3), keepdim=True)) / spread
        x = model.patchify(torch.cat([(pooled - model.channel_mean) / model.channel_std, within], 1))
        x = x.flatten(2).transpose(1, 2) + model.position
        for number, block in enumerate(model.blocks, start=1):
            x = block(x)
            if number == CONFIG.depth:
                x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
            if number == self.layer:
                x = self.hook(x)
        token = model.class_token.expand(len(x), -1, -1)
        for block in model.class_blocks:
            token = block(token, x)
        vector = model.head(model.norm(token[:, 0]))
        return vector / vector.norm(dim=-1, keepdim=True)


def noises_of(seed: int, settings: BottleneckSettings) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.num_noise_samples, CONFIG.grid**2, CONFIG.width)
    return [torch.randn(shape, generator=generator).double() for _ in range(settings.train_steps)]


def ours(
    aligner: Aligner, layer: int, pictures: Tensor, texts: Tensor, seeds: list[int], settings: BottleneckSettings
) -> Tensor:
    with torch.no_grad():
        tokens = aligner.prefix(pictures, layer)
    return m2ib_information(lambda z: aligner.suffix(z, layer), tokens, texts, seeds, settings)


def test_prefix_and_suffix_are_the_whole_encoder(aligner: Aligner, pictures: Tensor, layer: int) -> None:
    whole = HookedEncoder(aligner, layer, lambda x: x)(pictures)
    torch.testing.assert_close(aligner.suffix(aligner.prefix(pictures, layer), layer), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(aligner(pictures), whole, rtol=0, atol=1e-12)


def test_maps_are_those_of_the_published_procedure(
    aligner: Aligner, pictures: Tensor, texts: Tensor, layer: int
) -> None:
    seeds = [11, 12, 13]
    found = ours(aligner, layer, pictures, texts, seeds, SETTINGS)
    for item, seed in enumerate(seeds):
        expected = published(aligner, layer, pictures[item], texts[item], noises_of(seed, SETTINGS), SETTINGS)
        assert (found[item] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert expected.std() > 1e-3 * expected.mean()


def test_single_precision_agrees(aligner: Aligner, pictures: Tensor, texts: Tensor) -> None:
    exact = ours(aligner, 3, pictures, texts, [0, 1, 2], SETTINGS)
    single = Aligner(CONFIG).eval()
    single.load_state_dict(aligner.state_dict())
    found = ours(single, 3, pictures.float(), texts.float(), [0, 1, 2], SETTINGS)
    assert (exact.dtype, found.dtype) == (torch.float64, torch.float32)
    assert (found.double() - exact).abs().max() < 1e-3 * exact.abs().max()


def test_the_first_map_is_the_divergence_before_any_step(aligner: Aligner, pictures: Tensor, texts: Tensor) -> None:
    tokens = aligner.prefix(pictures, 3).detach()
    found = ours(aligner, 3, pictures, texts, [0, 1, 2], replace(SETTINGS, train_steps=1))
    expected = gaussian_divergence(torch.sigmoid(torch.full_like(tokens, 5.0)), tokens).sum(-1)
    torch.testing.assert_close(found, expected)


def test_the_suffix_runs_once_a_step_and_not_after_the_map_is_known(
    aligner: Aligner, pictures: Tensor, texts: Tensor
) -> None:
    sizes = []

    def suffix(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return aligner.suffix(z, 3)

    m2ib_information(suffix, aligner.prefix(pictures, 3), texts, [0, 1, 2], SETTINGS)
    assert sizes == [3 * SETTINGS.num_noise_samples] * (SETTINGS.train_steps - 1)


def test_an_item_alone_is_the_item_in_company(aligner: Aligner, pictures: Tensor, texts: Tensor, layer: int) -> None:
    together = ours(aligner, layer, pictures, texts, [5, 6, 7], SETTINGS)
    for item, seed in enumerate([5, 6, 7]):
        alone = ours(aligner, layer, pictures[item : item + 1], texts[item : item + 1], [seed], SETTINGS)
        torch.testing.assert_close(alone[0], together[item], rtol=1e-9, atol=0)


def test_the_seed_decides_the_noise(aligner: Aligner, pictures: Tensor, texts: Tensor) -> None:
    one, again, other = (ours(aligner, 3, pictures, texts, [s, s, s], SETTINGS) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-6
    torch.manual_seed(99)
    assert torch.equal(one, ours(aligner, 3, pictures, texts, [1, 1, 1], SETTINGS))


def test_the_divergence_is_the_one_between_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, 7, dtype=torch.float64, generator=generator) * 3
    keep = torch.sigmoid(torch.randn(4, 7, dtype=torch.float64, generator=generator) * 4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(keep * h, 1 - keep), torch.distributions.Normal(torch.zeros_like(h), 1.0)
    )
    torch.testing.assert_close(gaussian_divergence(keep, h), expected)
    assert torch.isfinite(gaussian_divergence(torch.ones(1), torch.ones(1))).all()


def test_neither_bottleneck_leaves_a_gradient_on_weights_tokens_or_texts(
    aligner: Aligner, pictures: Tensor, texts: Tensor
) -> None:
    assert all(parameter.requires_grad for parameter in aligner.parameters())
    aligner.zero_grad()
    tokens = aligner.prefix(pictures, 3).detach().requires_grad_(True)
    asked = texts.clone().requires_grad_(True)
    before = tokens.detach().clone()
    maps = [
        m2ib_information(lambda z: aligner.suffix(z, 3), tokens, asked, [0, 1, 2], SETTINGS),
        nib_contribution(lambda z: aligner.suffix(z, 3), tokens, asked, 4),
    ]
    assert all(parameter.grad is None for parameter in aligner.parameters())
    assert tokens.grad is None
    assert asked.grad is None
    assert not any(found.requires_grad for found in maps)
    assert torch.equal(tokens, before)


def test_both_work_where_gradients_are_switched_off(aligner: Aligner, pictures: Tensor, texts: Tensor) -> None:
    tokens = aligner.prefix(pictures, 3).detach()
    expected = ours(aligner, 3, pictures, texts, [0, 1, 2], SETTINGS)
    with torch.no_grad():
        found = m2ib_information(lambda z: aligner.suffix(z, 3), tokens, texts, [0, 1, 2], SETTINGS)
        assert float(nib_contribution(lambda z: aligner.suffix(z, 3), tokens, texts).max()) > 0
    torch.testing.assert_close(found, expected)


def signed_contribution(aligner: Aligner, layer: int, tokens: Tensor, texts: Tensor, steps: int) -> Tensor:
    """Negative contributions are those that speak for the opposite text."""

    def suffix(z: Tensor) -> Tensor:
        return aligner.suffix(z, layer)

    return nib_contribution(suffix, tokens, texts, steps) - nib_contribution(suffix, tokens, -texts, steps)


def test_contributions_of_nib_sum_to_the_change_of_the_score(aligner: Aligner, pictures: Tensor, texts: Tensor) -> None:
    tokens = aligner.prefix(pictures, 3).detach()
    total = signed_contribution(aligner, 3, tokens, texts, 400).sum(1)
    with torch.no_grad():
        everything, nothing = aligner.suffix(tokens, 3), aligner.suffix(torch.zeros_like(tokens), 3)
    change = ((everything - nothing) * texts).sum(1)
    assert change.abs().min() > 1e-2
    torch.testing.assert_close(total, change, rtol=1e-3, atol=1e-5)


def test_nib_is_the_gradient_along_the_path_written_out(
    aligner: Aligner, pictures: Tensor, texts: Tensor, layer: int
) -> None:
    tokens = aligner.prefix(pictures, layer).detach()
    found = nib_contribution(lambda z: aligner.suffix(z, layer), tokens, texts, 4)
    for item in range(len(tokens)):
        expected = torch.zeros(CONFIG.grid**2, dtype=torch.float64)
        for share in (0.125, 0.375, 0.625, 0.875):
            z = (share * tokens[item : item + 1]).requires_grad_(True)
            (aligner.suffix(z, layer)[0] @ texts[item]).backward()
            expected += (z.grad[0] * tokens[item]).sum(-1) / 4
        aligner.zero_grad()
        torch.testing.assert_close(found[item], expected.clamp_min(0), rtol=1e-9, atol=1e-15)
    again = nib_contribution(lambda z: aligner.suffix(z, layer), tokens, texts, 4)
    assert torch.equal(found, again)
    assert float(found.min()) >= 0


def test_m2ib_finds_the_token_the_score_depends_on() -> None:
    """A suffix that reads one token only: the others are worth nothing, and give up their information first."""
    direction = F.normalize(torch.randn(8, generator=torch.Generator().manual_seed(0)), dim=0)

    def suffix(z: Tensor) -> Tensor:
        return F.normalize(z[:, 4], dim=-1)

    tokens = direction * 2 + torch.zeros(1, 9, 8)
    maps = [
        m2ib_information(suffix, tokens, direction[None], [0], BottleneckSettings(beta=0.1, num_noise_samples=4)),
        nib_contribution(suffix, tokens + 0.3, direction[None]),
    ]
    assert int(maps[0].argmax()) == 4
    assert float(maps[1].sum() - maps[1][0, 4]) == 0


def test_maps_come_out_the_same_inside_a_callers_inference_mode(
    aligner: Aligner, layer: int, pictures: Tensor, texts: Tensor
) -> None:
    def suffix(z: Tensor) -> Tensor:
        return aligner.suffix(z, layer)

    def both() -> tuple[Tensor, Tensor]:
        tokens = aligner.prefix(pictures, layer)
        information = m2ib_information(suffix, tokens, texts * 1.0, [1, 2, 3], SETTINGS)
        return information, nib_contribution(suffix, tokens, texts * 1.0)

    with torch.no_grad():
        expected = both()
    with torch.inference_mode():
        found = both()
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
