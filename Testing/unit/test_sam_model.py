"""The SAM stage against segment_anything itself: encoder, decoder and loading."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from official_layouts import random_state, write_random_sam
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.sam import sam_model
from FreqSegLib.sam.promptable import PromptableSegmenter, decode_prompts
from FreqSegLib.sam.sam_model import SegmentAnything, build_sam, guess_model_type, use_fused_attention


def small_encoder(image_size: int, seed: int = 0) -> ImageEncoderViT:
    """SAM's image encoder with one windowed and one global block, 64 channels and relative positions that matter."""
    encoder = ImageEncoderViT(
        img_size=image_size,
        embed_dim=64,
        depth=2,
        num_heads=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=(1,),
        window_size=14,
        out_chans=256,
    )
    state = random_state(encoder, seed)
    for key in state:
        if "rel_pos" in key:
            state[key] = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(seed))
    encoder.load_state_dict(state)
    return encoder.eval()


def small_sam(image_size: int = 256, seed: int = 0) -> Sam:
    """SAM with its own decoder and a small image encoder."""
    grid = image_size // 16
    model = Sam(
        image_encoder=small_encoder(image_size, seed),
        prompt_encoder=PromptEncoder(
            embed_dim=256,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=256, transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        ),
    )
    for part in (model.prompt_encoder, model.mask_decoder):
        part.load_state_dict(random_state(part, seed + 1))
    return model.eval()


@pytest.fixture(scope="module")
def published() -> Sam:
    return small_sam()


@pytest.fixture(scope="module")
def sam(published: Sam) -> SegmentAnything:
    return SegmentAnything(deepcopy(published), "small")


@pytest.fixture(scope="module")
def predictor(published: Sam) -> SamPredictor:
    """segment_anything's predictor with an 8-bit image that fills the frame."""
    predictor = SamPredictor(published)
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    return predictor


@pytest.mark.parametrize("image_size", [224, 256, 320])
def test_fused_attention_gives_what_segment_anything_gives(image_size: int) -> None:
    """A multiple of the window (14 tokens), one that needs padding, and two images at once."""
    published = small_encoder(image_size)
    fused = deepcopy(published)
    use_fused_attention(fused)
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, result = published(images), fused(images)
    assert expected.std() > 0.1
    assert torch.allclose(result, expected, atol=1e-4)


def test_relative_positions_matter_in_the_comparison_above() -> None:
    encoder = small_encoder(256)
    flat = deepcopy(encoder)
    for name, parameter in flat.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.zeros_(parameter)
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert (encoder(images) - flat(images)).abs().max() > 0.01


def test_relative_positions_of_another_grid_are_interpolated_as_segment_anything_does() -> None:
    attention = small_encoder(256).blocks[1].attn
    tokens = torch.randn(1, 10, 10, 64)
    with torch.no_grad():
        assert torch.allclose(sam_model.FusedAttention(attention)(tokens), attention(tokens), atol=1e-5)


def test_state_dict_keys_and_values_stay_after_the_swap(published: Sam, sam: SegmentAnything) -> None:
    before, after = published.state_dict(), sam.model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(isinstance(block.attn, sam_model.FusedAttention) for block in sam.model.image_encoder.blocks)
    assert not any(parameter.requires_grad for parameter in sam.model.parameters())


@pytest.mark.slow
def test_fused_attention_gives_what_segment_anything_gives_for_vit_b_at_1024_pixels() -> None:
    model = build_sam("vit_b").image_encoder
    model.load_state_dict(random_state(model, 7), assign=True)
    images = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = model(images)
        use_fused_attention(model)
        result = model(images)
    assert torch.allclose(result, expected, atol=1e-4)


def test_it_is_a_promptable_segmenter(sam: SegmentAnything) -> None:
    assert isinstance(sam, PromptableSegmenter)
    assert (sam.name, sam.image_size, sam.embedding_shape) == ("small", 256, (256, 16, 16))


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 170), (130, 256)])
def test_embedding_is_the_predictors_with_padding_after_normalising(
    published: Sam, sam: SegmentAnything, rows: int, columns: int
) -> None:
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 3, rows, columns))).float()
    predictor = SamPredictor(published)
    predictor.set_torch_image(pixels, (rows, columns))
    frame = torch.zeros(1, 3, 256, 256)
    frame[..., :rows, :columns] = pixels / 255
    assert torch.allclose(sam.embed(frame, valid=(rows, columns)), predictor.features, atol=1e-4)
    if (rows, columns) != (256, 256):
        assert not torch.allclose(sam.embed(frame), predictor.features, atol=1e-2)


def test_medsam_takes_unit_intensities_as_they_are(published: Sam) -> None:
    medsam = SegmentAnything(deepcopy(published), "medsam", normalisation="unit")
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        expected = published.image_encoder(images)
    assert torch.allclose(medsam.embed(images), expected, atol=1e-4)


def test_images_of_another_size_are_refused(sam: SegmentAnything) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, 256, 256\), got \(1, 1, 256, 256\)"):
        sam.embed(torch.rand(1, 1, 256, 256))


PROMPTS = {
    "box": {"box": np.array([40.0, 60, 200, 180])},
    "points": {"point_coords": np.array([[50.0, 60], [90, 30], [200, 220]]), "point_labels": np.array([1, 1, 0])},
    "box and point": {
        "box": np.array([40.0, 60, 200, 180]),
        "point_coords": np.array([[50.0, 60]]),
        "point_labels": np.array([1]),
    },
    "box and mask": {"box": np.array([40.0, 60, 200, 180]), "mask_input": np.linspace(-4, 4, 4096).reshape(1, 64, 64)},
}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_decoding_is_the_predictors(
    sam: SegmentAnything, predictor: SamPredictor, prompt: dict[str, np.ndarray], multimask: bool
) -> None:
    _, iou, low_res = predictor.predict(**prompt, multimask_output=multimask)
    ours = {{"box": "boxes"}.get(name, name): torch.from_numpy(value)[None].float() for name, value in prompt.items()}
    decoded = sam.decode(predictor.features, **ours, multimask=multimask)
    assert decoded.low_res_logits.shape == (1, 3 if multimask else 1, 64, 64)
    assert torch.allclose(decoded.low_res_logits[0], torch.from_numpy(low_res), atol=1e-4)
    assert torch.allclose(decoded.iou[0], torch.from_numpy(iou), atol=1e-4)


def test_several_prompts_on_one_image_decode_as_each_alone(sam: SegmentAnything, predictor: SamPredictor) -> None:
    boxes = torch.tensor([[10.0, 10, 100, 90], [120, 40, 250, 200], [0, 0, 255, 255]])
    together = sam.decode(predictor.features, boxes=boxes, multimask=True)
    alone = [sam.decode(predictor.features, boxes=box[None], multimask=True) for box in boxes]
    expected = torch.cat([one.low_res_logits for one in alone])
    assert torch.allclose(together.low_res_logits, expected, atol=1e-4)
    assert torch.allclose(together.iou, torch.cat([one.iou for one in alone]), atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_one_image_a_prompt_decodes_each_on_its_own_image(sam: SegmentAnything) -> None:
    embeddings = torch.randn(3, 256, 16, 16, generator=torch.Generator().manual_seed(2))
    boxes = torch.tensor([[10.0, 10, 100, 90]]).repeat(3, 1)
    together = sam.decode(embeddings, boxes=boxes).low_res_logits
    alone = torch.cat([sam.decode(one[None], boxes=boxes[:1]).low_res_logits for one in embeddings])
    assert torch.allclose(together, alone, atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_a_half_precision_embedding_decodes_in_the_decoders_precision(sam: SegmentAnything) -> None:
    embedding = torch.randn(1, 256, 16, 16, generator=torch.Generator().manual_seed(2))
    boxes = torch.tensor([[10.0, 10, 100, 90]])
    half = sam.decode(embedding.half(), boxes=boxes).low_res_logits
    assert half.dtype == torch.float32
    assert torch.equal(half, sam.decode(embedding.half().float(), boxes=boxes).low_res_logits)


def test_decode_prompts_serves_another_frame_than_sixteen_pixels_a_token(published: Sam) -> None:
    """LiteMedSAM's: 256 pixels on 64 x 64 tokens."""
    prompt_encoder = PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(256, 256), mask_in_chans=16
    )
    decoded = decode_prompts(
        prompt_encoder, published.mask_decoder, torch.zeros(1, 256, 64, 64), boxes=torch.tensor([[0.0, 0, 20, 20]])
    )
    assert decoded.low_res_logits.shape == (1, 1, 256, 256)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "nothing to decode"),
        ({"boxes": torch.zeros(4)}, r"boxes must have shape \(P, 4\), got \(4,\)"),
        ({"point_coords": torch.zeros(1, 2, 2)}, "go together"),
        ({"point_coords": torch.zeros(1, 2, 2), "point_labels": torch.zeros(1, 3)}, r"\(1, 2\), got \(1, 3\)"),
        ({"boxes": torch.zeros(2, 4), "mask_input": torch.zeros(1, 1, 64, 64)}, "P times.*'boxes': 2.*'mask_input': 1"),
        ({"mask_input": torch.zeros(1, 1, 256, 256)}, r"\(P, 1, 64, 64\), got \(1, 1, 256, 256\)"),
    ],
)
def test_prompts_that_do_not_go_together_are_refused(
    sam: SegmentAnything, prompts: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sam.decode(torch.zeros(1, 256, 16, 16), **prompts)


def test_an_embedding_of_another_model_is_refused(sam: SegmentAnything) -> None:
    with pytest.raises(InputError, match=r"embedding must be .*\(1, 256, 64, 64\)"):
        sam.decode(torch.zeros(1, 256, 64, 64), boxes=torch.zeros(1, 4))


@pytest.mark.parametrize("model_type", ["vit_b", "vit_l", "vit_h"])
def test_auto_tells_the_three_sizes_apart_by_shape(model_type: str) -> None:
    with torch.device("meta"):
        state = sam_model_registry[model_type]().state_dict()
    assert guess_model_type(state) == model_type
    ours = build_sam(model_type).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in state.items()}


def test_auto_refuses_what_is_not_sam() -> None:
    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight' is missing"):
        guess_model_type({"visual.proj": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"has shape \(64, 3, 16, 16\), expected \(768, 3, 16, 16\) or"):
        guess_model_type({"image_encoder.patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)})


@pytest.fixture
def small_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_b and vit_l as small models, so that files of them are small."""
    with torch.device("meta"):
        monkeypatch.setitem(sam_model_registry, "vit_b", partial(small_sam_on_meta, 256))
        monkeypatch.setitem(sam_model_registry, "vit_l", partial(small_sam_on_meta, 320))


def small_sam_on_meta(image_size: int) -> Sam:
    with torch.device("cpu"):
        return small_sam(image_size).to("meta")


@pytest.mark.usefixtures("small_registry")
@pytest.mark.parametrize("nest", [None, "model"])
def test_a_checkpoint_loads_with_its_weights_and_gives_the_same_embedding(
    published: Sam, sam: SegmentAnything, tmp_path: Path, nest: str | None
) -> None:
    state = published.state_dict()
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "sam.pth")
    loaded = SegmentAnything.from_checkpoint(tmp_path / "sam.pth", "vit_b")
    images = torch.rand(1, 3, 256, 256)
    assert loaded.name == "sam_vit_b"
    assert torch.allclose(loaded.embed(images), sam.embed(images), atol=1e-6)
    medsam = SegmentAnything.from_checkpoint(tmp_path / "sam.pth", "medsam")
    assert (medsam.name, medsam.normalisation) == ("medsam_vit_b", "unit")


@pytest.mark.usefixtures("small_registry")
def test_auto_takes_a_file_called_medsam_for_medsam(
    published: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam_model, "_TYPE_OF_WIDTH", {64: "vit_b"})
    for file, name in (("medsam_vit_b.pth", "medsam_vit_b"), ("sam_vit_b_01ec64.pth", "sam_vit_b")):
        torch.save(published.state_dict(), tmp_path / file)
        assert SegmentAnything.from_checkpoint(tmp_path / file, "auto").name == name


@pytest.mark.usefixtures("small_registry")
def test_a_checkpoint_of_another_size_is_refused_by_key_and_shapes(published: Sam, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "sam.pth")
    message = r"'image_encoder.pos_embed' has shape \(1, 16, 16, 64\), expected \(1, 20, 20, 64\)"
    with pytest.raises(WeightsError, match=message):
        SegmentAnything.from_checkpoint(tmp_path / "sam.pth", "vit_l")


def test_an_unknown_model_type_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="auto, vit_b, vit_l, vit_h, medsam, got 'vit_t'"):
        SegmentAnything.from_checkpoint(tmp_path / "sam.pth", "vit_t")  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"sam\.pth: the file does not exist"):
        SegmentAnything.from_checkpoint(tmp_path / "sam.pth")


@pytest.mark.slow
def test_vit_b_loads_from_its_official_file_name_and_segments(tmp_path: Path) -> None:
    path = write_random_sam(tmp_path, "vit_b", seed=1)
    assert round(path.stat().st_size / 1e6) == 375  # as published
    sam = SegmentAnything.from_checkpoint(path, "auto")
    path.unlink()
    embedding = sam.embed(torch.rand(1, 3, 1024, 1024))
    assert embedding.shape == (1, *sam.embedding_shape) == (1, 256, 64, 64)
    decoded = sam.decode(embedding, boxes=torch.tensor([[100.0, 100, 500, 600]]), multimask=True)
    assert decoded.low_res_logits.shape == (1, 3, 256, 256)
    assert decoded.low_res_logits.isfinite().all()
