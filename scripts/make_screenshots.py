"""Screenshots of the panel for README, tutorial and catalogue: ``make screenshots``.

The module's own panel on real MRML, driven as a user would, with the real worker and the ``lite`` preset on the
simulated head in ``Resources/Samples``. The window around it is the tests' stand-in (``Testing/slicer``), not the
Slicer application.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1600, 1000)
FULL_COLOUR = ("spectral.png",)
"""Large enough on the screen for steps between its greys to be seen."""
REAL_CASE = "TCGA_CS_6668"
LESION_CENTRE = (31.0, -13.0, 31.0)
"""RAS in mm, as Resources/Samples/README.md gives it in LPS."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "Resources" / "Screenshots")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--only", choices=("fuse", "models", "real", "spectral"), help="one picture alone")
    parser.add_argument("--spectral-model", default="spectral-hippocampus", help="a model's name or folder")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "Testing" / "slicer"))
    from stand_in import Application

    app = Application.start()
    try:
        pictures = Screenshots(app, chosen.output, chosen.device, chosen.spectral_model)
        if chosen.only:
            getattr(pictures, chosen.only)()
        else:
            pictures.take()
    finally:
        app.stop()


class Screenshots:
    """One session with the panel, and a picture at every stage of it."""

    def __init__(self, app: Any, folder: Path, device: str, spectral_model: str) -> None:
        self.app, self.folder, self.spectral_model = app, folder, spectral_model
        import slicer

        self.slicer = slicer
        self.volume = slicer.util.loadVolume(str(ROOT / "Resources" / "Samples" / "simulated_flair.nrrd"))
        self.volume.SetName("Simulated FLAIR")
        self.panel = app.load_module(ROOT / "FreqSeg" / "FreqSeg.py")
        self.ui = self.panel.ui
        devices = ["auto", "cpu", "cuda"]
        self.ui.deviceComboBox.setCurrentIndex(devices.index(device))

    def take(self) -> None:
        self.thumbnails()
        self.segment()
        self.refine()
        self.look_inside()
        self.fuse()
        self.models()
        self.real()
        self.spectral()

    def segment(self) -> None:
        self.ui.inputVolumeSelector.setCurrentNode(self.volume)
        self.ui.promptsTable.cellWidget(0, 0).setEditText("brain tumour")
        self.ui.uncertaintyCheckBox.setChecked(True)
        self.ui.show3DCheckBox.setChecked(True)
        self.app.process(0.2)
        self.ui.applyButton.click()
        self.wait(lambda: not self.panel.busy)
        if self.panel.segmentation is None:
            raise SystemExit(f"nothing was segmented: {self.ui.statusLabel.text}")
        self.grab("segment.png")

    def refine(self) -> None:
        """A click on the part of the lesion that was missed most."""
        mark = self.missed_voxel()
        self.ui.refineSection.setProperty("collapsed", False)
        self.ui.uncertaintyCheckBox.setChecked(True)
        self.panel.refine.marks("Inside").AddControlPointWorld(*mark)
        self.wait(lambda: self.panel.refine._task is not None and self.panel.refine._task.finished)
        self.grab("refine.png", mark)
        self.ui.clearPointsButton.click()
        self.ui.refineSection.setProperty("collapsed", True)

    def look_inside(self) -> None:
        self.ui.segmentSection.setProperty("collapsed", True)
        self.ui.lookSection.setProperty("collapsed", False)
        for button in (self.ui.frequencyButton, self.ui.saliencyButton, self.ui.uncertaintyButton):
            button.click()
            self.wait(lambda: self.ui.lookLabel.text.startswith("Shown"))
            self.ui.lookLabel.text = ""
        self.ui.sideBySideButton.click()
        display = self.panel.segmentation.GetDisplayNode()
        display.SetVisibility2DFill(False)
        self.grab("look-inside.png", arrange=False)
        display.SetVisibility2DFill(True)
        self.ui.hideLooksButton.click()
        self.ui.lookSection.setProperty("collapsed", True)

    def fuse(self) -> None:
        """The simulated CT and FLAIR beside what they became."""
        util = self.slicer.util
        ct = util.loadVolume(str(ROOT / "Resources" / "Samples" / "simulated_ct.nrrd"), {"show": False})
        ct.SetName("Simulated CT")
        ct.GetDisplayNode().AutoWindowLevelOff()
        ct.GetDisplayNode().SetWindowLevel(80, 40)
        if self.panel.segmentation is not None:
            self.panel.segmentation.GetDisplayNode().SetVisibility2D(False)
        self.ui.segmentSection.setProperty("collapsed", True)
        self.ui.fuseSection.setProperty("collapsed", False)
        self.ui.fuseCTSelector.setCurrentNode(ct)
        self.ui.fuseMRSelector.setCurrentNode(self.volume)
        self.ui.fuseButton.click()
        self.wait(lambda: not self.panel.fuse.busy)
        fused = self.panel.parameters.fuseOutput
        if fused is None:
            raise SystemExit(f"nothing was fused: {self.ui.fuseStatusLabel.text}")
        self.compare([ct, self.volume, fused])
        shown = self.slicer.mrmlScene.GetNodeByID("vtkMRMLSliceNodeYellow")
        shown.SetSliceVisible(True)
        self.grab("fuse.png", arrange=False)
        shown.SetSliceVisible(False)
        if self.panel.segmentation is not None:
            self.panel.segmentation.GetDisplayNode().SetVisibility2D(True)
        self.ui.fuseSection.setProperty("collapsed", True)

    def compare(self, volumes: list[Any]) -> None:
        """The same axial slice of three volumes, one in every slice view."""
        for name, volume in zip(("Red", "Green", "Yellow"), volumes, strict=True):
            composite = self.slicer.mrmlScene.GetNodeByID(f"vtkMRMLSliceCompositeNode{name}")
            composite.SetBackgroundVolumeID(volume.GetID())
            composite.SetForegroundVolumeID(None)
            self.slicer.mrmlScene.GetNodeByID(f"vtkMRMLSliceNode{name}").SetOrientationToAxial()
        self.slicer.util.resetSliceViews()

    def models(self) -> None:
        self.ui.modelsSection.setProperty("collapsed", False)
        self.wait(lambda: self.ui.modelsTable.rowCount > 0 and not self.panel.models.busy)
        self.grab("models.png")

    def real(self) -> None:
        """A FLAIR volume of the test set (TCGA-LGG), where the real images are at hand; not the best of the eight."""
        import numpy as np
        from vtk import vtkMatrix4x4

        sys.path.insert(0, str(ROOT))
        from FreqSegLib.evaluation.cases import default_data_folder

        folder = default_data_folder() / "segmentation" / "lgg_flair" / "test"
        images = sorted(folder.glob(f"{REAL_CASE}*_flair.nii.gz"))
        if not images:
            print(f"no real images in {folder}: real.png stays as it is")
            return
        util = self.slicer.util
        truth_node = util.loadVolume(str(images[0]).replace("_flair.nii", "_mask.nii"), {"show": False})
        middle = np.argwhere(util.arrayFromVolume(truth_node) > 0).mean(axis=0)[::-1]
        to_world = vtkMatrix4x4()
        truth_node.GetIJKToRASMatrix(to_world)
        place = [to_world.MultiplyPoint((*middle, 1.0))[axis] for axis in range(3)]
        self.slicer.mrmlScene.RemoveNode(truth_node)
        for earlier in util.getNodesByClass("vtkMRMLSegmentationNode"):
            earlier.GetDisplayNode().SetVisibility(False)
        self.volume = util.loadVolume(str(images[0]))
        self.volume.SetName(f"FLAIR, {REAL_CASE}")
        for section in (self.ui.modelsSection, self.ui.fuseSection, self.ui.lookSection):
            section.setProperty("collapsed", True)
        self.ui.segmentSection.setProperty("collapsed", False)
        self.ui.inputVolumeSelector.setCurrentNode(self.volume)
        self.ui.promptsTable.cellWidget(0, 0).setEditText("brain tumour")
        self.ui.uncertaintyCheckBox.setChecked(False)
        self.app.process(0.2)
        self.ui.applyButton.click()
        self.wait(lambda: not self.panel.busy)
        self.grab("real.png", place)

    def spectral(self) -> None:
        """A hippocampus of the test set, its two parts and the uncertainty; needs the images and the model."""
        import numpy as np

        sys.path.insert(0, str(ROOT))
        from FreqSegLib.evaluation.cases import default_data_folder

        images = sorted((default_data_folder() / "segmentation" / "hippocampus" / "test" / "images").glob("*.nii.gz"))
        if not images:
            print("no real images: spectral.png stays as it is")
            return
        util = self.slicer.util
        self.volume = util.loadVolume(str(images[0]))
        self.volume.SetName("Hippocampus T1")
        for name in ("segmentSection", "fuseSection", "lookSection", "modelsSection"):
            getattr(self.ui, name).setProperty("collapsed", True)
        self.ui.spectralSection.setProperty("collapsed", False)
        if Path(self.spectral_model).is_dir():
            self.ui.spectralFolderEdit.setCurrentPath(self.spectral_model)
        place = self.ui.spectralModelComboBox.findText(Path(self.spectral_model).name)
        if place < 0:
            print(f"there is no model {self.spectral_model}: spectral.png stays as it is")
            return
        self.ui.spectralModelComboBox.setCurrentIndex(place)
        self.ui.spectralVolumeSelector.setCurrentNode(self.volume)
        self.ui.spectralUncertaintyCheckBox.setChecked(True)
        self.app.process(0.2)
        self.ui.spectralButton.click()
        self.wait(lambda: not self.panel.spectral.busy)
        node = self.panel.parameters.spectralSegmentation
        if node is None:
            raise SystemExit(f"nothing was segmented: {self.ui.spectralStatusLabel.text}")
        node.CreateClosedSurfaceRepresentation()
        found = [
            util.arrayFromSegmentBinaryLabelmap(node, node.GetSegmentation().GetNthSegmentID(index), self.volume) > 0
            for index in range(node.GetSegmentation().GetNumberOfSegments())
        ]
        voxels = np.argwhere(np.any(found, axis=0))
        if not len(voxels):
            raise SystemExit(f"nothing was found: {self.ui.spectralStatusLabel.text}")
        self.grab("spectral.png", self.world_of(voxels.mean(axis=0)[::-1]))
        self.ui.spectralFolderEdit.setCurrentPath("")
        self.ui.spectralSection.setProperty("collapsed", True)

    def world_of(self, ijk: Any) -> list[float]:
        """World position of a voxel of the volume."""
        from FreqSegPanel import geometry

        return list(geometry.ijk_to_world(self.volume, [tuple(ijk)])[0])

    def thumbnails(self) -> None:
        """Pictures of the samples for Slicer's Sample Data module."""
        util = self.slicer.util
        other = util.loadVolume(str(ROOT / "Resources" / "Samples" / "simulated_ct.nrrd"), {"show": False})
        for name, volume in (("FreqSegFLAIR", self.volume), ("FreqSegCT", other)):
            util.setSliceViewerLayers(background=volume, fit=True)
            self.slicer.mrmlScene.GetNodeByID("vtkMRMLSliceNodeRed").JumpSliceByOffsetting(*LESION_CENTRE)
            self.app.grab_slice(ROOT / "FreqSeg" / "Resources" / "Icons" / f"{name}.png", "Red", (260, 280))
        self.slicer.mrmlScene.RemoveNode(other)

    def missed_voxel(self) -> list[float]:
        """World position of the middle of what the result lacks of the true lesion, in the slice that lacks most."""
        import numpy as np
        from FreqSegPanel import geometry

        util = self.slicer.util
        truth_node = util.loadVolume(str(ROOT / "Resources" / "Samples" / "simulated_lesion.nrrd"), {"show": False})
        truth = util.arrayFromVolume(truth_node) > 0
        self.slicer.mrmlScene.RemoveNode(truth_node)
        node = self.panel.segmentation
        segment_id = node.GetSegmentation().GetNthSegmentID(0)
        mask = util.arrayFromSegmentBinaryLabelmap(node, segment_id, self.volume) > 0
        missed = truth & ~mask
        layer = int(missed.sum(axis=(1, 2)).argmax())
        voxels = np.argwhere(missed[layer])
        middle = voxels[np.abs(voxels - np.median(voxels, axis=0)).sum(axis=1).argmin()]
        return list(geometry.ijk_to_world(self.volume, [(middle[1], middle[0], layer)])[0])

    def grab(self, name: str, place: Any = LESION_CENTRE, arrange: bool = True) -> None:
        """The window, every slice view through one place; ``arrange`` shows the picture alone in all of them."""
        volume = self.volume if arrange else None
        self.app.grab_window(self.folder / name, volume=volume, layout="four-up", size=SIZE, center=tuple(place))
        if name not in FULL_COLOUR:
            shrink(self.folder / name)
        print(self.folder / name)

    def wait(self, condition: Any) -> None:
        self.app.wait_until(condition, timeout=900)


def shrink(path: Path) -> None:
    """A picture in 256 colours, a quarter as large: every version of it stays in the history."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    main()
