"""The extension as CMake installs it, against a stand-in for Slicer's macros: every file of it, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from extension_install import MODULES, CMakeMissing, Installed, InstallFailed, install_extension, run_tests_from

LIGHT_TEST = "Testing/unit/test_slicer_packages.py::test_a_fresh_slicer_lacks_all_of_it_and_torch_comes_first"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    # A folder with a space: Slicer is often installed in one.
    return installed_from(tmp_path_factory.mktemp("extension") / "a folder")


def installed_from(folder: Path, *source: Path) -> Installed:
    try:
        return install_extension(folder, *source)
    except CMakeMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lists(project_root: Path) -> ModuleType:
    """scripts/list_extension_files.py"""
    path = project_root / "scripts" / "list_extension_files.py"
    spec = importlib.util.spec_from_file_location("list_extension_files", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_lists_of_files_are_up_to_date(lists: ModuleType) -> None:
    different = lists.differences()
    assert different == [], f"run: python scripts/list_extension_files.py ({'; '.join(different)})"


def test_every_file_of_the_extension_is_installed_and_nothing_else(installed: Installed, project_root: Path) -> None:
    def below(folder: str, *patterns: str) -> set[str]:
        return {
            path.relative_to(project_root).as_posix()
            for pattern in patterns
            for path in (project_root / folder).glob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        }

    library = below("FreqSegLib", "**/*.py")
    shipped = below("Resources", "Models/**/*", "Samples/*.nrrd", "Samples/README.md")
    module = {
        name.removeprefix("FreqSeg/")
        for name in below("FreqSeg", "**/*.py", "Resources/**/*.ui", "Resources/**/*.png", "Resources/*.txt")
    }
    assert {"FreqSeg.py", "Resources/UI/FreqSeg.ui", "Resources/Icons/FreqSeg.png"} <= module
    assert {"Resources/Models/manifest.json", "Resources/Models/lite-aligner/preset.json"} <= shipped
    assert not shipped & module
    expected = {(MODULES / name).as_posix() for name in library | shipped | module}
    assert set(installed.files()) == expected


def test_installed_files_are_the_trees_own_bytes(installed: Installed, project_root: Path) -> None:
    for name, source in (
        ("Resources/Models/lite-aligner/aligner.safetensors", "Resources/Models/lite-aligner/aligner.safetensors"),
        ("Resources/Icons/FreqSeg.png", "FreqSeg/Resources/Icons/FreqSeg.png"),
        ("FreqSegLib/weights.py", "FreqSegLib/weights.py"),
    ):
        assert (installed.tree / name).read_bytes() == (project_root / source).read_bytes()


def test_slicer_finds_one_module_among_the_installed_files(installed: Installed) -> None:
    """Slicer takes every .py in the folder itself for a module of its own."""
    assert [path.name for path in installed.tree.glob("*.py")] == ["FreqSeg.py"]


def test_slicer_would_run_the_modules_own_tests(installed: Installed) -> None:
    assert set(installed.tests()) == {
        "py_nomainwindow_qSlicerFreqSegModuleGenericTest",
        "py_FreqSeg",
        "py_nomainwindow_FreqSegInstalledTest",
    }


def test_the_installed_library_works_where_only_pythons_own_packages_are(
    installed: Installed, project_root: Path
) -> None:
    """FreqSegInstalledTest, as Slicer runs it before any package was installed: -S leaves out site-packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed.tree), str(project_root / "Testing")])}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "unittest", "-v", "FreqSegInstalledTest"],
        cwd=installed.prefix,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 6 tests" in done.stderr


def test_the_installed_library_finds_its_weights_samples_and_presets(installed: Installed) -> None:
    code = (
        "import sys; from FreqSegLib import presets, samples, slicer_packages, weights\n"
        "print(weights.require('lite-aligner')); print(samples.sample(samples.FLAIR))\n"
        "print(slicer_packages.requirements_file()); print(bool(presets.read_tuning(weights.find('lite-aligner'))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed.tree)}
    environment.pop("FREQSEG_WEIGHTS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed.prefix, env=environment, capture_output=True, text=True, check=True
    )
    tree = installed.tree.resolve()
    assert done.stdout.splitlines() == [
        str(tree / "Resources" / "Models" / "lite-aligner"),
        str(tree / "Resources" / "Samples" / "simulated_flair.nrrd"),
        str(tree / "Resources" / "requirements.txt"),
        "True",
    ]


def test_tests_run_on_the_installed_library(installed: Installed, tmp_path: Path) -> None:
    done = run_tests_from(installed.tree, [LIGHT_TEST], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_tests_refuse_to_run_on_another_library(installed: Installed, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run_tests_from(elsewhere, [LIGHT_TEST], tmp_path / "run")
    assert done.returncode != 0
    assert "not on the installed tree" in done.stdout + done.stderr


@pytest.mark.slow
def test_worker_tests_pass_on_the_installed_library(installed: Installed, project_root: Path, tmp_path: Path) -> None:
    tests = sorted((project_root / "Testing" / "unit").glob("test_worker*.py"))
    tests += [project_root / "Testing" / "unit" / "test_protocol.py"]
    assert len(tests) > 1
    done = run_tests_from(installed.tree, [path.relative_to(project_root) for path in tests], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_panel_tests_pass_on_the_installed_module(installed: Installed, project_root: Path, tmp_path: Path) -> None:
    if not (project_root / "Testing" / "slicer").is_dir() or importlib.util.find_spec("PySide6") is None:
        pytest.skip("the panel's tests need slicer-core and PySide6-Essentials")
    done = run_tests_from(installed.tree, ["Testing/slicer"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_new_a_moved_and_a_lost_file_are_noticed(lists: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "FreqSegLib"
    (folder / "clip").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text("set(MODULE_PYTHON_SCRIPTS\n  gone.py\n  here.py\n  )\n# kept\n")
    for name in ("here.py", "clip/new.py", "clip/.hidden.py", "half.part"):
        (folder / name).touch()
    one = lists.FILE_LISTS[0]
    assert lists.differences([one], tmp_path) == [
        "FreqSegLib/CMakeLists.txt does not list clip/new.py",
        "FreqSegLib/CMakeLists.txt lists gone.py, which is not there",
    ]
    assert one.write(tmp_path)
    assert (
        folder / "CMakeLists.txt"
    ).read_text() == "set(MODULE_PYTHON_SCRIPTS\n  clip/new.py\n  here.py\n  )\n# kept\n"
    assert lists.differences([one], tmp_path) == []
    assert not one.write(tmp_path)


class TestStandIn:
    """The stand-in refuses, and loses, what Slicer's macros refuse and lose."""

    def extension(self, folder: Path, project_root: Path, scripts: str, call: str = "") -> Path:
        """A small extension with one module A, and a folder B beside it."""
        source = folder / "source"
        for name in ("A/A.py", "A/Resources/a.txt", "B/b.py"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).touch()
        for name in ("README.md", "LICENSE"):
            shutil.copy(project_root / name, source)
        top = (project_root / "CMakeLists.txt").read_text(encoding="utf-8")
        kept = [line for line in top.splitlines() if "add_subdirectory" not in line]
        (source / "CMakeLists.txt").write_text("\n".join(kept).replace("## NEXT_MODULE", "add_subdirectory(A)"))
        (source / "A" / "CMakeLists.txt").write_text(
            f"slicerMacroBuildScriptedModule(NAME A SCRIPTS {scripts} RESOURCES Resources/a.txt {call})\n"
        )
        return source

    def test_a_file_listed_from_beside_the_module_is_not_installed(self, tmp_path: Path, project_root: Path) -> None:
        source = self.extension(tmp_path, project_root, "A ../B/b.py")
        found = installed_from(tmp_path / "out", source).files()
        assert found == [(MODULES / name).as_posix() for name in ("A.py", "Resources/a.txt")]

    def test_a_module_with_a_folder_of_its_own_is_installed_there(self, tmp_path: Path, project_root: Path) -> None:
        source = self.extension(tmp_path, project_root, "A.py", "WITH_SUBDIR")
        found = installed_from(tmp_path / "out", source).files()
        assert found == [(MODULES / "A" / name).as_posix() for name in ("A.py", "Resources/a.txt")]

    @pytest.mark.parametrize(("scripts", "call", "said"), [("A C.py", "", "C.py"), ("A", "WITH_TESTS", "WITH_TESTS")])
    def test_a_lost_file_or_an_unknown_word_stops_it(
        self, tmp_path: Path, project_root: Path, scripts: str, call: str, said: str
    ) -> None:
        source = self.extension(tmp_path, project_root, scripts, call)
        with pytest.raises(InstallFailed, match=said):
            installed_from(tmp_path / "out", source)
