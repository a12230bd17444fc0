"""`anomalib drift`: whether parts still look like those of the training."""

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from anomalib_exdd.commands.banks import load_checkpoint
from anomalib_exdd.commands.subcommand import Subcommand
from anomalib_exdd.images.file_discovery import list_images
from anomalib_exdd.images.predict_loader import leave_out_masks
from anomalib_exdd.models.record import Record
from anomalib_exdd.utils.files import write_file

from .drift import EVERY, LAST, Drift, from_images, from_record

DRIFTED = 4
"""Exit code of `anomalib drift` after an alarm."""


class DriftCommand(Subcommand):
    """Tell whether parts still look like those of the training, from a record or a folder of images."""

    @staticmethod
    def get_parser() -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        parser = ArgumentParser(description=DriftCommand.__doc__)
        parser.add_argument("--record", type=Path | None, help="Record of `predict --model.record` or of `review`.")
        parser.add_argument("--data", type=Path | None, help="Instead of a record, a folder of images, by name.")
        parser.add_argument("--ckpt_path", type=Path | None, help="With --data, the checkpoint of the model.")
        parser.add_argument("--last", type=int, default=LAST, help="How many images count as today's.")
        parser.add_argument(
            "--every", type=int, default=EVERY, help="Images for which one false alarm is allowed, on average."
        )
        parser.add_argument(
            "--output",
            type=Path,
            default=Path("results/drift"),
            help="Folder for drift.json, drift.png and record.csv.",
        )
        return parser

    def call(self, config: Namespace) -> None:
        """Print what the images say, and leave with a code of its own after an alarm."""
        if (config.record is None) == (config.data is None) or (config.data is None) != (config.ckpt_path is None):
            msg = "Give either --record, or --data and --ckpt_path."
            raise ValueError(msg)
        for name in ("last", "every"):
            if config[name] < 1:
                msg = f"Argument --{name} has to be at least 1, but is {config[name]}."
                raise ValueError(msg)
        config.output.mkdir(parents=True, exist_ok=True)
        if config.record is None:
            images = from_images(load_checkpoint(config.ckpt_path), _images_in(config.data))
        else:
            if not config.record.is_file():
                msg = f"The record {config.record} does not exist."
                raise FileNotFoundError(msg)
            record = Record(config.record)
            images = from_record(record)
            record.write_csv(config.output / "record.csv")
        drift = Drift(images, config.last, config.every)
        write_file(config.output / "drift.json", json.dumps(drift.to_dict(), indent=2) + "\n")
        print(drift)
        print(f"Picture: {drift.draw(config.output / 'drift.png').resolve()}")
        if drift.drifted:
            raise SystemExit(DRIFTED)


def _images_in(folder: Path) -> list[Path]:
    """List the images of a folder by name, without the masks beside them."""
    return leave_out_masks(list_images("--data", folder, Path.cwd()))[0]
