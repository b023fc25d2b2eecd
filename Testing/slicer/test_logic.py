"""FreqSeg without its panel: scripts, geometry, terminology, packages, tasks; and once with the real worker."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "FreqSeg" / "FreqSeg.py"


@pytest.fixture
def loaded(app):
    """The loaded module, not opened."""
    app.load_module(MODULE, enter=False)
    return sys.modules["FreqSeg"]


@pytest.fixture
def logic(loaded, fake):
    made = loaded.FreqSegLogic(make_client=lambda: fake)
    yield made
    made.close()


def make_volume(values: np.ndarray | None = None, **arguments: Any):
    import slicer

    if values is None:
        values = np.full((5, 9, 7), 10, dtype=np.int16)
        values[1:3, 4:7, 2:5] = 200
    return slicer.util.addVolumeFromArray(values, **arguments)


def test_a_script_waits_for_its_segments(logic) -> None:
    import slicer

    volume, seen = make_volume(name="FLAIR"), []
    report = logic.segment(volume, ["brain tumour", "left lung"], progress=seen.append)
    assert report.sentences == ("brain tumour: 18 voxels.", "left lung: 18 voxels.")
    for segment_id in report.segment_ids:
        mask = slicer.util.arrayFromSegmentBinaryLabelmap(report.segmentation_node, segment_id, volume)
        assert np.array_equal(mask > 0, slicer.util.arrayFromVolume(volume) > 100)
    assert {progress.stage for progress in seen} == {"Reading slices", "Looking"}
    assert report.stages == ("Reading slices", "Looking", "Drawing")
    assert logic.segment(volume, "lungs", report.segmentation_node).stages == ("Looking", "Drawing")


def test_a_script_writes_into_the_segmentation_it_names(logic) -> None:
    import slicer

    volume = make_volume()
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    report = logic.segment(volume, "lungs", node)
    assert report.segmentation_node is node
    assert node.GetSegmentation().GetNumberOfSegments() == 1
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is volume


def test_a_script_need_not_wait(logic) -> None:
    task = logic.segment(make_volume(), ["lungs"], waitForCompletion=False)
    assert not task.finished
    while not task.finished:
        logic.session.runner.tick()
    assert len(task.result.segment_ids) == 1


@pytest.mark.parametrize(("prompts", "word"), [([], "prompt"), (["  "], "prompt")])
def test_a_script_without_prompts_is_told(logic, prompts, word) -> None:
    from FreqSegPanel.trouble import Trouble

    with pytest.raises(Trouble, match=word):
        logic.segment(make_volume(), prompts)


def test_the_worker_s_refusals_are_raised_with_their_code(logic, fake) -> None:
    from FreqSegPanel.trouble import Trouble

    fake.refuse["segment"] = ("vocabulary", "'left foot' is not one of the things lite knows.")
    with pytest.raises(Trouble) as caught:
        logic.segment(make_volume(), ["left foot"])
    assert caught.value.code == "vocabulary"
    assert "left foot" in str(caught.value)


def test_a_sequence_s_current_frame_is_what_is_segmented(logic) -> None:
    import slicer

    frames = [np.full((3, 6, 5), 10, dtype=np.int16) for _ in range(2)]
    frames[0][0, 0, 0], frames[1][2, 5, 4] = 200, 200
    sequence = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode")
    for index, frame in enumerate(frames):
        node = make_volume(frame)
        sequence.SetDataNodeAtValue(node, str(index))
        slicer.mrmlScene.RemoveNode(node)
    browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    sequences = slicer.vtkSlicerSequencesLogic()
    sequences.SetMRMLScene(slicer.mrmlScene)
    found = []
    for index in range(2):
        browser.SetSelectedItemNumber(index)
        sequences.UpdateProxyNodesFromSequences(browser)
        proxy = browser.GetProxyNode(sequence)
        report = logic.segment(proxy, ["lungs"])
        image = report.segmentation_node.GetSegmentation().GetSegment(report.segment_ids[0])
        found.append(image.GetRepresentation("Binary labelmap").GetExtent())
    assert found == [(0, 0, 0, 0, 0, 0), (4, 4, 5, 5, 2, 2)]


def test_nonlinear_transforms_carry_points_back_to_their_voxels(loaded) -> None:
    import slicer
    import vtk
    from FreqSegPanel import geometry

    volume = make_volume()
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode")
    warp = vtk.vtkThinPlateSplineTransform()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for point in ((0, 0, 0), (10, 0, 0), (0, 10, 0), (0, 0, 10), (5, 5, 5)):
        source.InsertNextPoint(point)
        target.InsertNextPoint([value * 1.1 + 0.01 * value * value for value in point])
    warp.SetSourceLandmarks(source)
    warp.SetTargetLandmarks(target)
    warp.SetBasisToR()
    transform.SetAndObserveTransformToParent(warp)
    volume.SetAndObserveTransformNodeID(transform.GetID())
    voxels = np.array([[0, 0, 0], [3, 2, 1], [6, 8, 4]], dtype=float)
    world = geometry.ijk_to_world(volume, voxels)
    assert not np.allclose(world, voxels * [-1, -1, 1])
    assert np.allclose(geometry.world_to_ijk(volume, world), voxels, atol=1e-2)


@pytest.mark.parametrize("axis", ["auto", "axial", "coronal", "sagittal"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("spacing", [(1.0, 1.1, 1.3), (0.8, 0.8, 5.0), (5.0, 1.0, 1.0)])
def test_slices_are_counted_along_the_library_s_axis(loaded, axis, order, spacing) -> None:
    import slicer
    from FreqSegPanel import geometry

    from FreqSegLib.slices import SliceStack
    from FreqSegLib.volume import Volume

    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[:, list(order)] * np.array(spacing) * [-1, 1, -1]
    volume = make_volume()
    volume.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
    library = SliceStack.of(Volume(slicer.util.arrayFromVolume(volume), geometry.ijk_to_lps(volume)), axis)
    assert geometry.stack_axis(volume, axis) == 2 - library.order[0]


def test_moving_a_mask_to_another_lattice_takes_the_nearest_voxel(loaded) -> None:
    from FreqSegPanel import geometry

    mask = np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype(np.uint8)
    matrix, target = np.diag([1.0, 2.0, 3.0, 1.0]), np.diag([0.7, 1.1, 1.9, 1.0])
    target[:3, 3] = (0.2, -0.3, 0.4)
    work = geometry.resampled(mask, matrix, (2, 1, -1), target)
    try:
        while True:
            next(work)
    except StopIteration as end:
        moved, start = end.value
    assert moved.any()
    for k, j, i in np.ndindex(moved.shape):
        place = target @ [i + start[0], j + start[1], k + start[2], 1]
        source = np.linalg.inv(matrix) @ place
        if np.abs(source[:3] - np.floor(source[:3]) - 0.5).min() < 1e-9:
            continue
        x, y, z = np.rint(source[:3]).astype(int) - (2, 1, -1)
        inside = 0 <= z < 4 and 0 <= y < 5 and 0 <= x < 6
        assert moved[k, j, i] == (mask[z, y, x] if inside else 0)


TERMS = {
    "brain tumour": ("4147007^Mass", "12738006^Brain", None),
    "Brain Tumor": ("4147007^Mass", "12738006^Brain", None),
    "low-grade glioma": ("4147007^Mass", "12738006^Brain", None),
    "breast lesion": ("4147007^Mass", "76752008^Breast", None),
    "both lungs": ("39607008^Lung", None, None),
    "left lung": ("39607008^Lung", None, "7771000^Left"),
    "RIGHT lung field": ("39607008^Lung", None, "24028007^Right"),
    "hippocampus": ("5366008^Hippocampus", None, None),
    "posterior hippocampus": ("5366008^Hippocampus", None, "255551008^Posterior"),
    "oedema": ("79654002^Edema", None, None),
    "left kidney": ("64033007^Kidney", None, "7771000^Left"),
}


@pytest.mark.parametrize("prompt", TERMS)
def test_prompts_find_their_codes(loaded, prompt) -> None:
    from FreqSegPanel.terminology import find_term

    kind, region, modifier = TERMS[prompt]
    entry = find_term(prompt).entry.split("~")
    assert len(entry) == 7
    assert entry[2] == f"SCT^{kind}"
    assert entry[3] == (f"SCT^{modifier}" if modifier else "^^")
    assert entry[5] == (f"SCT^{region}" if region else "^^")


@pytest.mark.parametrize("prompt", ["something bright", "no brain tumour", "", "a healthy foot without a tumour"])
def test_what_fits_nothing_is_left_without_a_code(loaded, prompt) -> None:
    from FreqSegPanel.terminology import entry_and_color

    assert entry_and_color(prompt) == (None, None)


def test_every_target_of_the_built_in_preset_has_a_code(loaded) -> None:
    from FreqSegPanel.terminology import find_term
    from FreqSegPanel.vocabulary import presets

    for target in presets()[0].targets:
        assert find_term(target.name) is not None, target.name


CONTRASTS = {
    "Ax T2 FLAIR": "flair",
    "t1_mprage_sag": "t1",
    "AX T1 POST GAD": "t1 with contrast agent",
    "T1ce": "t1 with contrast agent",
    "sub-01_T2w": "t2",
    "CT Head": "ct",
    "MRHead": None,
    "infarct": None,
    "ADC map": "diffusion",
}


@pytest.mark.parametrize("name", CONTRASTS)
def test_names_tell_the_contrast(loaded, name) -> None:
    from FreqSegPanel.volume_input import contrast_of

    assert contrast_of(make_volume(name=name)) == CONTRASTS[name]


# Packages


def packages(loaded, missing: list[str], answer: bool, failure: Exception | None = None):
    from FreqSegPanel.packages import Packages

    asked, installed = [], []

    def install(requirement: str, constraints: Path) -> None:
        if failure is not None:
            raise failure
        assert constraints.is_file()
        installed.append(requirement)
        missing.remove(requirement)

    def install_torch(version: str) -> None:
        installed.append(f"torch{version}")
        missing[:] = [one for one in missing if not one.startswith("torch")]

    def confirm(question: str) -> bool:
        asked.append(question)
        return answer

    return Packages(lambda: missing, confirm, install, install_torch), asked, installed


def test_packages_are_asked_for_once_and_torch_comes_first(loaded) -> None:
    chosen, asked, installed = packages(loaded, ["timm>=1.0", "torch>=2.14", "torchvision", "monai>=1.5"], True)
    said: list[str] = []
    assert chosen.ensure(said.append) == ""
    assert len(asked) == 1
    assert "timm" in asked[0]
    assert installed == ["torch>=2.14", "timm>=1.0", "monai>=1.5"]
    assert said[0] == "Installing torch (1 of 3) …"


@pytest.mark.parametrize("fits", [True, False])
def test_what_only_makes_it_faster_comes_last_and_may_fail(loaded, fits: bool) -> None:
    from FreqSegPanel.packages import Packages

    missing, faster, tried = ["timm>=1.0"], ["numba>=0.61"], []

    def install(requirement: str, constraints: object) -> None:
        tried.append(requirement)
        if requirement in faster and not fits:
            raise RuntimeError("No matching distribution found for numba")
        for wanted in (missing, faster):
            wanted[:] = [one for one in wanted if one != requirement]

    said: list[str] = []
    chosen = Packages(lambda: missing, lambda question: True, install, None, lambda: list(faster))
    assert chosen.ensure(said.append) == ""
    assert tried == ["timm>=1.0", "numba>=0.61"]
    assert said[-1] == "Installing numba …"
    assert chosen.ensure(said.append) == ""
    assert len(tried) == 2


def test_a_refusal_is_remembered_until_the_user_asks(loaded) -> None:
    chosen, asked, installed = packages(loaded, ["timm>=1.0"], False)
    sentence = chosen.ensure(lambda text: None)
    assert "Install packages" in sentence
    assert chosen.ensure(lambda text: None) == sentence
    assert len(asked) == 1
    chosen.ensure(lambda text: None, ask_again=True)
    assert len(asked) == 2
    assert installed == []


def test_a_failed_installation_says_what_and_may_be_tried_again(loaded) -> None:
    chosen, _asked, _installed = packages(loaded, ["timm>=1.0"], True, RuntimeError("pip said:\nno network"))
    assert chosen.ensure(lambda text: None).startswith("timm could not be installed: no network.")


def test_nothing_is_asked_when_nothing_is_missing(loaded) -> None:
    chosen, asked, _installed = packages(loaded, [], True)
    assert chosen.ensure(lambda text: None) == ""
    assert asked == []


@pytest.mark.parametrize("style", ["new", "old"])
def test_torch_comes_through_the_pytorch_extension_of_any_age(loaded, monkeypatch, style) -> None:
    from FreqSegPanel.packages import install_torch_by_extension

    given: dict[str, Any] = {}

    class New:
        def installTorch(self, askConfirmation=True, forceComputationBackend=None, torchVersionRequirement=None):
            given.update(ask=askConfirmation, version=torchVersionRequirement)
            return object()

    class Old:
        def installTorch(self, confirm=True):
            given.update(ask=confirm, version=None)
            return object()

    utils = types.ModuleType("PyTorchUtils")
    utils.PyTorchUtilsLogic = New if style == "new" else Old
    monkeypatch.setitem(sys.modules, "PyTorchUtils", utils)
    install_torch_by_extension(">=2.14")
    assert given == {"ask": False, "version": ">=2.14" if style == "new" else None}


def test_without_the_pytorch_extension_it_is_named(loaded, monkeypatch) -> None:
    from FreqSegPanel.packages import install_torch_by_extension

    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    with pytest.raises(RuntimeError, match="Extensions Manager"):
        install_torch_by_extension("")


def test_packages_go_through_slicer_s_own_installer(loaded, app, monkeypatch, tmp_path) -> None:
    import slicer
    from FreqSegPanel.packages import install_package

    calls: list[Any] = []
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("")
    new = types.ModuleType("slicer.packaging")
    new.pip_ensure = lambda requirements, constraints=None, prompt_install=True, requester=None: calls.append(
        ([str(one) for one in requirements], constraints, prompt_install)
    )
    monkeypatch.setitem(sys.modules, "slicer.packaging", new)
    install_package("timm>=1.0", constraints)
    assert calls == [(["timm>=1.0"], str(constraints), False)]
    monkeypatch.setitem(sys.modules, "slicer.packaging", None)
    monkeypatch.setattr(slicer.util, "pip_install", calls.append)
    install_package("timm>=1.0", constraints)
    assert calls[1] == ["--constraint", str(constraints), "timm>=1.0"]


def test_the_module_s_files_import_nothing_heavy() -> None:
    """Only the standard library, Slicer's own modules, numpy and the module's own files, at file scope."""
    import ast

    allowed = {"slicer", "qt", "ctk", "vtk", "numpy", "FreqSegPanel", *sys.stdlib_module_names}
    files = [MODULE, *sorted((MODULE.parent / "FreqSegPanel").glob("*.py"))]
    assert len(files) > 10
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, path.name


def test_translated_texts_are_never_f_strings() -> None:
    import ast

    for path in [MODULE, *sorted((MODULE.parent / "FreqSegPanel").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("_", "translate"):
                assert all(isinstance(argument, ast.Constant) for argument in node.args), f"{path}:{node.lineno}"


# The real worker


@pytest.mark.slow
def test_the_real_worker_finds_the_simulated_tumour(loaded) -> None:
    """The lite preset on the slices around the lesion, from node to node; then a second prompt and a click."""
    import slicer

    worker_client = importlib.import_module("FreqSegLib.worker_client")
    from FreqSegLib import weights

    if any(weights.find(name) is None for name in ("litemedsam", "minilm", "lite-aligner")):
        pytest.skip("the lite preset's weights are not installed")
    volume = slicer.util.loadVolume(str(ROOT / "Resources" / "Samples" / "simulated_flair.nrrd"))
    truth_node = slicer.util.loadVolume(str(ROOT / "Resources" / "Samples" / "simulated_lesion.nrrd"))
    truth = slicer.util.arrayFromVolume(truth_node) > 0
    region = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    bounds = [0.0] * 6
    volume.GetRASBounds(bounds)
    region.SetCenter([(bounds[0] + bounds[1]) / 2, (bounds[2] + bounds[3]) / 2, 31.0])
    region.SetSize([bounds[1] - bounds[0], bounds[3] - bounds[2], 11.0])
    logic = loaded.FreqSegLogic(make_client=worker_client.WorkerClient)
    try:
        report = logic.segment(volume, ["brain tumour"], roiNode=region, device="cpu")
        mask = slicer.util.arrayFromSegmentBinaryLabelmap(report.segmentation_node, report.segment_ids[0], volume) > 0
        slices = np.flatnonzero(mask.any(axis=(1, 2)))
        assert 1 <= len(slices) <= 3
        part = truth[slices]
        overlap = 2 * (mask[slices] & part).sum() / (mask[slices].sum() + part.sum())
        assert overlap > 0.5
        again = logic.segment(volume, ["glioma"], report.segmentation_node, roiNode=region, device="cpu")
        assert "Reading slices" not in again.stages
        assert "Loading models" not in again.stages
    finally:
        logic.close()


@pytest.mark.slow
def test_the_panel_opens_without_torch_in_a_fresh_process() -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})\n"
        "from stand_in import Application\n"
        "app = Application.start(); start = time.perf_counter()\n"
        f"app.load_module({str(MODULE)!r})\n"
        "print(time.perf_counter() - start); assert 'torch' not in sys.modules; assert 'SimpleITK' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
