"""Weights in half precision: what is written, and that equal weights make equal files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

CODE = """
import sys
from pathlib import Path
import torch
from FreqSegLib.checkpoint import save_half
torch.manual_seed(0)
metadata = {key: key * 3 for key in ("config", "licence", "meanings", "é", "a", "b", "c")}
save_half(torch.nn.Linear(3, 2), Path(sys.argv[1]), metadata)
"""


def test_equal_weights_make_equal_files_in_every_process(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in files:
        subprocess.run([sys.executable, "-c", CODE, str(path)], check=True, timeout=120)
    first, *others = (path.read_bytes() for path in files)
    assert all(other == first for other in others)
    length = int.from_bytes(first[:8], "little")
    assert list(json.loads(first[8 : 8 + length])["__metadata__"]) == [
        "a",
        "b",
        "c",
        "config",
        "licence",
        "meanings",
        "é",
    ]
    torch.manual_seed(0)
    expected = torch.nn.Linear(3, 2).half()
    with safe_open(files[0], framework="pt") as file:
        assert (file.metadata() or {})["licence"] == "licence" * 3
        assert torch.equal(file.get_tensor("weight"), expected.weight)
        assert torch.equal(file.get_tensor("bias"), expected.bias)
