"""Where spectral models are on this computer, and what is said of each: needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from FreqSegLib import weights
from FreqSegLib.errors import WeightsError
from FreqSegLib.mamba.model_config import MODEL_FILE, WEIGHTS_FILE, SpectralModel


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a spectral model in it.

    Attributes:
        reference: what :func:`find_model` is given for it: its name, or the folder itself.
        folder: with ``model.json`` and the weights.
        model: what ``model.json`` says; None where it cannot be read.
        fault: why the model cannot be used, as a sentence; empty when it can.
    """

    reference: str
    folder: Path
    model: SpectralModel | None
    fault: str = ""

    @property
    def name(self) -> str:
        """The model's own name, or its folder's."""
        return self.folder.name if self.model is None else self.model.name


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of a model, by its name or path. Weights that are shipped are checked by their sha256.

    Raises:
        WeightsError: there is none, and the message names those that are here; or the weights are damaged.
    """
    folder = Path(name_or_folder)
    if (folder / MODEL_FILE).is_file():
        return folder
    name = str(name_or_folder)
    if name in weights.catalogue():
        return weights.require(name)
    for place in weights.search_folders() if folder.name == name else ():
        if (place / name / MODEL_FILE).is_file():
            return place / name
    there = installed_models()
    near = difflib.get_close_matches(name, there, 1)
    offered = f"; did you mean {near[0]!r}?" if near else "."
    raise WeightsError(
        f"there is no spectral model '{name}'{offered} Give the folder of one (with {MODEL_FILE}), or a name; here "
        f"are: {', '.join(there) or 'none, train one with freqseg train-spectral'}"
    )


def installed_models() -> list[str]:
    """Names of the spectral models on this machine."""
    return sorted(found.reference for found in model_folders() if (found.folder / WEIGHTS_FILE).is_file())


def model_folders(more: Iterable[Path] = ()) -> list[ModelFolder]:
    """Every spectral model on this machine, those that cannot be used too, with the reason.

    Args:
        more: folders besides those where weights are looked for: of a model, or of several.
    """
    found: dict[Path, ModelFolder] = {}
    names: set[str] = set()
    for folder in _folders_in(weights.search_folders()):
        # of two with one name, the first is taken, as weights are
        if folder.name not in names:
            names.add(folder.name)
            found[folder.resolve()] = _read(folder.name, folder)
    for place in more:
        for folder in [place] if (place / MODEL_FILE).is_file() else _folders_in([place]):
            found.setdefault(folder.resolve(), _read(str(folder), folder))
    return list(found.values())


def _folders_in(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(path.parent for path in place.glob(f"*/{MODEL_FILE}"))


def _read(reference: str, folder: Path) -> ModelFolder:
    try:
        model = SpectralModel.read(folder)
    except WeightsError as error:
        return ModelFolder(reference, folder, None, str(error))
    if not (folder / WEIGHTS_FILE).is_file():
        fault = f"{folder} has no {WEIGHTS_FILE}. Get the model again, or train it."
        return ModelFolder(reference, folder, model, fault)
    return ModelFolder(reference, folder, model)
