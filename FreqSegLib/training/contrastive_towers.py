"""What phase 1 trains on a user's own pairs: the lite aligner on cached embeddings, or an open_clip model itself."""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.open_clip_encoder import CONFIG_NAME, OpenCLIPEncoder
from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.sam.lite_medsam import LiteMedSAM
from FreqSegLib.training.contrastive_pairs import Pair, PairData, read_picture

ALIGNER_ID = "lite-aligner"
WEIGHT_ENDINGS = (".bin", ".safetensors", ".pt", ".pth")
HEADS = ("visual.head.", "visual.proj", "text.proj.", "text_projection")
CLIP_WEIGHTS = "open_clip_model.safetensors"

Told = Callable[[str], None]


class Towers(nn.Module, ABC):
    """Both sides of the pairs as unit vectors; the parameters that ask for gradients are trained.

    Args:
        pairs: of all splits; ``rows`` below are places in it.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__()
        keys = [(pair.image, pair.index) for pair in pairs]
        self.image_of = np.array([keys.index(key) for key in keys])

    def forward(self, rows: NDArray[np.int64], noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and texts (b, D) of those rows; ``noise`` (b, ...) is added to what can take it."""
        return self.images(rows, noise), self.texts(rows)

    @abstractmethod
    def images(self, rows: NDArray[np.int64], noise: Tensor | None = None) -> Tensor:
        """Unit vectors (b, D)."""

    @abstractmethod
    def texts(self, rows: NDArray[np.int64]) -> Tensor:
        """Unit vectors (b, D)."""

    def noise(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Random changes of ``count`` images, or None where there are none."""
        return None

    @abstractmethod
    def save(self, folder: Path) -> str:
        """Write the weights below ``folder``; how to use them, in a sentence."""


class LiteTowers(Towers):
    """The aligner between LiteMedSAM's embeddings and MiniLM's sentences, both computed once.

    Args:
        aligner: trained; from scratch, its channel statistics are set from the training images.
        pairs: see :class:`Towers`.
        embeddings: (N, 256, 32, 32) half precision, one a pair.
        sentences: (N, 384).
        feature_noise: standard deviation of the noise on the embeddings, in units of each channel's own.
    """

    def __init__(
        self,
        aligner: Aligner,
        pairs: Sequence[Pair],
        embeddings: NDArray[np.float16],
        sentences: Tensor,
        feature_noise: float = 0.08,
        *,
        from_scratch: bool = False,
    ) -> None:
        super().__init__(pairs)
        self.aligner, self.feature_noise = aligner.requires_grad_(True), feature_noise
        self._embeddings, self._sentences = embeddings, sentences
        if from_scratch:
            train = [row for row, pair in enumerate(pairs) if pair.split == "train"]
            values = torch.from_numpy(embeddings[train]).float()
            aligner.channel_mean.copy_(values.mean((0, 2, 3))[:, None, None])
            aligner.channel_std.copy_(values.std((0, 2, 3)).clamp_min(1e-3)[:, None, None])

    @classmethod
    def prepared(
        cls, start: str, pairs: Sequence[Pair], data: PairData, work: Path, feature_noise: float, told: Told
    ) -> LiteTowers:
        """From the weights on this machine; embeddings are kept in ``work``.

        Args:
            start: ``shipped``, ``scratch``, or the path of an aligner's weights.
        """
        if start == "scratch":
            aligner = Aligner()
        else:
            found = weights.require(ALIGNER_ID) / "aligner.safetensors" if start == "shipped" else Path(start)
            aligner = Aligner.load(found)
        tower = LiteMedSAM.from_checkpoint(weights.require("litemedsam") / "lite_medsam.pth")
        embeddings = cached_embeddings(pairs, data, work, tower.embed, told)
        sentences = MiniLM(weights.require("minilm")).encode([pair.caption for pair in pairs]).clone()
        return cls(aligner, pairs, embeddings, sentences, feature_noise, from_scratch=start == "scratch")

    def images(self, rows: NDArray[np.int64], noise: Tensor | None = None) -> Tensor:
        """See :class:`Towers`."""
        place = self.aligner.channel_std.device
        pooled = torch.from_numpy(self._embeddings[rows]).to(place).float()
        if noise is not None:
            pooled = pooled + self.feature_noise * noise.to(place) * self.aligner.channel_std
        return self.aligner(pooled)

    def texts(self, rows: NDArray[np.int64]) -> Tensor:
        """See :class:`Towers`."""
        return self.aligner.align_text(self._sentences[rows].to(self.aligner.channel_std.device))

    def noise(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Normal noise of the embeddings' shape."""
        return torch.randn((count, *self._embeddings.shape[1:]), generator=generator) if self.feature_noise else None

    def save(self, folder: Path) -> str:
        """Weights where the lite preset looks for its aligner, below a folder of their own."""
        (folder / ALIGNER_ID).mkdir(parents=True, exist_ok=True)
        self.aligner.save(folder / ALIGNER_ID / "aligner.safetensors")
        weights.record_shipped(ALIGNER_ID, folder)
        return (
            f"The lite preset takes this aligner when FREQSEG_WEIGHTS is set to {folder}; ask for prompts outside its "
            "vocabulary with --experimental, zero-shot with --method zero-shot. Its presence gate is not calibrated."
        )


class OpenClipTowers(Towers):
    """An open_clip model, its projection heads alone or all of it.

    Args:
        encoder: frozen as it comes.
        folder: where it came from; its configuration and tokenizer are copied beside the new weights.
        pairs: see :class:`Towers`.
        pictures: (N, S, S) in [0, 255], one a pair.
        tune: ``heads`` or ``all``.
        checkpointing: compute blocks again in the backward pass, for memory.
    """

    def __init__(
        self,
        encoder: OpenCLIPEncoder,
        folder: Path,
        pairs: Sequence[Pair],
        pictures: NDArray[np.uint8],
        tune: Literal["heads", "all"] = "heads",
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(pairs)
        self.model, self.folder, self.tune = encoder.model, folder, tune
        self._pictures = torch.from_numpy(pictures)
        self._tokens = encoder.tokenizer([pair.caption for pair in pairs])
        self.register_buffer("_mean", torch.tensor(encoder.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(encoder.std).view(3, 1, 1), persistent=False)
        for name, parameter in self.model.named_parameters():
            # the temperature is the loss's own
            wanted = tune == "all" or name.startswith(HEADS)
            parameter.requires_grad_(wanted and not name.startswith("logit_"))
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise WeightsError(f"{folder} holds a model without projection heads; set tune to all")
        if checkpointing:
            self.model.set_grad_checkpointing(True)

    @classmethod
    def prepared(
        cls,
        folder: Path,
        pairs: Sequence[Pair],
        data: PairData,
        tune: Literal["heads", "all"],
        told: Told,
        *,
        checkpointing: bool = False,
    ) -> OpenClipTowers:
        """From a folder in open_clip's layout."""
        encoder = OpenCLIPEncoder.from_folder(folder)
        side = encoder.image_size
        pictures = np.empty((len(pairs), side, side), dtype=np.uint8)
        for row, pair in enumerate(pairs):
            pictures[row] = (read_picture(pair, data, side)[0, 0] * 255).round().byte().numpy()
        told(f"{len(pairs)} pictures of {side} x {side}")
        return cls(encoder, folder, pairs, pictures, tune, checkpointing=checkpointing)

    def images(self, rows: NDArray[np.int64], noise: Tensor | None = None) -> Tensor:
        """See :class:`Towers`."""
        mean, std = self.get_buffer("_mean"), self.get_buffer("_std")
        pixels = self._pictures[rows][:, None].to(mean.device).float() / 255
        return F.normalize(self.model.encode_image((pixels.expand(-1, 3, -1, -1) - mean) / std).float(), dim=-1)

    def texts(self, rows: NDArray[np.int64]) -> Tensor:
        """See :class:`Towers`."""
        tokens = self._tokens[rows].to(self.get_buffer("_mean").device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def train(self, mode: bool = True) -> OpenClipTowers:
        """Frozen towers stay in evaluation mode."""
        super().train(mode and self.tune == "all")
        return self

    def save(self, folder: Path) -> str:
        """A folder in open_clip's layout."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix not in WEIGHT_ENDINGS:
                shutil.copyfile(path, folder / path.name)
        state = {key: value.detach().cpu().clone().contiguous() for key, value in self.model.state_dict().items()}
        temporary = folder / f"{CLIP_WEIGHTS}.part"
        save_file(state, temporary)
        temporary.replace(folder / CLIP_WEIGHTS)
        return f"Use it with: freqseg segment VOLUME --preset biomedclip-sam --clip-folder {folder}"


def cached_embeddings(
    pairs: Sequence[Pair], data: PairData, work: Path, embed: Callable[[Tensor], Tensor], told: Told
) -> NDArray[np.float16]:
    """The tower's embeddings of the pairs' images, averaged to 32 x 32, (N, 256, 32, 32).

    Every image goes through the tower once; its file is named by what shaped it, so a changed image or setting is
    computed again and a stopped run goes on where it was.
    """
    folder = work / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, NDArray[np.float16]] = {}
    rows = []
    for pair in pairs:
        facts = pair.image.stat()
        said = (str(pair.image.resolve()), facts.st_size, facts.st_mtime_ns, pair.index, data.axis, data.intensity)
        key = hashlib.sha256(repr(said).encode()).hexdigest()[:32]
        rows.append(key)
        if key in found:
            continue
        path = folder / f"{key}.npy"
        if not path.exists():
            image = read_picture(pair, data, 256).expand(-1, 3, -1, -1)
            with torch.inference_mode():
                pooled = F.avg_pool2d(embed(image), 2)[0].half().numpy()
            temporary = path.with_suffix(".part")
            with temporary.open("wb") as file:
                np.save(file, pooled)
            temporary.replace(path)
        found[key] = np.load(path)
        if len(found) % 50 == 0:
            told(f"embeddings: {len(found)} images")
    return np.stack([found[key] for key in rows])


def check_clip_folder(folder: str) -> Path:
    """A folder given in a configuration.

    Raises:
        SettingsError: there is none.
    """
    path = Path(folder)
    if not folder or not (path / CONFIG_NAME).is_file():
        raise SettingsError(
            f"start must be a folder in open_clip's layout (with {CONFIG_NAME}) for the encoder open_clip, got "
            f"'{folder}'; get one with 'freqseg models get biomedclip'"
        )
    return path
