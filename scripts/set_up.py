"""Set up ``.venv`` for ``make``: a fitting Python, the packages, the lite preset's weights. Standard library only.

A second run with nothing changed does nothing. Set PYTHON to use a particular interpreter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
READY = VENV / ".ready"
OLDEST, NEWEST = (3, 10), (3, 13)
EXTRAS = "test,lint,slicer"
WEIGHTS = ("litemedsam", "minilm")


def main() -> int:
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if READY.exists() and READY.read_text(encoding="utf-8") == state:
        return 0
    started = time.monotonic()
    READY.unlink(missing_ok=True)
    if not _runs(_venv_python()):
        python = _fitting_python()
        print(f"Setting up .venv with {python} (about 7 GB of disk; minutes, mostly download)", flush=True)
        _call([python, "-m", "venv", "--clear", str(VENV)])
    _install()
    _call([str(_venv_python()), "-m", "FreqSegLib", "models", "get", *WEIGHTS, "--yes"])
    READY.write_text(state, encoding="utf-8")
    print(f"Ready after {time.monotonic() - started:.0f} s. A next run skips all of this.", flush=True)
    return 0


def _install() -> None:
    """With uv where it can be had (several times faster), else with pip; both ask the index that pip is set to."""
    python = str(_venv_python())
    target = f"{ROOT}[{EXTRAS}]"
    if subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=False).returncode == 0:
        environment = dict(os.environ)
        index = subprocess.run(
            [python, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
        )
        chosen = os.environ.get("PIP_INDEX_URL") or (index.stdout.strip() if index.returncode == 0 else "")
        if chosen:
            environment.setdefault("UV_DEFAULT_INDEX", chosen)
        command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--editable", target]
        if subprocess.run(command, env=environment, check=False).returncode == 0:
            return
        print("uv could not install the packages; trying pip", flush=True)
    _call([python, "-m", "pip", "install", "--editable", target])


def _fitting_python() -> str:
    """An interpreter from 3.10 to 3.13: PYTHON, this one, or one on the path."""
    names = [os.environ.get("PYTHON", ""), sys.executable, "python3.12", "python3.11", "python3.13", "python3.10"]
    for name in names:
        found = shutil.which(name) if name else None
        if found and _fits(found):
            return found
    raise SystemExit(
        f"FreqSeg needs Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}; this is "
        f"{sys.version_info[0]}.{sys.version_info[1]}. Install one of these, or name it: make PYTHON=python3.12"
    )


def _fits(python: str) -> bool:
    code = f"import sys, venv, ensurepip; sys.exit(not ({OLDEST} <= sys.version_info[:2] <= {NEWEST}))"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def _runs(python: Path) -> bool:
    return python.exists() and _fits(str(python))


def _venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _call(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, check=False)
    if result.returncode:
        raise SystemExit(
            f"Set-up stopped: {' '.join(command)} ended with {result.returncode}. Nothing else was changed."
        )


if __name__ == "__main__":
    raise SystemExit(main())
