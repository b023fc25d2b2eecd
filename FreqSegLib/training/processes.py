"""Several processes that train together, as torchrun starts them: one a device, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from FreqSegLib.errors import SettingsError

Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Team:
    """Which of how many processes this is.

    Attributes:
        rank: from 0; the first one writes the files and speaks.
        world: processes in all.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """This process's part of a batch.

        Raises:
            SettingsError: the batch cannot be shared out evenly.
        """
        if batch_size % self.world:
            raise SettingsError(f"batch_size must be a multiple of the {self.world} processes, got {batch_size}")
        return batch_size // self.world

    def averaging(self, module: Module) -> Module | DistributedDataParallel:
        """The module, its gradients averaged over the processes in every backward pass."""
        return DistributedDataParallel(module) if self.world > 1 else module

    def wait(self) -> None:
        """Return when all processes have called it."""
        if self.world > 1:
            distributed.barrier()

    def gathered(self, part: Tensor) -> Tensor:
        """The parts (b, ...) of all processes, one after the other; a gradient flows into this process's own alone."""
        if self.world == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world)]
        distributed.all_gather(parts, part.detach().contiguous())
        parts[self.rank] = part
        return torch.cat(parts)

    def told_by_the_first(self, compute: Callable[[], Result]) -> Callable[[], Result]:
        """``compute`` so that the first process runs it and all have its result: decisions must not differ."""
        if self.world == 1:
            return compute

        def shared() -> Result:
            result: list[Result | None] = [compute() if self.leads else None]
            distributed.broadcast_object_list(result, src=0)
            found = result[0]
            assert found is not None
            return found

        return shared


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, processes in all, device): one process, or those that torchrun started, for the length of the block."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, device
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank, world, device
    finally:
        distributed.destroy_process_group()
