"""Fitting in several processes: what Lightning's DDP needs beside banks that are built together."""

from typing import Any, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

_ANCHOR = "gradient_anchor"


class DistributedFit(nn.Module):
    """Lets a module without trainable parameters be fitted by Lightning's DDP.

    DDP refuses to wrap a module in which nothing requires a gradient. While several processes fit, the module therefore
    has one parameter that nothing depends on; it is in no checkpoint.
    """

    trainer: Any

    def setup(self, stage: str) -> None:
        """Have the parameter while several processes fit."""
        cast("Any", super()).setup(stage)
        if self.trainer.world_size > 1 and stage == TrainerFn.FITTING:
            self.register_parameter(_ANCHOR, nn.Parameter(torch.zeros((), device=cast("Any", self).device)))

    def no_loss(self) -> Tensor:
        """Return the loss that Lightning wants of every step, with a gradient; there is nothing to optimise."""
        anchor: Tensor | None = self._parameters.get(_ANCHOR)
        if anchor is not None:
            return anchor * 0
        return torch.zeros((), requires_grad=True, device=cast("Any", self).device)

    def teardown(self, stage: str) -> None:
        """Be a module without trainable parameters again."""
        self._parameters.pop(_ANCHOR, None)
        cast("Any", super()).teardown(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the anchor out."""
        cast("Any", super()).on_save_checkpoint(checkpoint)
        checkpoint.get("state_dict", {}).pop(_ANCHOR, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept checkpoints without the anchor, which are all of them."""
        cast("Any", super()).on_load_checkpoint(checkpoint)
        if _ANCHOR in self._parameters:
            checkpoint["state_dict"][_ANCHOR] = self._parameters[_ANCHOR]
