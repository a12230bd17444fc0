"""Drift: no alarm on what is like the training, an alarm soon on what is not, and what is said about it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import mannwhitneyu

from anomalib_exdd.commands.banks import load_checkpoint
from anomalib_exdd.models.record import Record
from anomalib_exdd.station.command import DRIFTED, DriftCommand
from anomalib_exdd.station.drift import Drift, Watched, detect, from_record, shares

TRAINING = np.random.default_rng(1).normal(1.0, 0.1, 100)


def watched(distances: list[float], decision: str = "accept") -> list[Watched]:
    return [Watched(f"{number}.png", "", each, decision, TRAINING) for number, each in enumerate(distances)]


def test_a_share_counts_training_images_that_are_as_far() -> None:
    training = np.array([1.0, 2.0, 2.0, 3.0])
    images = [Watched("", "", distance, None, training) for distance in (0.5, 2.0, 2.5, 9.0)]
    assert shares(images).tolist() == [5 / 5, 4 / 5, 2 / 5, 1 / 5]


def test_evidence_is_the_mean_of_all_bets() -> None:
    """By hand, with sizes so large that nothing has to be allowed for."""
    share, size, bets = [0.6, 0.03, 0.3], 10**12, [(level, stake) for level in (0.5, 0.2, 0.05) for stake in (0.2, 0.5)]
    expected = []
    for count in range(1, 4):
        total = 0.0
        for level, stake in bets:
            gains = [1 + stake * ((each <= level) / level - 1) for each in share[:count]]
            # One player begins before every image and lets the winnings stand.
            total += sum(float(np.prod(gains[first:])) for first in range(count))
        expected.append(total / len(bets))
    evidence, alarms = detect(np.array(share), [size] * 3)
    assert evidence == pytest.approx(expected, rel=1e-4)
    assert alarms == []
    assert detect(np.array(share), [size] * 3, every=3)[1] == [1]


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Of images like those of the training: alarms once in `every` images, or less often."""
    alarms, rng = 0, np.random.default_rng(0)
    for _ in range(100):
        training = rng.normal(size=60)
        images = [Watched("", "", distance, None, training) for distance in rng.normal(size=500)]
        alarms += len(detect(shares(images), [60] * 500, every=200)[1])
    assert alarms / (100 * 500) <= 1 / 200


@pytest.mark.parametrize(("deviations", "soon"), [(1.0, 60), (2.0, 20), (10.0, 12)])
def test_drift_is_found_soon(deviations: float, soon: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        distances = [*rng.normal(1.0, 0.1, 300), *rng.normal(1.0 + deviations * 0.1, 0.1, 100)]
        _, alarms = detect(shares(watched(distances)), [len(TRAINING)] * 400)
        assert 300 <= alarms[0] < 300 + soon


def test_it_is_said_in_numbers_and_words(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(1.0, 0.1, 150).tolist(), rng.normal(2.0, 0.1, 50).tolist()
    calm, moved = Drift(watched(before)), Drift(watched(before) + watched(after, "review"), last=80)
    assert not calm.drifted
    assert str(calm).startswith("The parts look like those of the training.")
    assert moved.drifted
    assert 150 <= moved.alarms[0] < 165
    said = str(moved)
    assert f"DRIFTED away from the training: alarm at image {moved.alarms[0] + 1} " in said
    assert "of the last 80 of 200 images" in said
    assert "Mann-Whitney, one-sided, 80 against 100 images" in said
    assert f"For review: {100 * 50 / 80:.0f} % of the last 80, 0 % before." in said
    assert f"p = {mannwhitneyu([*before[-30:], *after], TRAINING, alternative='greater').pvalue:.2g} (Mann" in said
    farthest = [float(each.partition(")")[0]) for each in said.rpartition("Farthest from normal")[2].split("(")[1:]]
    assert farthest == pytest.approx(sorted(after, reverse=True)[:10], rel=5e-3)
    # A model that has learnt the new parts is calm again, and the old alarms are of the past.
    taught = [each._replace(training=TRAINING + 1) for each in watched(rng.normal(2.0, 0.1, 90).tolist())]
    assert not Drift([*moved.images, *taught], last=80).drifted
    red = []
    for drift in (calm, moved):
        with Image.open(drift.draw(tmp_path / "drift.png")) as picture:
            assert min(picture.size) > 600
            red.append(int((np.asarray(picture.convert("RGB")) == [0xB3, 0x26, 0x1E]).all(axis=-1).sum()))
    assert red[1] > red[0], "alarms are marked"
    with pytest.raises(ValueError, match="There are no predictions"):
        Drift([])


def test_images_of_a_record_stand_beside_the_training_of_their_model(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.db")
    row = {"normal_distance": 1.5, "decision": "review"}
    record.add("model", "one", "", {"training_distances": [1.0, 2.0]})
    record.add("prediction", "one", "a.png", row)
    record.add("prediction", "one", "broken.png", {"normal_distance": None, "decision": None})
    record.add("model", "two", "", {"training_distances": [3.0]})
    record.add("prediction", "one", "b.png", row)
    record.add("prediction", "two", "c.png", row)
    record.add("model", "alone", "", {"training_distances": []})
    record.add("prediction", "alone", "d.png", row)
    found = from_record(record)
    assert [(each.path, each.training.tolist()) for each in found] == [
        ("a.png", [1.0, 2.0]),
        ("b.png", [1.0, 2.0]),
        ("c.png", [3.0]),
    ]
    assert {(each.distance, each.decision) for each in found} == {(1.5, "review")}


def test_the_command_tells_another_product(
    trained: Path, surfaces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    for number in range(24):
        with Image.open(surfaces / "test" / f"2000{number % 6}.png") as image:
            image.save(tmp_path / "same" / f"{number:02d}.png")
        noise = np.random.default_rng(number).integers(0, 256, (316, 112, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "other" / f"{number:02d}.png")
    (tmp_path / "same" / "broken.png").write_bytes(b"no image")

    def run(*arguments: str) -> None:
        DriftCommand().run(DriftCommand.get_parser().parse_args([*arguments, "--output", str(tmp_path / "drift")]))

    given = ("--ckpt_path", str(trained), "--every", "100", "--data")
    run(*given, str(tmp_path / "same"))
    assert "look like those of the training" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        run(*given, str(tmp_path / "other"))
    assert left.value.code == DRIFTED
    told = capsys.readouterr().out
    median = float(np.median(load_checkpoint(trained).facts()["training_distances"]))
    assert f"of the last 24 of 24 images, {median:.3g} of 24 training images" in told
    assert (tmp_path / "drift" / "drift.png").is_file()
    for arguments, message in (
        ((), "Give either --record, or --data"),
        (("--record", "a.db", "--data", "b"), "Give either --record, or --data"),
        (("--record", "none.db"), "none.db does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
