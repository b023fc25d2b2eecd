"""The trained method: a dual-stream model draws the probability map that zero-shot runs read off the encoder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.device import Batches, default_batch_size
from FreqSegLib.embedding_cache import FEATURES
from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.interaction.dual_stream import DualStreamModel, ImageFeatures, read_metadata
from FreqSegLib.presets import Preset, Tuning, read_tuning
from FreqSegLib.saliency.gate import Calibration, Presence, judged
from FreqSegLib.text_stages import PromptRun

WEIGHTS_FILE = "text_guided.safetensors"
_OTHER_SIDE = {"left": "right", "right": "left"}


class SentenceEncoder(Protocol):
    """What the trained method asks of a text tower."""

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> (P, D) unit vectors."""
        ...


@dataclass(frozen=True)
class TrainedMethod:
    """A trained model and what belongs to it.

    Attributes:
        model: draws one mask a slice and prompt.
        text: the sentence encoder it was trained with.
        meanings: names of the targets it knows.
        tuning: chosen on validation patients, by meaning.
        key: tells its cached features from those of other weights.
    """

    model: DualStreamModel
    text: SentenceEncoder
    meanings: tuple[str, ...]
    tuning: dict[str, Tuning] = field(default_factory=dict)
    key: str = ""

    @classmethod
    def load(cls, folder: Path, key: str, text: SentenceEncoder, device: torch.device) -> TrainedMethod:
        """From a folder of weights.

        Raises:
            WeightsError: a file is damaged.
        """
        path = folder / WEIGHTS_FILE
        model = DualStreamModel.load(path, device)
        try:
            meanings = tuple(str(name) for name in json.loads(read_metadata(path)["meanings"]))
        except (KeyError, ValueError, TypeError) as error:
            raise WeightsError(
                f"'{path}' does not say which targets it knows; reinstall FreqSeg or train it again."
            ) from error
        return cls(model, text, meanings, read_tuning(folder), key)

    def knows(self, prompt: MatchedPrompt) -> bool:
        """Was it trained on what this prompt means?"""
        return prompt.meaning is not None and prompt.meaning.name in self.meanings


def require_trained(trained: TrainedMethod | None, prompt: MatchedPrompt, preset: Preset) -> None:
    """Whether the trained method can answer a prompt.

    Raises:
        SettingsError: the preset has no such method, or it does not know this target.
        WeightsError: its weights are not installed.
    """
    if preset.trained is None:
        raise SettingsError(f"Preset {preset.name} has no trained method; set method to auto or zero-shot.")
    if trained is None:
        raise WeightsError(
            f"The weights '{preset.trained}' of the trained method are not installed. They are shipped with FreqSeg: "
            "reinstall it, or run 'freqseg train text-guided' in a checkout; or set method to zero-shot."
        )
    if not trained.knows(prompt):
        raise SettingsError(
            f"The trained method does not know '{prompt.text}'. It knows: {', '.join(trained.meanings)}. Set method to "
            "auto or zero-shot."
        )


class TrainedRun(PromptRun):
    """One prompt's way through the stages, trained: gate and coarse mask come from the dual-stream model."""

    method = "trained"
    _maps: NDArray[np.float16]

    def texts(self) -> tuple[Tensor, Tensor]:
        """The vector (D) that is asked with; there are no null prompts, presence is an output of the model."""
        text = self._asked_with()
        return text, text[None][:0]

    def gate(self, text: Tensor, nulls: Tensor) -> Presence:
        """Which slices hold the target, by the model's own presence logit; its masks are kept for the next stage."""
        evidence = self._drawn(text)
        tuned = self.tuning
        found = judged(evidence, Calibration(tuned.slope, tuned.offset, tuned.slice_threshold, tuned.volume_threshold))
        if not self.settings.gate:
            return Presence(found.probability, torch.ones_like(found.passed))
        self._warn_of_contrast(self._image_vectors())
        return self.reaching(found)

    def question(self, text: Tensor) -> Tensor:
        """The prompt itself."""
        return text

    def saliency(self, text: Tensor, present: Presence) -> dict[str, NDArray[np.float32]]:
        """Probability that a pixel belongs to the target, in the model's frame: (S, R, 256, 256)."""
        return {"raw": self._maps.astype(np.float32)}

    def scaled(self, maps: NDArray[np.float32], present: Presence) -> NDArray[np.float32]:
        """Probabilities have their scale already; slices that did not pass the gate are 0."""
        return maps * present.passed.numpy()[:, None, None, None]

    @property
    def _trained(self) -> TrainedMethod:
        assert self.owner.trained is not None
        return self.owner.trained

    def _drawn(self, text: Tensor) -> Tensor:
        """Masks of every slice and replica into ``_maps``; the mean presence logit of each slice (S)."""
        s, count, side = self.settings, self.prepared.stack.count, self.prepared.frame.size
        views = _views(s.replicas if s.uncertainty else 1, s.seed)
        self._maps = np.zeros((count, len(views), side, side), dtype=np.float16)
        evidence = torch.zeros(count, len(views))
        said = {False: text, True: self._asked_with(mirrored=True)} if len(views) > 1 else {}
        batches = Batches(s.batch_size or default_batch_size(self.owner.device))
        stage = self.stage("Drawing the coarse mask", count)
        device = self.owner.device

        @torch.inference_mode()
        def work(positions: range) -> None:
            for number, view in enumerate(views):
                features = self._features(positions, view)
                vectors = said.get(view.mirrored, text).to(device).expand(len(positions), -1)
                output = self._trained.model.segment(features, vectors)
                masks = output.probability[:, 0]
                masks = masks.flip(-1) if view.mirrored else masks
                self._maps[positions.start : positions.stop, number] = masks.half().cpu().numpy()
                evidence[positions.start : positions.stop, number] = output.presence.cpu()

        for positions, _ in batches.run(count, work):
            stage.advance(positions.stop)
        return evidence.mean(1)

    def _features(self, positions: range, view: View) -> ImageFeatures:
        """What the model knows of some slices before any prompt; of the plain view it is kept for the next prompt."""
        if view != View():
            return self._encoded(positions, view)
        names = [f"{FEATURES}{self._trained.key}-{index}" for index in positions]
        stored = [self.owner.cache.get(self.prepared.key, name) for name in names]
        known = [item for item in stored if item is not None]
        if len(known) < len(stored):
            encoded = self._encoded(positions, view)
            known = [_flattened(encoded, row) for row in range(len(positions))]
            for name, item in zip(names, known, strict=True):
                self.owner.cache.put(self.prepared.key, name, item)
        return _unflattened(known, self._trained.model, self.owner.device)

    def _encoded(self, positions: range, view: View) -> ImageFeatures:
        indices = list(positions)
        embedding = torch.cat([self.owner.embedding(self.prepared, index) for index in indices])
        images = self.owner.framed(self.prepared, indices).to(self.owner.device)
        images = images.clamp(0, 1) ** view.gamma
        if view.mirrored:
            embedding, images = embedding.flip(-1), images.flip(-1)
        return self._trained.model.encode_image(embedding, images)

    def _asked_with(self, *, mirrored: bool = False) -> Tensor:
        """A unit vector (D) halfway between the prompt's words and the name of the target they were matched to.

        Words that were never trained on can lie off what the model knows; halfway to the name they do not. For a
        mirrored picture both name the same place in it: sides change on X-rays, nothing elsewhere.
        """
        meaning = self.prompt.meaning
        assert meaning is not None
        said = [self.prompt.text, meaning.name]
        if mirrored and meaning.modality == "xray":
            said = [_sides_exchanged(text) for text in said]
        vectors = self._trained.text.encode(list(dict.fromkeys(said)))
        return vectors[0] if len(vectors) == 1 else F.normalize(vectors.sum(0), dim=0)


def _sides_exchanged(text: str) -> str:
    return re.sub(r"\b(left|right)\b", lambda m: _OTHER_SIDE[m.group().lower()], text, flags=re.IGNORECASE)


@dataclass(frozen=True)
class View:
    """How a slice is shown once more to see how far the answer depends on it."""

    mirrored: bool = False
    gamma: float = 1.0


def _views(count: int, seed: int) -> list[View]:
    """The slice as it is, then in a mirror, then both with other grey curves."""
    rng = np.random.default_rng(seed)
    curves = [1.0, 1.0, *(float(g) for g in rng.uniform(0.8, 1.25, max(0, count - 2)))]
    return [View(bool(number % 2), gamma) for number, gamma in enumerate(curves[:count])]


def _flattened(features: ImageFeatures, row: int) -> NDArray[np.float16]:
    parts = [x[row].reshape(-1) for x in (features.semantic, *features.frequency)]
    return torch.cat(parts).half().cpu().numpy()


def _unflattened(items: Sequence[NDArray[np.float16]], model: DualStreamModel, device: torch.device) -> ImageFeatures:
    flat = torch.from_numpy(np.stack(items)).to(device).float()
    maps, start = [], 0
    for shape in model.feature_shapes():
        size = shape[0] * shape[1] * shape[2]
        maps.append(flat[:, start : start + size].unflatten(1, shape))
        start += size
    return ImageFeatures(maps[0], tuple(maps[1:]))
