"""Any vision transformer of open_clip, cut after any block; BiomedCLIP (Zhang et al., 2023) first of all.

Weights are read from a local folder in the layout open_clip publishes. Nothing is asked of the network.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.checkpoint import StateDict, load_exactly, read_state_dict
from FreqSegLib.clip.encoder import check_layer, token_maps
from FreqSegLib.clip.hugging_face_layout import is_hugging_face_layout, to_open_clip_layout
from FreqSegLib.errors import InputError, WeightsError

if TYPE_CHECKING:
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

CONFIG_NAME = "open_clip_config.json"
_CHECKPOINT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
_CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_VOCABULARY_NAMES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
# BiomedCLIP's folder does not carry its text tower's config.json; these two names are the same model.
_BERT_BASE_NAMES = ("BiomedNLP-BiomedBERT-base-uncased-abstract", "BiomedNLP-PubMedBERT-base-uncased-abstract")
# A buffer that transformers saved before 4.31 and no longer expects.
_OBSOLETE_KEYS = ("text.transformer.embeddings.position_ids",)


class Tokenizer(Protocol):
    """open_clip's tokenizers: texts to token ids ``(P, context_length)``."""

    context_length: int

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor: ...


class OpenCLIPEncoder:
    """A frozen open_clip model as an :class:`~FreqSegLib.clip.encoder.ImageTextEncoder`.

    Args:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP`` with a vision transformer of timm or of its own.
        tokenizer: open_clip's tokenizer for ``model``.
        mean: of the pixels in [0, 1] the model was trained with, one a channel.
        std: the same.
        name: shown to the user and part of cache keys.

    Raises:
        WeightsError: the image tower is no plain vision transformer on a square image.

    Example::

        encoder = OpenCLIPEncoder.from_folder("weights/biomedclip")
        tokens = encoder.prefix(images, layer_idx=7)
        score = encoder.suffix(tokens, layer_idx=7) @ encoder.encode_text(["brain tumour"]).T
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        tokenizer: Tokenizer,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "open_clip",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._tower = _image_tower(model.visual, name)
        self.image_size = self._tower.image_size
        self.token_grid = self._tower.token_grid
        self.width = self._tower.width
        self.num_layers = len(self._tower.blocks)
        self.num_prefix_tokens = self._tower.num_prefix_tokens
        with torch.no_grad():
            shape = (1, self.num_prefix_tokens + self.token_grid[0] * self.token_grid[1], self.width)
            self.embed_dim = self._tower.head(self._parameter.new_zeros(shape)).shape[-1]

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: str | torch.device = "cpu", *, checkpoint: str | Path | None = None
    ) -> OpenCLIPEncoder:
        """Load a folder as it is on the model's page: configuration, weights and tokenizer files.

        Args:
            folder: holds ``open_clip_config.json``, the weights and, for a Hugging Face text tower, its tokenizer files
                and ``config.json`` (not needed for BiomedCLIP's). Nothing is written into it.
            device: where the model runs.
            checkpoint: weights to use in place of the folder's, e.g. a DHN-NCE fine-tuned model, in open_clip's layout
                or in the one MedCLIP-SAMv2 publishes.

        Raises:
            WeightsError: a file is missing or damaged, or a key of the weights is missing or has another shape.
        """
        folder = Path(folder).absolute()
        config = _read_json(folder / CONFIG_NAME, folder)
        path = Path(checkpoint) if checkpoint is not None else _find_checkpoint(folder)
        state = read_state_dict(path)
        if is_hugging_face_layout(state):
            state = to_open_clip_layout(state)
        with _offline():
            model = _build(folder, config)
            _load(model, state, path)
            tokenizer = _tokenizer(folder, config, model)
        preprocess = config.get("preprocess_cfg", {})
        import open_clip

        return cls(
            model.to(device),
            tokenizer,
            mean=preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN),
            std=preprocess.get("std", open_clip.OPENAI_DATASET_STD),
            name=folder.name,
        )

    def prefix(self, images: Tensor, layer_idx: int) -> Tensor:
        """Tokens ``(B, N, width)`` after block ``layer_idx`` of ``images (B, 3, S, S)`` in [0, 1].

        Raises:
            InputError: images of another size.
            SettingsError: no such layer.
        """
        check_layer(layer_idx, self.num_layers)
        tokens = self._tower.embed(self._pixels(images))
        for block in self._tower.blocks[:layer_idx]:
            tokens = block(tokens)
        return tokens

    def suffix(self, tokens: Tensor, layer_idx: int) -> Tensor:
        """Unit image embeddings ``(B, embed_dim)`` of tokens ``(B, N, width)`` as they are after block ``layer_idx``.

        Raises:
            SettingsError: no such layer.
        """
        check_layer(layer_idx, self.num_layers)
        for block in self._tower.blocks[layer_idx:]:
            tokens = block(tokens)
        return F.normalize(self._tower.head(tokens), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit image embeddings ``(B, embed_dim)`` of ``images (B, 3, S, S)`` in [0, 1]."""
        return self.suffix(self.prefix(images, self.num_layers), self.num_layers)

    def features(self, images: Tensor, layers: list[int]) -> list[Tensor]:
        """Maps ``(B, width, rows, columns)`` after each block in ``layers``, in the order asked, from one pass.

        Raises:
            InputError: images of another size.
            SettingsError: no such layer.
        """
        for layer_idx in layers:
            check_layer(layer_idx, self.num_layers)
        tokens = self._tower.embed(self._pixels(images))
        maps: dict[int, Tensor] = {}
        for layer_idx, block in enumerate(self._tower.blocks[: max(layers, default=0)], start=1):
            tokens = block(tokens)
            if layer_idx in layers:
                maps[layer_idx] = token_maps(tokens, self.token_grid, self.num_prefix_tokens)
        return [maps[layer_idx] for layer_idx in layers]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings ``(P, embed_dim)``.

        A prompt with more tokens than the text tower reads is cut, with a ``UserWarning`` that names it;
        :meth:`count_tokens` tells beforehand.
        """
        limit = self.tokenizer.context_length
        for prompt in prompts:
            length = self.count_tokens(prompt)
            if length > limit:
                warnings.warn(
                    f"the prompt {prompt[:40]!r}... is {length} tokens long and {self.name} reads {limit}: the rest is "
                    "ignored. Use a shorter prompt.",
                    stacklevel=2,
                )
        if not prompts:
            return self._parameter.new_zeros((0, self.embed_dim))
        tokens = _without_common_padding(self.model, self.tokenizer(list(prompts))).to(self._parameter.device)
        return F.normalize(self.model.encode_text(tokens), dim=-1)

    def count_tokens(self, prompt: str) -> int:
        """Length of a prompt as the text tower counts it, start and end tokens included."""
        if hasattr(self.tokenizer, "tokenizer"):
            text = self.tokenizer.clean_fn(prompt) if hasattr(self.tokenizer, "clean_fn") else prompt
            return len(self.tokenizer.tokenizer(text, truncation=False, verbose=False).input_ids)
        return len(self.tokenizer.encode(prompt)) + 2  # type: ignore[attr-defined]

    @property
    def _parameter(self) -> Tensor:
        return next(self.model.visual.parameters())

    def _pixels(self, images: Tensor) -> Tensor:
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise InputError(f"{self.name} takes images of shape (B, 3, {side}, {side}), got {tuple(images.shape)}.")
        pixels = images.to(device=self._parameter.device, dtype=self._parameter.dtype)
        return (pixels - pixels.new_tensor(self.mean).view(3, 1, 1)) / pixels.new_tensor(self.std).view(3, 1, 1)


@dataclass(frozen=True)
class _ImageTower:
    """A vision transformer in three parts, whoever wrote it."""

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module]
    head: Callable[[Tensor], Tensor]
    image_size: int
    token_grid: tuple[int, int]
    width: int
    num_prefix_tokens: int


def _image_tower(visual: TimmModel | VisionTransformer, name: str) -> _ImageTower:
    from open_clip.transformer import VisionTransformer as OwnVisionTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    trunk = getattr(visual, "trunk", None)
    if not isinstance(trunk, TimmVisionTransformer) and not isinstance(visual, OwnVisionTransformer):
        kind = type(visual if trunk is None else trunk).__name__
        raise WeightsError(f"the image tower of {name} is a {kind}; FreqSeg needs a plain vision transformer (ViT).")
    height, width = visual.image_size
    if height != width:
        raise WeightsError(f"{name} takes {height} x {width} images; FreqSeg needs a model for square ones.")
    if isinstance(trunk, TimmVisionTransformer):

        def embed(pixels: Tensor) -> Tensor:
            return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels))))

        def head(tokens: Tensor) -> Tensor:
            return visual.head(trunk.forward_head(trunk.norm(tokens)))

        return _ImageTower(
            embed=embed,
            blocks=list(trunk.blocks),
            head=head,
            image_size=height,
            token_grid=tuple(trunk.patch_embed.grid_size),
            width=trunk.embed_dim,
            num_prefix_tokens=trunk.num_prefix_tokens,
        )

    def own_head(tokens: Tensor) -> Tensor:
        pooled, _ = visual._pool(tokens)
        return pooled if visual.proj is None else pooled @ visual.proj

    return _ImageTower(
        embed=visual._embeds,
        blocks=list(visual.transformer.resblocks),
        head=own_head,
        image_size=height,
        token_grid=tuple(visual.grid_size),
        width=visual.transformer.width,
        num_prefix_tokens=1,
    )


def _build(folder: Path, config: dict[str, Any]) -> CLIP | CustomTextCLIP:
    """The architecture the configuration describes, with random weights."""
    import open_clip

    model_config = deepcopy(config["model_cfg"])
    text_config = model_config.get("text_cfg", {})
    custom_text = model_config.pop("custom_text", False) or "hf_model_name" in text_config
    try:
        model_config["vision_cfg"]["timm_model_pretrained"] = False
        if "hf_model_name" not in text_config:
            return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**model_config)
        # transformers takes the architecture from a folder, and the user's own is not written to.
        with tempfile.TemporaryDirectory(prefix="freqseg-") as temporary:
            tower = json.dumps(_text_tower_config(folder, text_config["hf_model_name"]))
            (Path(temporary) / "config.json").write_text(tower, encoding="utf-8")
            text_config.update(hf_model_name=temporary, hf_model_pretrained=False)
            return open_clip.CustomTextCLIP(**model_config)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        raise WeightsError(
            f"open_clip {open_clip.__version__} cannot build the model in {folder / CONFIG_NAME}: {error}"
        ) from error


def _text_tower_config(folder: Path, hf_model_name: str) -> dict[str, Any]:
    path = folder / "config.json"
    config = _read_json(path, folder) if path.is_file() else {}
    # A port of a whole CLIP model keeps its text tower's configuration inside.
    config = config.get("text_config", config)
    if "model_type" in config and "hidden_size" in config:
        return {key: value for key, value in config.items() if key != "auto_map"}
    if Path(hf_model_name).name in _BERT_BASE_NAMES:
        from transformers import BertConfig

        return BertConfig().to_dict()
    raise WeightsError(
        f"{folder} lacks the text tower's configuration: add config.json from the page of {hf_model_name}."
    )


def _load(model: CLIP | CustomTextCLIP, state: StateDict, source: Path) -> None:
    state = {key: value for key, value in state.items() if key not in _OBSOLETE_KEYS}
    for key in ("logit_scale", "logit_bias"):
        # Saved as a number by some versions and as one element by others.
        own = getattr(model, key, None)
        if own is not None and key in state and state[key].numel() == own.numel():
            state[key] = state[key].reshape(own.shape)
    load_exactly(model, state, source)


def _tokenizer(folder: Path, config: dict[str, Any], model: CLIP | CustomTextCLIP) -> Tokenizer:
    import open_clip

    text_config = config["model_cfg"].get("text_cfg", {})
    if not text_config.get("hf_tokenizer_name"):
        return open_clip.get_tokenizer(f"local-dir:{folder}")
    # transformers makes an empty vocabulary where it finds none.
    if not any((folder / name).is_file() for name in _VOCABULARY_NAMES):
        raise WeightsError(
            f"{folder} lacks the tokenizer's vocabulary: add tokenizer_config.json and vocab.txt (or tokenizer.json) "
            "from the model's page."
        )
    try:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", local_files_only=True, trust_remote_code=False)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise WeightsError(f"transformers cannot load the tokenizer in {folder}: {error}") from error
    size = len(tokenizer.tokenizer)
    if size > model.vocab_size:
        raise WeightsError(
            f"the tokenizer in {folder} has {size} tokens and the text tower {model.vocab_size}: they belong to "
            "different models. Get the tokenizer files from the model's page."
        )
    return tokenizer


def _without_common_padding(model: CLIP | CustomTextCLIP, tokens: Tensor) -> Tensor:
    """Token ids cut to the longest prompt, where the text tower masks padding and so gives the same without it."""
    from open_clip.hf_model import HFTextEncoder

    text = getattr(model, "text", None)
    if not isinstance(text, HFTextEncoder) or text.config.pad_token_id is None:
        return tokens
    used = (tokens != text.config.pad_token_id).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1] if len(used) else tokens


def _find_checkpoint(folder: Path) -> Path:
    for name in _CHECKPOINT_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in _CHECKPOINT_SUFFIXES)
    if len(others) == 1:
        return others[0]
    found = f"several: {', '.join(path.name for path in others)}; name one" if others else "none; get them"
    raise WeightsError(
        f"{folder} should hold one file of weights, such as open_clip_pytorch_model.bin, and has {found}."
    )


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise WeightsError(
            f"no weights at {folder}: the folder does not exist. Check the path, or get the weights again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{folder} has no readable {path.name}: {error}. Get the folder again.") from error
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {error}. Get it again.") from error
    if not isinstance(content, dict) or (path.name == CONFIG_NAME and "model_cfg" not in content):
        raise WeightsError(f"{path} has no 'model_cfg', so it does not describe an open_clip model. Get it again.")
    return content


@contextmanager
def _offline() -> Iterator[None]:
    """Hugging Face libraries refuse the network inside; what the process had set before comes back after."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    constant = constants.HF_HUB_OFFLINE
    os.environ.update(dict.fromkeys(names, "1"))
    constants.HF_HUB_OFFLINE = True  # read from the environment once, when it was imported
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = constant
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
