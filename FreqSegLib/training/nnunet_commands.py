"""nnU-Net v2 as it is: its own commands as child processes, with its environment variables set for them alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from FreqSegLib.errors import FreqSegError, SettingsError

COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")
TRAINER = "nnUNetTrainerCycles"
TRAINER_FOLDER = Path(__file__).parent / "nnunet_trainer"
_TRAINERS = "nnUNet_extTrainer"
# what nnU-Net prints of an epoch, after its time stamp
_TOLD = re.compile(r"(?:^|: )((?:Epoch \d+|train_loss|val_loss|Pseudo dice|Training done|Mean Validation Dice)\b.*)")


@dataclass(frozen=True)
class NNUNetConfig:
    """How nnU-Net is run.

    Attributes:
        dataset_id: of the dataset it makes, from 1 to 999.
        configuration: of its plans; 2d for pictures.
        fold: 0 to 4 of its cross-validation (at least 5 cases), or all.
        cycles: of the learning rate; a checkpoint of each makes the ensemble.
        epochs: a cycle.
        iterations: batches an epoch; nnU-Net's own number is 250.
        processes: that it uses beside the one that trains.
        gpu_memory: its planner's target in GB, which decides patch and batch size; 0 for its own.
        commands: folder of its commands, where they are not installed beside FreqSeg and not on the PATH.
    """

    dataset_id: int = 501
    configuration: Literal["2d", "3d_fullres", "3d_lowres"] = "2d"
    fold: Literal["0", "1", "2", "3", "4", "all"] = "0"
    cycles: int = 3
    epochs: int = 50
    iterations: int = 250
    processes: int = 2
    gpu_memory: float = 0.0
    commands: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.dataset_id <= 999:
            raise SettingsError(f"dataset_id must lie in 1 to 999, got {self.dataset_id}")
        for name in ("cycles", "epochs", "iterations", "processes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders of a run, and the logs of its commands."""

    base: Path

    @property
    def raw(self) -> Path:
        return self.base / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.base / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.base / "nnUNet_results"

    @property
    def logs(self) -> Path:
        return self.base / "logs"


def find_commands(folder: str = "") -> dict[str, str]:
    """Where nnU-Net's commands are.

    Raises:
        SettingsError: one is missing; says how to get it.
    """
    places = [folder] if folder else [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = {name: shutil.which(name, path=os.pathsep.join(places)) for name in COMMANDS}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        where = f"in {folder}" if folder else "on this machine"
        raise SettingsError(
            f"nnU-Net v2 is not {where} ({missing[0]} was not found). Install it: pip install 'freqseg[nnunet]', or "
            "name the folder of its commands as nnunet.commands; --prepare-only writes the dataset without it."
        )
    return {name: path for name, path in found.items() if path is not None}


def environment(config: NNUNetConfig, folders: Folders, device: str, *, training: bool = False) -> dict[str, str]:
    """This process's environment with nnU-Net's variables for one of its commands.

    Args:
        config, folders: see there.
        device: cpu, cuda or cuda:N.
        training: for the command that trains; on a CPU it prepares its batches itself, as planning cannot.
    """
    kind, _, number = device.partition(":")
    trainers = [str(TRAINER_FOLDER), *filter(None, [os.environ.get(_TRAINERS)])]
    said = {
        "nnUNet_raw": str(folders.raw.absolute()),
        "nnUNet_preprocessed": str(folders.preprocessed.absolute()),
        "nnUNet_results": str(folders.results.absolute()),
        _TRAINERS: os.pathsep.join(trainers),
        "nnUNet_n_proc_DA": "0" if training and kind == "cpu" else str(config.processes),
        "nnUNet_def_n_proc": str(config.processes),
        "FREQSEG_CYCLES": str(config.cycles),
        "FREQSEG_EPOCHS": str(config.epochs),
        "FREQSEG_ITERATIONS": str(config.iterations),
        "PYTHONUNBUFFERED": "1",
    }
    if kind == "cpu":
        said["nnUNet_compile"] = "f"
    if number:
        said["CUDA_VISIBLE_DEVICES"] = number
    return {**os.environ, **said}


def plan_command(config: NNUNetConfig) -> list[str]:
    """Fingerprint, plans and preprocessed cases."""
    count = str(config.processes)
    memory = ["-gpu_memory_target", f"{config.gpu_memory:g}"] if config.gpu_memory else []
    return [
        *(COMMANDS[0], "-d", str(config.dataset_id), "-c", config.configuration, "-np", count, "-npfp", count),
        *("--verify_dataset_integrity", *memory),
    ]


def train_command(config: NNUNetConfig, device: str, *, resume: bool) -> list[str]:
    """One fold, from its last checkpoint where there is one."""
    return [
        *(COMMANDS[1], str(config.dataset_id), config.configuration, config.fold, "-tr", TRAINER),
        *("-device", device.partition(":")[0], *(["--c"] if resume else [])),
    ]


def predict_command(config: NNUNetConfig, source: Path, target: Path, cycle: int, device: str) -> list[str]:
    """One checkpoint's probabilities of every image in a folder; those that are there already are kept."""
    return [
        *(COMMANDS[2], "-i", str(source.absolute()), "-o", str(target.absolute()), "-d", str(config.dataset_id)),
        *("-c", config.configuration, "-f", config.fold, "-tr", TRAINER, "-chk", f"checkpoint_cycle_{cycle}.pth"),
        *("--save_probabilities", "--continue_prediction", "-device", device.partition(":")[0]),
        *("-npp", "1", "-nps", "1"),
    ]


def run_command(
    command: Sequence[str],
    commands: Mapping[str, str],
    variables: Mapping[str, str],
    log: Path,
    report: Callable[[str], None],
) -> None:
    """Run one of nnU-Net's commands to its end; whatever stops this process ends it and its children.

    Args:
        command: its name, then its arguments.
        commands: where each is.
        variables: its environment.
        log: gets all it prints.
        report: told what it prints of each epoch.

    Raises:
        FreqSegError: it failed; says what it printed last, and where the rest is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    report(f"{' '.join(command)}")
    process = subprocess.Popen(
        [commands[command[0]], *command[1:]],
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    last: list[str] = []
    try:
        assert process.stdout is not None
        with log.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = [*last, line.strip()][-30:]
                told = _TOLD.search(line.strip())
                if told:
                    report(f"nnU-Net: {told.group(1)}")
        code = process.wait()
    finally:
        end_tree(process)
    if code:
        said = next((line for line in reversed(last) if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
        reason = said or next((line for line in reversed(last) if line), "it said nothing")
        raise FreqSegError(f"{command[0]} ended with code {code}: {reason} All it printed is in {log}.")


def end_tree(process: subprocess.Popen[str]) -> None:
    """End a process that still runs, and all it started."""
    import psutil

    if process.poll() is None:
        with suppress(psutil.Error):
            top = psutil.Process(process.pid)
            doomed = [*top.children(recursive=True), top]
            for one in doomed:
                with suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs(doomed, timeout=5)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
