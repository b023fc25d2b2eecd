"""Run by ctest inside Slicer: the installed extension has all of its parts and is light to import.

It asks for nothing that Slicer lacks. ``python -m unittest FreqSegInstalledTest`` runs it outside of Slicer too, from
the folder of scripted modules on the path.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import unittest
from pathlib import Path


class FreqSegInstalledTest(unittest.TestCase):
    def test_the_library_lies_beside_the_module(self) -> None:
        import FreqSegLib

        folder = Path(FreqSegLib.__file__).resolve().parents[1]
        assert (folder / "FreqSeg.py").is_file(), folder
        assert (folder / "Resources" / "UI" / "FreqSeg.ui").is_file(), folder
        assert (folder / "Resources" / "Icons" / "FreqSeg.png").is_file(), folder

    def test_shipped_weights_are_beside_the_library_and_undamaged(self) -> None:
        from FreqSegLib import weights

        shipped = weights.shipped_folders()[0]
        listed = json.loads((shipped / "manifest.json").read_text(encoding="utf-8"))
        assert "lite-aligner" in listed
        for name, files in listed.items():
            for filename, facts in files.items():
                content = (shipped / name / filename).read_bytes()
                assert hashlib.sha256(content).hexdigest() == facts["sha256"], filename

    def test_the_preset_has_its_tuning(self) -> None:
        from FreqSegLib import presets, weights

        assert presets.read_tuning(weights.shipped_folders()[0] / "lite-aligner")

    def test_samples_are_beside_the_library(self) -> None:
        from FreqSegLib import samples

        for name in (samples.FLAIR, samples.CT, samples.LESION):
            assert samples.sample(name).parent == samples.sample_folders()[0]

    def test_what_to_install_can_be_told(self) -> None:
        from FreqSegLib import slicer_packages

        assert "torch" in [one.name for one in slicer_packages.requirements()]

    def test_importing_the_library_loads_no_torch(self) -> None:
        import FreqSegLib

        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import FreqSegLib.presets, FreqSegLib.weights; "
            "sys.exit('torch' in sys.modules)"
        )
        root = str(Path(FreqSegLib.__file__).resolve().parents[1])
        # Slicer's sys.executable is its Python, PythonSlicer, with the application's own folders on its path.
        assert subprocess.run([sys.executable, "-c", code, root], check=False).returncode == 0


if __name__ == "__main__":
    unittest.main()
