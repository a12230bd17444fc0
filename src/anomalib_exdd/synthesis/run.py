"""Makes many synthetic images, in any number of processes and sessions, with always the same results.

Attempt `a` at image `i` draws everything random from the seed `(seed, i, a)`: the normal image, the place, the words.
So the images do not depend on batches, on their order or on interruptions.

At any moment the folder holds finished images and tells which are missing. Every file is written beside its place and
renamed. The record of an image is written last: an image without one is made again. Processes share nothing but the
folder, and each touches the files of its own images only.
"""

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from anomalib_exdd.utils.files import PARTIAL_FILES, write_file

from . import manifest
from .base import Defect, Mask, Pixels, Request, Synthesis, Synthesizer, as_plain, check_prompts, check_range
from .change_detection import Change, MaskMode, changed_mask, measure_change
from .manifest import Record, differences, read_json, to_json, write_image
from .placement import MaskSource, place
from .review_page import preview

logger = logging.getLogger(__name__)

MAX_COUNT = 100_000  # five digits name an image, as in KSDD2
LIBRARIES = (
    *("anomalib-exdd", "anomalib", "numpy", "opencv-python-headless", "opencv-python", "pillow", "scipy", "torch"),
    *("accelerate", "diffusers", "peft", "transformers"),
)


@dataclass(frozen=True)
class LazySequence(Sequence[Any]):
    """Items that are read from their keys whenever they are indexed, and not kept."""

    keys: Sequence[Any]
    read: Callable[[Any], Any]

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        """Read an item; slices are not supported."""
        return self.read(self.keys[index])


@dataclass(frozen=True)
class SourceImages:
    """Files of normal images and real defects, and how to read them: as training does."""

    normals: Sequence[str]  # files of normal images, whose order influences which one is drawn
    defects: Sequence[tuple[str, str]]  # files of real defective images and of their masks; may be empty
    read_image: Callable[[str], Pixels]  # reads an image, `[H, W, 3]`, RGB, uint8
    read_mask: Callable[[str], Mask]  # reads a mask, `[H, W]`, bool
    kinds: Mapping[str, str] = field(default_factory=dict)  # kinds of the defects that are known, by image file

    def read_defect(self, paths: tuple[str, str]) -> Defect:
        """Read a real defect from the files of its image and its mask."""
        return Defect(self.read_image(paths[0]), self.read_mask(paths[1]), paths[0], self.kinds.get(paths[0], ""))


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run, besides the synthesizer's own.

    Attributes:
        count: How many images.
        seed: Seed of everything random.
        masks: Where defects are placed: masks of real defects as they are (real) or moved about (moved), generated
            shapes (drawn), or moved where there are real defects and else drawn (auto).
        prompts: Defects in words, one is drawn for each image; default: the synthesizer's own.
        mask_mode: What the mask of a synthetic image shows: the place that was asked for (input), what really changed
            (difference), or both together (intersection).
        min_change: Grey levels by which an image has to change visibly; 0 accepts all.
        retries: How often an image without a visible change is made again, before it is rejected.
    """

    count: int = 100
    seed: int = 0
    masks: MaskSource = "auto"
    prompts: Sequence[str] = ()
    mask_mode: MaskMode = "intersection"
    min_change: float = 8.0
    retries: int = 3

    def __post_init__(self) -> None:
        """Check the values."""
        check_range(1, MAX_COUNT, count=self.count)
        check_range(0, seed=self.seed, retries=self.retries)
        check_range(0, 255, min_change=self.min_change)
        check_prompts(self.prompts)


@dataclass
class SynthesisRun:
    """Makes the images of one folder.

    Any number of processes `open` it, one of them before the others, and `work`; one of them calls `finish` at the end.
    """

    output: Path  # folder to write
    sources: SourceImages
    synthesizer: Synthesizer
    settings: RunSettings
    batch_size: int = 4  # requests that the synthesizer gets at once; only its own batches may influence the images
    command: str = ""  # that makes the images, named in messages about an unfinished folder

    def __post_init__(self) -> None:
        """Check that there are real defects where they are needed."""
        name, masks = type(self.synthesizer).__name__, self.settings.masks
        if not self.sources.defects and (self.synthesizer.needs_defects or masks in {"real", "moved"}):
            none = f"{name} with masks {masks!r} works with real defects, but the training images have none with a mask"
            msg = f"{none}. Give some, or use PerlinSynthesizer or DiagSynthesizer with masks 'auto' or 'drawn'."
            raise ValueError(msg)
        self._defects = LazySequence(self.sources.defects, self.sources.read_defect)

    def open(self, *, overwrite: bool = False) -> None:
        """Create the folder, or go on with it; prepare the synthesizer, unless no image is missing.

        Images depend on the `settings` in `synthesis.json` alone: a finished folder may be extended by a larger
        `count`. With `overwrite`, what an earlier run has made is removed. A ValueError refuses a folder of something
        else, of other settings, or with more images than wanted.
        """
        path, start = self.output / manifest.START_NAME, as_plain(self._start())
        others = [other.name for other in self.output.glob("*") if not other.match(PARTIAL_FILES)]
        if others and not path.is_file():
            what = f"something else than synthetic images, such as `{min(others)}`"
            msg = f"The output folder `{self.output}` holds {what}. Name one that is empty or does not exist."
            raise ValueError(msg)
        if overwrite:
            for name in manifest.FOLDERS:
                shutil.rmtree(self.output / name, ignore_errors=True)
            for name in manifest.REPORTS:
                (self.output / name).unlink(missing_ok=True)
        elif path.is_file():
            before = read_json(path)
            self._check_same(before, start)
            start["versions"] = before["versions"]  # of the first images
            if start["count"] > before["count"]:
                (self.output / manifest.MANIFEST_NAME).unlink(missing_ok=True)  # it is not finished any more
        self.output.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(start))
        for name in manifest.FOLDERS:
            (self.output / name).mkdir(exist_ok=True)
        if self.missing():
            self.synthesizer.prepare(self._defects, LazySequence(self.sources.normals, self.sources.read_image))

    def _start(self) -> dict[str, Any]:
        """Content of `synthesis.json`."""
        settings, sources = asdict(self.settings), self.sources
        installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
        return {
            "format": manifest.FORMAT,
            "count": settings.pop("count"),
            "command": self.command,
            "versions": {name: installed[name] for name in LIBRARIES if name in installed},
            "settings": {  # everything that the images depend on
                "synthesizer": type(self.synthesizer).__name__,
                "synthesizer_settings": self.synthesizer.settings,
                **settings,
                "material": {
                    "normals": len(sources.normals),
                    "normals_digest": _digest(sources.normals),
                    "defects": len(sources.defects),
                    "defects_digest": _digest([path for pair in sources.defects for path in pair]),
                },
            },
        }

    def _check_same(self, before: dict[str, Any], start: dict[str, Any]) -> None:
        found = differences(before["settings"], start["settings"])
        if before["count"] > start["count"]:
            found += differences(before["count"], start["count"], "count")
        if found:
            fix = "Give another --output, or --overwrite to remove the images that are there."
            msg = f"The output folder `{self.output}` holds images of other settings: {'; '.join(found)}. {fix}"
            raise ValueError(msg)
        if found := differences(before["versions"], start["versions"]):
            logger.warning("`%s` was begun with other versions of libraries: %s.", self.output, "; ".join(found))

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """List the images that one of several processes still has to make."""
        return [i for i in range(rank, self.settings.count, world_size) if not self._is_finished(i)]

    def _is_finished(self, index: int) -> bool:
        try:
            record = self._read(index)
        except (OSError, ValueError, TypeError):  # there is none, or a power failure has emptied it
            return False
        return all((self.output / name).is_file() for name in (record.image, record.mask))

    def _read(self, index: int) -> Record:
        path = self.output / manifest.RECORDS / f"{index:05d}.json"
        return Record(**json.loads(path.read_text(encoding="utf-8")))

    def work(self, rank: int = 0, world_size: int = 1) -> Iterator[Record]:
        """Make the missing images of one of several processes; yields the record of each when its files are written."""
        indexes = self.missing(rank, world_size)
        total = len(range(rank, self.settings.count, world_size))
        label = f"Synthesizing (process {rank + 1} of {world_size})"
        bar = tqdm(desc=label, total=total, initial=total - len(indexes), unit="image", disable=rank > 0)
        waiting = deque((index, 1) for index in indexes)
        best: dict[int, tuple[Change, Request, Synthesis]] = {}  # of equal changes, the first
        rejected = 0
        while waiting:
            jobs = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
            requests = [self._request(index, number - 1) for index, number in jobs]
            results = self.synthesizer.synthesize(requests)
            for (index, number), request, made in zip(jobs, requests, results, strict=True):
                attempt = (measure_change(request.image, made.image, made.mask), request, made)
                best[index] = max(best.get(index, attempt), attempt, key=lambda each: each[0].visible)
                if attempt[0].visible < self.settings.min_change and number <= self.settings.retries:
                    waiting.appendleft((index, number + 1))
                    continue
                record = self._store(*best.pop(index), number)
                rejected += not record.accepted
                bar.set_postfix(rejected=rejected, refresh=False)
                bar.update()
                yield record
        bar.close()

    def finish(self) -> list[Record]:
        """Write manifest and review, when all images are there; return all records."""
        records = [self._read(index) for index in range(self.settings.count)]
        for path in self.output.rglob(PARTIAL_FILES):  # left by processes that were killed
            path.unlink()
        manifest.write_manifest(self.output, read_json(self.output / manifest.START_NAME), records)
        return records

    def _request(self, index: int, attempt: int) -> Request:
        rng = np.random.default_rng(np.random.SeedSequence([self.settings.seed, index, attempt]))
        seed = int(rng.integers(2**31))
        source = self.sources.normals[int(rng.integers(len(self.sources.normals)))]
        prompts = self.settings.prompts
        prompt = prompts[int(rng.integers(len(prompts)))] if prompts else ""
        image = self.sources.read_image(source)
        mask, defect, placement = place(image, self._defects, self.settings.masks, rng)
        return Request(index, seed, image, mask, prompt, defect, source, placement)

    def _store(self, change: Change, request: Request, made: Synthesis, attempts: int) -> Record:
        accepted = change.visible >= self.settings.min_change
        name = f"{manifest.ACCEPTED if accepted else manifest.REJECTED}/{request.index:05d}"
        tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        found = f"at most {change.visible:.1f} grey levels, {self.settings.min_change:g} are wanted"
        # A synthesizer that places its defects itself ignores mask and prompt, and the real defect unless it names it.
        placed = np.array_equal(made.mask, request.mask)
        details, defect = as_plain(made.details), request.defect
        if defect is not None and not placed and defect.path not in details.values():
            defect = None
        if defect is not None and defect.kind:
            details["kind"] = defect.kind
        record = Record(
            index=request.index,
            image=f"{name}.png",
            mask=f"{name}_GT.png",
            source=request.source,
            defect=None if defect is None else defect.path,
            placement=request.placement if placed else "placed by the synthesizer",
            prompt=str(details.pop("prompt", request.prompt if placed else "")),
            seed=request.seed,
            attempts=attempts,
            synthesizer=str(details.pop("synthesizer", type(self.synthesizer).__name__)),
            model=details.pop("model", None),
            revision=details.pop("revision", None),
            details=details,
            change=as_plain(asdict(change)),
            accepted=accepted,
            reason="" if accepted else f"No visible change in {tried}: {found}.",
        )
        mask = changed_mask(request.image, made.image, made.mask, self.settings.mask_mode)
        write_image(self.output / record.image, Image.fromarray(made.image), compress_level=4)
        write_image(self.output / record.mask, Image.fromarray(mask.astype(np.uint8) * 255), compress_level=4)
        write_image(self.output / record.preview, preview(request.image, mask, made.image), quality=90)
        write_file(self.output / manifest.RECORDS / f"{request.index:05d}.json", to_json(asdict(record)))
        return record


def _digest(paths: Sequence[str]) -> str:
    """Identify files by their names, the names of their folders and their sizes: they may be moved together."""
    lines = [f"{'/'.join(Path(path).parts[-2:])} {Path(path).stat().st_size}" for path in paths]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]
