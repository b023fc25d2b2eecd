"""One prompt's way through the stages of the text-guided pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.questions import apart_from_contrasts, null_prompts
from FreqSegLib.clip.vocabulary import MODALITIES
from FreqSegLib.device import Batches, default_batch_size
from FreqSegLib.intensity import Normalised
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion
from FreqSegLib.presets import Tuning
from FreqSegLib.progress import CancelCallback, ProgressCallback, Stage
from FreqSegLib.saliency.amortised import amortised_information
from FreqSegLib.saliency.gate import Calibration, Presence, presence
from FreqSegLib.saliency.m2ib import BottleneckSettings, m2ib_information
from FreqSegLib.saliency.nib import nib_contribution
from FreqSegLib.sam.coarse_mask import coarse_mask, largest_components_3d, surrounding_background
from FreqSegLib.sam.promptable import PromptableSegmenter
from FreqSegLib.sam.refine import refine_slice
from FreqSegLib.sam.visual_prompts import VisualPrompt, visual_prompts
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import Frame, SliceStack, evened
from FreqSegLib.text_results import Intermediate, PromptResult
from FreqSegLib.volume import Volume
from FreqSegLib.wavelet import frequency_images

if TYPE_CHECKING:
    from FreqSegLib.text_segmentation import TextSegmenter

# on validation slices the right modality leads by 0.6 or more in the mean, a wrong one by 0.8 or more
CLEARLY_ANOTHER = 0.2
PALETTE = ((0.56, 0.93, 0.56), (0.35, 0.65, 0.90), (0.95, 0.55, 0.35), (0.77, 0.65, 0.94), (0.95, 0.82, 0.35))


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


class PromptRun:
    """One prompt's way through the stages, zero-shot: the coarse mask comes from the encoder's saliency."""

    method = "zero-shot"

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

    def stage(self, name: str, total: int) -> Stage:
        return Stage(f"{name}: {self.prompt.text}", total, self.progress, self.cancel)

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
        return self.reaching(found)

    def reaching(self, found: Presence) -> Presence:
        """Slices within ``slice_smoothing`` of one that passed pass too: the gate looks at each by itself."""
        assert self.settings.slice_smoothing is not None
        # 1 mm reaches a slice that is 1.0001 mm away
        reach = int(self.settings.slice_smoothing / self.prepared.stack.slice_spacing + 0.01)
        passed = found.passed.numpy()
        near = np.array([passed[max(0, i - reach) : i + reach + 1].any() for i in range(len(passed))], dtype=bool)
        return replace(found, passed=torch.from_numpy(near))

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
        scaled = {branch: self._evened(values, present) for branch, values in maps.items()}
        raw = scaled["raw"]
        if "low" in scaled:
            raw = self._fused(raw, scaled["low"], scaled["high"], present)
        frame = self.prepared.frame
        mean = _on_slices(raw.mean(1), frame)
        spread = raw if self.doubt is None else self._evened(self.doubt, present)
        deviation = _on_slices(spread.std(1), frame) if self.settings.uncertainty else None
        return mean, deviation

    def _fused(
        self, raw: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32], present: Presence
    ) -> NDArray[np.float32]:
        """One saliency (S, R, gh, gw) of three; slices that did not pass the gate stay as they are."""
        fusion, why_not = self._trained_fusion()
        if fusion is None or fusion.is_identity:
            self.warnings.append(
                f"Frequency branches were computed, but no fusion weights are trained for {why_not}, so they do not "
                "change the result; they can be looked at."
            )
            return raw
        found, replicas = raw.copy(), raw.shape[1]
        batches = Batches(self.settings.batch_size or default_batch_size(self.owner.device))
        passed = np.flatnonzero(present.passed.numpy())

        @torch.inference_mode()
        def work(positions: range) -> NDArray[np.float32]:
            indices = [int(passed[p]) for p in positions]
            device = next(fusion.parameters()).device
            maps = [torch.from_numpy(x[indices]).flatten(0, 1)[:, None].to(device) for x in (raw, low, high)]
            if isinstance(fusion, AdaptiveFusion):
                fused = fusion(*maps)
            else:
                tokens = [self._tokens_of(branch, indices, replicas).to(device) for branch in ("low", "high")]
                fused = fusion(*maps, *tokens, self.owner.encoder.token_grid)
            return fused.cpu().view(len(indices), *raw.shape[1:]).numpy()

        for positions, fused in batches.run(len(passed), work):
            found[[int(passed[p]) for p in positions]] = fused
        return found

    def _trained_fusion(self) -> tuple[AdaptiveFusion | ZeroShotFusion | None, str]:
        """The fusion whose training covers what is asked, else None and what it does not cover."""
        fusion, s = self.owner.fusion, self.settings
        if not isinstance(fusion, ZeroShotFusion):
            return fusion, "this preset"
        trained = fusion.config
        if self.prompt.meaning is None or self.prompt.meaning.name not in self.owner.branch_tuning:
            return None, f"'{self.prompt.text}'"
        if s.fusion != trained.method:
            return None, f"fusion '{s.fusion}' (it is '{trained.method}' that is)"
        for name in ("layer_idx", "wave", "levels", "wavelet_mode"):
            if getattr(s, name) != getattr(trained, name):
                return None, f"{name} {getattr(s, name)} (they are for {getattr(trained, name)})"
        return fusion, "this preset"

    def _tokens_of(self, branch: str, indices: list[int], replicas: int) -> Tensor:
        """A branch's tokens (len(indices) * replicas, N, width), without a class token."""
        tokens = torch.stack([self.owner.tokens(self.prepared, self.settings, branch, i) for i in indices])
        return tokens[:, self.owner.encoder.num_prefix_tokens :].repeat_interleave(replicas, 0)

    def _evened(self, maps: NDArray[np.float32], present: Presence) -> NDArray[np.float32]:
        """Maps (S, R, gh, gw) as they are shown: averaged over neighbouring slices, then scaled."""
        assert self.settings.slice_smoothing is not None
        return self.scaled(evened(maps, self.prepared.stack, self.settings.slice_smoothing), present)

    def scaled(self, maps: NDArray[np.float32], present: Presence) -> NDArray[np.float32]:
        """Saliency in the bottleneck's own unit, brought to [0, 1] over the volume."""
        return _over_volume(maps, present)

    def coarse(self, saliency: NDArray[np.float32], present: Presence) -> NDArray[np.bool_]:
        """(S, h, w) bool."""
        s = self.settings
        assert s.threshold is not None
        assert s.threshold_value is not None
        assert s.confidence_threshold is not None
        assert s.num_contours is not None
        assert s.smallest_part is not None
        found = coarse_mask(
            saliency,
            self.places(present),
            threshold=s.threshold,
            value=s.threshold_value,
            confidence_threshold=s.confidence_threshold,
            num_contours=s.num_contours,
        )
        return largest_components_3d(found, s.smallest_part)

    def places(self, present: Presence) -> NDArray[np.bool_]:
        """Where the target may be, (S, h, w): in slices that passed the gate, outside the air around the patient."""
        stack = self.prepared.stack
        found = np.zeros((stack.count, *stack.slice_shape), dtype=bool)
        for index in np.flatnonzero(present.passed.numpy()):
            found[index] = ~surrounding_background(self.prepared.image(int(index)))
        return found

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
        assert self.settings.smallest_part is not None
        return largest_components_3d(mask, self.settings.smallest_part)

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
            branches = {b: _on_slices(self._evened(m, present).mean(1), frame) for b, m in maps.items()}
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
            method=self.method,
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
        if bottleneck == "amortised":
            assert self.owner.amortised is not None
            assert s.beta is not None
            found = amortised_information(self.owner.amortised, repeated[:, encoder.num_prefix_tokens :], texts, s.beta)
            return found.view(len(indices), replicas, *encoder.token_grid).cpu().numpy().astype(np.float32)
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
        if likeness.max() - likeness[keys.index(meaning.modality)] > CLEARLY_ANOTHER:
            self.warnings.append(
                f"'{self.prompt.text}' was learned on {MODALITIES[meaning.modality].name}; this volume does not look "
                "like one. Expect nothing, or errors."
            )

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (P, D) on the CPU, where those of the slices are kept."""
        return self.owner.encoder.encode_text(prompts).cpu()

    def _on_volume(self, stack_array: NDArray[Any]) -> NDArray[Any]:
        target = self.prepared.stack.empty(stack_array.dtype)
        self.prepared.stack.displayed(target)[:] = stack_array
        return target


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
