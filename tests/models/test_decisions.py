"""Decisions, weak labels and calibration of the whole model, through Anomalib's engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.transforms.v2 import Resize

from anomalib_exdd import ExDD
from small import batch

Make = Callable[..., Any]


def test_decisions_come_with_predictions(trained: tuple[ExDD, Path], small_data: Make, engine: Make) -> None:
    """Every prediction says accept, review or reject; the rates may be changed without training."""
    lines = {}
    for rate in (0.4, 0.02):
        model = ExDD(false_reject_rate=rate)
        predictions = engine().predict(model=model, datamodule=small_data(), ckpt_path=trained[1])
        lines[rate] = [line for prediction in predictions for line in prediction.explanation]
        assert model.decisions is not None
        assert all(line.startswith(("accept: ", "review: ", "reject: ")) for line in lines[rate])
        probability = [float(line.split("probability ")[1].split(" ")[0]) for line in lines[rate]]
        assert [line.split(":")[0] for line in lines[rate]] == [
            model.decisions.name(value) if abs(value - model.decisions.reject) > 1e-3 else line.split(":")[0]
            for value, line in zip(probability, lines[rate], strict=True)
        ]
    assert sum(line.startswith("reject") for line in lines[0.4]) >= sum(
        line.startswith("reject") for line in lines[0.02]
    )


def test_other_image_scores_come_without_decisions(small_model: Make, small_data: Make, engine: Make) -> None:
    model = small_model(image_scoring="normal")
    engine().fit(model=model, datamodule=small_data())
    assert model.decisions is None
    assert engine().predict(model=model, datamodule=small_data())[0].explanation is None


def test_farthest_patches_need_no_masks(small_model: Make, small_data: Make, engine: Make) -> None:
    """Labels alone fill the positive bank, mostly with patches that lie on defects."""
    settings = {"backbone": "filter_bank", "image_size": (316, 112), "positive_patches": "farthest"}
    model, data = small_model(**settings), small_data()
    engine().fit(model=model, datamodule=data)
    bank = model.model.positive_bank
    train = data.train_data.samples
    rows = {path: row for row, path in enumerate(train.image_path)}
    assert set(bank.sources) == set(train[train.label_index == 1].image_path)
    on_defect = []
    data.train_data.augmentations = Resize((316, 112), antialias=True)
    for source, (y, x) in zip(bank.source.tolist(), bank.position.tolist(), strict=True):
        mask = data.train_data[rows[bank.sources[source]]].gt_mask
        on_defect.append(bool(mask[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9].any()))
    assert np.mean(on_defect) > 0.5

    batch_without = batch([0, 1], None)
    blind = small_model(positive_patches="farthest")
    blind.on_fit_start()
    blind.training_step(batch_without)
    blind.fit()
    assert len(blind.model.positive_bank) >= 1
