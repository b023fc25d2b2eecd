"""The README's pictures: ``make pictures``. The demo's, and the median case of a real test set beside its truth."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from FreqSegLib import TextSegmenter, Volume
from FreqSegLib.evaluation.cases import default_data_folder
from FreqSegLib.sheet import overview_figure, png

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "Resources" / "Screenshots"
EVALUATION = ROOT / "build" / "evaluation_cases.csv"


def main() -> int:
    PICTURES.mkdir(parents=True, exist_ok=True)
    demo = ROOT / "freqseg-demo"
    if not (demo / "demo.png").exists():
        subprocess.run([sys.executable, "-m", "FreqSegLib", "demo", "-o", str(demo)], check=True)
    (PICTURES / "demo.png").write_bytes((demo / "demo.png").read_bytes())
    name, dice = _median_case("lungs")
    folder = default_data_folder() / "segmentation" / "cxr_lungs" / "test"
    volume = Volume.read(folder / "images" / f"{name}.png")
    segmenter = TextSegmenter.from_preset("lite")
    segmenter.set_volume(volume)
    result = segmenter.segment(["lungs"], return_intermediate=True)[0]
    figure = overview_figure(
        result,
        truth=Volume.read(folder / "masks" / f"{name}.png").array > 0,
        label="chest X-ray, Montgomery set",
        facts=f"DSC {dice:.2f}, the median of the test set",
        note="Real image: US National Library of Medicine",
    )
    (PICTURES / "real_lungs.png").write_bytes(png(figure))
    print(f"{name}: DSC {dice:.3f}")
    return 0


def _median_case(target: str) -> tuple[str, float]:
    """The case whose DSC is the middle one, and that DSC, from what ``make evaluate`` wrote."""
    if not EVALUATION.exists():
        raise SystemExit(f"{EVALUATION} is missing; run: make evaluate")
    with EVALUATION.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["prompt"] == target and row["dsc"]]
    rows.sort(key=lambda row: float(row["dsc"]))
    middle = rows[len(rows) // 2]
    return middle["group"].rpartition("/")[2], float(middle["dsc"])


if __name__ == "__main__":
    raise SystemExit(main())
