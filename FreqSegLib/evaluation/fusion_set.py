"""Every fusion method on whole patients that no network has seen, in one run: the tables, and the claims to settle."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from FreqSegLib.evaluation import fusion_metrics as metrics
from FreqSegLib.evaluation.fusion_comparison import OVERSHOOT, number
from FreqSegLib.evaluation.fusion_metrics import METRICS
from FreqSegLib.progress import CancelCallback, ProgressCallback, Stage

if TYPE_CHECKING:
    from FreqSegLib.fusion import FusionMethod
    from FreqSegLib.training.fusion_data import Pairs

COUNTED = ("EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM")
"""The metrics a win is counted in."""
CDDFUSE = {
    "EN": 4.88,
    "SD": 79.17,
    "SF": 38.14,
    "MI": 2.61,
    "SCD": 1.41,
    "VIF": 0.61,
    "Qabf": 0.68,
    "SSIM": 1.34,
}
"""As published for its 21 pairs of the same atlas (Zhao et al., 2023), other slices than those measured here."""
NETWORKS = ("single-scale", "multi-scale")


@dataclass(frozen=True)
class SliceRow:
    """One slice by one method: ``values`` as ``fusion_table`` and overshoot, ``published`` as CDDFuse's evaluator."""

    name: str
    method: str
    values: Mapping[str, float]
    published: Mapping[str, float]


@dataclass(frozen=True)
class SetResult:
    """What ``evaluate_pairs`` found.

    Attributes:
        rows: a slice and method each.
        ceilings: means over the slices by metric, None where the pairs set none.
        seconds: median time of one pair by method, one at a time.
        shares: mean CT share by network and band.
        energy: share of the low band's energy in one haar level, for CT and MR.
        parameters: of each network.
    """

    rows: tuple[SliceRow, ...]
    ceilings: Mapping[str, float | None]
    seconds: Mapping[str, float]
    shares: Mapping[str, Mapping[str, float]]
    energy: Mapping[str, float]
    parameters: Mapping[str, int]

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order they were measured."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def slices(self) -> int:
        """How many were measured."""
        return len({row.name for row in self.rows})

    def mean(self, method: str, key: str, *, published: bool = False) -> float:
        """Mean over the slices; NaN counts nowhere."""
        rows = [row.published if published else row.values for row in self.rows if row.method == method]
        known = [row[key] for row in rows if not np.isnan(row[key])]
        return float(np.mean(known)) if known else float("nan")

    def wins(self, method: str, baseline: str, *, published: bool = False) -> list[str]:
        """The counted metrics in which a method's mean is higher."""
        return [
            key
            for key in COUNTED
            if self.mean(method, key, published=published) > self.mean(baseline, key, published=published)
        ]


def evaluate_pairs(
    pairs: Pairs,
    methods: Mapping[str, FusionMethod],
    *,
    progress: ProgressCallback | None = None,
    cancel: CancelCallback | None = None,
) -> SetResult:
    """Every method on every slice.

    Args:
        pairs: registered slices.
        methods: by name, in the order of the tables.
        progress: told how many slices are done.
        cancel: asked between slices.

    Returns:
        Values of whole grey levels, as images store them; overshoot of the values before rounding and clipping.

    Raises:
        Cancelled: ``cancel`` said so.
    """
    import torch

    rows: list[SliceRow] = []
    limits: dict[str, list[float | None]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    shares: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    stage = Stage("Measuring", len(pairs), progress, cancel)
    with torch.inference_mode():
        for method in methods.values():
            method(pairs.ct[:1], pairs.mr[:1])
        for index, name in enumerate(pairs.names):
            tensors = pairs.ct[index : index + 1], pairs.mr[index : index + 1]
            ct, mr = (255.0 * one[0, 0].double().numpy() for one in tensors)
            for label, method in methods.items():
                started = time.perf_counter()
                found = method(*tensors)
                seconds[label].append(time.perf_counter() - started)
                exact = 255.0 * found.image[0, 0].double().numpy()
                whole = np.clip(np.rint(exact), 0, 255)
                values = {**metrics.fusion_table(whole, ct, mr), OVERSHOOT: metrics.edge_overshoot(exact, ct, mr)}
                rows.append(SliceRow(name, label, values, metrics.published_table(whole, ct, mr)))
                _add_shares(shares[label], found.names, found.masks)
            for key, limit in metrics.ceilings(ct, mr).items():
                limits.setdefault(key, []).append(limit.value)
            stage.advance(index + 1)
    return SetResult(
        rows=tuple(rows),
        ceilings={key: _mean_or_none(values) for key, values in limits.items()},
        seconds={name: median(values) for name, values in seconds.items()},
        shares={
            name: {band: float(np.mean(values)) for band, values in bands.items()} for name, bands in shares.items()
        },
        energy={"CT": _low_energy(pairs.ct), "MR": _low_energy(pairs.mr)},
        parameters={
            name: sum(parameter.numel() for parameter in method.parameters())
            for name, method in methods.items()
            if isinstance(method, torch.nn.Module)
        },
    )


def markdown(result: SetResult, title: str, notes: Sequence[str] = ()) -> str:
    """The tables of a run: every metric, published rows beside, wins, and the claims that came with the methods."""
    methods = result.methods
    lines = [f"# {title}", "", f"Means over {result.slices} slices. **Bold**: the best of the column.", ""]
    keys = [metric.key for metric in METRICS]
    lines += _table(
        ["method", *(_heading(metric) for metric in METRICS), "overshoot ↓", "ms a pair"],
        [
            [
                name,
                *(_bold(result, name, metric.key, metric.better) for metric in METRICS),
                _bold(result, name, OVERSHOOT, -1),
                f"{1000 * result.seconds[name]:.1f}",
            ]
            for name in methods
        ]
        + [["*ceiling of the pairs*", *(number(result.ceilings.get(key)) for key in keys), "0", ""]],
    )
    lines += [
        "",
        "MI, VIF and SCD are sums over both sources, CC, FMI and SSIM means; MI in bits; PSNR of the error averaged "
        "over both sources, whose ceiling is the plain average. Overshoot: mean grey levels outside the sources' range "
        "beside the CT's bone edges, before clipping.",
        "",
        "## As published rows count",
        "",
        "MI in nats, VIF and SSIM summed over the sources, SSIM with a data range of 2 on 0-255 data. CDDFuse's row is "
        "the published one, for 21 other slices of the same atlas: near, not the same test.",
        "",
    ]
    lines += _table(
        ["method", *COUNTED],
        [[name, *(number(result.mean(name, key, published=True)) for key in COUNTED)] for name in methods]
        + [["*CDDFuse, published elsewhere*", *(number(CDDFUSE[key]) for key in COUNTED)]],
    )
    networks = [name for name in NETWORKS if name in methods]
    if networks:
        lines += ["", "## Wins", "", f"Of {', '.join(COUNTED)}: where the network's mean is higher.", ""]
        lines += _table(
            ["against", *networks],
            [
                [name, *(_won(result, network, name) for network in networks)]
                for name in methods
                if name not in networks
            ],
        )
        changed = [
            f"{network} against {name}"
            for network in networks
            for name in methods
            if name not in networks
            and ("SSIM" in result.wins(network, name)) != ("SSIM" in result.wins(network, name, published=True))
        ]
        if changed:
            lines += ["", f"With SSIM as published rows count it, its outcome changes for: {'; '.join(changed)}."]
    lines += ["", *_claims(result, networks)]
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def slices_csv(result: SetResult) -> str:
    """A line a slice and method, numbers in full."""
    keys = list(result.rows[0].values)
    published = [f"published_{key}" for key in result.rows[0].published]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slice", "method", *keys, *published])
    for row in result.rows:
        numbers = [*row.values.values(), *row.published.values()]
        writer.writerow([row.name, row.method, *("" if np.isnan(value) else repr(float(value)) for value in numbers)])
    return text.getvalue()


def _claims(result: SetResult, networks: Sequence[str]) -> list[str]:
    """What was claimed for these methods on data of its own, beside what is measured here by the same definitions."""
    # definitions as the claims have them: SSIM, MI and PSNR (in dB) averaged over both sources
    claimed: dict[str, tuple[str, str, str, str, str]] = {
        "single-scale (claimed)": ("0.584", "18.03", "0.920", "1.743", "5.342"),
        "traditional wavelet (claimed)": ("0.612", "–", "0.947", "–", "–"),
        "ResNet fusion (claimed, not reproduced)": ("0.607", "–", "0.952", "–", "–"),
        "multi-scale (expected)": ("0.82-0.88", "22-26", "0.95-0.98", "–", "–"),
    }

    def measured(name: str) -> list[str]:
        decibels = (result.mean(name, "PSNR_CT") + result.mean(name, "PSNR_MR")) / 2
        return [
            number(result.mean(name, "SSIM")),
            f"{number(decibels)} ({number(result.mean(name, 'PSNR'))})",
            number(result.mean(name, "EP")),
            number(result.mean(name, "MI") / 2),
            number(result.mean(name, "EN")),
        ]

    shown = [*networks, *(name for name in result.methods if name.startswith("choose-max")), "average"]
    ceiling = result.ceilings
    lines = [
        "## Claims that came with these networks, and what is measured",
        "",
        "The claims were made on other data, which is not public. Measured by their definitions: SSIM, MI and PSNR "
        "averaged over both sources. In brackets the PSNR of the averaged error, the one that has a ceiling: the mean "
        "of two decibels can be raised without end by copying one source.",
        "",
        *_table(
            ["", "SSIM", "PSNR dB", "edge preservation", "MI bits", "EN bits"],
            [[name, *values] for name, values in claimed.items()]
            + [[f"{name}, measured", *measured(name)] for name in shown if name in result.methods]
            + [
                [
                    "*ceiling of the pairs*",
                    number(ceiling["SSIM"]),
                    f"({number(ceiling['PSNR'])})",
                    "1",
                    number(None if ceiling["MI"] is None else ceiling["MI"] / 2),
                    "8",
                ]
            ],
        ),
        "",
        f"- Energy of the low band in one haar level, claimed about 85 %: {100 * result.energy['CT']:.1f} % for CT, "
        f"{100 * result.energy['MR']:.1f} % for MR.",
    ]
    for name in networks:
        bands = ", ".join(f"{band} {100 * share:.0f} %" for band, share in result.shares[name].items())
        claim = "; claimed LL 45, LH 60, HL 40, HH 50 %" if name == "single-scale" else ""
        lines.append(f"- Mean CT share of the {name} network's masks: {bands}{claim}.")
        count = result.parameters.get(name)
        if count is not None:
            claim = ", claimed 2 million" if name == "single-scale" else ""
            lines.append(f"- Parameters of the {name} network: {count:,}{claim}.")
        claim = ", claimed 30 ms on a GPU" if name == "single-scale" else ""
        size = "one pair at a time, on the device of this run"
        lines.append(f"- Time of the {name} network: {1000 * result.seconds[name]:.1f} ms a pair, {size}{claim}.")
    return lines


def _add_shares(into: dict[str, list[float]], names: Sequence[str], masks: Sequence[object]) -> None:
    import torch

    from FreqSegLib.volume_fusion import band_names

    for name, mask in zip(names, masks, strict=True):
        assert isinstance(mask, torch.Tensor)
        for band, values in zip(band_names(name, mask.shape[1]), mask[0], strict=True):
            into.setdefault(band, []).append(float(values.mean()))


def _low_energy(images: object) -> float:
    """Share of the low band in the energy of one orthonormal haar level, over all images together."""
    import torch

    from FreqSegLib.wavelet import dwt2

    assert isinstance(images, torch.Tensor)
    bands = dwt2(images.double(), "haar", 1, "symmetric")
    low, high = float((bands.yl**2).sum()), float((bands.yh[0] ** 2).sum())
    return low / (low + high)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _heading(metric: metrics.Metric) -> str:
    return metric.key if metric.better > 0 else f"{metric.key} ↓"


def _bold(result: SetResult, method: str, key: str, better: int) -> str:
    means = {name: better * result.mean(name, key) for name in result.methods}
    text = number(result.mean(method, key))
    return f"**{text}**" if means[method] >= max(means.values()) - 1e-5 else text


def _won(result: SetResult, network: str, baseline: str) -> str:
    won = result.wins(network, baseline)
    lost = [key for key in COUNTED if key not in won]
    return f"{len(won)} of {len(COUNTED)}" + (f" (not {', '.join(lost)})" if lost else "")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]
