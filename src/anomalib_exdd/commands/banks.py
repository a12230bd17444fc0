"""`anomalib info`, `anomalib teach` and `anomalib forget`: the banks of a trained checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from anomalib_exdd.images.masks import check_same_size, looks_inverted, read_mask, warn_of_inverted_masks
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.callbacks.checkpoint import save_changed
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.exdd.bank_editing import kinds_summary, summary
from anomalib_exdd.utils.files import write_file

from .subcommand import Subcommand


class Info(Subcommand):
    """Show what is in the memory banks of an ExDD checkpoint."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""
        parser.add_argument("--ckpt_path", type=Path, required=True, help="Checkpoint that `anomalib train` wrote.")
        parser.add_argument("--all", action="store_true", help="List every image instead of the ten with most entries.")
        parser.add_argument("--json", type=Path | None, help="Write everything to this JSON file as well.")

    def call(self, config: Namespace) -> None:
        """Print the banks' content."""
        model = load_checkpoint(config.ckpt_path)
        info, decisions = model.info(), model.decisions
        if config.json is not None:
            content = {
                "sources": [asdict(each) for each in info],
                "history": model.history,
                "decisions": None if decisions is None else decisions._asdict(),
            }
            write_file(config.json, json.dumps(content, indent=2) + "\n")
        for bank in ("negative", "positive"):
            print(f"{bank.capitalize()} bank: {summary(info, bank)}")
            ours = [each for each in info if each.bank == bank]
            shown = ours if config.all else ours[:10]
            for each in shown:
                print(f"  {each.entries:6d}  {_named(each.source, each.kind)}")
            if len(ours) > len(shown):
                print(f"          ... and {len(ours) - len(shown)} more images (--all)")
        if kinds := kinds_summary(info):
            print(f"Kinds of defects: {kinds}")
        if decisions is not None:
            print(decisions)
        for change in model.history:
            named = _named(change["source"], change.get("kind", ""))
            print(f"{change['date']}  {change['action']} {named}: {change['entries']} entries")


class Teach(Subcommand):
    """Add a new defect, or a good part that was not accepted, to the banks of an ExDD checkpoint, without training."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""
        parser.add_argument("--ckpt_path", type=Path, required=True, help="Checkpoint that `anomalib train` wrote.")
        parser.add_argument("--image", type=Path, required=True, help="Image of the defect or of the good part.")
        parser.add_argument("--mask", type=Path | None, help="Its mask, of its size: black where there is no defect.")
        parser.add_argument(
            "--box",
            type=tuple[int, int, int, int] | None,
            help="Instead of a mask, a box around the defect in pixels of the image: '[left, top, width, height]'.",
        )
        parser.add_argument("--good", action="store_true", help="Instead of a mask: the whole image shows a good part.")
        parser.add_argument("--kind", default="", help="Kind of the defect; `anomalib info` lists those known.")
        parser.add_argument("--output", type=Path | None, help="Changed checkpoint; default: over the old one.")

    def call(self, config: Namespace) -> None:
        """Teach the image and write the checkpoint."""
        image, mask, box = config.image, config.mask, config.box
        if (mask is not None) + (box is not None) + config.good != 1:
            msg = "Give either --mask or --box, to say where the defect is, or --good for a part without defects."
            raise ValueError(msg)
        if config.good and config.kind:
            msg = f"A good part has no kind of defect, but got --kind {config.kind}. Leave it out, or leave out --good."
            raise ValueError(msg)
        for path in filter(None, (image, mask)):  # before the model is loaded, which takes a while
            _check_exists(path)
        model = load_checkpoint(config.ckpt_path)
        image_CHW = torch.Tensor(read_image(image, model.white_level))
        if config.good:
            added, bank = model.teach_good(image_CHW, str(image)), "negative"
        else:
            mask_HW = _mask(config, (image_CHW.shape[-2], image_CHW.shape[-1]))
            added, bank = model.teach(image_CHW, mask_HW, str(image), config.kind), "positive"
        written, named = save_changed(model, config.ckpt_path, config.output), _named(str(image), config.kind)
        print(f"{added} patches of {named} are in the {bank} bank now: {summary(model.info(), bank)}.")
        print(f"Changed model: {written.resolve()}")


class Forget(Subcommand):
    """Drop everything that an ExDD checkpoint's banks took from an image, without training again."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""
        parser.add_argument("--ckpt_path", type=Path, required=True, help="Checkpoint that `anomalib train` wrote.")
        parser.add_argument("--source", required=True, help="The image: its path, or its file name if that is unique.")
        parser.add_argument("--output", type=Path | None, help="Changed checkpoint; default: over the old one.")

    def call(self, config: Namespace) -> None:
        """Forget the image and write the checkpoint."""
        model = load_checkpoint(config.ckpt_path)
        dropped = model.forget(config.source)
        written = save_changed(model, config.ckpt_path, config.output)
        print(f"{dropped} entries of {model.history[-1]['source']} are gone.")
        print(f"Changed model: {written.resolve()}")


def _named(source: str, kind: str) -> str:
    return f"{source} ({kind})" if kind else source


def _check_exists(path: Path) -> None:
    if not path.is_file():
        msg = f"The file {path} does not exist: correct its path, which starts from `{Path.cwd()}` if it is relative."
        raise FileNotFoundError(msg)


def load_checkpoint(ckpt_path: Path) -> ExDD:
    """Load a trained model for use on the CPU; a ValueError if the file is no checkpoint of an ExDD model."""
    _check_exists(ckpt_path)
    try:
        model = ExDD.load_from_checkpoint(ckpt_path, map_location="cpu")
    except (KeyError, RuntimeError) as error:
        msg = f"{ckpt_path} is no checkpoint of an ExDD model: {error}"
        raise ValueError(msg) from error
    return model.eval()


def _mask(config: Namespace, size: tuple[int, int]) -> Tensor:
    """Return where the defect is, non-zero, shape (H, W)."""
    if config.mask is not None:
        mask_HW = torch.as_tensor(read_mask(config.mask))
        check_same_size(config.image, size, config.mask, mask_HW.shape[-2:])
        warn_of_inverted_masks([config.mask] if looks_inverted(mask_HW.numpy() > 0) else [])
        return mask_HW
    left, top, width, height = config.box
    if min(left, top) < 0 or min(width, height) < 1 or left + width > size[1] or top + height > size[0]:
        msg = f"The box {config.box} has to be (left, top, width, height) in the image of {size[1]} x {size[0]} pixels."
        raise ValueError(msg)
    mask_HW = torch.zeros(size, dtype=torch.uint8)
    mask_HW[top : top + height, left : left + width] = 1
    return mask_HW
