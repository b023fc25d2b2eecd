"""Reading a checkpoint file without running anything in it, and loading it into the one module it fits.

Only tensors are read (``torch.load(weights_only=True)`` or safetensors). A checkpoint that does not fit is refused with
the first key at fault and both shapes; nothing is resized, skipped or left at random values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar

from FreqSegLib.errors import SettingsError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

StateDict = dict[str, "Tensor"]
Module = TypeVar("Module", bound="nn.Module")

_NESTS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a checkpoint file, on the CPU.

    Training scripts nest the weights (``{"epoch": 3, "state_dict": {...}}``) and prefix them (``module.`` from
    DistributedDataParallel, ``_orig_mod.`` from torch.compile, ``model.`` from a wrapper); both are undone.

    Args:
        path: a ``.safetensors`` file, or a file written by ``torch.save``.

    Raises:
        WeightsError: the file is missing, damaged, or holds Python objects that would have to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: the file does not exist. Check the path, or get the weights again.")
    state = _unwrap(_read(path))
    if not state:
        raise WeightsError(
            f"{path} holds no tensors, so it is not a checkpoint. Give a file with a model's state dict."
        )
    return state


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give ``module`` the weights in ``state``, all of them and nothing else.

    The tensors are taken over, not copied (so ``module`` may be on the meta device), in the dtype of the module's own.

    Args:
        module: the architecture; its state dict says which keys and shapes are right.
        state: key to tensor.
        source: where ``state`` came from, for the message.

    Raises:
        WeightsError: a key has another shape, is missing or is unknown; names the first, with both shapes.
    """
    expected = module.state_dict()
    check_fit(expected, state, source)
    module.load_state_dict({key: state[key].to(value.dtype) for key, value in expected.items()}, assign=True)


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Whether the weights in ``state`` are those an architecture expects, by keys and shapes.

    Args:
        expected: the architecture's state dict.
        state: key to tensor.
        source: where ``state`` came from, for the message.

    Raises:
        WeightsError: a key has another shape, is missing or is unknown; names the first, with both shapes.
    """
    faults = _faults(expected, state)
    if faults:
        raise WeightsError(
            f"{source} does not fit this architecture: {'; '.join(faults)}. It holds another model, or a part of one: "
            "choose the model it was saved from, or get the weights again."
        )


def save_half(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a module's weights in half precision as safetensors, atomically; equal weights give equal bytes.

    Args:
        module: its state dict is written; numbers that are not floating point stay as they are.
        path: the file.
        metadata: stored beside the weights, like the architecture's configuration as JSON under ``config``.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".part")
    tensors = {
        key: (tensor.detach().half() if tensor.is_floating_point() else tensor.detach()).contiguous()
        for key, tensor in module.state_dict().items()
    }
    save_file(tensors, temporary, metadata=dict(metadata))
    _sort_metadata(temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes a file's metadata in an order that changes from run to run, and with it the checksum."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # only the order changes, so that it fits where it was
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_half(path: Path, what: str) -> tuple[dict[str, Any], StateDict]:
    """Configuration and tensors of a file that :func:`save_half` wrote, the tensors as they are stored.

    Args:
        path: the file.
        what: names the weights in the message.

    Raises:
        WeightsError: the file cannot be read, or has no configuration.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            # copied out of the file, which may then be replaced
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise WeightsError(
            f"'{path}' holds no {what} weights ({error}); reinstall FreqSeg or train them again."
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"'{path}' holds no {what} weights; reinstall FreqSeg or train them again.")
    return config, state


def module_of(path: Path, what: str, build: Callable[[dict[str, Any]], Module]) -> Module:
    """A module that :func:`save_half` wrote, as float32, frozen, in evaluation mode.

    Args:
        path: the file.
        what: names the weights in the message.
        build: makes the module of its configuration.

    Raises:
        WeightsError: unreadable, or tensors that do not fit (key and shapes are named).
    """
    config, state = read_half(path, what)
    try:
        module = build(config)
    except (TypeError, SettingsError) as error:
        raise WeightsError(f"'{path}' holds no {what} weights ({error}); reinstall FreqSeg.") from error
    load_exactly(module, state, path)
    return module.requires_grad_(False).eval()


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            # Copied out of the file: it may then be replaced, and memory is aligned as for any other format, so that
            # rounding is the same.
            return {key: value.clone() for key, value in load_file(path).items()}
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged or not a safetensors file ({error}). Get it again.") from error

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise WeightsError(
                f"{path} holds Python objects besides tensors, and FreqSeg runs no code from a checkpoint. "
                "Save the model's state dict alone, with torch.save or as safetensors, and give that file."
            ) from error
        raise WeightsError(f"{path} is damaged or not a checkpoint. Get it again.") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript archive, and FreqSeg runs no code from a checkpoint. "
                "Save the model's state dict alone, with torch.save or as safetensors, and give that file."
            ) from error
        raise WeightsError(f"{path} is damaged or not a checkpoint. Get it again.") from error


def _unwrap(content: Any) -> StateDict:
    if not isinstance(content, Mapping):
        return {}
    for nest in _NESTS:
        if isinstance(content.get(nest), Mapping):
            return _unwrap(content[nest])
    state = {str(key): value for key, value in content.items() if hasattr(value, "shape")}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _faults(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What differs, one clause a kind, each naming the first key of its kind."""
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    faults = []
    if shapes:
        key = shapes[0]
        found, right = tuple(state[key].shape), tuple(expected[key].shape)
        faults.append(f"key '{key}' has shape {found}, expected {right}{_more(shapes)}")
    if missing:
        key = missing[0]
        faults.append(f"key '{key}' of shape {tuple(expected[key].shape)} is missing{_more(missing)}")
    if unknown:
        key = unknown[0]
        faults.append(f"key '{key}' of shape {tuple(state[key].shape)} is unknown{_more(unknown)}")
    return faults


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
