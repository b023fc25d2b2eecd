"""Runs a script twice at once as torchrun would: two processes of one gloo group on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PATIENCE = 400.0


def run_twice(script: str, result: Path, root: Path) -> list[str]:
    """Both must end well; each gets ``result`` and the tests' folder as arguments, and works in ``root``.

    Returns:
        What each printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(result), str(Path(__file__).parent)],
            cwd=root,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [child.communicate(timeout=PATIENCE) for child in children]
    assert [child.returncode for child in children] == [0, 0], [trouble for _, trouble in told]
    return [printed for printed, _ in told]
