"""Making many synthetic images: interrupted at any moment, split between processes, and always the same images.

Attempt `a` at image `i` draws everything random from the seed `(seed, i, a)`: the normal image, the place, the words.
It therefore does not matter which images are made together, in which order, where, or in how many sessions.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .base import Mask, Pixels, Request, Synthesis, Synthesizer
from .change_detection import Change, changed_mask, measure_change
from .material import Material
from .output_folder import Record, as_plain
from .placement import place
from .run_folder import ACCEPTED, REJECTED, RunFolder
from .run_settings import RunSettings, check_material

LIBRARIES = (
    "anomalib-exdd",
    "anomalib",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "pillow",
    "scipy",
    "torch",
)
DIFFUSION_LIBRARIES = ("accelerate", "diffusers", "peft", "transformers")

PLACED_ITSELF = "placed by the synthesizer"

Preview = Callable[[Pixels, Mask, Pixels], bytes]
"""Draws a small picture, a JPEG, of a normal image, a mask and the synthetic image."""


class SynthesisRun:
    """Makes the images of one folder.

    One process opens the folder and finishes it; any number of them work in between.

    Args:
        output: Folder to write.
        material: Normal images and real defects.
        synthesizer: Draws the defects.
        settings: What is wanted.
        batch_size: How many images the synthesizer gets at once. Has no influence on the images, as long as the
            synthesizer's results are those of one by one.
        preview: Draws a small picture of each image, for a page to review them.
        command: Command that makes the images, named in messages about an unfinished folder.

    Raises:
        ValueError: If there are no normal images, or no real defects where they are needed.
    """

    def __init__(
        self,
        output: str | Path,
        material: Material,
        synthesizer: Synthesizer,
        settings: RunSettings,
        *,
        batch_size: int = 4,
        preview: Preview | None = None,
        command: str = "",
    ) -> None:
        if batch_size < 1:
            msg = f"Argument `batch_size` has to be at least 1, but got {batch_size}."
            raise ValueError(msg)
        check_material(material, synthesizer, settings)
        self.folder = RunFolder(Path(output))
        self.synthesizer = synthesizer
        self.settings = settings
        self._material = material
        self._defects = material.real_defects()
        self._batch_size = batch_size
        self._preview = preview
        self._command = command

    def open(self, *, overwrite: bool = False) -> None:
        """Begin the folder, or go on with it; one process does this, before any other works.

        Args:
            overwrite: Remove the images of an earlier run.

        Raises:
            ValueError: If the folder holds something else, or images of other settings.
        """
        identity = {
            "synthesizer": type(self.synthesizer).__name__,
            "synthesizer_settings": self.synthesizer.settings,
            **{name: value for name, value in asdict(self.settings).items() if name != "count"},
            "material": self._material.identity(),
        }
        self.folder.open(
            as_plain(identity), self.settings.count, versions=_versions(), command=self._command, overwrite=overwrite
        )

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """List the images of one process that are not there yet.

        Args:
            rank: Number of the process.
            world_size: Number of processes.
        """
        return [i for i in range(rank, self.settings.count, world_size) if not self.folder.is_finished(i)]

    def prepare(self) -> None:
        """Let the synthesizer learn from the material; it is not asked to where no image is missing."""
        if self.missing():
            self.synthesizer.prepare(self._defects, self._material.normal_images())

    def work(self, rank: int = 0, world_size: int = 1) -> Iterator[Record]:
        """Make the missing images of one process.

        Args:
            rank: Number of the process.
            world_size: Number of processes.

        Yields:
            The record of each image as soon as it is there.

        Raises:
            ValueError: If an image cannot be made at all; images that are finished stay.
        """
        indexes = self.missing(rank, world_size)
        for index in indexes:
            self.folder.clean(index)
        waiting = deque(_Job(index) for index in indexes)
        while waiting:
            jobs = [waiting.popleft() for _ in range(min(self._batch_size, len(waiting)))]
            for job, result in zip(jobs, self._synthesize([self._ask(job) for job in jobs]), strict=True):
                job.add(result)
                if self._accepts(result) or job.attempts > self.settings.retries:
                    yield self._store(job)
                else:
                    waiting.appendleft(job)

    def finish(self) -> list[Record]:
        """Write manifest and review; one process does this, after all others have worked.

        Returns:
            Records of all images.

        Raises:
            ValueError: If images are missing.
        """
        return self.folder.finish()

    def _ask(self, job: "_Job") -> "_Asked":
        """Draw what the next attempt at an image starts from."""
        rng = np.random.default_rng(np.random.SeedSequence([self.settings.seed, job.index, job.attempts]))
        seed = int(rng.integers(2**31))
        source = self._material.normals[int(rng.integers(len(self._material.normals)))]
        prompts = self.settings.prompts
        prompt = prompts[int(rng.integers(len(prompts)))] if prompts else ""
        image = self._material.read_image(source)
        placed = place(image, self._defects, self.settings.masks, rng)
        request = Request(job.index, seed, image, placed.mask, prompt, placed.defect)
        return _Asked(source, placed.description, request)

    def _synthesize(self, asked: "Sequence[_Asked]") -> "list[_Result]":
        try:
            results = self.synthesizer.synthesize([each.request for each in asked])
        except ValueError as error:
            sources = ", ".join(f"number {each.request.index} from `{each.source}`" for each in asked)
            msg = f"{error} (While making {sources}.)"
            raise ValueError(msg) from error
        return [self._measure(each, result) for each, result in zip(asked, results, strict=True)]

    def _measure(self, asked: "_Asked", result: Synthesis) -> "_Result":
        normal = asked.request.image
        change = measure_change(normal, result.image, result.mask)
        mask = changed_mask(normal, result.image, result.mask, self.settings.mask_mode)
        return _Result(asked, result, change, mask)

    def _accepts(self, result: "_Result") -> bool:
        return bool(result.mask.any()) and result.change.visible >= self.settings.min_change

    def _why_not(self, best: "_Result", attempts: int) -> str:
        return (
            f"No visible change in {attempts} attempt{'s' if attempts > 1 else ''}: at most {best.change.visible:.1f} "
            f"grey levels, {self.settings.min_change:g} are wanted."
        )

    def _store(self, job: "_Job") -> Record:
        best = job.best
        request, made = best.asked.request, best.made
        accepted = self._accepts(best)
        reason = "" if accepted else self._why_not(best, job.attempts)
        name = f"{ACCEPTED if accepted else REJECTED}/{job.index:05d}"
        # Where a synthesizer places its defects itself, mask and words took no part, and the real defect only if it is
        # named.
        as_asked = np.array_equal(made.mask, request.mask)
        details, defect = as_plain(made.details), request.defect
        if defect is not None and not as_asked and defect.path not in details.values():
            defect = None
        if defect is not None and defect.kind:
            details["kind"] = defect.kind
        record = Record(
            index=job.index,
            image=f"{name}.png",
            mask=f"{name}_GT.png",
            source=best.asked.source,
            defect=None if defect is None else defect.path,
            placement=best.asked.placement if as_asked else PLACED_ITSELF,
            prompt=str(details.pop("prompt", request.prompt if as_asked else "")),
            seed=request.seed,
            attempts=job.attempts,
            synthesizer=str(details.pop("synthesizer", type(self.synthesizer).__name__)),
            model=details.pop("model", None),
            revision=details.pop("revision", None),
            details=details,
            change=as_plain(asdict(best.change)),
            accepted=accepted,
            reason=reason,
        )
        preview = self._preview(request.image, best.mask, made.image) if self._preview else None
        self.folder.store(record, made.image, best.mask, preview)
        return record


def synthesize(
    output: str | Path,
    material: Material,
    synthesizer: Synthesizer,
    settings: RunSettings,
    *,
    batch_size: int = 4,
    overwrite: bool = False,
) -> list[Record]:
    """Write a folder of synthetic images in this process, with a progress bar; go on where an earlier call stopped.

    Args:
        output: Folder to write.
        material: Normal images and real defects.
        synthesizer: Draws the defects.
        settings: What is wanted.
        batch_size: How many images the synthesizer gets at once.
        overwrite: Remove the images of an earlier run.

    Returns:
        Records of all images.

    Raises:
        ValueError: If an argument cannot be used, or the folder holds something else.
    """
    run = SynthesisRun(output, material, synthesizer, settings, batch_size=batch_size)
    run.open(overwrite=overwrite)
    run.prepare()
    for _ in tqdm(run.work(), "Synthesizing", total=len(run.missing()), unit="image", delay=2):
        pass
    return run.finish()


@dataclass(frozen=True)
class _Asked:
    """What an attempt starts from."""

    source: str
    placement: str
    request: Request


@dataclass(frozen=True)
class _Result:
    """What came of an attempt."""

    asked: _Asked
    made: Synthesis
    change: Change
    mask: Mask


class _Job:
    """An image that is wanted, and the attempt at it in which most changed."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.attempts = 0
        self._best: _Result | None = None

    @property
    def best(self) -> _Result:
        """The attempt in which most changed visibly, the first of equals."""
        if self._best is None:
            msg = f"There was no attempt at image {self.index}."
            raise RuntimeError(msg)
        return self._best

    def add(self, result: _Result) -> None:
        """Take the result of one more attempt."""
        self.attempts += 1
        if self._best is None or result.change.visible > self._best.change.visible:
            self._best = result


def _versions() -> dict[str, str]:
    found = {name: _version(name) for name in (*LIBRARIES, *DIFFUSION_LIBRARIES)}
    return {name: number for name, number in found.items() if number is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # an optional one, or OpenCV under its other name
        return None
