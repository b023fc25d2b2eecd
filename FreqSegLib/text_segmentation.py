"""Type a prompt, get a mask: the text-guided pipeline, one stage a line in :meth:`TextSegmenter.segment`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.encoder import ImageTextEncoder, check_layer
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.prompts import MatchedPrompt, PromptMatcher, clean_prompt
from FreqSegLib.clip.questions import apart_from_contrasts, null_prompts
from FreqSegLib.clip.vocabulary import MODALITIES
from FreqSegLib.device import Batches, default_batch_size, resolve_device
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import Cancelled, FreqSegError, SettingsError
from FreqSegLib.intensity import Normalised, normalise
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.presets import Preset, Tuning
from FreqSegLib.saliency.gate import Calibration, Presence, presence
from FreqSegLib.saliency.m2ib import BottleneckSettings, m2ib_information
from FreqSegLib.saliency.nib import nib_contribution
from FreqSegLib.sam.coarse_mask import coarse_mask, largest_components_3d, surrounding_background
from FreqSegLib.sam.promptable import PromptableSegmenter
from FreqSegLib.sam.refine import refine_slice
from FreqSegLib.sam.visual_prompts import VisualPrompt, visual_prompts
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.volume import Segment, Volume
from FreqSegLib.wavelet import frequency_images

SMALLEST_COMPONENT_SHARE = 0.05
# on validation slices the right modality leads by 0.6 or more in the mean, a wrong one by 0.8 or more
CLEARLY_ANOTHER = 0.2
PALETTE = ((0.56, 0.93, 0.56), (0.35, 0.65, 0.90), (0.95, 0.55, 0.35), (0.77, 0.65, 0.94), (0.95, 0.82, 0.35))


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``stage`` in words, ``done`` of ``total`` slices, seconds left (None: unknown)."""

    stage: str
    done: int
    total: int
    seconds_left: float | None


ProgressCallback = Callable[[Progress], None]
CancelCallback = Callable[[], bool]


@dataclass(frozen=True)
class Intermediate:
    """One slice's stages, kept when asked for. Images are (h, w); saliencies in [0, 1] by branch."""

    index: int
    image: NDArray[np.float32]
    frequency: dict[str, NDArray[np.float32]]
    saliency: dict[str, NDArray[np.float32]]
    fused: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    coarse: NDArray[np.bool_]
    prompts: tuple[VisualPrompt, ...]
    mask: NDArray[np.bool_]
    probability: float


@dataclass(frozen=True)
class PromptResult:
    """What was found for one prompt, on the input's own grid.

    Attributes:
        name: the prompt as typed.
        mask: (k, j, i) bool; empty where the target was judged absent.
        saliency: (k, j, i) float32 in [0, 1].
        uncertainty: (k, j, i) float32, standard deviation of the saliency over replicas; None unless asked for.
        score: probability in [0, 1] that the target is in the volume (calibrated where the preset has a gate).
        slice_scores: the same a slice, along the stack.
        color: RGB in [0, 1].
        meaning: what the prompt was understood as.
        intermediates: one a slice, when asked for.
    """

    name: str
    mask: NDArray[np.bool_]
    saliency: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    score: float
    slice_scores: NDArray[np.float32]
    color: tuple[float, float, float]
    meaning: str | None
    intermediates: tuple[Intermediate, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.mask.any()

    def segment(self) -> Segment:
        """For :func:`FreqSegLib.volume.write_segmentation`."""
        return Segment(self.name, self.mask, self.color)


@dataclass(frozen=True)
class Segmentation:
    """Segments in the order of the prompts, and what the user should know."""

    segments: tuple[PromptResult, ...]
    warnings: tuple[str, ...]
    settings: TextSegmentationSettings

    def __iter__(self) -> Iterator[PromptResult]:
        return iter(self.segments)

    def __getitem__(self, index: int) -> PromptResult:
        return self.segments[index]

    def __len__(self) -> int:
        return len(self.segments)


@dataclass
class PreparedVolume:
    """A volume whose slices have been through the image tower; prompts are cheap from here on."""

    volume: Volume
    stack: SliceStack
    intensity: Normalised
    frame: Frame
    key: str
    branches: tuple[str, ...]
    axis: str = "auto"
    intensity_setting: str = "auto"
    image_vectors: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def image(self, index: int) -> NDArray[np.float32]:
        """Slice ``index`` (h, w) in [0, 1]."""
        return self.intensity.apply(np.ascontiguousarray(self.stack.take(index)))

    def frame_of(self, model: PromptableSegmenter) -> Frame:
        """How the slices sit in a SAM-family model's square."""
        return Frame.fit(self.stack.slice_shape, self.stack.pixel_spacing, model.image_size, model.frame_mode)


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
        fusion: AdaptiveFusion | None = None,
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
            cache, device: where to keep and compute.
        """
        self.encoder, self.refiner, self.preset = encoder, refiner, preset
        self.settings = settings or TextSegmentationSettings()
        self.tuning = tuning or {}
        self.matcher = matcher
        self.fusion = fusion
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
            tuning = self._tuning(prompt)
            chosen = self.preset.complete(asked, tuning)
            run = _Run(self, prepared, prompt, chosen, tuning, progress, cancel)
            if self._branches(chosen) != prepared.branches:
                prepared.branches = self._branches(chosen)
                self._encode(prepared, chosen, progress, cancel)
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

    def _tuning(self, prompt: MatchedPrompt) -> Tuning:
        name = prompt.meaning.name if prompt.meaning else "*"
        return self.tuning.get(name, self.tuning.get("*", Tuning()))

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
        stage = _Stage("Reading slices", len(todo), progress, cancel)

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


class _Run:
    """One prompt's way through the stages."""

    def __init__(
        self,
        owner: TextSegmenter,
        prepared: PreparedVolume,
        prompt: MatchedPrompt,
        settings: TextSegmentationSettings,
        tuning: Tuning,
        progress: ProgressCallback | None,
        cancel: CancelCallback | None,
    ) -> None:
        self.owner, self.prepared, self.prompt = owner, prepared, prompt
        self.settings, self.tuning = settings, tuning
        self.progress, self.cancel = progress, cancel
        self.warnings: list[str] = []
        assert settings.layer_idx is not None
        self.layer = settings.layer_idx
        self.doubt: NDArray[np.float32] | None = None

    def stage(self, name: str, total: int) -> _Stage:
        return _Stage(f"{name}: {self.prompt.text}", total, self.progress, self.cancel)

    def texts(self) -> tuple[Tensor, Tensor]:
        """The prompt's vector (D) and the null prompts' (K, D)."""
        return self._encode_text([self.prompt.text])[0], self._encode_text(null_prompts(self.prompt.meaning))

    def gate(self, text: Tensor, nulls: Tensor) -> Presence:
        """Which slices may hold the target."""
        images = self._image_vectors()
        calibration = Calibration(
            self.tuning.slope, self.tuning.offset, self.tuning.slice_threshold, self.tuning.volume_threshold
        )
        found = presence(images, text, nulls, calibration)
        if not self.owner.preset.has_gate:
            self.warnings.append(
                f"Preset {self.owner.preset.name} cannot tell whether a target is there: its image-text score is not "
                "calibrated, so an absent target may still be drawn."
            )
        if not (self.settings.gate and self.owner.preset.has_gate):
            return replace(found, passed=torch.ones_like(found.passed))
        self._warn_of_contrast(images)
        return found

    def question(self, text: Tensor) -> Tensor:
        """The text vector (D) the bottleneck asks for: the prompt's, or what sets it apart from its contrasts."""
        if not self.settings.contrast:
            return text
        return apart_from_contrasts(text, self.prompt.meaning, self._encode_text)

    def saliency(self, text: Tensor, present: Presence) -> dict[str, NDArray[np.float32]]:
        """Token saliency of the slices that passed, by branch: (S, R, gh, gw), in the bottleneck's own unit.

        NIB has no noise to repeat with other seeds, so its uncertainty is M2IB's about the same question.
        """
        s = self.settings
        repeated = s.uncertainty and s.bottleneck == "m2ib"
        maps = {
            branch: self._looked(
                f"Looking ({branch})" if len(self.prepared.branches) > 1 else "Looking",
                branch,
                text,
                present,
                s.bottleneck,
                s.replicas if repeated else 1,
            )
            for branch in self.prepared.branches
        }
        if s.uncertainty and not repeated:
            self.doubt = self._looked("Looking again", "raw", text, present, "m2ib", s.replicas)
        return maps

    def _looked(
        self, stage_name: str, branch: str, text: Tensor, present: Presence, bottleneck: str | None, replicas: int
    ) -> NDArray[np.float32]:
        """(S, R, gh, gw) of one branch."""
        passed = np.flatnonzero(present.passed.numpy())
        grid = self.owner.encoder.token_grid
        maps = np.zeros((self.prepared.stack.count, replicas, *grid), dtype=np.float32)
        batches = Batches(self.settings.batch_size or default_batch_size(self.owner.device))
        stage = self.stage(stage_name, len(passed))

        def work(positions: range) -> NDArray[np.float32]:
            indices = [int(passed[p]) for p in positions]
            tokens = torch.stack([self.owner.tokens(self.prepared, self.settings, branch, i) for i in indices])
            return self._bottleneck(tokens.to(self.owner.device), text, indices, bottleneck, replicas)

        for positions, found in batches.run(len(passed), work):
            maps[[int(passed[p]) for p in positions]] = found
            stage.advance(positions.stop)
        return maps

    def fuse(
        self, maps: dict[str, NDArray[np.float32]], present: Presence
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Saliency (S, h, w) in [0, 1], normalised over the volume, and its standard deviation over replicas."""
        scaled = {branch: _over_volume(values, present) for branch, values in maps.items()}
        raw = scaled["raw"]
        if "low" in scaled:
            fusion = self.owner.fusion or AdaptiveFusion(self.settings.fusion)
            if fusion.is_identity:
                self.warnings.append(
                    "Frequency branches were computed, but no fusion weights are trained for this preset, so they do "
                    "not change the result; they can be looked at."
                )
            low, high = scaled["low"], scaled["high"]
            with torch.inference_mode():
                fused = fusion(*(torch.from_numpy(x).flatten(0, 1)[:, None] for x in (raw, low, high)))
            raw = fused.view(raw.shape).numpy()
        frame = self.prepared.frame
        mean = _on_slices(raw.mean(1), frame)
        spread = raw if self.doubt is None else _over_volume(self.doubt, present)
        deviation = _on_slices(spread.std(1), frame) if self.settings.uncertainty else None
        return mean, deviation

    def coarse(self, saliency: NDArray[np.float32], present: Presence) -> NDArray[np.bool_]:
        """(S, h, w) bool."""
        s = self.settings
        assert s.threshold is not None
        assert s.threshold_value is not None
        assert s.confidence_threshold is not None
        assert s.num_contours is not None
        candidates = np.zeros(saliency.shape, dtype=bool)
        for index in np.flatnonzero(present.passed.numpy()):
            candidates[index] = ~surrounding_background(self.prepared.image(int(index)))
        found = coarse_mask(
            saliency,
            candidates,
            threshold=s.threshold,
            value=s.threshold_value,
            confidence_threshold=s.confidence_threshold,
            num_contours=s.num_contours,
        )
        return largest_components_3d(found, SMALLEST_COMPONENT_SHARE)

    def visual_prompts(self, coarse: NDArray[np.bool_], saliency: NDArray[np.float32]) -> dict[int, list[VisualPrompt]]:
        """Prompts of every slice that is not empty."""
        s = self.settings
        assert s.prompt_kind is not None
        assert s.box_margin is not None
        rows, columns = self.prepared.stack.pixel_spacing
        margin = (s.box_margin / rows, s.box_margin / columns)
        return {
            int(index): visual_prompts(
                coarse[index],
                saliency[index],
                s.prompt_kind,
                num_points=s.num_points,
                negative_points=s.negative_points,
                margin=margin,
            )
            for index in np.flatnonzero(coarse.any((1, 2)))
        }

    def refine(self, coarse: NDArray[np.bool_], visual: dict[int, list[VisualPrompt]]) -> NDArray[np.bool_]:
        """(S, h, w) bool; slices without prompts stay empty, and the decoder is not called for them."""
        model = self.owner.refiner
        if model is None or not self.settings.refine:
            if model is None:
                self.warnings.append(
                    "No SAM weights are installed: the coarse mask is the result, without refined edges."
                )
            return coarse
        frame = self.prepared.frame_of(model)
        mask = np.zeros_like(coarse)
        stage = self.stage("Drawing", len(visual))
        for done, (index, prompts) in enumerate(visual.items(), start=1):
            embedding = self.owner.embedding(self.prepared, index)
            refined = refine_slice(model, embedding, frame, prompts, vote=self.settings.vote)
            mask[index] = refined.mask if refined.mask.any() else coarse[index]
            stage.advance(done)
        return mask

    def result(
        self,
        present: Presence,
        maps: dict[str, NDArray[np.float32]],
        fused: NDArray[np.float32],
        uncertainty: NDArray[np.float32] | None,
        coarse: NDArray[np.bool_],
        visual: dict[int, list[VisualPrompt]],
        mask: NDArray[np.bool_],
        keep: bool,
    ) -> PromptResult:
        """Everything back on the volume's own grid."""
        meaning = self.prompt.meaning
        intermediates: tuple[Intermediate, ...] = ()
        if keep:
            frame = self.prepared.frame
            branches = {b: _on_slices(_over_volume(m, present).mean(1), frame) for b, m in maps.items()}
            intermediates = tuple(
                self._intermediate(i, present, branches, fused, uncertainty, coarse, visual, mask)
                for i in range(self.prepared.stack.count)
            )
        number = int(hashlib.sha256(self.prompt.text.encode()).hexdigest(), 16) % len(PALETTE)
        return PromptResult(
            name=self.prompt.text,
            mask=self._on_volume(mask),
            saliency=self._on_volume(fused),
            uncertainty=None if uncertainty is None else self._on_volume(uncertainty),
            score=present.score,
            slice_scores=present.probability.float().numpy(),
            color=meaning.color if meaning else PALETTE[number],
            meaning=meaning.name if meaning else None,
            intermediates=intermediates,
        )

    def _intermediate(
        self,
        index: int,
        present: Presence,
        branches: dict[str, NDArray[np.float32]],
        fused: NDArray[np.float32],
        uncertainty: NDArray[np.float32] | None,
        coarse: NDArray[np.bool_],
        visual: dict[int, list[VisualPrompt]],
        mask: NDArray[np.bool_],
    ) -> Intermediate:
        image = self.prepared.image(index)
        pictures = branch_images(torch.from_numpy(image)[None, None], ("low", "high"), self.settings)
        return Intermediate(
            index=index,
            image=image,
            frequency={name: picture[0, 0].numpy() for name, picture in pictures.items()},
            saliency={name: values[index] for name, values in branches.items()},
            fused=fused[index],
            uncertainty=None if uncertainty is None else uncertainty[index],
            coarse=coarse[index],
            prompts=tuple(visual.get(index, ())),
            mask=mask[index],
            probability=float(present.probability[index]),
        )

    @torch.inference_mode()
    def _image_vectors(self) -> Tensor:
        """Unit vector of every slice (S, D), computed once a volume."""
        key = ("raw", self.layer)
        if key not in self.prepared.image_vectors:
            vectors = [
                self.owner.encoder.suffix(
                    self.owner.tokens(self.prepared, self.settings, "raw", index)[None].to(self.owner.device),
                    self.layer,
                ).cpu()
                for index in range(self.prepared.stack.count)
            ]
            self.prepared.image_vectors[key] = torch.cat(vectors)
        return self.prepared.image_vectors[key]

    def _bottleneck(
        self, tokens: Tensor, text: Tensor, indices: list[int], bottleneck: str | None, replicas: int
    ) -> NDArray[np.float32]:
        """(B, R, gh, gw) of one batch."""
        encoder, s = self.owner.encoder, self.settings

        def suffix(z: Tensor) -> Tensor:
            return encoder.suffix(z, self.layer)

        repeated = tokens.repeat_interleave(replicas, 0)
        texts = text.to(tokens.device).expand(len(repeated), -1)
        if bottleneck == "nib":
            found = nib_contribution(suffix, repeated, texts)
        else:
            seeds = [_seed(s.seed, index, replica) for index in indices for replica in range(replicas)]
            assert s.beta is not None
            assert s.train_steps is not None
            assert s.num_noise_samples is not None
            options = BottleneckSettings(s.beta, s.train_steps, s.num_noise_samples)
            found = m2ib_information(suffix, repeated, texts, seeds, options)
        places = found[:, encoder.num_prefix_tokens :]
        return places.view(len(indices), replicas, *encoder.token_grid).cpu().numpy().astype(np.float32)

    def _warn_of_contrast(self, images: Tensor) -> None:
        """Say so when the pictures look like another modality than the one the target was learned on."""
        meaning = self.prompt.meaning
        if meaning is None or not self.owner.preset.has_vocabulary:
            return
        keys = list(MODALITIES)
        texts = self._encode_text([MODALITIES[key].wordings[0] for key in keys])
        likeness = (images @ texts.T).mean(0)
        looks = keys[int(likeness.argmax())]
        if likeness.max() - likeness[keys.index(meaning.modality)] > CLEARLY_ANOTHER:
            self.warnings.append(
                f"'{self.prompt.text}' was learned on {MODALITIES[meaning.modality].name}; this volume looks more like "
                f"{MODALITIES[looks].name}. Expect nothing, or errors."
            )

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (P, D) on the CPU, where those of the slices are kept."""
        return self.owner.encoder.encode_text(prompts).cpu()

    def _on_volume(self, stack_array: NDArray[Any]) -> NDArray[Any]:
        target = self.prepared.stack.empty(stack_array.dtype)
        self.prepared.stack.displayed(target)[:] = stack_array
        return target


class _Stage:
    """Progress of one stage, and the place where a cancelled run stops."""

    def __init__(self, name: str, total: int, progress: ProgressCallback | None, cancel: CancelCallback | None) -> None:
        self.name, self.total, self.progress, self.cancel = name, total, progress, cancel
        self.started = time.monotonic()
        if total:
            self.advance(0)

    def advance(self, done: int) -> None:
        if self.cancel is not None and self.cancel():
            raise Cancelled("The run was cancelled; nothing was written.")
        if self.progress is not None:
            elapsed = time.monotonic() - self.started
            left = elapsed / done * (self.total - done) if done else None
            self.progress(Progress(self.name, done, self.total, left))


def branch_images(images: Tensor, branches: Sequence[str], settings: TextSegmentationSettings) -> dict[str, Tensor]:
    """Stage 1: raw, low- and high-frequency images (B, 1, H, W) in [0, 1], only those asked for."""
    found: dict[str, Tensor] = {"raw": images} if "raw" in branches else {}
    if {"low", "high"} & set(branches):
        frequencies = frequency_images(images, settings.wave, settings.levels, settings.wavelet_mode)
        both = {"low": frequencies.low.clamp(0, 1), "high": frequencies.high}
        found.update({name: both[name] for name in branches if name in both})
    return found


def _over_volume(maps: NDArray[np.float32], present: Presence) -> NDArray[np.float32]:
    """Min-max over all slices that passed the gate, never a single one: an empty slice must not light up.

    The others, which were never looked at, are 0 and do not count as the minimum. All equal gives zeros.
    """
    passed = present.passed.numpy()
    scaled = np.zeros_like(maps)
    low, high = float(maps[passed].min(initial=np.inf)), float(maps[passed].max(initial=-np.inf))
    if high > low:
        scaled[passed] = (maps[passed] - low) / (high - low)
    return scaled


def _on_slices(maps: NDArray[np.float32], frame: Frame) -> NDArray[np.float32]:
    """(S, gh, gw) token maps -> (S, h, w)."""
    return frame.from_frame(torch.from_numpy(maps)[:, None])[:, 0].numpy()


def _seed(seed: int, index: int, replica: int) -> int:
    return int(np.random.SeedSequence([seed, index, replica]).generate_state(1, np.uint64)[0] >> np.uint64(1))


__all__ = ["FreqSegError", "Progress", "PromptResult", "Segmentation", "TextSegmenter"]
