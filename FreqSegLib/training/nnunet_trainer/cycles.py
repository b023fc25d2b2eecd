"""A trainer that nnU-Net finds by its own ``nnUNet_extTrainer``: its rate starts anew every cycle.

Zhao et al., "Efficient Bayesian uncertainty estimation for nnU-Net" (MICCAI 2022): one run of cycles gives an ensemble,
a checkpoint a cycle. Runs inside nnU-Net's process, which may be another environment than FreqSeg's: it imports nothing
of FreqSeg, and its numbers come from the environment.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class CyclicRate(PolyLRScheduler):
    """nnU-Net's rate, begun again after every ``max_steps`` epochs."""

    def step(self, current_step: int | None = None) -> None:
        """Set the rate of an epoch."""
        super().step(None if current_step is None else current_step % self.max_steps)


class nnUNetTrainerCycles(nnUNetTrainer):
    """nnU-Net's trainer for FREQSEG_CYCLES cycles of FREQSEG_EPOCHS epochs of FREQSEG_ITERATIONS batches."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        cycles, self.cycle = int(os.environ["FREQSEG_CYCLES"]), int(os.environ["FREQSEG_EPOCHS"])
        self.num_epochs = cycles * self.cycle
        self.num_iterations_per_epoch = int(os.environ["FREQSEG_ITERATIONS"])
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)
        self.save_every = self.cycle

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's optimiser with the rate in cycles."""
        optimiser, _ = super().configure_optimizers()
        return optimiser, CyclicRate(optimiser, self.initial_lr, self.cycle)

    def on_epoch_end(self) -> None:
        """Keep a checkpoint where a cycle ends."""
        super().on_epoch_end()
        number, rest = divmod(self.current_epoch, self.cycle)
        if not rest:
            # what is stored is the number of the epoch that ended, plus one
            self.current_epoch -= 1
            self.save_checkpoint(os.path.join(self.output_folder, f"checkpoint_cycle_{number}.pth"))
            self.current_epoch += 1
