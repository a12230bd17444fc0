"""Makes many synthetic images, in any number of processes and sessions, with always the same results.

Attempt `a` at image `i` draws everything random from the seed `(seed, i, a)`: the normal image, the place, the words.
So the images do not depend on batches, on their order or on interruptions.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .base import Defect, Mask, Pixels, Request, Synthesis, Synthesizer, as_plain, check_prompts, check_range
from .change_detection import Change, MaskMode, changed_mask, measure_change
from .manifest import ACCEPTED, FORMAT, REJECTED, Record
from .output_folder import MAX_COUNT, OutputFolder
from .placement import MaskSource, place
from .review_page import preview

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

    One process calls `open` before and `folder.finish` after all others; any number of them `work` in between.
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
        self.folder = OutputFolder(self.output)
        self._defects = LazySequence(self.sources.defects, self.sources.read_defect)

    def open(self, *, overwrite: bool = False) -> None:
        """Create the folder, or go on with it; see `OutputFolder.open`."""
        settings, sources = asdict(self.settings), self.sources
        installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
        start = {
            "format": FORMAT,
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
        self.folder.open(as_plain(start), overwrite=overwrite)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """List the images that one of several processes still has to make."""
        return [i for i in range(rank, self.settings.count, world_size) if not self.folder.is_finished(i)]

    def prepare(self) -> None:
        """Prepare the synthesizer, unless no image is missing."""
        if self.missing():
            self.synthesizer.prepare(self._defects, LazySequence(self.sources.normals, self.sources.read_image))

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
        name = f"{ACCEPTED if accepted else REJECTED}/{request.index:05d}"
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
        self.folder.store(record, made.image, mask, preview(request.image, mask, made.image))
        return record


def _digest(paths: Sequence[str]) -> str:
    """Identify files by their names, the names of their folders and their sizes: they may be moved together."""
    lines = [f"{'/'.join(Path(path).parts[-2:])} {Path(path).stat().st_size}" for path in paths]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]
