"""Trained networks as files that run without FreqSeg: TorchScript, torch.export, ONNX, and ONNX with 8-bit weights.

Every file has inputs of one fixed size, a batch of one, and gives logits. What leads to its inputs (grey levels, the
square frame, the image tower) stays with the caller; the report beside the file says what it is to be given. Before a
file is delivered it is loaded again and compared with the network it was made from.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.errors import DeviceError, InputError, OutputError, SettingsError
from FreqSegLib.interaction.dual_stream import BOTTLENECK_SIDE, DualStreamModel
from FreqSegLib.mamba.model_config import InputConfig
from FreqSegLib.mamba.spectral_gating import SpectralGating
from FreqSegLib.mamba.spectral_input import SliceInput, VolumeInput
from FreqSegLib.output_file import replacing
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.text_trained import WEIGHTS_FILE as TEXT_GUIDED_FILE
from FreqSegLib.volume import Volume

Format = Literal["torchscript", "torch-export", "onnx", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[Format, str] = {"torchscript": ".pt", "torch-export": ".pt2", "onnx": ".onnx", "int8": ".int8.onnx"}
TEXT_GUIDED = "lite-text-guided"
REPORT_FILE = "export.json"

TOLERANCE = 1e-4
"""Largest difference of the exact formats, over the largest number the network gives, or over 1 where that is less."""
EXAMPLES = 8
FRAME_SIDE = 256

Run = Callable[..., tuple[Tensor, ...]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A network to export.

    Attributes:
        name: of its files.
        network: takes tensors of the inputs' shapes, gives a tensor or a tuple.
        inputs: name and shape of each.
        about: what each input is to hold, in words.
        outputs: names.
        labels: turns the first output into labels: (1, classes or 1, *size) to (*size).
        classes: names of the labels from 1.
        pieces: example inputs, real or made up.
        pieces_are: what they are, in words.
    """

    name: str
    network: nn.Module
    inputs: dict[str, tuple[int, ...]]
    about: dict[str, str]
    outputs: tuple[str, ...]
    labels: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]
    pieces: tuple[tuple[Tensor, ...], ...]
    pieces_are: str


@dataclass(frozen=True)
class Exported:
    """One file, and how it compares with the network in float32.

    Attributes:
        format: one of FORMATS.
        file: its name.
        megabytes: its size, in 10^6 bytes.
        largest_difference: of any output number, over all examples.
        largest_number: of any output number of the network itself, for scale.
        same_labels: share of pixels with the same label.
        dsc: mean Dice similarity of the classes' masks over the examples that show them; None where none does.
    """

    format: Format
    file: str
    megabytes: float
    largest_difference: float
    largest_number: float
    same_labels: float
    dsc: float | None

    def sentence(self) -> str:
        """For people."""
        overlap = "" if self.dsc is None else f", DSC between both {self.dsc:.4f}"
        return (
            f"{self.file}: {self.megabytes:.2f} MB, largest difference {self.largest_difference:.2g} of numbers up to "
            f"{self.largest_number:.3g}, {100 * self.same_labels:.2f} % of the labels the same{overlap}"
        )


def export_model(
    name_or_folder: str | Path,
    folder: Path,
    formats: Sequence[Format],
    *,
    size: Sequence[int] = (),
    images: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    overwrite: bool = False,
    say: Say = lambda sentence: None,
) -> list[Exported]:
    """Write a spectral model, or the text-guided one, in other formats, and a report beside them.

    Args:
        name_or_folder: a spectral model's name or folder; ``lite-text-guided``, or a folder with its weights.
        folder: gets the files, named after the model, and ``export.json``.
        formats: which.
        size: the image's sides for a spectral model: (h, w) or (z, h, w); what it sees in use if left out.
        images: to compare on; random numbers if left out.
        prompts: for the text-guided model, asked of every image.
        overwrite: whether files may be replaced.
        say: told what is being done.

    Raises:
        WeightsError, InputError, SettingsError: the model, an image or a setting is unusable.
        DeviceError: a package that the format needs is missing; it is named.
        OutputError: files exist or cannot be written, or a file would answer otherwise than the network.
    """
    unknown = [one for one in formats if one not in FORMATS]
    if unknown or not formats:
        raise SettingsError(f"formats must be some of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    _require_packages(formats)
    if is_text_guided(name_or_folder):
        if size:
            raise SettingsError("the text-guided model has one size, so size cannot be chosen")
        subject = text_guided_subject(name_or_folder, images, prompts)
    else:
        if prompts:
            raise SettingsError("a spectral model takes no prompts; they are for the text-guided model")
        subject = spectral_subject(name_or_folder, size, images)
    return export_subject(subject, folder, formats, overwrite=overwrite, say=say)


def export_subject(
    subject: Subject, folder: Path, formats: Sequence[Format], *, overwrite: bool = False, say: Say = lambda s: None
) -> list[Exported]:
    """Write a network in other formats; arguments and errors as for :func:`export_model`."""
    network = fixed(subject.network)
    asked = [one for one in FORMATS if one in formats]
    example = subject.pieces[0]
    paths = [folder / f"{subject.name}{ENDINGS[one]}" for one in asked]
    done: list[Exported] = []
    with (
        replacing([*paths, folder / REPORT_FILE], overwrite=overwrite) as places,
        tempfile.TemporaryDirectory(prefix="freqseg-export-") as aside,
        quiet(),
        torch.no_grad(),
    ):
        say(f"Reading the network of {subject.name}")
        program = torch.export.export(network, example)
        for node in program.graph.nodes:
            # source lines of every step, several times as large as a small model
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                node.meta.pop(key, None)
        float_onnx = Path(aside) / "float.onnx"
        if {"onnx", "int8"} & set(asked):
            say("Writing ONNX")
            _write_onnx(program, subject, float_onnx)
        for one, place in zip(asked, places, strict=False):
            say(f"Writing and comparing {place.name}")
            run = _written(one, program, example, float_onnx, place)
            result = compared(subject, run, one, place)
            if one != "int8":
                _require_equal(result)
            done.append(result)
            say(result.sentence())
        places[-1].write_text(json.dumps(_report(subject, done), indent=1) + "\n", encoding="utf-8")
    return done


def is_text_guided(name_or_folder: str | Path) -> bool:
    """Whether this names the text-guided model rather than a spectral one."""
    return str(name_or_folder) == TEXT_GUIDED or (Path(name_or_folder) / TEXT_GUIDED_FILE).is_file()


def spectral_subject(name_or_folder: str | Path, size: Sequence[int] = (), images: Sequence[Path] = ()) -> Subject:
    """A spectral model, with slices of ``images`` or random ones to compare on."""
    segmenter = SpectralSegmenter.from_model(name_or_folder, "cpu")
    model, network = segmenter.model, segmenter.network
    usual = model.input.window if model.input.form == "volume" else (model.input.side,) * 2
    sides = tuple(size) or tuple(usual)
    if len(sides) != model.model.dimensions or any(a < b for a, b in zip(sides, network.patch_size, strict=False)):
        raise SettingsError(
            f"size must be {model.model.dimensions} sides of at least {network.patch_size} pixels, got {sides}"
        )
    shape = (1, model.model.in_channels, *sides)
    pieces = [piece for path in images for piece in _slices_of(Volume.read(path), model.input, sides)]
    made_up = not pieces
    if made_up:
        generator = torch.Generator().manual_seed(0)
        # blurred noise: like images, and unlike what any one filter would answer to
        noise = [torch.rand(shape, generator=generator) for _ in range(EXAMPLES)]
        pool = F.avg_pool2d if len(sides) == 2 else F.avg_pool3d
        pieces = [(one + pool(one, 3, 1, 1, count_include_pad=False)) / 2 for one in noise]
    return Subject(
        model.name,
        network,
        {"image": shape},
        {"image": f"grey levels in [0, 1], as 'freqseg spectral' makes them: {json.dumps(asdict(model.input))}"},
        ("logits",),
        lambda logits: logits[0].argmax(0),
        tuple(one.name for one in model.classes),
        tuple((piece,) for piece in pieces),
        "random images" if made_up else f"{len(pieces)} pieces of {len(images)} images",
    )


def text_guided_subject(
    name_or_folder: str | Path = TEXT_GUIDED, images: Sequence[Path] = (), prompts: Sequence[str] = ()
) -> Subject:
    """The text-guided model from a prompt's vector and the image tower's embedding to logits and presence.

    Comparing on images takes the weights of LiteMedSAM and MiniLM too.
    """
    folder = Path(name_or_folder)
    if not (folder / TEXT_GUIDED_FILE).is_file():
        folder = weights.require(str(name_or_folder))
    model = DualStreamModel.load(folder / TEXT_GUIDED_FILE)
    if bool(images) != bool(prompts):
        raise SettingsError("to compare on images, give both images and prompts (--image, --prompt)")
    pieces = _asked_of(images, prompts) if images else _made_up(model)
    return Subject(
        TEXT_GUIDED,
        TextGuided(model),
        {name: tuple(tensor.shape) for name, tensor in zip(("embedding", "image", "text"), pieces[0], strict=True)},
        {
            "embedding": "of LiteMedSAM's image tower",
            "image": "the picture that the tower saw, in [0, 1]",
            "text": "a sentence as MiniLM's unit vector",
        },
        ("logits", "presence"),
        lambda logits: (logits[0, 0] > 0).long(),
        ("target",),
        tuple(pieces),
        f"{len(pieces)} slices with prompts" if images else "random numbers",
    )


class TextGuided(nn.Module):
    """The dual-stream model with plain tensors in and out: logits (1, 1, 256, 256) and presence logit (1)."""

    def __init__(self, model: DualStreamModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(embedding, image, text)
        return output.logits, output.presence


class FixedFilter(nn.Module):
    """A :class:`SpectralGating` whose filter is written out: the same numbers by direct convolution.

    Formats for other runtimes have no Fourier transform, or a slow one.
    """

    kernel: Tensor
    bias: Tensor

    def __init__(self, gating: SpectralGating) -> None:
        super().__init__()
        axes = tuple(range(-gating.dimensions, 0))
        self.register_buffer("kernel", gating.response().detach().flip(axes)[:, None].contiguous())
        # the exporter to ONNX makes a bias of its own where there is none, in 3D of a wrong size
        self.register_buffer("bias", torch.zeros(len(self.kernel)))
        before, after = gating.filter_size - 1 - gating.filter_size // 2, gating.filter_size // 2
        self.padding = (before, after) * gating.dimensions
        self.dimensions = gating.dimensions

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *size) to the same shape."""
        convolve = F.conv2d if self.dimensions == 2 else F.conv3d
        return convolve(F.pad(x, self.padding, mode="replicate"), self.kernel, self.bias, groups=x.shape[1])


def fixed(network: nn.Module) -> nn.Module:
    """A copy for use only, with nothing in it that other runtimes lack."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SpectralGating):
                setattr(parent, name, FixedFilter(child))
    return network


def compared(subject: Subject, run: Run, kind: Format, path: Path) -> Exported:
    """What a file gives against what the network gives, on every example."""
    difference, largest, same, pixels = 0.0, 0.0, 0, 0
    overlaps = []
    for piece in subject.pieces:
        wanted, found = _tuple(subject.network(*piece)), run(*piece)
        for one, other in zip(wanted, found, strict=True):
            difference = max(difference, float((one - other).abs().max()))
            largest = max(largest, float(one.abs().max()))
        mine, theirs = subject.labels(wanted[0]), subject.labels(found[0])
        same, pixels = same + int((mine == theirs).sum()), pixels + mine.numel()
        for label in range(1, len(subject.classes) + 1):
            both = int((mine == label).sum()) + int((theirs == label).sum())
            if both:
                overlaps.append(2 * int(((mine == label) & (theirs == label)).sum()) / both)
    return Exported(
        kind,
        path.name,
        path.stat().st_size / 1e6,
        difference,
        largest,
        same / pixels,
        float(np.mean(overlaps)) if overlaps else None,
    )


def _written(kind: Format, program: Any, example: tuple[Tensor, ...], float_onnx: Path, path: Path) -> Run:
    """Write one format; how to run what was written, loaded from its file."""
    if kind == "torchscript":
        # what was read has fixed sizes already, so that tracing meets no Python that depends on them
        torch.jit.trace(program.module(check_guards=False), example, check_trace=False).save(str(path))
        script = torch.jit.load(str(path))
        return lambda *tensors: _tuple(script(*tensors))
    if kind == "torch-export":
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        return lambda *tensors: _tuple(loaded(*tensors))
    if kind == "onnx":
        path.write_bytes(float_onnx.read_bytes())
    else:
        _quantise(float_onnx, path)
    return _onnx_runner(path)


def _write_onnx(program: Any, subject: Subject, path: Path) -> None:
    from onnxscript import optimizer

    # the exporter's own optimisation takes minutes for a scan's many small steps; runtimes do theirs on loading
    made = torch.onnx.export(
        program,
        input_names=list(subject.inputs),
        output_names=list(subject.outputs),
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert made is not None
    optimizer.fold_constants(made.model)
    optimizer.remove_unused_nodes(made.model)
    made.model.metadata_props.clear()
    for node in made.model.graph:
        node.metadata_props.clear()
    content = made.model_proto
    # shapes of what was folded are stale, and quantisation reads them
    del content.graph.value_info[:]
    path.write_bytes(content.SerializeToString())


def _quantise(source: Path, path: Path) -> None:
    """8-bit weights in the linear layers; what flows through them is rounded to 8 bits as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    linear = ["MatMul", "Gemm"]
    quantize_dynamic(source, path, op_types_to_quantize=linear, per_channel=True, weight_type=QuantType.QInt8)


def _onnx_runner(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = {name: tensor.contiguous().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return tuple(torch.from_numpy(np.asarray(found)) for found in session.run(None, values))

    return run


def _require_equal(result: Exported) -> None:
    allowed = TOLERANCE * max(1.0, result.largest_number)
    if not result.largest_difference <= allowed:
        raise OutputError(
            f"{result.file} would give other numbers than the network (by up to {result.largest_difference:.3g}, "
            f"allowed are {allowed:.3g}), so it was not written. Try another format, and report this."
        )


def _require_packages(formats: Sequence[Format]) -> None:
    if not {"onnx", "int8"} & set(formats):
        return
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise DeviceError(
            f"ONNX needs the packages {', '.join(missing)}, which are not installed; run 'pip install freqseg[export]' "
            "or choose torchscript or torch-export"
        )


def _report(subject: Subject, done: Sequence[Exported]) -> dict[str, Any]:
    return {
        "model": subject.name,
        "inputs": [
            {"name": name, "shape": list(shape), "type": "float32", "holds": subject.about[name]}
            for name, shape in subject.inputs.items()
        ],
        "outputs": list(subject.outputs),
        "classes": list(subject.classes),
        "compared_on": subject.pieces_are,
        "torch": torch.__version__,
        "files": [asdict(one) for one in done],
    }


def _slices_of(volume: Volume, config: InputConfig, sides: tuple[int, ...]) -> list[Tensor]:
    """Example inputs out of an image: slices from its middle half, or the middle of the volume."""
    if config.form == "volume":
        return [_fitted(VolumeInput.of(volume, config).image(), sides)]
    slices = SliceInput.of(volume, config)
    return [_fitted(slices.images([index]), sides) for index in _spread(slices.stack.count)]


def _spread(count: int) -> list[int]:
    """Numbers of at most EXAMPLES slices of the middle half."""
    chosen = np.linspace(count // 4, max(count // 4, (3 * count - 1) // 4), min(EXAMPLES, count))
    return sorted({round(float(index)) for index in chosen})


def _fitted(image: Tensor, sides: tuple[int, ...]) -> Tensor:
    """(1, 1, *size) cropped about its middle, or padded with its border, to the sides."""
    for axis, side in enumerate(sides, start=2):
        extra = image.shape[axis] - side
        if extra > 0:
            image = image.narrow(axis, extra // 2, side)
    short = [side - found for side, found in zip(sides, image.shape[2:], strict=True)]
    if any(short):
        image = F.pad(image, [n for amount in reversed(short) for n in (0, amount)], mode="replicate")
    return image.contiguous()


def _made_up(model: DualStreamModel) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    channels, text = model.config.embedding_channels, model.config.text_dim
    scale, offset = model.channel_std, model.channel_mean
    pieces: list[tuple[Tensor, ...]] = []
    for _ in range(EXAMPLES // 2):
        embedding = torch.randn(1, channels, 4 * BOTTLENECK_SIDE, 4 * BOTTLENECK_SIDE, generator=generator)
        image = torch.rand(1, 1, FRAME_SIDE, FRAME_SIDE, generator=generator)
        said = F.normalize(torch.randn(1, text, generator=generator), dim=1)
        pieces.append((embedding * scale + offset, image, said))
    return pieces


def _asked_of(images: Sequence[Path], prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
    """Every prompt of some slices of every image."""
    from FreqSegLib.clip.mini_lm import MiniLM
    from FreqSegLib.sam.lite_medsam import LiteMedSAM

    tower = LiteMedSAM.from_checkpoint(weights.require("litemedsam") / "lite_medsam.pth", torch.device("cpu"))
    said = MiniLM(weights.require("minilm"), torch.device("cpu")).encode(list(prompts)).float()
    pieces: list[tuple[Tensor, ...]] = []
    for path in images:
        slices = SliceInput.of(Volume.read(path), InputConfig(side=FRAME_SIDE))
        for index in _spread(slices.stack.count):
            image = slices.images([index])
            with torch.inference_mode():
                embedding = tower.embed(image.expand(-1, 3, -1, -1), slices.frame.valid)
            pieces += [(embedding.clone(), image, vector[None].clone()) for vector in said]
    if not pieces:
        raise InputError("the images hold no slices to compare on")
    return pieces


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


@contextmanager
def quiet() -> Iterator[None]:
    """torch announces the end of TorchScript, and exporters tell every step: not the user's business here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
