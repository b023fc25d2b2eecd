"""M2IB with the shared prefix against the published procedure and a fair baseline: same weights, noise and map."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from FreqSegLib.clip.open_clip_encoder import OpenCLIPEncoder
from FreqSegLib.saliency.m2ib import INITIAL_ALPHA, BottleneckSettings, gaussian_divergence, m2ib_information
from FreqSegLib.saliency.nib import nib_contribution
from Testing.benchmarks.measuring import Section, seconds
from Testing.unit.official_layouts import write_random_biomedclip

LAYER, SEED, PROMPT = 9, 0, "brain tumour"
PUBLISHED_GOAL, FAIR_GOAL, TOLERANCE = 8.0, 2.0, 1e-5


def m2ib_time(steps: int, samples: int, scale: str) -> Section:
    """Args:
    steps, samples: M2IB's; 10 and 10 as published.
    scale: ``full`` for BiomedCLIP's architecture, ``tiny`` to see that the benchmark runs.
    """
    section = Section("M2IB: a map of one image")
    settings = BottleneckSettings(beta=0.1, train_steps=steps, num_noise_samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        encoder = OpenCLIPEncoder.from_folder(write_random_biomedclip(Path(folder), scale=scale))
    section.say(
        f"BiomedCLIP's architecture ({scale}, random weights), after block {LAYER} of {encoder.num_layers}, {steps} "
        f"steps, {samples} noise samples, {torch.get_num_threads()} threads. From pixels and prompt to the map."
    )
    image = torch.rand(1, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(1))
    maps: dict[str, Tensor] = {}
    works: dict[str, Callable[[], Tensor]] = {
        "shared prefix (ours)": lambda: ours(encoder, image, settings),
        "fair baseline: frozen weights, text once, whole image tower a step": lambda: fair(encoder, image, settings),
        "as published: both towers and weight gradients a step": lambda: published(encoder, image, settings),
        "NIB": lambda: nib(encoder, image),
    }
    # what is set up once a process is nobody's time: kernels, buffers, and the compiler that torch's Adam brings along
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    encoder.encode_image(image)
    encoder.encode_text([PROMPT])
    taken = {name: seconds(lambda name=name, work=work: maps.update({name: work()})) for name, work in works.items()}  # type: ignore[misc]
    mine, theirs, plain, _ = taken.values()
    section.table(
        ["procedure", "s a map", "times ours"], [[name, f"{t:.1f}", f"{t / mine:.2f}"] for name, t in taken.items()]
    )
    own, *others = (maps[name] for name in list(works)[:3])
    for name, other in zip(("fair baseline", "published procedure"), others, strict=True):
        relative = float((own - other).abs().max() / other.abs().max())
        section.check(f"Largest difference from the {name}'s map, relative to its maximum", relative, TOLERANCE)
    section.goal("Times faster than the published procedure", plain / mine, PUBLISHED_GOAL, at_least=True)
    section.goal("Times faster than the fair baseline", theirs / mine, FAIR_GOAL, at_least=True)
    return section


def ours(encoder: OpenCLIPEncoder, image: Tensor, settings: BottleneckSettings) -> Tensor:
    with torch.no_grad():
        tokens = encoder.prefix(image, LAYER)
    text = encoder.encode_text([PROMPT])
    return m2ib_information(lambda z: encoder.suffix(z, LAYER), tokens, text, [SEED], settings)


def nib(encoder: OpenCLIPEncoder, image: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = encoder.prefix(image, LAYER)
    return nib_contribution(lambda z: encoder.suffix(z, LAYER), tokens, encoder.encode_text([PROMPT]))


def fair(encoder: OpenCLIPEncoder, image: Tensor, settings: BottleneckSettings) -> Tensor:
    """Weights frozen and the text encoded once, but every step runs the image tower from the pixels."""
    text = encoder.encode_text([PROMPT])
    return _by_hook(encoder, image, settings, lambda: text)


def published(encoder: OpenCLIPEncoder, image: Tensor, settings: BottleneckSettings) -> Tensor:
    """Every step runs both towers on as many copies as there are samples, and collects the weights' gradients."""
    words = encoder.tokenizer([PROMPT]).expand(settings.num_noise_samples, -1)
    encoder.model.requires_grad_(True)
    try:
        return _by_hook(encoder, image, settings, lambda: encoder.model.encode_text(words, normalize=True))
    finally:
        encoder.model.requires_grad_(False)
        encoder.model.zero_grad(set_to_none=True)


def _by_hook(
    encoder: OpenCLIPEncoder, image: Tensor, settings: BottleneckSettings, encode_text: Callable[[], Tensor]
) -> Tensor:
    """M2IB with the bottleneck as a hook inside the whole model (Wang et al., 2023)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    pixels = ((image - mean) / std).expand(settings.num_noise_samples, -1, -1, -1)
    with torch.no_grad():
        shape = encoder.prefix(image, LAYER).shape
    alpha = torch.full(shape, INITIAL_ALPHA, requires_grad=True)
    optimiser = torch.optim.Adam([alpha], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(SEED)
    divergence = torch.zeros(shape)

    def bottleneck(h: Tensor) -> Tensor:
        nonlocal divergence
        keep = torch.sigmoid(alpha)
        noise = torch.randn(settings.num_noise_samples, *shape[1:], generator=generator)
        divergence = gaussian_divergence(keep, h).mean(0, keepdim=True)
        return keep * h + (1 - keep) * noise

    with _hooked(encoder, bottleneck), torch.enable_grad():
        for _ in range(settings.train_steps):
            optimiser.zero_grad()
            vectors = encoder.model.encode_image(pixels, normalize=True)
            cosine = (vectors * encode_text()).sum(-1).mean()
            (settings.beta * divergence.mean() - cosine).backward()
            optimiser.step()
    return divergence.detach().sum(-1)


@contextmanager
def _hooked(encoder: OpenCLIPEncoder, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    block = encoder.model.visual.trunk.blocks[LAYER - 1]
    handle = block.register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()
