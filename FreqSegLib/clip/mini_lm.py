"""MiniLM (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0) as a text tower: sentences to 384-d vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.checkpoint import load_exactly, read_state_dict
from FreqSegLib.errors import WeightsError

MAX_TOKENS = 128


class MiniLM:
    """Frozen sentence encoder: mean over the tokens of BERT's last layer, unit length."""

    embed_dim = 384

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        from transformers import BertConfig, BertModel, BertTokenizerFast

        try:
            self._tokenizer = BertTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            model = BertModel(BertConfig.from_json_file(str(folder / "config.json")), add_pooling_layer=False)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"'{folder}' holds no MiniLM weights ({error}). Fetch them again: freqseg models get minilm"
            ) from error
        path = folder / "model.safetensors"
        state = read_state_dict(path)
        # the sentence vector is the mean over tokens, so BERT's pooler is not built
        unused = ("pooler.", "embeddings.position_ids")
        load_exactly(model, {key: value for key, value in state.items() if not key.startswith(unused)}, path)
        self._model = model.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> (P, 384) unit vectors; what exceeds 128 word pieces is cut."""
        batch = self._tokenizer(
            list(sentences), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
