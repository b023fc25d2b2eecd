"""What is light stays light, and imports go down the house only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    *("torch", "torchvision", "SimpleITK", "matplotlib", "transformers", "open_clip", "segment_anything"),
    *("timm", "monai", "scipy", "pywt", "pytorch_wavelets", "safetensors", "requests", "PIL"),
)
PACKAGE = Path(__file__).resolve().parents[2] / "FreqSegLib"

# The rooms of the house from the ground up; a module may import its own storey and those below.
ROOMS = ("clip", "saliency", "interaction", "sam", "mamba", "fusion")
PIPELINES = (
    *("loading", "text_results", "text_stages", "text_trained", "text_segmentation"),
    *("text_refinement", "spectral_segmentation", "volume_fusion"),
)
ABOVE = ("training", "evaluation", "sheet", "export")
TOP = ("cli", "worker", "__main__")


def storey(module: str) -> int:
    """0 for the ground (volume, slices, weights, settings ...) up to 4 for command line and worker."""
    first = module.split(".")[1]
    if first in TOP or first.startswith(("cli_", "worker_")):
        return 4
    return 3 if first in ABOVE else 2 if first in PIPELINES else 1 if first in ROOMS else 0


def python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


def test_light_modules_load_nothing_heavy(project_root: Path) -> None:
    """One child process; after each import, what it brought in."""
    modules = [
        "FreqSegLib",
        *(f"FreqSegLib.{name}" for name in ("errors", "settings", "presets", "weights", "loading")),
        # what the panel imports inside Slicer, where torch may not be installed yet
        *(f"FreqSegLib.{name}" for name in ("protocol", "worker_client", "slicer_packages", "mamba.model_folders")),
    ]
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module({name!r}); print({name!r}, [m for m in {HEAVY!r} if m in sys.modules])\n"
        for name in modules
    )
    assert python(code, project_root).splitlines() == [f"{name} []" for name in modules]


def test_the_package_offers_its_names_and_loads_them_on_demand(project_root: Path) -> None:
    code = (
        "import sys, FreqSegLib\n"
        "assert 'torch' not in sys.modules\n"
        "assert FreqSegLib.Volume.__module__ == 'FreqSegLib.volume'\n"
        "assert 'torch' not in sys.modules\n"
        "try: FreqSegLib.Nothing\n"
        "except AttributeError as error: print(error)\n"
        "assert FreqSegLib.TextSegmenter.__module__ == 'FreqSegLib.text_segmentation'\n"
        "assert FreqSegLib.SpectralSegmenter.__module__ == 'FreqSegLib.spectral_segmentation'\n"
        "late = {'SpectralSegmenter', 'TextSegmenter', 'Volume', 'VolumeFuser'}\n"
        "assert set(FreqSegLib.__all__) <= {*dir(FreqSegLib), *late}\n"
        # the compiler takes seconds to import, and nothing here is compiled
        "print('torch' in sys.modules, 'torch._dynamo' in sys.modules)\n"
    )
    assert python(code, project_root).splitlines() == ["module 'FreqSegLib' has no attribute 'Nothing'", "True False"]


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at the top or late, but for those that only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = str(node.module)
            found.add(base)
            if base == "FreqSegLib":
                found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_the_package_was_found() -> None:
    assert len(SOURCES) > 30
    assert storey("FreqSegLib.slices") < storey("FreqSegLib.sam.refine") < storey("FreqSegLib.text_segmentation")
    assert "FreqSegLib.sam.refine" in imports_of(PACKAGE / "text_stages.py")
    assert "FreqSegLib.loading" in imports_of(PACKAGE / "text_segmentation.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_imports_go_down_the_house_only_and_never_into_slicer(path: Path) -> None:
    module, imported = module_name(path), imports_of(path)
    assert not {name.split(".")[0] for name in imported} & {"slicer", "qt", "ctk", "vtk", "PySide6", "PythonQt"}
    own = {name for name in imported if name.startswith("FreqSegLib.")}
    if module != "FreqSegLib":
        assert {name for name in own if storey(name) > storey(module)} == set()
