"""Random weights in the layouts the official weights are published in: same files, same keys, same shapes.

The values are meaningless; they stand in where the real weights cannot be downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The model card's own configuration (microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224).
BIOMEDCLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
BERT_BASE: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
BERT_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
SAM_FILES = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
    "medsam": "medsam_vit_b.pth",
}


def write_random_biomedclip(folder: Path, *, scale: str = "tiny", seed: int = 0, text_config: bool = True) -> Path:
    """BiomedCLIP's folder with random weights.

    Args:
        folder: made if needed.
        scale: ``"full"`` for BiomedCLIP's own architecture (195.9 M parameters, 784 MB), ``"tiny"`` for the same
            layout with timm's vit_tiny_patch16_224 and a small BERT (5.6 M parameters).
        seed: of the values.
        text_config: add the text tower's config.json. The official folder has none; the tiny tower needs it.

    Returns:
        the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(BIOMEDCLIP_CONFIG))
    bert = dict(BERT_BASE)
    if scale == "tiny":
        config["model_cfg"]["embed_dim"] = 24
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_tiny_patch16_224"
        bert.update(BERT_TINY)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=4))
    if text_config:
        (folder / "config.json").write_text(json.dumps(bert, indent=2))
    _write_bert_tokenizer(folder, bert["vocab_size"])
    state = random_state(_biomedclip_on_meta(config["model_cfg"], bert), seed)
    # The published file was saved when transformers still kept this buffer.
    state["text.transformer.embeddings.position_ids"] = torch.arange(bert["max_position_embeddings"])[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder


def write_random_sam(folder: Path, model_type: str = "vit_b", seed: int = 0) -> Path:
    """A SAM or MedSAM checkpoint with random weights (vit_b 375 MB, vit_l 1.2 GB, vit_h 2.6 GB).

    Args:
        folder: made if needed.
        model_type: ``"vit_b"``, ``"vit_l"``, ``"vit_h"`` or ``"medsam"``.
        seed: of the values.

    Returns:
        the file, under its official name.
    """
    from segment_anything import sam_model_registry

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = sam_model_registry["vit_b" if model_type == "medsam" else model_type]()
    path = folder / SAM_FILES[model_type]
    torch.save(random_state(model, seed), path)
    return path


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict of ``model``'s keys and shapes with values of a trained network's size; meta models will do."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1 and "norm" in key.lower() and key.endswith("weight"):
            state[key] = 1 + 0.1 * noise
        elif value.ndim >= 2 and key.endswith("weight"):
            state[key] = noise / max(1, value[0].numel()) ** 0.5
        else:
            state[key] = 0.1 * noise
    return state


def _biomedclip_on_meta(model_config: dict[str, Any], bert: dict[str, Any]) -> nn.Module:
    import tempfile

    import open_clip

    with tempfile.TemporaryDirectory() as temporary, torch.device("meta"):
        (Path(temporary) / "config.json").write_text(json.dumps(bert))
        text = {**model_config["text_cfg"], "hf_model_name": temporary, "hf_model_pretrained": False}
        return open_clip.CustomTextCLIP(model_config["embed_dim"], model_config["vision_cfg"], text)


def _write_bert_tokenizer(folder: Path, vocab_size: int) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *"0123456789",
    ]
    tokens += ["brain", "tumour", "tumor", "lung", "lungs", "breast", "lesion", "scan", "mri", "ct", "a", "the", "of"]
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"[unused{number}]" for number in range(vocab_size - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    settings = {
        "cls_token": "[CLS]",
        "do_basic_tokenize": True,
        "do_lower_case": True,
        "mask_token": "[MASK]",
        "model_max_length": 1000000000000000019884624838656,
        "never_split": None,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
        "unk_token": "[UNK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
