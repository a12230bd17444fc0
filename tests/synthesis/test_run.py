import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anomalib_exdd.synthesis import Request, Synthesis, Synthesizer
from anomalib_exdd.synthesis.manifest import Record, read_synthetic
from anomalib_exdd.synthesis.run import LazySequence, RunSettings, SourceImages, SynthesisRun
from anomalib_exdd.utils.files import PARTIAL_FILES
from made_up_defects import textured, with_defect
from made_up_records import read_records

SIZE = (48, 40)
COUNT = 6
SETTINGS = RunSettings(count=COUNT, prompts=("deep scratch", "oil stain"))


class Painter(Synthesizer):
    """Darkens the mask, but now and then by next to nothing; how much, the request's seed decides."""

    def __init__(self, weak: float = 0.4, levels: int = 90) -> None:
        self.weak = weak
        self.levels = levels
        self.batches: list[list[int]] = []
        self.prepared: list[tuple[int, int]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"weak": self.weak, "levels": (self.levels, 0)}

    def prepare(self, defects: Sequence[Any], normals: Sequence[Any]) -> None:
        self.prepared.append((len(defects), len(normals)))

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        self.batches.append([request.index for request in requests])
        return [self._paint(request) for request in requests]

    def _paint(self, request: Request) -> Synthesis:
        rng = np.random.default_rng(request.seed)
        levels = 1 if rng.random() < self.weak else self.levels
        image = request.image.copy()
        image[request.mask] -= np.minimum(image[request.mask], rng.integers(levels - levels // 4, levels + 1)).astype(
            np.uint8
        )
        return Synthesis(image, request.mask, {"model": "paint", "levels": np.int64(levels), "doubt": np.inf})


class NeedsDefects(Painter):
    needs_defects = True


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SourceImages:
    """Files of five normal images and two real defects."""
    root = tmp_path_factory.mktemp("parts")
    for seed in range(5):
        cv2.imwrite(str(root / f"n{seed}.png"), textured(seed, *SIZE))
    for seed in range(2):
        defect = with_defect(10 + seed, *SIZE)
        cv2.imwrite(str(root / f"d{seed}.png"), defect.image)
        cv2.imwrite(str(root / f"d{seed}_GT.png"), defect.mask.astype(np.uint8) * 255)
    return SourceImages(
        normals=[str(root / f"n{seed}.png") for seed in range(5)],
        defects=[(str(root / f"d{seed}.png"), str(root / f"d{seed}_GT.png")) for seed in range(2)],
        read_image=lambda path: np.asarray(cv2.imread(path), dtype=np.uint8),
        read_mask=lambda path: np.asarray(cv2.imread(path, cv2.IMREAD_GRAYSCALE)) > 0,
    )


@pytest.fixture
def make(sources: SourceImages, tmp_path: Path) -> Callable[..., SynthesisRun]:
    def run(name: str = "out", synthesizer: Synthesizer | None = None, **options: Any) -> SynthesisRun:
        settings = options.pop("settings", SETTINGS)
        options = {"batch_size": 2, **options}
        return SynthesisRun(tmp_path / name, sources, synthesizer or Painter(), settings, **options)

    return run


Make = Callable[..., SynthesisRun]


def through(run: SynthesisRun, **options: bool) -> dict[str, bytes]:
    """Run in one go, and return what is in the folder."""
    run.open(**options)
    for _ in run.work():
        pass
    run.finish()
    return content(run.output)


def made(output: Path, *arguments: Any) -> list[Record]:
    """Run in one go, and return the records."""
    through(SynthesisRun(output, *arguments))
    return read_records(output)


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_images_masks_and_records_fit_together(make: Make, sources: SourceImages) -> None:
    run = make()
    through(run)
    root = run.output
    records = read_records(root)
    assert [record.index for record in records] == list(range(COUNT))
    assert any(record.attempts > 1 for record in records), "the test needs images that were made again"
    for record in records:
        image, mask = cv2.imread(str(root / record.image)), cv2.imread(str(root / record.mask), cv2.IMREAD_GRAYSCALE)
        source = sources.read_image(record.source)
        assert image.shape == source.shape
        assert mask.shape == SIZE
        assert set(np.unique(mask)) == {0, 255}
        assert record.change["visible"] >= SETTINGS.min_change
        changed = np.abs(image.astype(int) - source).max(axis=2) > 0
        assert changed[mask > 0].mean() > 0.9
        assert record.prompt in SETTINGS.prompts
        assert record.defect in {path for path, _ in sources.defects}
        assert record.synthesizer == "Painter"
        assert record.model == "paint"
        assert record.details == {"levels": 90, "doubt": None}
    assert {record.prompt for record in records} == set(SETTINGS.prompts)
    assert len({record.source for record in records}) > 1
    assert len({record.seed for record in records}) == COUNT


def test_batches_do_not_matter(make: Make) -> None:
    painters = [Painter(), Painter(), Painter()]
    folders = [
        through(make(f"by{size}", painter, batch_size=size)) for size, painter in zip((1, 3, 8), painters, strict=True)
    ]
    assert folders[0] == folders[1] == folders[2]
    assert [max(map(len, painter.batches)) for painter in painters] == [1, 3, COUNT]


def test_processes_do_not_matter(make: Make) -> None:
    alone = through(make("alone"))
    runs = [make("shared") for _ in range(3)]
    runs[0].open()
    workers = [run.work(rank, 3) for rank, run in enumerate(runs)]
    for worker in (*workers[::-1], *workers):  # a step each, the last one first
        next(worker, None)
    for worker in workers:
        assert all(record.index < COUNT for record in worker)
    runs[0].finish()
    assert content(runs[0].output) == alone


def test_an_image_depends_on_its_number_alone(make: Make) -> None:
    few = through(make("few", settings=replace(SETTINGS, count=2)))
    many = through(make("many"))
    shared = [name for name in few if name.startswith(("train", "rejected", "records", "previews"))]
    assert len(shared) == 2 * 4
    assert all(few[name] == many[name] for name in shared)


def test_a_finished_folder_can_be_extended(make: Make) -> None:
    through(make("grown", settings=replace(SETTINGS, count=2)))
    grown, whole = through(make("grown")), through(make("whole"))
    assert grown.pop("review.csv") != whole.pop("review.csv")  # the review is a person's: never written over
    assert grown == whole
    with pytest.raises(ValueError, match=r"`count` was 6 and is 2 now.*--overwrite"):
        make("grown", settings=replace(SETTINGS, count=2)).open()


class KilledError(BaseException):
    """The process ends here."""


def test_interruptions_at_any_moment_leave_no_trace(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is written, then flushed to the disk, then renamed: ending there is ending anywhere."""
    flush, moments = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: (moments.append(None), flush(file)))
    whole = through(make("whole"))
    assert len(moments) == len(whole)
    for moment in range(len(moments)):
        left, broken = moment, make(f"broken{moment}")

        def fsync(file: int, root: Path = broken.output) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                for partial in root.rglob(PARTIAL_FILES):  # a killed process cannot remove it
                    shutil.copy(partial, partial.with_name(f".killed{partial.name}"))
                raise KilledError
            flush(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(KilledError):
                through(broken)
        assert list(broken.output.rglob(PARTIAL_FILES))
        assert through(make(f"broken{moment}")) == whole


def test_only_missing_images_are_made_again(make: Make) -> None:
    whole = through(make())
    idle = Painter()
    assert through(make(synthesizer=idle)) == whole
    assert idle.batches == idle.prepared == []

    root = make().output
    (root / read_records(root)[3].mask).unlink()  # lost
    (root / "records" / "00005.json").write_bytes(b"")  # a disk without power
    busy = Painter(weak=0.4)
    assert through(make(synthesizer=busy)) == whole
    assert {index for batch in busy.batches for index in batch} == {3, 5}
    assert busy.prepared == [(2, 5)]


def test_weak_images_are_made_again_and_then_rejected(make: Make) -> None:
    painter = Painter(weak=1)
    settings = replace(SETTINGS, retries=2)
    run = make(synthesizer=painter, settings=settings)
    through(run)
    records = read_records(run.output)
    assert [record.attempts for record in records] == [3] * COUNT
    assert sum(map(len, painter.batches)) == 3 * COUNT
    for record in records:
        assert not record.accepted
        assert record.image.startswith("rejected/")
        assert "No visible change in 3 attempts" in record.reason
        assert "8 are wanted" in record.reason
    assert read_synthetic(run.output) == []
    assert len(read_synthetic(run.output, with_rejected=True)) == COUNT
    accepted = make("all", Painter(weak=1), settings=replace(settings, min_change=0))
    through(accepted)
    assert [record.attempts for record in read_records(accepted.output)] == [1] * COUNT


def test_of_rejected_attempts_the_most_visible_is_kept(make: Make) -> None:
    few = through(make("few", settings=replace(SETTINGS, min_change=255, retries=0)))
    more = through(make("more", settings=replace(SETTINGS, min_change=255, retries=4)))
    visible = [
        [json.loads(files[f"records/{index:05d}.json"])["change"]["visible"] for index in range(COUNT)]
        for files in (few, more)
    ]
    assert all(best >= first for first, best in zip(*visible, strict=True))
    assert max(best - first for first, best in zip(*visible, strict=True)) > 10


def test_other_settings_are_refused_by_name(make: Make) -> None:
    before = through(make())
    with pytest.raises(ValueError, match=r"`seed` was 0 and is 1 now. Give another --output, or --overwrite"):
        make(settings=replace(SETTINGS, seed=1)).open()
    with pytest.raises(ValueError, match=r"`synthesizer_settings.weak` was 0.4 and is 0.1 now"):
        make(synthesizer=Painter(weak=0.1)).open()
    assert content(make().output) == before
    other = replace(SETTINGS, seed=1)
    assert through(make(settings=other), overwrite=True) == through(make("fresh", settings=other))


def test_other_material_is_refused(make: Make, sources: SourceImages, tmp_path: Path) -> None:
    through(make())
    fewer = replace(sources, normals=sources.normals[1:])
    with pytest.raises(ValueError, match=r"`material.normals` was 5 and is 4 now"):
        SynthesisRun(tmp_path / "out", fewer, Painter(), SETTINGS).open()


def test_overwriting_takes_the_review_and_leaves_other_files(make: Make) -> None:
    run = make()
    through(run)
    root = run.output
    (root / "review.csv").write_text("image,decision,comment\n00000.png,reject,\n")
    (root / "notes.txt").write_text("mine")
    assert "00000.png,reject" in through(make())["review.csv"].decode()
    again = through(make(), overwrite=True)
    assert "reject," not in again["review.csv"].decode()
    assert again["notes.txt"] == b"mine"


def test_a_folder_of_other_things_is_left_alone(make: Make) -> None:
    root = make().output
    (root / "train").mkdir(parents=True)
    (root / "train" / "10000.png").write_bytes(b"real")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds something else than synthetic images, such as `train`"):
            make().open(overwrite=overwrite)
    assert content(root) == {"train/10000.png": b"real"}


def test_other_versions_are_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = make()
    run.open()
    path = run.output / "synthesis.json"
    start = json.loads(path.read_text())
    assert {"torch", "numpy", "anomalib-exdd"} <= set(start["versions"])
    path.write_text(json.dumps({**start, "versions": {**start["versions"], "torch": "0.1"}}))
    with caplog.at_level(logging.WARNING, logger="anomalib_exdd"):
        make().open()
    assert "`torch` was '0.1'" in caplog.text


def test_unfinished_runs_are_not_finished(make: Make) -> None:
    run = make(command="anomalib synthesize --count 6")
    run.open()
    next(iter(run.work()))
    with pytest.raises(FileNotFoundError, match=r"records/0000"):
        run.finish()
    with pytest.raises(ValueError, match=r"1 of 6 images are there.*`anomalib synthesize --count 6` again"):
        read_synthetic(run.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "`count` has to be between 1 and 100000, but got 0"),
        ({"seed": -1}, "`seed` has to be at least 0"),
        ({"min_change": 256}, "`min_change` has to be between 0 and 255"),
        ({"min_change": float("nan")}, "`min_change` has to be between 0 and 255"),
        ({"retries": -1}, "`retries` has to be at least 0"),
        ({"prompts": "scratch"}, "`prompts` has to be a list"),
        ({"prompts": (" ",)}, "`prompts` has to be a list"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSettings(**{**asdict(SETTINGS), **change})


def test_material_has_to_suffice(sources: SourceImages, tmp_path: Path) -> None:
    without = replace(sources, defects=[])
    for given, synthesizer, settings, message in (
        (without, NeedsDefects(), SETTINGS, "NeedsDefects with masks 'auto' works with real defects"),
        (without, Painter(), replace(SETTINGS, masks="real"), "masks 'real' works with real defects"),
    ):
        with pytest.raises(ValueError, match=message):
            SynthesisRun(tmp_path / "none", given, synthesizer, settings)


def test_works_without_real_defects(sources: SourceImages, tmp_path: Path) -> None:
    records = made(tmp_path / "out", replace(sources, defects=[]), Painter(weak=0), SETTINGS)
    assert [record.defect for record in records] == [None] * COUNT
    assert all(record.accepted for record in records)


def test_what_took_no_part_is_not_recorded(make: Make, sources: SourceImages) -> None:
    class OwnPlace(Painter):
        def _paint(self, request: Request) -> Synthesis:
            corner = np.zeros_like(request.mask)
            corner[:8, :8] = True
            made = super()._paint(replace(request, mask=corner))
            return replace(made, details={"pasted": request.defect.path} if request.index % 2 else {})

    run = make(synthesizer=OwnPlace(weak=0))
    through(run)
    records = read_records(run.output)
    assert {record.placement for record in records} == {"placed by the synthesizer"}
    assert [record.defect is None for record in records] == [True, False] * (COUNT // 2)


def test_the_kind_of_the_real_defect_is_recorded(sources: SourceImages, tmp_path: Path) -> None:
    known = replace(sources, kinds={sources.defects[0][0]: "dent", sources.defects[1][0]: ""})
    records = made(tmp_path / "out", known, Painter(0), replace(SETTINGS, count=8))
    kinds = [("dent" if record.defect == sources.defects[0][0] else None) for record in records]
    assert [record.details.get("kind") for record in records] == kinds
    assert set(kinds) == {"dent", None}
    drawn = replace(SETTINGS, masks="drawn")
    assert all("kind" not in each.details for each in made(tmp_path / "drawn", known, Painter(0), drawn))


def test_material_is_read_when_it_is_looked_at(sources: SourceImages) -> None:
    read: list[str] = []
    counted = replace(sources, read_image=lambda path: (read.append(path), sources.read_image(path))[1])
    images = LazySequence(counted.normals, counted.read_image)
    defects = LazySequence(counted.defects, counted.read_defect)
    assert (len(images), len(defects)) == (5, 2)
    assert read == []
    assert np.array_equal(images[-1], sources.read_image(sources.normals[4]))
    assert len(read) == 1
    assert defects[1].path == sources.defects[1][0]
    assert defects[1].mask.any()
    with pytest.raises(IndexError):
        LazySequence([7], abs)[1]
