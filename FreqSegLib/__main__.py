"""``python -m FreqSegLib`` is the ``freqseg`` command."""

from __future__ import annotations

import sys

from FreqSegLib.cli import main

if __name__ == "__main__":
    sys.exit(main())
