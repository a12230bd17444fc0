"""`anomalib review`, the page, and `anomalib drift`, whether parts still look like those of the training."""

from importlib.util import find_spec
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from anomalib_exdd.commands.banks import load_checkpoint
from anomalib_exdd.commands.subcommand import Subcommand
from anomalib_exdd.images.file_discovery import list_images
from anomalib_exdd.images.predict_loader import leave_out_masks
from anomalib_exdd.models.record import Record

from .drift import EVERY, LAST, Drift, from_images, from_record
from .station import Station

DRIFTED = 4
"""Exit code of `anomalib drift` after an alarm."""
LOCAL = ("127.0.0.1", "localhost", "::1")


class ReviewCommand(Subcommand):
    """Open a page to review images and teach the model, which also answers `POST /predict`."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""
        parser.add_argument("--ckpt_path", type=Path, required=True, help="Checkpoint of an ExDD model; is changed.")
        parser.add_argument("--data", type=Path | None, help="Folder of images to review.")
        parser.add_argument("--record", type=Path, default=Path("results/record.db"), help="Record to write into.")
        parser.add_argument("--host", type=str, default=LOCAL[0], help="Address to listen at; others need a password.")
        parser.add_argument("--port", type=int, default=7860, help="Port to listen at.")
        parser.add_argument("--password", type=str | None, help="Password of the user `review`.")

    def call(self, config: Namespace) -> None:
        """Predict the folder, and serve until interrupted."""
        if config.host not in LOCAL and not config.password:
            msg = f"Others could open the page at {config.host}: give it a --password."
            raise ValueError(msg)
        if find_spec("gradio") is None:
            msg = "The page needs Gradio: pip install 'anomalib-exdd[station]'."
            raise ValueError(msg)
        from .server import serve  # noqa: PLC0415  an extra

        paths = [] if config.data is None else _images_in(config.data)
        station = Station(config.ckpt_path, config.record)
        for path in tqdm(paths, "Predicting"):
            station.predict(path)
        print(f"Review: http://{config.host}:{config.port}  Record: {config.record}  Stop: Ctrl+C")
        serve(station, config.host, config.port, config.password)


class DriftCommand(Subcommand):
    """Tell whether parts still look like those of the training, from a record or a folder of images."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""
        parser.add_argument("--record", type=Path | None, help="Record of `predict --model.record` or of `review`.")
        parser.add_argument("--data", type=Path | None, help="Instead of a record, a folder of images, by name.")
        parser.add_argument("--ckpt_path", type=Path | None, help="With --data, the checkpoint of the model.")
        parser.add_argument("--last", type=PositiveInt, default=LAST, help="How many images count as today's.")
        parser.add_argument("--every", type=PositiveInt, default=EVERY, help="Images for one false alarm, on average.")
        folder = Path("results/drift")
        parser.add_argument("--output", type=Path, default=folder, help="Folder for drift.png and record.csv.")

    def call(self, config: Namespace) -> None:
        """Print what the images say, and leave with a code of its own after an alarm."""
        if (config.record is None) == (config.data is None) or (config.data is None) != (config.ckpt_path is None):
            msg = "Give either --record, or --data and --ckpt_path."
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
        print(drift)
        print(f"Picture: {drift.draw(config.output / 'drift.png').resolve()}")
        if drift.drifted:
            raise SystemExit(DRIFTED)


def _images_in(folder: Path) -> list[Path]:
    """List the images of a folder by name, without the masks beside them."""
    return leave_out_masks(list_images("--data", folder, Path.cwd()))[0]
