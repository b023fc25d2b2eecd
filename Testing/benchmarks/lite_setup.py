"""The lite preset for benchmarks: trained weights where they are installed, random ones of the same size elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.prompts import PromptMatcher
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.presets import preset
from FreqSegLib.sam.lite_medsam import LiteMedSAM
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.volume import Volume
from Testing.benchmarks.measuring import ROOT
from Testing.benchmarks.reference_tiny_vit import PlainTinyViT

SAMPLE = ROOT / "Resources" / "Samples" / "simulated_flair.nrrd"
# every slice goes through every stage, so that the time does not depend on what the gate finds
EVERY_SLICE = TextSegmentationSettings(gate=False)


def lite_segmenter(cache: Path) -> tuple[TextSegmenter, str]:
    """The pipeline with an embedding cache of its own, and whose weights it has, in words."""
    wanted = preset("lite").weights
    missing = [name for name in wanted if weights.find(name) is None]
    if not missing:
        found = TextSegmenter.from_preset("lite", device="cpu", settings=EVERY_SLICE, cache=EmbeddingCache(cache))
        return found, "trained weights"
    torch.manual_seed(0)
    tower = _tower()
    folder = weights.find("minilm")
    text = MiniLM(folder) if folder else WordHashes()
    aligner = weights.find("lite-aligner")
    head = Aligner.load(aligner / "aligner.safetensors") if aligner else Aligner().requires_grad_(False).eval()
    segmenter = TextSegmenter(
        LiteEncoder(tower, head, text),  # type: ignore[arg-type]
        tower,
        preset("lite"),
        weights_key="benchmark",
        # a random aligner sees a dozen things in every slice, a trained one the target
        settings=replace(EVERY_SLICE, num_contours=1),
        matcher=PromptMatcher(text),  # type: ignore[arg-type]
        cache=EmbeddingCache(cache),
    )
    said = f"random weights in place of {', '.join(missing)} (not installed), largest component of each slice only"
    return segmenter, said


def plain_encoder() -> PlainTinyViT:
    """The unoptimised encoder with the checkpoint's weights, or random ones."""
    model = PlainTinyViT()
    folder = weights.find("litemedsam")
    if folder is None:
        torch.manual_seed(0)
        _shake(model)
        return model
    state = torch.load(folder / "lite_medsam.pth", map_location="cpu", weights_only=True)
    prefix = "image_encoder."
    model.load({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return model


def sample_volume(slices: int) -> Volume:
    """The simulated FLAIR repeated up and down to that many slices, no two of them alike."""
    sample = Volume.read(SAMPLE)
    order = np.resize(np.r_[np.arange(sample.shape[0]), np.arange(sample.shape[0])[::-1]], slices)
    array = np.ascontiguousarray(sample.array[order]).astype(np.float32)
    array *= np.linspace(0.9, 1.0, slices, dtype=np.float32)[:, None, None]
    return replace(sample, array=array, name=f"{slices} slices")


class WordHashes:
    """Stands in for MiniLM where it is not installed: a random direction a sentence."""

    embed_dim = 384

    def encode(self, sentences: Sequence[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") for text in sentences]
        rows = [torch.randn(self.embed_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return nn.functional.normalize(torch.stack(rows), dim=-1)


def _tower() -> LiteMedSAM:
    folder = weights.find("litemedsam")
    if folder:
        return LiteMedSAM.from_checkpoint(folder / "lite_medsam.pth")
    tower = LiteMedSAM()
    tower.image_encoder.load_checkpoint(plain_encoder().state_dict())
    return tower


def _shake(model: nn.Module) -> None:
    """Batch norms of a fresh network do nothing; random ones make equality mean something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                value.data.uniform_(0.5, 1.5)
            for value in (module.bias, module.running_mean):
                value.data.normal_(0, 0.1)
