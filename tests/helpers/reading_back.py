"""Reading back what a data module has made of the images."""

from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule

from anomalib_exdd.data import DefectFolder


def ready_folder(root: Path | None, **arguments: Any) -> DefectFolder:
    data = DefectFolder("parts", root=root, num_workers=0, **arguments)
    data.setup()
    return data


def sample_rows(data: AnomalibDataModule) -> list[tuple[str, str, int, str]]:
    """(image, mask, label, train or test) by file name; validation counts as training."""
    return sorted(
        (Path(row.image_path).name, Path(row.mask_path).name, row.label_index, split)
        for dataset, split in ((data.train_data, "train"), (data.val_data, "train"), (data.test_data, "test"))
        for row in dataset.samples.itertuples()
    )


def kinds_by_name(data: AnomalibDataModule) -> dict[str, str]:
    """Kind of every image of all splits, by file name without ending."""
    datasets = (data.train_data, data.val_data, data.test_data)
    return {Path(row.image_path).stem: row.kind for dataset in datasets for row in dataset.samples.itertuples()}


def split_counts(data: AnomalibDataModule) -> dict[str, tuple[int, int]]:
    """Number of normal and of defective images in each split."""
    return {
        name: (int((dataset.samples.label_index == 0).sum()), int((dataset.samples.label_index == 1).sum()))
        for name, dataset in (("train", data.train_data), ("val", data.val_data), ("test", data.test_data))
    }
