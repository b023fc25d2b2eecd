"""DHN-NCE against the paper's equations written as loops in double precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.training.dhn_nce import DHNNCELoss


def unit(rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(
        torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def written_out(
    images: Tensor, texts: Tensor, temperature: float, beta1: float, beta2: float, negatives: list[list[bool]]
) -> float:
    """L(v->t) + L(t->v), the mean over the batch, each row with its own negatives."""
    count = len(images)

    def one_way(queries: Tensor, keys: Tensor, beta: float, negative: list[list[bool]]) -> float:
        total = 0.0
        for i in range(count):
            score = [float(queries[i] @ keys[j]) / temperature for j in range(count)]
            others = [j for j in range(count) if negative[i][j]]
            total -= score[i]
            if others:
                hardness = sum(math.exp(beta * score[k]) for k in others)
                weight = {j: len(others) * math.exp(beta * score[j]) / hardness for j in others}
                total += math.log(sum(weight[j] * math.exp(score[j]) for j in others))
        return total / count

    transposed = [[negatives[j][i] for j in range(count)] for i in range(count)]
    return one_way(images, texts, beta1, negatives) + one_way(texts, images, beta2, transposed)


@pytest.mark.parametrize(("temperature", "beta1", "beta2"), [(0.6, 0.15, 0.15), (0.1, 0.5, 0.0), (1.0, 0.0, 1.0)])
def test_the_loss_is_the_papers(temperature: float, beta1: float, beta2: float) -> None:
    images, texts = unit(6, 5, 0), unit(6, 5, 1)
    others = [[i != j for j in range(6)] for i in range(6)]
    expected = written_out(images, texts, temperature, beta1, beta2, others)
    loss = DHNNCELoss(temperature, beta1, beta2)
    assert float(loss(images, texts)) == pytest.approx(expected, rel=1e-12)
    assert float(loss(images, texts, torch.tensor(others))) == pytest.approx(expected, rel=1e-12)


def test_pairs_that_may_belong_together_are_no_negatives() -> None:
    images, texts = unit(5, 4, 2), unit(5, 4, 3)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(4)) < 0.6
    mask.fill_diagonal_(False)
    mask[2] = False  # an image without any negative text; its text still has negative images
    assert mask[:, 2].any()
    loss = DHNNCELoss(0.6, 0.15, 0.3)
    expected = written_out(images, texts, 0.6, 0.15, 0.3, mask.tolist())
    assert float(loss(images, texts, mask)) == pytest.approx(expected, rel=1e-12)
    before = float(loss(images, texts, mask))
    closer = texts.clone()
    closer[0] = images[2]  # not a negative of image 2, so bringing it near costs image 2 nothing
    changed = written_out(images, closer, 0.6, 0.15, 0.3, mask.tolist())
    assert float(loss(images, closer, mask)) == pytest.approx(changed, rel=1e-12)
    assert changed != before


def test_without_any_negative_only_the_positive_pairs_count() -> None:
    images, texts = unit(3, 4, 5), unit(3, 4, 6)
    found = DHNNCELoss(0.5)(images, texts, torch.zeros(3, 3, dtype=torch.bool))
    assert float(found) == pytest.approx(-2 * float((images * texts).sum(1).mean()) / 0.5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_right(masked: bool) -> None:
    images, texts = unit(4, 3, 7).requires_grad_(True), unit(4, 3, 8).requires_grad_(True)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool() if masked else None
    assert torch.autograd.gradcheck(lambda i, t: DHNNCELoss(0.6, 0.15, 0.0)(i, t, mask), (images, texts))


def test_large_scores_do_not_overflow() -> None:
    images = torch.eye(4).requires_grad_(True)
    texts = torch.eye(4)
    loss = DHNNCELoss(temperature=1e-3, beta1=2.0, beta2=2.0)(images, texts.roll(1, 0))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(images.grad).all()
    # one negative of score 1000 in each row carries all the weight, 3 of 3: log 3 + 1000, both ways
    assert float(loss.detach()) == pytest.approx(2 * (1000 + math.log(3)), rel=1e-6)


def test_hard_negatives_weigh_more() -> None:
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), dim=-1)
    mild, sharp = (float(DHNNCELoss(0.6, beta, beta)(image, image)) for beta in (0.0, 1.0))
    assert sharp > mild
