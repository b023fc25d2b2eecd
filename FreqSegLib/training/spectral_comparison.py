"""Several networks trained alike on one configuration, and measured alike on its test images.

Data, augmentation, loss, epochs, seeds, checkpoint choice and the way into and out of the network are those of
:mod:`FreqSegLib.training.spectral_recipe` for every one of them; only the network differs. Widths are chosen so that
the parameters come as close as each architecture allows to those of the configuration's SpectralVMUNet.
"""

from __future__ import annotations

import csv
import difflib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.evaluation.paired import paired_test
from FreqSegLib.mamba.model_config import ModelConfig, from_mapping, read_config
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.training.spectral_config import SpectralRecipe
from FreqSegLib.training.spectral_data import Pair, find_pairs, split
from FreqSegLib.training.spectral_recipe import SpectralTraining, build_network
from FreqSegLib.training.spectral_test import DIGITS, METRICS, choose_smallest_part, scored, spread
from FreqSegLib.training.unet_peer import UNetPeer

# of a configuration: what changes nothing in its networks
WORDS = ("name", "description", "licence")
OWN = "SpectralVMUNet"
ABLATIONS = {
    "no spectral path": (False, True),
    "no frequency loss": (True, False),
    "neither": (False, False),
}
"""Of our network: with the spectral path, with the frequency loss."""
PEERS = ("UNet", "SegResNet", "SwinUNETR")


class AnySize(nn.Module):
    """A network that halves its input several times, for images of any size: padded to whole steps, cropped again.

    Args:
        network: logits of images (b, c, *size) whose sides are multiples of ``multiple``.
        multiple: of every side.
        dimensions: 2 or 3.
    """

    dropout = 0.0

    def __init__(self, network: nn.Module, multiple: int, dimensions: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple
        self.patch_size = (1,) * dimensions

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *size) to (b, classes, *size)."""
        size = x.shape[2:]
        amounts = [value for side in reversed(size) for value in (0, -side % self.multiple)]
        if any(amounts):
            x = F.pad(x, amounts, mode="replicate")
        y = self.network(x)
        for axis, side in enumerate(size, start=2):
            y = y.narrow(axis, 0, side)
        return y


def build(name: str, recipe: SpectralRecipe) -> nn.Module:
    """A network of :data:`OWN`, :data:`ABLATIONS` or :data:`PEERS` for a recipe, at its start.

    Raises:
        SettingsError: there is no such network.
    """
    _check_name(name)
    if name == OWN:
        return build_network(recipe)
    if name in ABLATIONS:
        return build_network(ablated(recipe, name))
    makers: dict[str, tuple[Callable[[ModelConfig, int], nn.Module], Sequence[int]]] = {
        "UNet": (_unet, range(4, 129, 2)),
        "SegResNet": (_segresnet, range(4, 65, 2)),
        "SwinUNETR": (_swin, range(12, 49, 12)),
    }
    make, widths = makers[name]
    wanted = count_parameters(build_network(recipe))
    # on the meta device only shapes are made, no weights; SwinUNETR computes its rates while it is built
    with torch.device("cpu" if name == "SwinUNETR" else "meta"):
        sizes = {width: count_parameters(make(recipe.model, width)) for width in widths}
    closest = min(widths, key=lambda width: abs(sizes[width] - wanted))
    torch.manual_seed(recipe.training.seed)
    return make(recipe.model, closest)


def _check_name(name: str) -> None:
    there = (OWN, *ABLATIONS, *PEERS)
    if name not in there:
        near = difflib.get_close_matches(name, there, 1, cutoff=0.5)
        offered = f"; did you mean {near[0]!r}?" if near else "."
        raise SettingsError(f"there is no network {name!r}{offered} There are {', '.join(there)}")


def ablated(recipe: SpectralRecipe, name: str) -> SpectralRecipe:
    """The recipe without what ``name`` leaves out; any other name changes nothing."""
    path, loss = ABLATIONS.get(name, (True, True))
    weight = recipe.loss.freq_weight if loss else 0.0
    return replace(
        recipe,
        model=replace(recipe.model, spectral=path and recipe.model.spectral),
        loss=replace(recipe.loss, freq_weight=weight),
    )


def count_parameters(network: nn.Module) -> int:
    """All of them."""
    return sum(value.numel() for value in network.parameters())


def _unet(model: ModelConfig, width: int) -> nn.Module:
    widths = [width * 2**stage for stage in range(4)]
    net = UNetPeer(model.dimensions, model.in_channels, model.out_channels, widths, dropout=model.dropout)
    return AnySize(net, 8, model.dimensions)


def _segresnet(model: ModelConfig, width: int) -> nn.Module:
    from monai.networks.nets import SegResNet

    net = SegResNet(
        spatial_dims=model.dimensions,
        init_filters=width,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        norm="INSTANCE",
        dropout_prob=model.dropout,
    )
    return AnySize(net, 8, model.dimensions)


def _swin(model: ModelConfig, width: int) -> nn.Module:
    if importlib.util.find_spec("einops") is None:
        raise SettingsError("MONAI's SwinUNETR needs the package einops; run 'pip install einops', or leave it out")
    from monai.networks.nets import SwinUNETR

    net = SwinUNETR(
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        feature_size=width,
        spatial_dims=model.dimensions,
        drop_rate=model.dropout,
    )
    return AnySize(net, 32, model.dimensions)


def compare(
    config: Path,
    work: Path,
    *,
    data: Path | None = None,
    networks: Sequence[str] = (OWN, "UNet", "SegResNet"),
    seeds: Sequence[int] = (0,),
    noise: Sequence[float] = (),
    drop_parts: bool = False,
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train and measure every network with every seed; runs that are finished are read, a stopped one goes on.

    Args:
        config: a :class:`SpectralRecipe` with test folders.
        work: a folder for each run, with its log, curves and ``test.json``.
        data: what relative folders are relative to; the configuration's own folder if None.
        networks: of :func:`build`.
        seeds: of start, batches and augmentation; the split stays.
        noise: standard deviations of noise added to the test images, grey levels in [0, 1], besides none at all.
        drop_parts: choose for every network on the validation cases under which share of its largest a connected part
            of a class is dropped, as ``train-spectral`` does.
        device: to compute on.
        report: where lines of progress go.

    Returns:
        A run a row: network, seed, parameters, seconds, steps, validation score, and test scores by noise.

    Raises:
        SettingsError: an unknown network, or a configuration without test folders.
        InputError: images or labels are missing or unusable.
    """
    recipe = read_config(config, SpectralRecipe)
    place = data or config.parent
    if not recipe.data.test_images:
        raise SettingsError(f"{config} names no test_images and test_labels under data, so nothing could be measured")
    for name in networks:
        _check_name(name)
    networks, seeds = list(dict.fromkeys(networks)), list(dict.fromkeys(seeds))
    if any(not level > 0 for level in noise):
        raise SettingsError(f"noise must be above 0, got {min(noise)}")
    pairs = find_pairs(recipe.data, place, test=True)
    rows = []
    for seed in seeds:
        for name in networks:
            own = replace(ablated(recipe, name), training=replace(recipe.training, seed=seed))
            folder = work / recipe.name / f"{name.replace(' ', '-')}-seed{seed}"
            levels = (0.0, *noise)
            rows.append(
                _run(name, own, place, folder, pairs, levels, drop_parts, device or torch.device("cpu"), report)
            )
    return rows


def _run(
    name: str,
    recipe: SpectralRecipe,
    data: Path,
    folder: Path,
    pairs: Sequence[Pair],
    levels: Sequence[float],
    drop_parts: bool,
    device: torch.device,
    report: Callable[[str], None],
) -> dict[str, Any]:
    done = folder / "test.json"
    # as it will be read again
    about = json.loads(json.dumps({"recipe": asdict(recipe), "network": name, "noise": list(levels[1:])}))
    if drop_parts:
        about["drop_parts"] = True
    if done.exists():
        kept: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        if _deciding(kept["about"]) != _deciding(about):
            raise SettingsError(f"{folder} holds a run of another configuration; take it away, or give another folder")
        return kept
    torch.manual_seed(recipe.training.seed)
    run = SpectralTraining(recipe, data, folder, device, network=build(name, recipe))
    report(f"{name}, seed {recipe.training.seed}: {run.described()}")
    best = run.fit(lambda line: report(f"{name}: {line}"))
    row: dict[str, Any] = {
        "about": about,
        "network": name,
        "seed": recipe.training.seed,
        "parameters": count_parameters(run.network),
        "seconds": best["seconds"],
        "steps": best["step"],
        "validation": best["score"],
        "test": {},
    }
    # every network here has what a segmenter asks of one: patch_size and dropout
    segmenter = SpectralSegmenter(cast(SpectralVMUNet, run.network), recipe.described(), device)
    if drop_parts:
        _, validation = split(find_pairs(recipe.data, data), recipe.training.validation_share)
        shares = choose_smallest_part(segmenter, recipe, validation)
        row["smallest_part"], row["validation"] = next(iter(shares.items()))
        segmenter.model = replace(segmenter.model, smallest_part=row["smallest_part"])
        share = row["smallest_part"]
        report(f"{name}: {f'parts under {share:.0%} of the largest are dropped' if share else 'all parts are kept'}")
    started = time.monotonic()
    for level in levels:
        row["test"][f"{level:g}"] = [
            asdict(score) for pair in pairs for score in scored(segmenter, recipe, pair, level)
        ]
    row["test_seconds"] = time.monotonic() - started
    temporary = done.with_name(done.name + ".part")
    temporary.write_text(json.dumps(row, indent=1), encoding="utf-8")
    os.replace(temporary, done)
    return row


def _deciding(about: dict[str, Any]) -> dict[str, Any]:
    """What a run came from, without the words that change nothing in it; keys that came since have their defaults."""
    recipe = asdict(from_mapping(SpectralRecipe, about["recipe"], "test.json"))
    return {**about, "recipe": {key: value for key, value in recipe.items() if key not in WORDS}}


def table(rows: Sequence[dict[str, Any]], noise: str = "0") -> str:
    """Markdown: a network a line, mean ± sd over test images (each the mean of its classes and of the seeds).

    Where more than one seed was run, the sd of the seeds' means follows. The validation score is the one that chose the
    checkpoint, or, where parts are dropped, that of the whole segmenter with its share. The last column tests DSC
    against the first network, image by image.
    """
    names = list(dict.fromkeys(row["network"] for row in rows))
    values = {name: _by_case([row for row in rows if row["network"] == name], noise) for name in names}
    titles = ["network", "parameters", "seeds", "DSC", "NSD", "HD95", "boundary IoU", "validation DSC", "minutes"]
    lines = [
        f"| {' | '.join(titles)} | DSC against the first |",
        f"| --- | {' | '.join(['---:'] * (len(titles) - 1))} | --- |",
    ]
    for name in names:
        own = [row for row in rows if row["network"] == name]
        cells = [_cell(values[name], [_by_case([row], noise) for row in own], metric) for metric in METRICS]
        against = "–"
        if name != names[0]:
            test = paired_test(
                [case["dsc"] for case in values[name].values()], [case["dsc"] for case in values[names[0]].values()]
            )
            gap = test.difference
            against = f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}), p = {test.p:.2g}"
        minutes = np.mean([row["seconds"] for row in own]) / 60
        cells = [f"{own[0]['parameters'] / 1e6:.2f} M", str(len(own)), *cells]
        cells += [f"{np.mean([row['validation'] for row in own]):.3f}", f"{minutes:.0f}", against]
        shares = ", ".join(f"{share:.0%}" for share in sorted({row.get("smallest_part", 0.0) for row in own} - {0.0}))
        parts = f" (parts under {shares} dropped)" if shares else ""
        lines.append(f"| {name}{parts} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Every class of every test image of every run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "seed", "noise", "case", "class", *METRICS])
    for row in rows:
        for noise, scores in row["test"].items():
            for score in scores:
                numbers = [f"{score[metric]:.6g}" for metric in METRICS]
                writer.writerow([row["network"], row["seed"], noise, score["case"], score["label"], *numbers])
    return text.getvalue()


def _by_case(rows: Sequence[dict[str, Any]], noise: str) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        for score in row["test"][noise]:
            found.setdefault(score["case"], []).append(score)
    return {
        case: {metric: float(np.mean([score[metric] for score in found[case]])) for metric in METRICS}
        for case in sorted(found)
    }


def _cell(cases: dict[str, dict[str, float]], seeds: Sequence[dict[str, dict[str, float]]], metric: str) -> str:
    digits = DIGITS[metric]
    text = spread([case[metric] for case in cases.values()], metric)
    if len(seeds) > 1:
        means = [float(np.mean([case[metric] for case in one.values()])) for one in seeds]
        text += f" (seeds ± {np.std(means, ddof=1):.{digits}f})"
    return text
