"""`anomalib synthesize`: a folder of synthetic defects from the training images of any of our data modules."""

import inspect
import json
import logging
import shlex
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from anomalib.data.utils import LabelName
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from tqdm import tqdm

from anomalib_exdd.data.base import DefectDataModule
from anomalib_exdd.images.masks import read_mask
from anomalib_exdd.images.reading import WHITE_LEVEL, read_image
from anomalib_exdd.reporting.contact_sheet import preview
from anomalib_exdd.synthesis.change import MaskMode
from anomalib_exdd.synthesis.diag import DiagSynthesizer
from anomalib_exdd.synthesis.dreambooth import DreamBoothSynthesizer
from anomalib_exdd.synthesis.in_and_out import InAndOutSynthesizer
from anomalib_exdd.synthesis.manifest import read_synthetic
from anomalib_exdd.synthesis.masks import MaskSource
from anomalib_exdd.synthesis.material import Material
from anomalib_exdd.synthesis.paste import PasteSynthesizer
from anomalib_exdd.synthesis.perlin import PerlinSynthesizer
from anomalib_exdd.synthesis.run import SynthesisRun
from anomalib_exdd.synthesis.run_settings import RunSettings
from anomalib_exdd.synthesis.synthesizer import Mask, Pixels, Synthesizer

from .synthesis_report import answer, write_reports
from .verb import Verb

logger = logging.getLogger(__name__)

# Imported so that the command line finds them by their plain names.
SYNTHESIZERS = (DiagSynthesizer, DreamBoothSynthesizer, InAndOutSynthesizer, PasteSynthesizer, PerlinSynthesizer)
_NO_TIMEOUT = timedelta(days=100)  # processes wait for the slowest one, which may take long


class Synthesize(Verb):
    """Draw synthetic defects into normal training images, to be reviewed and trained with."""

    @staticmethod
    def get_parser() -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        parser = ArgumentParser(description=Synthesize.__doc__)
        add = parser.add_argument
        add("-c", "--config", action=ActionConfigFile, help="Configuration file in YAML, such as those in configs/.")
        parser.add_subclass_arguments(DefectDataModule, "data", required=True)
        parser.add_subclass_arguments(Synthesizer, "synthesizer", required=True)
        add("--count", type=int, default=100, help="How many images.")
        add("--output", type=Path, required=True, help="Folder to write; goes on with what an interrupted run left.")
        add("--seed", type=int, default=0, help="Seed of everything random.")
        add("--prompts", type=list[str], default=[], help="Defects in words; default: the synthesizer's own.")
        add("--masks", type=MaskSource, default="auto", help=f"Where defects are placed: {_words(MaskSource)}.")
        add(
            "--mask_mode",
            type=MaskMode,
            default="intersection",
            help=f"What the mask of a synthetic image shows: {_words(MaskMode)}. The place that was asked for, what "
            "really changed, or both together.",
        )
        add("--min_change", type=float, default=8.0, help="Grey levels by which an image has to change visibly.")
        add("--retries", type=int, default=3, help="How often an image without a visible change is made again.")
        add(
            "--batch_size",
            type=int,
            default=4,
            help="Images handed to the synthesizer at once. They do not depend on it, but for the rounding of a "
            "diffusion model that draws them together; see its argument `batched`.",
        )
        add("--accelerator", type=str, default="auto", help="Kind of device, as of Lightning: auto, cpu, gpu, mps.")
        add("--devices", type=int | list[int] | str, default=1, help="How many devices, which, or all of them (-1).")
        add("--num_nodes", type=int, default=1, help="How many machines; they share the folder.")
        add("--overwrite", action="store_true", help="Remove the images of an earlier run from the folder.")
        return parser

    def run(self, config: Namespace) -> None:
        """Run the subcommand, and end with one line where input, model or machine do not suffice."""
        try:
            super().run(config)
        except (RuntimeError, OSError) as error:  # the extra is missing, no memory, no network, no space on the disk
            logger.debug("Where it happened:", exc_info=True)
            msg = f"Error: {error} (Finished images are kept; the same command goes on from there.)"
            raise SystemExit(msg) from error

    def call(self, config: Namespace) -> None:
        """Make the images, and write manifest, contact sheet and page."""
        made = self.get_parser().instantiate_classes(config)
        datamodule, synthesizer = made.data, made.synthesizer
        settings = RunSettings(
            count=config.count,
            seed=config.seed,
            masks=config.masks,
            prompts=tuple(config.prompts),
            mask_mode=config.mask_mode,
            min_change=config.min_change,
            retries=config.retries,
        )
        fabric = launch(config.accelerator, config.devices, config.num_nodes)
        on_first(fabric, datamodule.prepare_data)
        datamodule.setup()
        run = SynthesisRun(
            config.output,
            material_of(datamodule),
            synthesizer,
            settings,
            batch_size=config.batch_size,
            preview=preview,
            command=_this_command(),
        )
        on_first(fabric, lambda: run.open(overwrite=config.overwrite))
        synthesizer.device = str(fabric.device)
        on_first(fabric, run.prepare)  # may train and save a model, which the others then find
        if fabric.global_rank > 0:
            run.prepare()
        _work(run, fabric)
        fabric.barrier()
        on_first(fabric, lambda: _finish(run))
        if fabric.global_rank == 0:
            print(answer(config.output, _train_command(datamodule, config)))


def launch(accelerator: str, devices: int | list[int] | str, num_nodes: int) -> Fabric:
    """Start the processes of a run, one for each device.

    They only wait for each other, so they talk over the CPU, without a limit of time.
    """
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes)
    if isinstance(fabric.strategy, DDPStrategy):
        strategy = DDPStrategy(process_group_backend="gloo", timeout=_NO_TIMEOUT)
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    fabric.launch()
    return fabric


def on_first(fabric: Fabric, action: Callable[[], None]) -> None:
    """Let the first process do something while the others wait.

    Raises:
        ValueError: In all processes, if the first one was refused.
    """
    problem: str | None = None
    if fabric.global_rank == 0:
        try:
            action()
        except (ValueError, RuntimeError, OSError) as error:
            problem = str(error)
    problem = fabric.broadcast(problem)
    if problem is not None:
        raise ValueError(problem)


def material_of(datamodule: DefectDataModule) -> Material:
    """Return the real training images of a data module that was set up.

    Validation and test images take no part: what is measured on them is measured on images never seen.
    """
    samples = datamodule.train_data.samples
    samples = samples[~samples["is_synthetic"]].sort_values("image_path")
    defective = samples[(samples["label_index"] == LabelName.ABNORMAL) & (samples["mask_path"] != "")]
    return Material(
        normals=[str(path) for path in samples["image_path"][samples["label_index"] == LabelName.NORMAL]],
        defects=[
            (str(image), str(mask)) for image, mask in zip(defective.image_path, defective.mask_path, strict=True)
        ],
        read_image=partial(read_pixels, white_level=datamodule.white_level),
        read_mask=read_defect_pixels,
        kinds={str(image): str(kind) for image, kind in zip(defective.image_path, defective.kind, strict=True)},
    )


def read_pixels(path: str, white_level: int = WHITE_LEVEL) -> Pixels:
    """Read an image as training reads it, at its own resolution, `[H, W, 3]`, uint8."""
    return np.ascontiguousarray((read_image(path, white_level) * 255).round().byte().permute(1, 2, 0).numpy())


def read_defect_pixels(path: str) -> Mask:
    """Read a mask as training reads it, `[H, W]`, bool."""
    return np.asarray(read_mask(path).numpy() > 0)


def _work(run: SynthesisRun, fabric: Fabric) -> None:
    rank, world_size = fabric.global_rank, fabric.world_size
    share = len(range(rank, run.settings.count, world_size))
    missing = len(run.missing(rank, world_size))
    label = "Synthesizing" if world_size == 1 else f"Synthesizing (process 1 of {world_size})"
    rejected = 0
    with tqdm(desc=label, total=share, initial=share - missing, unit="image", disable=rank > 0) as bar:
        for record in run.work(rank, world_size):
            rejected += not record.accepted
            bar.set_postfix(rejected=rejected, refresh=False)
            bar.update()


def _finish(run: SynthesisRun) -> None:
    run.finish()
    write_reports(run.folder.root, read_synthetic(run.folder.root, with_rejected=True))


def _train_command(datamodule: DefectDataModule, config: Namespace) -> str:
    """Return the command that trains with the images, for the same split of the same data."""
    words = ["anomalib", "train", "--model", "ExDD", "--data", "SyntheticDefects"]
    words += ["--data.base", type(datamodule).__name__]
    defaults = dict(inspect.signature(DefectDataModule).parameters)
    defaults |= inspect.signature(type(datamodule)).parameters
    for name, value in config.data.as_dict().get("init_args", {}).items():
        if value != defaults[name].default:
            words += [f"--data.base.{name}", _as_argument(value)]
    return shlex.join([*words, "--data.synthetic_root", str(config.output)])


def _as_argument(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def _this_command() -> str:
    if "synthesize" not in sys.argv[1:2]:  # called from Python
        return ""
    return shlex.join(["anomalib", *(word for word in sys.argv[1:] if word != "--overwrite")])


def _words(literal: Any) -> str:
    return ", ".join(get_args(literal))
