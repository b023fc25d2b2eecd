"""Makes a preset's models from the weights on this machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from FreqSegLib import weights
from FreqSegLib.download import file_digest
from FreqSegLib.errors import SettingsError
from FreqSegLib.presets import Preset, Tuning, preset, read_tuning
from FreqSegLib.settings import TextSegmentationSettings

if TYPE_CHECKING:
    import torch

    from FreqSegLib.embedding_cache import EmbeddingCache
    from FreqSegLib.text_segmentation import TextSegmenter


@dataclass(frozen=True)
class OwnWeights:
    """The user's files in place of the catalogue's: an open_clip folder, a segment_anything checkpoint."""

    clip_folder: Path | None = None
    sam_checkpoint: Path | None = None

    def key(self) -> str:
        """Tells these files from others in the embedding cache: paths, sizes and times."""
        files = sorted(p for p in self.clip_folder.rglob("*") if p.is_file()) if self.clip_folder else []
        files += [self.sam_checkpoint] if self.sam_checkpoint else []
        said = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists()]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16] if said else ""


def load_segmenter(
    kind: type[TextSegmenter],
    name: str,
    device: torch.device,
    sam: str | None,
    own: OwnWeights,
    settings: TextSegmentationSettings | None,
    cache: EmbeddingCache | None,
) -> TextSegmenter:
    """See ``TextSegmenter.from_preset``."""
    chosen = preset(name, sam)
    if chosen.encoder != "lite":
        return _open_clip(kind, chosen, device, own, settings, cache)
    if own != OwnWeights():
        raise SettingsError(f"Preset '{name}' has its own weights; use your own with the preset biomedclip-sam.")
    return _lite(kind, chosen, device, settings, cache)


def _lite(
    kind: type[TextSegmenter],
    chosen: Preset,
    device: torch.device,
    settings: TextSegmentationSettings | None,
    cache: EmbeddingCache | None,
) -> TextSegmenter:
    from FreqSegLib.clip.aligner import Aligner
    from FreqSegLib.clip.lite_encoder import LiteEncoder
    from FreqSegLib.clip.mini_lm import MiniLM
    from FreqSegLib.clip.prompts import PromptMatcher
    from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion
    from FreqSegLib.saliency.amortised import AmortisedBottleneck
    from FreqSegLib.sam.lite_medsam import LiteMedSAM
    from FreqSegLib.text_trained import TrainedMethod

    folders = {weight: weights.require(weight) for weight in chosen.weights}
    tower = LiteMedSAM.from_checkpoint(folders["litemedsam"] / "lite_medsam.pth", device)
    text = MiniLM(folders["minilm"], device)
    aligner = Aligner.load(folders["lite-aligner"] / "aligner.safetensors", device)
    assert chosen.trained is not None
    trained = None
    if weights.find(chosen.trained) is not None:
        folder = weights.require(chosen.trained)
        trained = TrainedMethod.load(folder, _weights_key((chosen.trained,)), text, device)
    assert chosen.zero_shot is not None
    fusion, amortised = None, None
    branch_tuning: dict[str, Tuning] = {}
    if weights.find(chosen.zero_shot) is not None:
        folder = weights.require(chosen.zero_shot)
        fusion = ZeroShotFusion.load(folder / "fusion.safetensors", device)
        amortised = AmortisedBottleneck.load(folder / "bottleneck.safetensors", device)
        branch_tuning = read_tuning(folder)
    return kind(
        LiteEncoder(tower, aligner, text),
        tower,
        chosen,
        weights_key=_weights_key(chosen.weights),
        settings=settings,
        tuning=read_tuning(folders["lite-aligner"]),
        branch_tuning=branch_tuning,
        matcher=PromptMatcher(text),
        fusion=fusion,
        amortised=amortised,
        trained=trained,
        cache=cache,
        device=device,
    )


def _open_clip(
    kind: type[TextSegmenter],
    chosen: Preset,
    device: torch.device,
    own: OwnWeights,
    settings: TextSegmentationSettings | None,
    cache: EmbeddingCache | None,
) -> TextSegmenter:
    from FreqSegLib.clip.open_clip_encoder import OpenCLIPEncoder
    from FreqSegLib.sam.sam_model import SegmentAnything

    clip, sam = chosen.weights
    encoder = OpenCLIPEncoder.from_folder(own.clip_folder or weights.require(clip), device)
    checkpoint = own.sam_checkpoint
    if checkpoint is None and weights.find(sam) is not None:
        checkpoint = weights.require(sam) / weights.catalogue()[sam].files[0].filename
    refiner = None if checkpoint is None else SegmentAnything.from_checkpoint(checkpoint, "auto", device)
    return kind(
        encoder,
        refiner,
        chosen,
        weights_key=_weights_key(chosen.weights) + own.key(),
        settings=settings,
        cache=cache,
        device=device,
    )


def _weights_key(ids: tuple[str, ...]) -> str:
    """Changes with the weights' contents, so that cached embeddings of other weights are never used."""
    digest = hashlib.sha256()
    for weight in ids:
        folder = weights.find(weight)
        digest.update(weight.encode())
        for file in weights.catalogue()[weight].files if folder else ():
            assert folder is not None
            # shipped weights without a manifest (just trained) have the same size whatever they hold
            digest.update((file.sha256 or file_digest(folder / file.filename)).encode())
    return digest.hexdigest()[:16]
