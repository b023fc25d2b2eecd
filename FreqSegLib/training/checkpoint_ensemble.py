"""Several checkpoints' predictions as one: mean probabilities, labels, and the entropy that says where they doubt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError


def average(predictions: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Mean of probabilities (classes, ...) over checkpoints.

    Raises:
        InputError: there are none, or their shapes differ.
    """
    shapes = {prediction.shape for prediction in predictions}
    if len(shapes) != 1:
        raise InputError(f"an ensemble needs predictions of one shape, got {sorted(shapes) or 'none'}")
    total = np.zeros(predictions[0].shape, dtype=np.float64)
    for prediction in predictions:
        total += prediction
    return total / len(predictions)


def entropy(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Shannon entropy over the first axis, divided by its largest value: 0 where one class is certain, 1 where all are
    alike.

    Args:
        probabilities: (classes >= 2, ...), adding up to 1.
    """
    p = np.clip(probabilities.astype(np.float64), 0, 1)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    found = -(p * logs).sum(0) / np.log(len(p))
    return np.clip(found, 0, 1).astype(np.float32)


def read_probabilities(path: Path) -> NDArray[Any]:
    """What ``nnUNetv2_predict --save_probabilities`` wrote for a case: (classes, k, j, i).

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with np.load(path) as content:
            return np.asarray(content["probabilities"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"cannot read the probabilities {path}: {error}; predict again") from error
