"""The open_clip encoder against open_clip itself, and its loading of folders in the official layout."""

from __future__ import annotations

import json
import shutil
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from official_layouts import write_random_biomedclip

from FreqSegLib.clip.encoder import ImageTextEncoder
from FreqSegLib.clip.open_clip_encoder import OpenCLIPEncoder
from FreqSegLib.errors import InputError, SettingsError, WeightsError

WEIGHTS = "open_clip_pytorch_model.bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_biomedclip(tmp_path_factory.mktemp("weights with space") / "biomedclip", scale="tiny", seed=1)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> OpenCLIPEncoder:
    return OpenCLIPEncoder.from_folder(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder with the same files, to be spoiled; removed again, as pytest keeps what tests leave."""
    target = Path(shutil.copytree(folder, tmp_path / "copy"))
    yield target
    shutil.rmtree(target)


@pytest.fixture(scope="module")
def own_vit() -> OpenCLIPEncoder:
    """open_clip's own vision transformer with its own text tower."""
    torch.manual_seed(3)
    model = open_clip.CLIP(
        embed_dim=20,
        vision_cfg={"layers": 4, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 40},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return OpenCLIPEncoder(model, tokenizer, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), name="own")


def published_encode_image(encoder: OpenCLIPEncoder, images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    return encoder.model.encode_image((images - mean[:, None, None]) / std[:, None, None], normalize=True)


@pytest.mark.parametrize("which", ["encoder", "own_vit"])
def test_prefix_then_suffix_is_the_models_own_image_encoding_at_every_layer(
    which: str, request: pytest.FixtureRequest
) -> None:
    encoder: OpenCLIPEncoder = request.getfixturevalue(which)
    side = encoder.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = published_encode_image(encoder, images)
    assert torch.allclose(encoder.encode_image(images), expected, atol=1e-5)
    for layer_idx in (1, encoder.num_layers // 2, encoder.num_layers):
        tokens = encoder.prefix(images, layer_idx)
        rows, columns = encoder.token_grid
        assert tokens.shape == (2, encoder.num_prefix_tokens + rows * columns, encoder.width)
        assert torch.allclose(encoder.suffix(tokens, layer_idx), expected, atol=1e-5)
    assert expected.shape[1] == encoder.embed_dim


@pytest.mark.parametrize("which", ["encoder", "own_vit"])
def test_features_are_open_clips_intermediates_in_the_order_asked(which: str, request: pytest.FixtureRequest) -> None:
    encoder: OpenCLIPEncoder = request.getfixturevalue(which)
    side = encoder.image_size
    images = torch.rand(1, 3, side, side)
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    pixels = (images - mean[:, None, None]) / std[:, None, None]
    theirs = encoder.model.visual.forward_intermediates(pixels, indices=[1, 3])["image_intermediates"]
    fourth, second = encoder.features(images, [4, 2])
    assert torch.allclose(second, theirs[0], atol=1e-5)
    assert torch.allclose(fourth, theirs[1], atol=1e-5)
    assert second.shape == (1, encoder.width, *encoder.token_grid)


def test_it_is_an_image_text_encoder(encoder: OpenCLIPEncoder) -> None:
    assert isinstance(encoder, ImageTextEncoder)
    assert (encoder.image_size, encoder.token_grid, encoder.num_prefix_tokens) == (224, (14, 14), 1)
    assert (encoder.width, encoder.num_layers, encoder.embed_dim) == (192, 12, 24)


def test_weights_are_frozen_and_a_gradient_still_reaches_the_tokens(own_vit: OpenCLIPEncoder) -> None:
    assert not own_vit.model.training
    tokens = own_vit.prefix(torch.rand(1, 3, 40, 40), 2)
    assert not tokens.requires_grad
    tokens.requires_grad_()
    own_vit.suffix(tokens, 2).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in own_vit.model.parameters())


def test_one_image_alone_encodes_as_in_a_batch(own_vit: OpenCLIPEncoder) -> None:
    images = torch.rand(3, 3, 40, 40)
    alone = torch.cat([own_vit.encode_image(image[None]) for image in images])
    assert torch.allclose(own_vit.encode_image(images), alone, atol=1e-5)


def test_text_embeddings_are_open_clips_own(folder: Path, encoder: OpenCLIPEncoder, tmp_path: Path) -> None:
    """open_clip's documented route: hf_model_name as a local path, weights picked up from the folder."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(folder)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    reference = open_clip.create_model(f"local-dir:{tmp_path}", pretrained_text=False).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    prompts = ["brain tumour", "a scan of the lungs with a lesion"]
    with torch.no_grad():
        texts = F.normalize(reference.encode_text(tokenizer(prompts)), dim=-1)
        images = torch.rand(1, 3, 224, 224)
        mean, std = (torch.tensor(config["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
        image = F.normalize(reference.encode_image((images - mean) / std), dim=-1)
    assert torch.allclose(encoder.encode_text(prompts), texts, atol=1e-5)
    assert torch.allclose(encoder.encode_image(images), image, atol=1e-5)
    assert not torch.allclose(texts[0], texts[1], atol=1e-3)


@pytest.mark.parametrize("which", ["encoder", "own_vit"])
def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(which: str, request: pytest.FixtureRequest) -> None:
    encoder: OpenCLIPEncoder = request.getfixturevalue(which)
    limit = encoder.tokenizer.context_length
    fitting = " ".join(["brain"] * (limit - 2))
    assert encoder.count_tokens(fitting) == limit
    with pytest.warns(UserWarning, match=f"{limit + 98} tokens long and .* reads {limit}"):
        long = encoder.encode_text([fitting + " lung" * 98])
    assert torch.allclose(long, encoder.encode_text([fitting]), atol=1e-5)


def test_a_prompt_that_fits_gives_no_warning(encoder: OpenCLIPEncoder, recwarn: pytest.WarningsRecorder) -> None:
    embedding = encoder.encode_text(["brain tumour"])
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(1))
    assert [warning for warning in recwarn if "tokens long" in str(warning.message)] == []
    assert encoder.encode_text([]).shape == (0, 24)


@pytest.mark.parametrize("layer_idx", [0, 5, -1])
def test_a_layer_that_does_not_exist_is_refused(own_vit: OpenCLIPEncoder, layer_idx: int) -> None:
    images = torch.rand(1, 3, 40, 40)
    with pytest.raises(SettingsError, match=f"1..4.*{layer_idx}"):
        own_vit.prefix(images, layer_idx)
    with pytest.raises(SettingsError, match="layer_idx"):
        own_vit.features(images, [1, layer_idx])


def test_images_of_another_size_are_refused(own_vit: OpenCLIPEncoder) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, 40, 40\), got \(1, 3, 32, 40\)"):
        own_vit.prefix(torch.rand(1, 3, 32, 40), 1)


def test_loading_asks_nothing_of_the_network_and_writes_nothing_into_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    OpenCLIPEncoder.from_folder(folder).encode_text(["brain tumour"])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_safetensors_and_nested_training_checkpoints_load_the_same_weights(
    copy: Path, encoder: OpenCLIPEncoder, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = torch.load(copy / WEIGHTS, weights_only=True)
    images = torch.rand(1, 3, 224, 224)
    expected = encoder.encode_image(images)
    training = {"epoch": 32, "name": "dhn-nce", "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(training, tmp_path / "epoch_32.pt")
    torch.save({"model": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "wrapped.pt")
    for name in ("epoch_32.pt", "wrapped.pt"):
        fine_tuned = OpenCLIPEncoder.from_folder(copy, checkpoint=tmp_path / name)
        assert torch.equal(fine_tuned.encode_image(images), expected)
    (copy / WEIGHTS).unlink()
    save_file(state, copy / "open_clip_model.safetensors")
    assert torch.equal(OpenCLIPEncoder.from_folder(copy).encode_image(images), expected)


def test_a_checkpoint_as_medclip_samv2_publishes_it_loads_the_same_weights(
    copy: Path, encoder: OpenCLIPEncoder, tmp_path: Path
) -> None:
    torch.save(in_published_layout(torch.load(copy / WEIGHTS, weights_only=True)), tmp_path / "pytorch_model.bin")
    fine_tuned = OpenCLIPEncoder.from_folder(copy, checkpoint=tmp_path / "pytorch_model.bin")
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(fine_tuned.encode_image(images), encoder.encode_image(images))
    assert torch.equal(fine_tuned.encode_text(["lesion"]), encoder.encode_text(["lesion"]))


def in_published_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value apart, class token and positions without batch axis, names as in transformers' CLIP."""
    renames = [
        ("visual.head.proj.", "visual_projection."),
        ("visual.trunk.norm.", "vision_model.post_layernorm."),
        ("visual.trunk.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
        ("visual.trunk.blocks.", "vision_model.encoder.layers."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.proj.", ".self_attn.out_proj."),
        ("text.transformer.encoder.layer.", "text_model.encoder.layers."),
        (".attention.self.query.", ".self_attn.q_proj."),
        (".attention.self.key.", ".self_attn.k_proj."),
        (".attention.self.value.", ".self_attn.v_proj."),
        (".attention.output.dense.", ".self_attn.out_proj."),
        (".attention.output.LayerNorm.", ".layer_norm1."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
        (".output.LayerNorm.", ".layer_norm2."),
        ("text.transformer.embeddings.word_embeddings", "text_model.embeddings.token_embedding"),
        ("text.transformer.embeddings.position_embeddings", "text_model.embeddings.position_embedding"),
        ("text.transformer.embeddings.token_type_embeddings", "text_model.embeddings.token_type_embedding"),
        ("text.transformer.embeddings.LayerNorm", "text_model.embeddings.layer_norm"),
        ("text.proj.0.", "text_projection.fc1."),
        ("text.proj.2.", "text_projection.fc2."),
    ]
    published = {}
    for key, value in state.items():
        name = key
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        if key == "visual.trunk.cls_token":
            published["vision_model.embeddings.class_embedding"] = value[0, 0]
        elif key == "visual.trunk.pos_embed":
            published["vision_model.embeddings.position_embedding.weight"] = value[0]
        elif ".attn.qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                published[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = third
        else:
            published[name] = value
    return published


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state.update({"text.proj.0.weight": torch.zeros(7, 32)}),
            r"proj\.0\.weight.*\(7, 32\).*\(28, 32\)",
        ),
        (
            lambda state: state.pop("visual.trunk.norm.bias"),
            r"'visual\.trunk\.norm\.bias' of shape \(192,\) is missing",
        ),
        (lambda state: state.update({"visual.trunk.extra": torch.zeros(3)}), r"extra' of shape \(3,\) is unknown"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key_and_shape(copy: Path, spoil: object, message: str) -> None:
    state = torch.load(copy / WEIGHTS, weights_only=True)
    spoil(state)  # type: ignore[operator]
    torch.save(state, copy / WEIGHTS)
    with pytest.raises(WeightsError, match=message):
        OpenCLIPEncoder.from_folder(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"<html>404 not found</html>", "damaged"),
        (None, "damaged"),
    ],
    ids=["empty", "web page", "truncated"],
)
def test_a_damaged_checkpoint_is_refused(copy: Path, content: bytes | None, message: str) -> None:
    path = copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:100_000] if content is None else content)
    with pytest.raises(WeightsError, match=message):
        OpenCLIPEncoder.from_folder(copy)
    path.rename(copy / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match="damaged"):
        OpenCLIPEncoder.from_folder(copy)


def test_a_checkpoint_with_python_objects_is_refused_and_not_run(copy: Path) -> None:
    state = torch.load(copy / WEIGHTS, weights_only=True)
    torch.save({"state_dict": state, "args": Namespace(lr=1)}, copy / WEIGHTS)
    with pytest.raises(WeightsError, match=r"Python objects.*Save the model's state dict alone") as caught:
        OpenCLIPEncoder.from_folder(copy)
    assert "weights_only=False" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip_config.json", "no readable open_clip_config.json"),
        (WEIGHTS, "has none"),
        ("vocab.txt", "lacks the tokenizer's vocabulary"),
    ],
)
def test_a_folder_with_a_file_missing_says_which(copy: Path, name: str, message: str) -> None:
    (copy / name).unlink()
    with pytest.raises(WeightsError, match=message):
        OpenCLIPEncoder.from_folder(copy)


def test_a_folder_of_another_text_tower_needs_its_configuration(copy: Path) -> None:
    (copy / "config.json").unlink()
    path = copy / "open_clip_config.json"
    path.write_text(path.read_text().replace("microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract", "someone/bert"))
    with pytest.raises(WeightsError, match=r"config\.json from the page of someone/bert"):
        OpenCLIPEncoder.from_folder(copy)


def test_a_configuration_that_is_damaged_or_unknown_to_open_clip_is_refused(copy: Path) -> None:
    path = copy / "open_clip_config.json"
    text = path.read_text()
    path.write_text(text.replace("vit_tiny_patch16_224", "vit_of_tomorrow"))
    with pytest.raises(WeightsError, match=r"cannot build.*vit_of_tomorrow"):
        OpenCLIPEncoder.from_folder(copy)
    path.write_text(text[:50])
    with pytest.raises(WeightsError, match="damaged"):
        OpenCLIPEncoder.from_folder(copy)


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    with (copy / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("extra\n")
    with pytest.raises(WeightsError, match="129 tokens and the text tower 128"):
        OpenCLIPEncoder.from_folder(copy)


def test_a_convolutional_image_tower_is_refused() -> None:
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32},
        text_cfg={"context_length": 8, "vocab_size": 100, "width": 8, "heads": 1, "layers": 1},
    )
    with pytest.raises(WeightsError, match="ModifiedResNet; FreqSeg needs a plain vision transformer"):
        OpenCLIPEncoder(model, open_clip.SimpleTokenizer(), mean=(0, 0, 0), std=(1, 1, 1))


def test_the_folder_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="folder does not exist"):
        OpenCLIPEncoder.from_folder(tmp_path / "nowhere")


def test_biomedclips_own_architecture_loads_from_a_folder_as_published(tmp_path: Path) -> None:
    """195.9 M parameters; like the official folder, without the text tower's config.json."""
    folder = write_random_biomedclip(tmp_path / "biomedclip", scale="full", seed=2, text_config=False)
    try:
        size = (folder / WEIGHTS).stat().st_size
        encoder = OpenCLIPEncoder.from_folder(folder)
    finally:
        (folder / WEIGHTS).unlink()
    assert round(size / 1e6) == 784  # as listed on the model's page
    assert round(sum(parameter.numel() for parameter in encoder.model.parameters()) / 1e5) == 1959
    assert (encoder.width, encoder.num_layers, encoder.embed_dim) == (768, 12, 512)
    images = torch.rand(1, 3, 224, 224)
    expected = published_encode_image(encoder, images)
    assert torch.allclose(encoder.suffix(encoder.prefix(images, 9), 9), expected, atol=1e-5)
    assert encoder.encode_text(["brain tumour"]).shape == (1, 512)
