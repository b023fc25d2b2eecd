"""BiomedCLIP's weights under the names of its timm-free port, as MedCLIP-SAMv2 publishes its DHN-NCE fine-tuned model.

The port holds the same tensors as open_clip's, with query, key and value apart.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from FreqSegLib.checkpoint import StateDict

if TYPE_CHECKING:
    from torch import Tensor

_VISION = "vision_model."
_WHOLE = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.trunk.cls_token",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "text_projection.fc1.weight": "text.proj.0.weight",
    "text_projection.fc2.weight": "text.proj.2.weight",
}
_STEMS = {
    "visual_projection": "visual.head.proj",
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.post_layernorm": "visual.trunk.norm",
    "text_model.embeddings.token_embedding": "text.transformer.embeddings.word_embeddings",
    "text_model.embeddings.position_embedding": "text.transformer.embeddings.position_embeddings",
    "text_model.embeddings.token_type_embedding": "text.transformer.embeddings.token_type_embeddings",
    "text_model.embeddings.layer_norm": "text.transformer.embeddings.LayerNorm",
}
_VISION_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_TEXT_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "layer_norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "layer_norm2": "output.LayerNorm",
}
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def is_hugging_face_layout(state: StateDict) -> bool:
    """Whether the keys are those of the port, not open_clip's."""
    return any(key.startswith(_VISION) for key in state) and not any(key.startswith("visual.") for key in state)


def to_open_clip_layout(state: StateDict) -> StateDict:
    """The same tensors under open_clip's keys; a key of neither layout is kept, for the loader to name.

    Args:
        state: key to tensor in the port's layout.
    """
    import torch

    renamed: StateDict = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer = _LAYER.fullmatch(key)
        if layer is None:
            stem, _, kind = key.rpartition(".")
            name = _WHOLE.get(key) or (f"{_STEMS[stem]}.{kind}" if stem in _STEMS else key)
            renamed[name] = value
            continue
        tower, number, stem, kind = layer.groups()
        if tower == "text":
            renamed[f"text.transformer.encoder.layer.{number}.{_TEXT_LAYER.get(stem, stem)}.{kind}"] = value
        elif stem in _QKV:
            parts.setdefault(f"visual.trunk.blocks.{number}.attn.qkv.{kind}", {})[stem] = value
        else:
            renamed[f"visual.trunk.blocks.{number}.{_VISION_LAYER.get(stem, stem)}.{kind}"] = value
    for name, part in parts.items():
        # In the order query, key, value whatever the file's; a part that is missing shows as a wrong shape.
        renamed[name] = torch.cat([part[stem] for stem in sorted(part, key=_QKV.index)])
    if "visual.trunk.cls_token" in renamed:
        renamed["visual.trunk.cls_token"] = renamed["visual.trunk.cls_token"].reshape(1, 1, -1)
    if "visual.trunk.pos_embed" in renamed:
        renamed["visual.trunk.pos_embed"] = renamed["visual.trunk.pos_embed"].unsqueeze(0)
    return renamed
