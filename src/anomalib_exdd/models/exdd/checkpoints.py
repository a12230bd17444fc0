"""Writing a changed model back into its checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from anomalib_exdd.utils.files import write_atomically

HISTORY = "exdd_history"
"""Where a checkpoint keeps what was done to the banks after training."""


def save_changed(model: LightningModule, checkpoint: str | Path, output: str | Path | None = None) -> Path:
    """Write a model's state into a copy of the checkpoint that it was loaded from.

    The new file is complete before it takes its name, so that an interruption leaves the old one as it was.

    Args:
        model: The changed model.
        checkpoint: The checkpoint that it was loaded from; everything but the state is taken from there.
        output: Where to write; by default the checkpoint itself is replaced.

    Returns:
        The file written.
    """
    output = Path(output or checkpoint)
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    content["state_dict"] = model.state_dict()
    model.on_save_checkpoint(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(output) as partial:
        torch.save(content, partial)
    return output
