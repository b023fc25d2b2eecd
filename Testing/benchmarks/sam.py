"""SAM vit_b's image encoder with fused attention against segment_anything's own: time, peak memory, difference."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from Testing.benchmarks.measuring import Section, answer_parent, in_child, megabytes, peak_memory, seconds

TOLERANCE = 1e-4
NAMES = {"theirs": "segment_anything", "ours": "fused attention (ours)"}


def sam_time(repeats: int, scale: str) -> Section:
    """Args:
    repeats: runs of each; the fastest counts.
    scale: ``full`` for vit_b at 1024 pixels, ``tiny`` to see that the benchmark runs.
    """
    section = Section("SAM vit_b: image embedding")
    found, outputs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for who in NAMES:
            path = Path(folder) / f"{who}.npy"
            found[who] = in_child("Testing.benchmarks.sam", who=who, output=str(path), repeats=repeats, scale=scale)
            outputs[who] = np.load(path)
    section.say(f"{scale} size, random weights, each in a process of its own, {found['ours']['threads']} threads.")
    section.table(
        ["encoder", "s an image", "peak memory", "of which loaded before"],
        [
            [name, f"{found[who]['seconds']:.1f}", megabytes(found[who]["peak"]), megabytes(found[who]["loaded"])]
            for who, name in NAMES.items()
        ],
    )
    section.check("Largest difference", float(np.abs(outputs["ours"] - outputs["theirs"]).max()), TOLERANCE)
    ratio = found["theirs"]["seconds"] / found["ours"]["seconds"]
    section.goal("Times faster than segment_anything", ratio, 1.0, at_least=True)
    memory = found["ours"]["peak"] / found["theirs"]["peak"]
    section.goal("Peak memory over segment_anything's", memory, 1.0, at_least=False)
    return section


def _child(who: str, output: str, repeats: int, scale: str) -> dict[str, Any]:
    from FreqSegLib.sam.sam_model import SegmentAnything

    model = _model(scale)
    side = model.image_encoder.img_size
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    if who == "ours":
        embed = SegmentAnything(model, "benchmark").embed
    else:
        embed = lambda pixels: model.image_encoder(model.preprocess(pixels * 255))  # noqa: E731
    loaded = peak_memory()
    with torch.no_grad():
        taken = min(seconds(lambda: embed(image)) for _ in range(repeats))
        peak = peak_memory()
        np.save(output, embed(image).numpy())
    return {"seconds": taken, "peak": peak, "loaded": loaded, "threads": torch.get_num_threads()}


def _model(scale: str) -> Any:
    from segment_anything import sam_model_registry
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    from Testing.unit.official_layouts import random_state

    if scale == "full":
        model = sam_model_registry["vit_b"]()
    else:
        norm = partial(torch.nn.LayerNorm, eps=1e-6)
        model = Sam(
            ImageEncoderViT(256, embed_dim=64, depth=2, num_heads=4, norm_layer=norm, use_rel_pos=True, window_size=14),
            PromptEncoder(embed_dim=256, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16),
            MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048)),
        )
    model.load_state_dict(random_state(model, 0))
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    answer_parent(_child)
