"""Type a prompt, get a mask: the text-guided pipeline, one stage a line in :meth:`TextSegmenter.segment`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from FreqSegLib.clip.encoder import ImageTextEncoder, check_layer
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.prompts import MatchedPrompt, PromptMatcher, clean_prompt
from FreqSegLib.device import Batches, default_batch_size, resolve_device
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import SettingsError
from FreqSegLib.intensity import Normalised, normalise
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion
from FreqSegLib.presets import Preset, Tuning
from FreqSegLib.progress import CancelCallback, Progress, ProgressCallback, Stage
from FreqSegLib.saliency.amortised import AmortisedBottleneck, require_amortised
from FreqSegLib.sam.promptable import PromptableSegmenter
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.text_results import Intermediate, PromptResult, Segmentation
from FreqSegLib.text_stages import PreparedVolume, PromptRun, branch_images
from FreqSegLib.text_trained import TrainedMethod, TrainedRun, require_trained
from FreqSegLib.volume import Volume

__all__ = [
    "CancelCallback",
    "Intermediate",
    "PreparedVolume",
    "Progress",
    "ProgressCallback",
    "PromptResult",
    "Segmentation",
    "TextSegmenter",
]


class TextSegmenter:
    """Set a volume once, ask many prompts.

    Example:
        >>> segmenter = TextSegmenter.from_preset("lite")
        >>> segmenter.set_volume(Volume.read("flair.nii.gz"))
        >>> result = segmenter.segment(["brain tumour"])
        >>> result[0].mask.sum(), result[0].score
    """

    def __init__(
        self,
        encoder: ImageTextEncoder,
        refiner: PromptableSegmenter | None,
        preset: Preset,
        *,
        weights_key: str,
        settings: TextSegmentationSettings | None = None,
        tuning: dict[str, Tuning] | None = None,
        matcher: PromptMatcher | None = None,
        fusion: AdaptiveFusion | ZeroShotFusion | None = None,
        branch_tuning: dict[str, Tuning] | None = None,
        amortised: AmortisedBottleneck | None = None,
        trained: TrainedMethod | None = None,
        cache: EmbeddingCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Give the collaborators; :meth:`from_preset` makes them from a preset's weights.

        Args:
            encoder: image-text encoder.
            refiner: SAM-family model; without one the coarse mask is the result, and the caller is told.
            preset: defaults and what is calibrated.
            weights_key: identifies the weights in the embedding cache.
            settings: of all runs unless ``segment`` is given others.
            tuning: chosen on validation patients, by meaning.
            matcher: recognises the vocabulary's meanings; needed where the preset has a vocabulary.
            fusion: trained fusion of the frequency branches; identity if left out.
            branch_tuning: chosen on validation patients for that fusion, by meaning: its setting ``frequency_branches``
                says what "auto" means there, the others hold where the branches are computed.
            amortised: trained bottleneck; the setting of that name is refused without it.
            trained: model that draws the coarse mask of the targets it was trained on.
            cache, device: where to keep and compute.
        """
        self.encoder, self.refiner, self.preset = encoder, refiner, preset
        self.settings = settings or TextSegmentationSettings()
        self.tuning = tuning or {}
        self.matcher = matcher
        self.fusion, self.trained, self.amortised = fusion, trained, amortised
        self.branch_tuning = branch_tuning or {}
        self.cache = cache or EmbeddingCache()
        self.device = device or torch.device("cpu")
        self._weights_key = weights_key
        self._prepared: PreparedVolume | None = None
        self._shares_tower = isinstance(encoder, LiteEncoder) and refiner is encoder.tower

    @classmethod
    def from_preset(
        cls,
        name: str = "lite",
        *,
        device: str = "auto",
        sam: str | None = None,
        clip_folder: Path | None = None,
        sam_checkpoint: Path | None = None,
        settings: TextSegmentationSettings | None = None,
        cache: EmbeddingCache | None = None,
    ) -> TextSegmenter:
        """Load a preset's weights from this machine; nothing is downloaded.

        Args:
            name: a preset.
            device: auto, cpu or cuda[:N].
            sam: another SAM-family model of the catalogue, where the preset takes one.
            clip_folder: your own image-text weights in open_clip's layout, in place of the catalogue's.
            sam_checkpoint: your own SAM or MedSAM weights in segment_anything's layout.
            settings, cache: see the class.

        Raises:
            SettingsError: there is no such preset.
            WeightsError: weights are missing (how to get them is said) or damaged.
            DeviceError: the device is absent.
        """
        from FreqSegLib.loading import OwnWeights, load_segmenter

        own = OwnWeights(clip_folder, sam_checkpoint)
        return load_segmenter(cls, name, resolve_device(device), sam, own, settings, cache)

    @property
    def prepared(self) -> PreparedVolume | None:
        """The volume set last."""
        return self._prepared

    def use(self, prepared: PreparedVolume) -> None:
        """Go back to a volume this segmenter has read before; nothing is computed."""
        self._prepared = prepared

    def set_volume(
        self,
        volume: Volume,
        *,
        progress: ProgressCallback | None = None,
        cancel: CancelCallback | None = None,
        settings: TextSegmentationSettings | None = None,
    ) -> PreparedVolume:
        """Run every slice through the image tower, once; embeddings go to the cache on disk.

        Raises:
            InputError: a volume that cannot be segmented (constant, not finite).
            Cancelled: ``cancel`` answered True.
        """
        settings = self.preset.complete(settings or self.settings)
        stack = SliceStack.of(volume, settings.axis)
        intensity = normalise(volume, settings.intensity)
        frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, self.encoder.image_size)
        branches = self._branches(settings)
        prepared = PreparedVolume(
            volume,
            stack,
            intensity,
            frame,
            self._key(volume, stack, intensity),
            branches,
            settings.axis,
            settings.intensity,
        )
        self.cache.make_room(keep=[prepared.key])
        self._encode(prepared, settings, progress, cancel)
        self.cache.make_room(keep=[prepared.key])
        self._prepared = prepared
        return prepared

    def segment(
        self,
        prompts: Sequence[str],
        *,
        progress: ProgressCallback | None = None,
        cancel: CancelCallback | None = None,
        settings: TextSegmentationSettings | None = None,
        return_intermediate: bool = False,
    ) -> Segmentation:
        """Segment the volume set before, one segment a prompt.

        Args:
            prompts: what to look for, in English.
            progress: called with :class:`Progress`.
            cancel: polled between batches.
            settings: in place of the segmenter's.
            return_intermediate: keep every stage of every slice.

        Raises:
            SettingsError: no volume was set, or a prompt is unusable.
            VocabularyError: a prompt is outside the preset's vocabulary.
            Cancelled: ``cancel`` answered True.
        """
        prepared = self._prepared
        if prepared is None:
            raise SettingsError("No volume is set. Call set_volume(volume) before segment(prompts).")
        if isinstance(prompts, str):
            prompts = [prompts]
        asked = settings or self.settings
        matched = self._understand(prompts, asked)
        if settings is not None and (asked.axis, asked.intensity) != (prepared.axis, prepared.intensity_setting):
            prepared = self.set_volume(prepared.volume, progress=progress, cancel=cancel, settings=asked)
        results, warnings = [], list(prepared.volume.warnings) + list(prepared.intensity.warnings)
        for prompt in matched:
            run = self._run(prompt, asked, prepared, progress, cancel)
            text, nulls = run.texts()
            present = run.gate(text, nulls)
            saliencies = run.saliency(run.question(text), present)
            fused, uncertainty = run.fuse(saliencies, present)
            coarse = run.coarse(fused, present)
            visual = run.visual_prompts(coarse, fused)
            mask = run.refine(coarse, visual)
            results.append(
                run.result(present, saliencies, fused, uncertainty, coarse, visual, mask, return_intermediate)
            )
            warnings += run.warnings
        return Segmentation(tuple(results), tuple(dict.fromkeys(warnings)), asked)

    def _run(
        self,
        prompt: MatchedPrompt,
        asked: TextSegmentationSettings,
        prepared: PreparedVolume,
        progress: ProgressCallback | None,
        cancel: CancelCallback | None,
    ) -> PromptRun:
        """The stages for one prompt: trained where asked for and known, else zero-shot."""
        if self._is_trained(prompt, asked):
            assert self.trained is not None
            tuning = _tuning_for(prompt, self.trained.tuning)
            return TrainedRun(self, prepared, prompt, self.preset.complete(asked, tuning), tuning, progress, cancel)
        asked, tuning = self._with_branches(prompt, asked, _tuning_for(prompt, self.tuning))
        chosen = self.preset.complete(asked, tuning)
        if chosen.bottleneck == "amortised":
            assert chosen.layer_idx is not None
            assert chosen.beta is not None
            require_amortised(self.amortised, self.preset.name, chosen.layer_idx, chosen.beta)
        if self._branches(chosen) != prepared.branches:
            prepared.branches = self._branches(chosen)
            self._encode(prepared, chosen, progress, cancel)
        return PromptRun(self, prepared, prompt, chosen, tuning, progress, cancel)

    def _with_branches(
        self, prompt: MatchedPrompt, asked: TextSegmentationSettings, tuning: Tuning
    ) -> tuple[TextSegmentationSettings, Tuning]:
        """What was chosen for the target with its frequency branches, where these are computed."""
        found = self.branch_tuning.get(prompt.meaning.name) if prompt.meaning else None
        if found is None or not isinstance(self.fusion, ZeroShotFusion) or asked.fusion != self.fusion.config.method:
            return asked, tuning
        if asked.frequency_branches == "auto":
            asked = replace(asked, frequency_branches=found.settings.get("frequency_branches", "off"))
        if asked.frequency_branches == "off":
            return asked, tuning
        return asked, replace(tuning, settings={**tuning.settings, **found.settings})

    def _is_trained(self, prompt: MatchedPrompt, asked: TextSegmentationSettings) -> bool:
        if asked.method == "zero-shot":
            return False
        if asked.method == "trained":
            require_trained(self.trained, prompt, self.preset)
        return self.trained is not None and self.trained.knows(prompt)

    def _understand(self, prompts: Sequence[str], settings: TextSegmentationSettings) -> list[MatchedPrompt]:
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        if not cleaned:
            raise SettingsError('No prompt was given. Type what to look for, like "brain tumour".')
        twice = {prompt for prompt in cleaned if cleaned.count(prompt) > 1}
        if twice:
            raise SettingsError(f"The prompt '{sorted(twice)[0]}' was given twice; name each target once.")
        if self.matcher is None:
            return [MatchedPrompt(prompt, None, 0.0) for prompt in cleaned]
        if settings.experimental or not self.preset.has_vocabulary:
            return [self.matcher.match(prompt) for prompt in cleaned]
        return [self.matcher.require(prompt) for prompt in cleaned]

    def _branches(self, settings: TextSegmentationSettings) -> tuple[str, ...]:
        """A branch whose gate is closed is not computed."""
        wanted = settings.frequency_branches
        on = wanted == "on" or (wanted == "auto" and self.preset.frequency_branches)
        return ("raw", "low", "high") if on else ("raw",)

    def _key(self, volume: Volume, stack: SliceStack, intensity: Normalised) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(volume.array).data)
        described = (
            self._weights_key,
            volume.array.shape,
            str(volume.array.dtype),
            stack.axis,
            stack.order,
            stack.flips,
            stack.pixel_spacing,
            intensity.low,
            intensity.high,
        )
        digest.update(repr(described).encode())
        return digest.hexdigest()[:32]

    def _names(self, settings: TextSegmentationSettings) -> dict[str, str]:
        """Name of each branch's tokens in the cache: everything that shaped them."""
        layer = settings.layer_idx
        wavelet = f"{settings.wave}-{settings.levels}-{settings.wavelet_mode}"
        return {
            branch: f"tokens-{layer}" if branch == "raw" else f"tokens-{layer}-{branch}-{wavelet}"
            for branch in ("raw", "low", "high")
        }

    def _encode(
        self,
        prepared: PreparedVolume,
        settings: TextSegmentationSettings,
        progress: ProgressCallback | None,
        cancel: CancelCallback | None,
    ) -> None:
        """Compute what the cache lacks: tokens of every branch, and the tower's embedding where it is shared."""
        layer = settings.layer_idx
        assert layer is not None
        check_layer(layer, self.encoder.num_layers)
        names = self._names(settings)
        todo = [
            index
            for index in range(prepared.stack.count)
            if not all(self.cache.has(prepared.key, f"{names[branch]}-{index}") for branch in prepared.branches)
            or (self._shares_tower and not self.cache.has(prepared.key, f"embedding-{index}"))
        ]
        batches = Batches(settings.batch_size or default_batch_size(self.device))
        stage = Stage("Reading slices", len(todo), progress, cancel)

        def work(positions: range) -> None:
            indices = [todo[position] for position in positions]
            images = self._framed(prepared, indices, prepared.frame)
            for branch, pictures in branch_images(images, prepared.branches, settings).items():
                tokens = self._tokens(pictures, indices, prepared, layer, branch)
                for index, item in zip(indices, tokens.half().cpu().numpy(), strict=True):
                    self.cache.put(prepared.key, f"{names[branch]}-{index}", item)

        for positions, _ in batches.run(len(todo), work):
            stage.advance(positions.stop)

    @torch.inference_mode()
    def _tokens(
        self, pictures: Tensor, indices: list[int], prepared: PreparedVolume, layer: int, branch: str
    ) -> Tensor:
        """Tokens of one branch; the raw branch's tower pass is kept for the decoder."""
        images = pictures.to(self.device).expand(-1, 3, -1, -1)
        if not (self._shares_tower and branch == "raw"):
            return self.encoder.prefix(images, layer)
        assert isinstance(self.encoder, LiteEncoder)
        stored = [self.cache.get(prepared.key, f"embedding-{index}") for index in indices]
        known = [item for item in stored if item is not None]
        if len(known) == len(stored):
            embedding = torch.from_numpy(np.stack(known)).to(self.device)
        else:
            embedding = self.encoder.tower.embed(images, prepared.frame.valid).half()
            for index, item in zip(indices, embedding.cpu().numpy(), strict=True):
                self.cache.put(prepared.key, f"embedding-{index}", item)
        return self.encoder.prefix_from_embedding(embedding.float(), layer)

    def _framed(self, prepared: PreparedVolume, indices: Sequence[int], frame: Frame) -> Tensor:
        """Slices as (B, 1, S, S) in [0, 1]."""
        images = torch.from_numpy(np.stack([prepared.image(index) for index in indices]))[:, None]
        return frame.to_frame(images)

    def framed(self, prepared: PreparedVolume, indices: Sequence[int]) -> Tensor:
        """Slices as the encoder's tower sees them, (B, 1, S, S) in [0, 1]."""
        return self._framed(prepared, indices, prepared.frame)

    def embedding(self, prepared: PreparedVolume, index: int) -> Tensor:
        """The decoder's image embedding of one slice (1, 256, 64, 64), from the cache or computed and kept."""
        assert self.refiner is not None
        name = f"embedding-{index}" if self._shares_tower else f"embedding-{self.refiner.name}-{index}"
        stored = self.cache.get(prepared.key, name)
        if stored is None:
            frame = prepared.frame_of(self.refiner)
            images = self._framed(prepared, [index], frame).to(self.device).expand(-1, 3, -1, -1)
            with torch.inference_mode():
                stored = self.refiner.embed(images, frame.valid).half()[0].cpu().numpy()
            self.cache.put(prepared.key, name, stored)
        return torch.from_numpy(stored)[None].to(self.device).float()

    def tokens(self, prepared: PreparedVolume, settings: TextSegmentationSettings, branch: str, index: int) -> Tensor:
        """One slice's tokens (N, width), from the cache or computed again."""
        name = f"{self._names(settings)[branch]}-{index}"
        stored = self.cache.get(prepared.key, name)
        if stored is None:
            images = self._framed(prepared, [index], prepared.frame)
            pictures = branch_images(images, (branch,), settings)[branch]
            assert settings.layer_idx is not None
            stored = self._tokens(pictures, [index], prepared, settings.layer_idx, branch).half()[0].cpu().numpy()
            self.cache.put(prepared.key, name, stored)
        return torch.from_numpy(stored).float()


def _tuning_for(prompt: MatchedPrompt, tuning: dict[str, Tuning]) -> Tuning:
    name = prompt.meaning.name if prompt.meaning else "*"
    return tuning.get(name, tuning.get("*", Tuning()))
