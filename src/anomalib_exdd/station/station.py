"""What the page and the HTTP interface do: predict, show, take a person's answer, teach, undo, and record all of it.

One model serves all clients, one call after the other. Images that are not accepted are kept beside the record, because
a person may teach them; the memory banks name them as their source.
"""

import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_exdd.commands.banks import load_checkpoint
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.callbacks.checkpoint import save_changed
from anomalib_exdd.models.callbacks.prediction_row import PredictionRow, predict_file
from anomalib_exdd.models.exdd.explanation_pictures import image_and_heat_map, patch_tiles
from anomalib_exdd.models.record import Record, model_version
from anomalib_exdd.models.transforms import whole_maps

Answer = Literal["good", "defect", "not sure"]

MOST_ITEMS = 1000
"""Images that wait for an answer, at most; all others are in the record."""
_ORDER = {"review": 0, "reject": 1, None: 2, "accept": 3}
_EXPLAINED = 2  # patches of an image


class View(NamedTuple):
    """What a person sees of an image."""

    row: PredictionRow
    reason: str  # why it is not accepted, in words
    image: Image.Image
    heat_map: Image.Image
    mask: NDArray[np.bool_]  # where the model sees a defect, of the image's size
    tiles: list[tuple[Image.Image, str]]  # for each explained patch: itself, the closest normal one and defect, named


class Station:
    """A trained model, its record, and the images that wait for an answer.

    Args:
        checkpoint: Checkpoint of an ExDD model that makes decisions; teaching changes it.
        record: Record; a file that is not there is made.
    """

    def __init__(self, checkpoint: Path, record: Path) -> None:
        self.checkpoint = checkpoint
        self.model = load_checkpoint(checkpoint)
        if self.model.decisions is None:
            msg = f"{checkpoint} makes no decisions. Train with calibrated scoring, on several good images."
            raise ValueError(msg)
        self.record = Record(record)
        self.folder = record.with_name(f"{record.name}.images")
        self.items: dict[str, PredictionRow] = {}
        self.taught: list[str] = []
        self.lock = threading.RLock()  # held while the model is used
        self._record_state()

    def _record_state(self) -> None:
        self.version = model_version(self.model)
        self.record.add("model", self.version, str(self.checkpoint), self.model.facts())

    @property
    def kinds(self) -> list[str]:
        """Kinds of defects that the model knows."""
        return sorted({kind for kind in self.model.model.positive_bank.kinds.values() if kind})

    def queue(self) -> list[PredictionRow]:
        """Return the images that wait: first those for review, then rejected and accepted ones, the worst first."""
        with self.lock:
            return sorted(self.items.values(), key=lambda row: (_ORDER[row.decision], -(row.probability or 0)))

    def predict(self, path: Path, name: str | None = None) -> PredictionRow:
        """Predict a file and record it, under ``name`` if it is accepted or cannot be read, and so is not kept."""
        with self.lock:
            row, _ = predict_file(self.model, path)
            gone = name is not None and row.decision in {"accept", None}
            if gone:
                row = replace(row, path=str(name))
            self.record.add("prediction", self.version, row.path, row.to_dict())
            if row.error is None and not gone:
                self.items[row.path] = row
                for left_out in self.queue()[MOST_ITEMS:]:
                    del self.items[left_out.path]
        return row

    def keep(self, file: Any, name: str) -> Path:
        """Copy a sent file beside the record, under its name and the time."""
        self.folder.mkdir(exist_ok=True)
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%f")
        path = self.folder / f"{now}_{re.sub(r'[^0-9A-Za-z._-]', '_', name)[-80:]}"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
        return path

    def predict_sent(self, file: Any, name: str) -> PredictionRow:
        """Predict a sent file; it is kept unless it is accepted or cannot be read."""
        path = self.keep(file, name)
        row = self.predict(path, name)
        if row.path == name:
            path.unlink()
        return row

    def view(self, path: str) -> View:
        """Predict an image with the model as it is now, and draw what a person needs to judge it."""
        with self.lock:
            row, batch = predict_file(self.model, Path(path))
            if row.error is not None:
                raise ValueError(row.error)
            image = read_image(path, self.model.white_level)
            explanation = self.model.explain(image, path, _EXPLAINED)
            kinds, tiles = self.model.model.positive_bank.kinds, []
            for patch, found in zip(explanation.patches, patch_tiles(explanation, self.model), strict=True):
                names = ["this image", f"good: {Path(patch.normal.source).name}"]
                if patch.defect is not None:
                    names.append(f"{kinds.get(patch.defect.source, 'defect')}: {Path(patch.defect.source).name}")
                tiles += [(tile, name) for (tile, _), name in zip(found, names, strict=True)]
            _, heat_map = image_and_heat_map(explanation, self.model)
            mask_HW = self._predicted_mask(batch, image.shape[-2:])
            return View(row, str(explanation.reason or ""), to_pil_image(image), heat_map, mask_HW, tiles)

    def _predicted_mask(self, batch: Any, size: Sequence[int]) -> NDArray[np.bool_]:
        """Return where the model sees a defect in an image of a height and width, shape (H, W)."""
        transform = getattr(self.model.pre_processor, "transform", None)
        mask_1hw = batch.pred_mask.float().reshape(1, *batch.pred_mask.shape[-2:])
        return _resized(whole_maps(mask_1hw, transform, size)[0].cpu().numpy() > 0.5, size)

    def answer(self, path: str, answer: Answer, mask_HW: NDArray[np.bool_] | None = None, kind: str = "") -> str:
        """Take a person's answer; defects and false alarms are taught at once. Return what that changed, in words.

        The mask, of the image's size or scaled, is where the defect is; without it, where the model sees it. A
        ValueError if it does not see any.
        """
        with self.lock:
            row, batch = predict_file(self.model, Path(path))
            image = torch.Tensor(read_image(path, self.model.white_level))
            if mask_HW is None or not mask_HW.any():
                mask_HW = self._predicted_mask(batch, image.shape[-2:])
            if answer == "defect" and not mask_HW.any():
                msg = "The model sees no defect here. Paint where it is, then press Defect."
                raise ValueError(msg)
            kind = kind if answer == "defect" else ""
            self.record.add("answer", self.version, path, {"answer": answer, "kind": kind, "decision": row.decision})
            before, entries = self.training_decisions(), 0
            if answer == "defect":
                entries = self.model.teach(image, torch.tensor(_resized(mask_HW, image.shape[-2:])), path, kind)
            elif answer == "good" and row.decision != "accept":
                entries = self.model.teach_good(image, path)
            self.items.pop(path, None)
            if entries == 0:
                return f"Recorded: {answer}. The model stays as it is."
            self.taught.append(path)
            return self._changed(self.model.history[-1]["action"], row, entries, before)

    def undo(self) -> str:
        """Forget what was taught last in this session; return what that changed, in words."""
        with self.lock:
            if not self.taught:
                return "Nothing was taught since the page was started."
            path = self.taught.pop()
            row, before = predict_file(self.model, Path(path))[0], self.training_decisions()
            changed = self._changed("forget", row, self.model.forget(path), before)
            self.items[path] = predict_file(self.model, Path(path))[0]
            return changed

    def _changed(self, action: str, row: PredictionRow, entries: int, before: dict[str, str]) -> str:
        """Save the model that was changed, record it, and compare an image and the training images with before."""
        save_changed(self.model, self.checkpoint)
        self._record_state()
        now, after = predict_file(self.model, Path(row.path))[0], self.training_decisions()
        pairs = [(Path(path).name, was, after.get(path, was)) for path, was in before.items()]
        moved = [f"`{name}` {was} → {new}" for name, was, new in pairs if was != new]
        content = {"entries": entries, "before": row.probability, "after": now.probability, "changed_decisions": moved}
        self.record.add(action, self.version, row.path, content)
        changes = f"{len(moved)} of {len(before)}" + (f": {', '.join(moved[:10])}" if moved else "")
        lines = (
            f"**{action.capitalize()}**: {entries} patches of `{Path(row.path).name}`.",
            f"Probability of a defect {row.probability:.3f} → {now.probability:.3f} ({row.decision} → {now.decision}).",
            f"Training images whose decision changes: {changes}.",
        )
        return "\n\n".join(lines)

    def training_decisions(self) -> dict[str, str]:
        """Return the decision on every real training image, out of fold, by its path."""
        model, decisions = self.model.model, self.model.decisions
        real = [path for path in model.calibration_set.sources if path not in model.positive_bank.origins]
        probabilities = model.calibration.training_probability.tolist()
        return {} if decisions is None else dict(zip(real, map(decisions.name, probabilities), strict=True))


def _resized(mask: NDArray[np.bool_], size: Sequence[int]) -> NDArray[np.bool_]:
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
