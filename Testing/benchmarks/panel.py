"""The panel at 256 x 256 x 150: how long the window waits, and the way from volume node to segment and back.

The models' time is left out: a client that answers from files it made before stands for the worker. It runs in a
process of its own, since the tests' stand-in of Slicer takes Qt and the scene over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from Testing.benchmarks.measuring import Section

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (150, 256, 256)


def measure() -> dict[str, float]:
    """Run the measurement in another process.

    Returns:
        ``worst_gap``: the longest the event loop was kept waiting during an Apply. ``round_trip``: node to worker's
        files to node. ``panel_opens``: from loading the module. All in s.
    """
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--here"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def panel_time(repeats: int = 3) -> Section:
    """The panel's own part of an Apply, worst of the repeats."""
    from Testing.benchmarks.measuring import Section

    section = Section("The panel, 256 x 256 x 150 voxels, without the models' time")
    runs = [measure() for _ in range(repeats)]
    section.table(
        ("run", "longest wait of the event loop, ms", "node to segment, s", "panel opens, s"),
        [
            (str(number), f"{run['worst_gap'] * 1e3:.0f}", f"{run['round_trip']:.2f}", f"{run['panel_opens']:.2f}")
            for number, run in enumerate(runs, start=1)
        ],
    )
    section.goal("longest wait over 50 ms", max(run["worst_gap"] for run in runs) / 0.05, 1.0, at_least=False)
    section.goal("node to segment over 1 s", max(run["round_trip"] for run in runs), 1.0, at_least=False)
    section.goal("panel opens over 1 s", max(run["panel_opens"] for run in runs), 1.0, at_least=False)
    return section


def _measure_here() -> dict[str, float]:
    sys.path[:0] = [str(ROOT / "Testing" / "slicer"), str(ROOT / "FreqSeg"), str(ROOT)]
    import time

    import numpy as np
    from stand_in import Application

    app = Application.start()
    import slicer
    from fake_client import FakeClient

    array = np.random.default_rng(0).integers(0, 100, SHAPE).astype(np.int16)
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[40:110, 60:190, 50:200] = 1

    class Prepared(FakeClient):
        """Answers from files made before, so that nothing but the panel's own work is measured."""

        def __init__(self) -> None:
            super().__init__(patience=1)
            self.answer = self._found("ready", "brain tumour", mask, False)

        def _set_volume(self, number: str, volume: dict[str, Any], **rest: Any) -> dict[str, Any]:
            return {"volume_id": "1", "axis": "axial", "array_axis": 0, "warnings": [], "ran": [], "slices": SHAPE[0]}

        def _segment(self, number: str, **values: Any) -> dict[str, Any]:
            return {"segments": [self.answer], "warnings": [], "ran": []}

        def export(self, voxels: Any) -> Any:
            from FreqSegLib.worker_client import ArrayExport

            self._count += 1
            return ArrayExport(voxels, self.folder / f"export-{self._count}.raw")

    client = Prepared()
    try:
        started = time.perf_counter()
        app.load_module(ROOT / "FreqSeg" / "FreqSeg.py", enter=False)
        module = sys.modules["FreqSeg"]
        module._client_of_the_user = lambda: client
        slicer.util.selectModule("FreqSeg")
        app.process()
        opened = time.perf_counter() - started
        panel = slicer.util.getModuleWidget("FreqSeg")
        panel.packages._missing = list
        slicer.util.addVolumeFromArray(array, name="FLAIR")
        app.process(0.5)
        panel.ui.promptsTable.cellWidget(0, 0).setEditText("brain tumour")
        app.process(0.5)
        with app.heartbeat() as beat:
            started = time.perf_counter()
            panel.ui.applyButton.click()
            app.wait_until(lambda: not panel.busy, 60)
            passed = time.perf_counter() - started
            app.process(0.2)
        if panel.segmentation is None:
            raise SystemExit(panel.ui.statusLabel.text)
        return {"worst_gap": beat.worst_gap, "round_trip": passed, "panel_opens": opened}
    finally:
        client.close()


if __name__ == "__main__":
    print(json.dumps(_measure_here() if "--here" in sys.argv else measure()), flush=True)
    # views and scene are not worth taking down here
    os._exit(0)
