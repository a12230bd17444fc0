"""`anomalib synthesize`: a folder of synthetic defects from the training images of any of our data modules."""

import inspect
import json
import shlex
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
from anomalib.data.utils import LabelName
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric import Fabric

from anomalib_exdd.commands.subcommand import Subcommand
from anomalib_exdd.data.base import DefectDataModule
from anomalib_exdd.images.masks import read_defect_pixels
from anomalib_exdd.images.reading import WHITE_LEVEL, read_image
from anomalib_exdd.utils.files import write_file

from .base import Pixels, Synthesizer
from .manifest import PAGE_NAME, SHEET_NAME, read_synthetic, write_image
from .review_page import contact_sheet, review_page
from .run import RunSettings, SourceImages, SynthesisRun

SHOWN_REASONS = 5


class Synthesize(Subcommand):
    """Draw synthetic defects into normal training images, to be reviewed and trained with."""

    kept = "Finished images are kept; the same command goes on from there."

    @staticmethod
    def get_parser() -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        parser = ArgumentParser(description=Synthesize.__doc__)
        add = parser.add_argument
        add("-c", "--config", action=ActionConfigFile, help="Configuration file in YAML, such as those in configs/.")
        parser.add_subclass_arguments(DefectDataModule, "data", required=True)
        parser.add_subclass_arguments(Synthesizer, "synthesizer", required=True)
        parser.add_class_arguments(RunSettings)
        add("--output", type=Path, required=True, help="Folder to write; goes on with what an interrupted run left.")
        add(
            "--batch_size",
            type=PositiveInt,
            default=4,
            help="Images handed to the synthesizer at once; does not change them, except by rounding if a diffusion "
            "model draws them together (`batched`).",
        )
        add("--accelerator", type=str, default="auto", help="Kind of device, as of Lightning: auto, cpu, gpu, mps.")
        add("--devices", type=int | list[int] | str, default=1, help="How many devices, which, or all of them (-1).")
        add("--num_nodes", type=int, default=1, help="How many machines; they share the folder.")
        add("--overwrite", action="store_true", help="Remove the images of an earlier run from the folder.")
        return parser

    def call(self, config: Namespace) -> None:
        """Make the images, and write manifest, contact sheet and page."""
        made = self.get_parser().instantiate_classes(config)
        settings = RunSettings(**{field.name: config[field.name] for field in fields(RunSettings)})
        fabric = Fabric(accelerator=config.accelerator, devices=config.devices, num_nodes=config.num_nodes)
        fabric.launch()
        made.synthesizer.device = str(fabric.device)
        with fabric.rank_zero_first():  # it may fetch data, and train a model, which the others then find
            made.data.prepare_data()
            made.data.setup()
            sources, command = source_images(made.data), _this_command()
            run = SynthesisRun(config.output, sources, made.synthesizer, settings, config.batch_size, command)
            run.open(overwrite=config.overwrite and fabric.is_global_zero)
        for _ in run.work(fabric.global_rank, fabric.world_size):
            pass
        with fabric.rank_zero_first():
            pass  # the slowest process may take long: this barrier has no time limit, that of Fabric's backend has one
        if fabric.is_global_zero:
            print(_finish(run, _train_command(made.data, config)))


def source_images(datamodule: DefectDataModule) -> SourceImages:
    """Return the real training images of a data module that was set up; validation and test images stay unseen."""
    samples = datamodule.train_data.samples
    samples = samples[~samples["is_synthetic"]].sort_values("image_path")
    normal = samples[samples["label_index"] == LabelName.NORMAL]
    defective = samples[(samples["label_index"] == LabelName.ABNORMAL) & (samples["mask_path"] != "")].astype(str)
    return SourceImages(
        normals=normal["image_path"].astype(str).tolist(),
        defects=list(zip(defective["image_path"], defective["mask_path"], strict=True)),
        read_image=partial(read_pixels, white_level=datamodule.white_level),
        read_mask=read_defect_pixels,
        kinds=dict(zip(defective["image_path"], defective["kind"], strict=True)),
    )


def read_pixels(path: str, white_level: int = WHITE_LEVEL) -> Pixels:
    """Read an image as training reads it, at its own resolution, `[H, W, 3]`, uint8."""
    return np.ascontiguousarray((read_image(path, white_level) * 255).round().byte().permute(1, 2, 0).numpy())


def _finish(run: SynthesisRun, train_command: str) -> str:
    """Write manifest, contact sheet and page; return what was made, and the command that trains with it."""
    records, output = run.finish(), run.output
    images = read_synthetic(output, with_rejected=True)
    write_image(output / SHEET_NAME, contact_sheet(output, records))
    write_file(output / PAGE_NAME, review_page(f"Synthetic defects: {output.resolve().name}", images))
    rejected = [record for record in records if not record.accepted]
    usable = sum(image.accepted for image in images)
    lines = [f"{len(records)} images: {len(records) - len(rejected)} accepted, {len(rejected)} rejected."]
    lines += [f"  {record.image}: {record.reason}" for record in rejected[:SHOWN_REASONS]]
    if len(rejected) > SHOWN_REASONS:
        lines.append(f"  ... and {len(rejected) - SHOWN_REASONS} more, see manifest.csv")
    if reviewed := sum(bool(image.decision) for image in images):
        lines.append(f"Reviewed: {reviewed}; training uses {usable}.")
    lines += [
        f"Folder: {output.resolve()}",
        f"Contact sheet: {(output / SHEET_NAME).resolve()}",
        f"Review: open {(output / PAGE_NAME).resolve()} in a browser, or fill in review.csv",
        f"Train with it: {train_command} --data.count {usable}"
        if usable
        else "No image can be used: look at the sheet, then try other prompts or masks, or a lower --min_change.",
    ]
    return "\n".join(lines)


def _train_command(datamodule: DefectDataModule, config: Namespace) -> str:
    words = ["anomalib", "train", "--model", "ExDD", "--data", "SyntheticDefects"]
    words += ["--data.base", type(datamodule).__name__]
    defaults = dict(inspect.signature(DefectDataModule).parameters) | inspect.signature(type(datamodule)).parameters
    for name, value in config.data.as_dict().get("init_args", {}).items():
        if value != defaults[name].default:
            text = str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
            words += [f"--data.base.{name}", text]
    return shlex.join([*words, "--data.synthetic_root", str(config.output)])


def _this_command() -> str:
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    return shlex.join(["anomalib", *words]) if "synthesize" in words[:1] else ""  # empty if called from Python
