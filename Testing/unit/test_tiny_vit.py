"""LiteMedSAM's image tower against a plain one: batch norms apart, NCHW, windows cut by hand, softmax written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.errors import WeightsError
from FreqSegLib.sam import tiny_vit
from FreqSegLib.sam.lite_medsam import LiteMedSAM
from FreqSegLib.sam.promptable import PromptableSegmenter
from FreqSegLib.sam.tiny_vit import TinyViT


class PlainConv(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class PlainMBConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = PlainConv(dim, 4 * dim)
        self.conv2 = PlainConv(4 * dim, 4 * dim, 3, groups=4 * dim)
        self.conv3 = PlainConv(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class PlainMerging(nn.Module):
    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = PlainConv(dim, out)
        self.conv2 = PlainConv(out, out, 3, stride, groups=out)
        self.conv3 = PlainConv(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class PlainAttention(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2))
        places = [(row, column) for row in range(window) for column in range(window)]
        # offsets are numbered as they are met, going through all pairs of places
        numbers: dict[tuple[int, int], int] = {}
        pairs = []
        for first in places:
            for second in places:
                offset = (abs(first[0] - second[0]), abs(first[1] - second[1]))
                pairs.append(numbers.setdefault(offset, len(numbers)))
        self.register_buffer("attention_bias_idxs", torch.tensor(pairs).view(len(places), len(places)))

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, _ = x.shape
        per_head = self.qkv(self.norm(x)).view(windows, tokens, self.heads, 3 * self.head_dim)
        out = torch.zeros_like(x)
        for head in range(self.heads):
            q, k, v = per_head[:, :, head].split(self.head_dim, dim=-1)
            scores = q @ k.transpose(1, 2) / self.head_dim**0.5
            scores = scores + self.attention_biases[head][self.attention_bias_idxs]
            weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[..., head * self.head_dim : (head + 1) * self.head_dim] = weight @ v
        return self.proj(out)


class PlainMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = PlainAttention(dim, heads, window)
        self.local_conv = PlainConv(dim, dim, 3, groups=dim)
        self.mlp = PlainMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        _, dim, height, width = x.shape
        w = self.window
        attended = torch.zeros_like(x)
        for top in range(0, height, w):
            for left in range(0, width, w):
                tile = x[:, :, top : top + w, left : left + w]
                rows, columns = tile.shape[2:]
                full = torch.zeros(len(x), dim, w, w, dtype=x.dtype)
                full[:, :, :rows, :columns] = tile
                tokens = self.attn(full.flatten(2).transpose(1, 2))
                back = tokens.transpose(1, 2).reshape(len(x), dim, w, w)
                attended[:, :, top : top + w, left : left + w] = back[:, :, :rows, :columns]
        x = self.local_conv(x + attended)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-6)
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


class PlainStage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class PlainTinyViT(nn.Module):
    """The published architecture in the published layout of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"seq": nn.Sequential(PlainConv(3, 32, 1), nn.GELU(), PlainConv(32, 64, 1))},
        )
        self.layers = nn.Sequential(
            PlainStage([PlainMBConv(64), PlainMBConv(64)], PlainMerging(64, 128, 2)),
            PlainStage([PlainBlock(128, 4, 7) for _ in range(2)], PlainMerging(128, 160, 2)),
            PlainStage([PlainBlock(160, 5, 14) for _ in range(6)], PlainMerging(160, 320, 1)),
            PlainStage([PlainBlock(320, 10, 7) for _ in range(2)], None),
        )
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, 1, bias=False),
            PlainChannelNorm(256),
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            PlainChannelNorm(256),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.layers(self.patch_embed["seq"](images)))


@pytest.fixture(scope="module")
def plain() -> PlainTinyViT:
    """Random weights, biases, running statistics and attention biases, none at its resting value."""
    torch.manual_seed(0)
    model = PlainTinyViT().double().eval().requires_grad_(False)
    for key, value in model.state_dict().items():
        if key.endswith(("running_var", "bn.weight", "norm.weight")):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias", "attention_biases")):
            value.normal_(0, 0.3)
    return model


def loaded(plain: PlainTinyViT, dtype: torch.dtype) -> TinyViT:
    tower = TinyViT().to(dtype).eval().requires_grad_(False)
    tower.load_checkpoint({key: value.to(dtype) for key, value in plain.state_dict().items()})
    return tower


@pytest.mark.parametrize("size", [36, 44, 56])
def test_the_tower_is_the_published_one_at_sizes_that_do_and_do_not_fit_the_windows(
    plain: PlainTinyViT, size: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(1 + (size < 40), 3, size, size, dtype=torch.float64, generator=generator)
    expected = plain(images)
    found = loaded(plain, torch.float64)(images)
    assert found.shape == (len(images), 256, size // 4, size // 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_single_precision_stays_within_rounding(plain: PlainTinyViT) -> None:
    images = torch.rand(1, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = plain(images)
    found = loaded(plain, torch.float32)(images.float()).double()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 5, 24, 200])
def test_strips_of_rows_leave_no_seam_where_they_do_not_divide_the_height(
    plain: PlainTinyViT, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_vit, "STRIP_ROWS", rows)
    block = loaded(plain, torch.float64).layers[0].blocks[0]
    x = torch.randn(1, 64, 34, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    expected = plain.layers[0].blocks[0](x)
    found = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_layout_is_that_of_the_published_checkpoint(plain: PlainTinyViT) -> None:
    keys = {key for key in plain.state_dict() if not key.endswith(("num_batches_tracked", "attention_bias_idxs"))}
    assert set(TinyViT().checkpoint_shapes()) == keys
    assert {"layers.0.blocks.0.conv1.c.weight", "layers.1.blocks.0.attn.attention_biases", "neck.0.weight"} <= keys


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.blocks.0.conv1.c.weight",
        "layers.0.blocks.0.conv1.bn.running_var",
        "layers.1.blocks.0.attn.attention_biases",
        "neck.0.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named_with_its_shapes(plain: PlainTinyViT, key: str) -> None:
    state = plain.state_dict()
    shape = tuple(state[key].shape)
    without = {name: value for name, value in state.items() if name != key}
    with pytest.raises(WeightsError) as missing:
        TinyViT().load_checkpoint(without)
    assert key in str(missing.value)
    assert str(shape) in str(missing.value)
    with pytest.raises(WeightsError) as misshapen:
        TinyViT().load_checkpoint({**state, key: torch.zeros(3, 5)})
    assert all(part in str(misshapen.value) for part in (key, "(3, 5)", str(shape)))


def test_an_unknown_tensor_is_named(plain: PlainTinyViT) -> None:
    with pytest.raises(WeightsError, match=r"layers\.7\.odd.*\(2, 2\)"):
        TinyViT().load_checkpoint({**plain.state_dict(), "layers.7.odd": torch.zeros(2, 2)})


def test_a_refused_checkpoint_leaves_the_tower_as_it_was(plain: PlainTinyViT) -> None:
    tower = TinyViT()
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    with pytest.raises(WeightsError):
        tower.load_checkpoint({**plain.state_dict(), "odd": torch.zeros(1)})
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


@pytest.fixture(scope="module")
def random_checkpoint(plain: PlainTinyViT, tmp_path_factory: pytest.TempPathFactory):
    """The whole of LiteMedSAM with random weights, as ``lite_medsam.pth`` is laid out."""
    model = LiteMedSAM()
    state = {f"image_encoder.{key}": value.float() for key, value in plain.state_dict().items()}
    for part in ("prompt_encoder", "mask_decoder"):
        state |= {f"{part}.{key}": value for key, value in getattr(model, part).state_dict().items()}
    path = tmp_path_factory.mktemp("lite") / "lite_medsam.pth"
    torch.save(state, path)
    return path, state


def test_litemedsam_loads_from_a_file_frozen_and_whole(random_checkpoint, plain: PlainTinyViT) -> None:
    path, state = random_checkpoint
    model = LiteMedSAM.from_checkpoint(path)
    assert isinstance(model, PromptableSegmenter)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for part in ("prompt_encoder", "mask_decoder"):
        for key, value in getattr(model, part).state_dict().items():
            assert torch.equal(value, state[f"{part}.{key}"])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = plain(images.double()).float()
    torch.testing.assert_close(model.embed(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.embed(images)[1:], model.embed(images[1:]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", ["mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"])
def test_another_architecture_is_refused_by_key_and_shape(random_checkpoint, tmp_path, key: str) -> None:
    _, state = random_checkpoint
    torch.save({**state, key: torch.zeros(1, 7)}, tmp_path / "other.pth")
    part, _, name = key.partition(".")
    with pytest.raises(WeightsError) as error:
        LiteMedSAM.from_checkpoint(tmp_path / "other.pth")
    shape = str(tuple(state[key].shape))
    assert all(text in str(error.value) for text in (part, name, "(1, 7)", shape, "other.pth"))


def test_foreign_and_damaged_files_are_refused(tmp_path) -> None:
    torch.save({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "clip.pth")
    with pytest.raises(WeightsError, match=r"visual\.conv1\.weight"):
        LiteMedSAM.from_checkpoint(tmp_path / "clip.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "clip.pth").read_bytes()[:200])
    (tmp_path / "empty.pth").touch()
    for name in ("list.pth", "cut.pth", "empty.pth", "absent.pth"):
        with pytest.raises(WeightsError, match=name):
            LiteMedSAM.from_checkpoint(tmp_path / name)


def test_the_real_checkpoint_loads_strictly() -> None:
    folder = weights.find("litemedsam")
    if folder is None:
        pytest.skip("LiteMedSAM's weights are not on this machine: freqseg models get litemedsam")
    model = LiteMedSAM.from_checkpoint(folder / "lite_medsam.pth")
    embedding = model.embed(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert embedding.shape == (1, 256, 16, 16)
    assert torch.isfinite(embedding).all()
    assert float(embedding.std()) > 0.01
