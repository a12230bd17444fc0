"""The page: images that wait for an answer, what speaks for a defect, three buttons, and what they change."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

from anomalib_exdd.images.reading import open_image

from .drift import Drift, from_record
from .station import Answer, Station

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = ".verdict h3 { margin: 0 } .tiles .grid-wrap { max-height: none } footer { display: none !important }"
_SIGNS = {"review": "?", "reject": "✕", "accept": "✓"}
_LISTED = 60  # images
_SIDE = 800  # pixels of the longer side of what is drawn on
_THUMB = 160
_INK = (229, 72, 77)
_PRIVATE: Any = {"api_visibility": "private"}  # the page's own calls are no interface for others


def build_page(station: Station) -> gr.Blocks:
    """Build the page of a station."""
    with gr.Blocks(title="Review", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Review"):
            _build_review(Handlers(station), page)
        with gr.Tab("Drift") as drift:
            said, picture = gr.Markdown(), gr.Image(show_label=False, interactive=False, buttons=[])
        drift.select(lambda: _drift(station), None, [said, picture], **_PRIVATE)
        with gr.Tab("Record"):
            gr.Markdown(f"All predictions, answers and teachings are in `{station.record.path}`.")
            table = gr.DownloadButton("Table of them (CSV)")
        table.click(lambda: _table(station), None, table, **_PRIVATE)
    return page


def _build_review(handlers: "Handlers", page: gr.Blocks) -> None:
    selected, listed = gr.State(""), gr.State([])
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(label="Drop images here", file_count="multiple", file_types=["image"], height=120)
            counts = gr.Markdown()
            queue = gr.Gallery(show_label=False, columns=3, height=460, allow_preview=False, buttons=[])
        with gr.Column(scale=5, min_width=300):
            verdict = gr.Markdown(elem_classes="verdict")
            with gr.Row():
                brush = gr.Brush(colors=[f"#{bytes(_INK).hex()}"], color_mode="fixed", default_size=16)
                look: Any = {"height": 420, "min_width": 280}
                plain: Any = {"sources": (), "transforms": (), "layers": False, "type": "numpy"}
                editor = gr.ImageEditor(label="Defect: outlined, or paint it", brush=brush, **plain, **look)
                heat_map = gr.Image(label="Heat map", interactive=False, buttons=[], **look)
            with gr.Row():
                good, defect, unsure, undo = (
                    gr.Button(name, variant="primary" if name == "Defect" else "secondary", size="md", min_width=60)
                    for name in ("Good", "Defect", "Not sure", "Undo")
                )
            kind = gr.Dropdown(label="Kind of the defect (choose or type)", allow_custom_value=True)
            changed = gr.Markdown(elem_classes="changed")
            gr.Markdown("**What decided:** patches of this image, the closest good one, the closest known defect")
            tiles = gr.Gallery(show_label=False, columns=3, height="auto", buttons=[], elem_classes="tiles")
    shown, listing = [selected, verdict, editor, heat_map, tiles, kind], [counts, queue, listed]
    page.load(handlers.listing, None, listing, **_PRIVATE).then(handlers.show_first, None, shown, **_PRIVATE)
    taken = upload.upload(handlers.take, upload, [upload, *listing], **_PRIVATE)
    taken.then(handlers.show_first, None, shown, **_PRIVATE)
    queue.select(handlers.pick, listed, shown, **_PRIVATE)
    answers: list[tuple[gr.Button, Answer]] = [(good, "good"), (defect, "defect"), (unsure, "not sure")]
    for button, answer in answers:
        given = [selected, editor, kind]
        answered = button.click(partial(handlers.answer, answer), given, [changed, *listing], **_PRIVATE)
        answered.success(handlers.show_first, None, shown, **_PRIVATE)
    undo.click(handlers.undo, None, [changed, *listing], **_PRIVATE)


class Handlers:
    """What happens when a person does something on the page, which shows the messages of errors."""

    def __init__(self, station: Station) -> None:
        self.station = station

    def listing(self) -> list[Any]:
        """Return how many images wait, pictures of the first of them, and their paths."""
        rows = self.station.queue()
        counts = [f"{sum(row.decision == name for row in rows)} {name} {sign}" for name, sign in _SIGNS.items()]
        rows = rows[:_LISTED]
        pictures = [(_thumbnail(row.path), f"{_SIGNS[str(row.decision)]} {_percent(row.probability)}") for row in rows]
        return [f"**{', '.join(counts)}**", gr.Gallery(pictures, selected_index=None), [row.path for row in rows]]

    def take(self, files: list[str]) -> list[Any]:
        """Predict dropped files."""
        for file in files:
            with Path(file).open("rb") as content:
                row = self.station.predict(self.station.keep(content, Path(file).name))
            if row.error is not None:
                gr.Warning(row.error)
        return [None, *self.listing()]

    def pick(self, paths: list[str], event: gr.SelectData) -> list[Any]:
        """Show the image that was clicked on."""
        return self.show(paths[event.index])

    def show_first(self) -> list[Any]:
        """Show the image that is to be reviewed next."""
        return self.show(next((row.path for row in self.station.queue()), ""))

    def show(self, path: str) -> list[Any]:
        """Return what is shown of an image: its path, verdict, mask to confirm, heat map, patches and kind."""
        if not path:
            return ["", "### Nothing to review", None, None, [], gr.skip()]
        view = self.station.view(path)
        row = view.row
        boxes = [(*region.box, region.kind or region.reason) for region in row.regions or []]
        regions = [f"{width} x {height} at ({left}, {top}), {what}" for left, top, width, height, what in boxes]
        verdict = (
            f"### {str(row.decision).capitalize()}{view.reason and f': {view.reason}'}\n\n"
            f"Probability of a defect {_percent(row.probability)}; accept below {_percent(row.accept_threshold)}, "
            f"reject from {_percent(row.reject_threshold)}. Regions, in pixels: {'; '.join(regions[:5]) or 'none'}. "
            f"`{Path(path).name}`"
        )
        # No layer of the editor, which would shift it.
        image = view.image.convert("RGB")
        image.paste(_INK, mask=Image.fromarray(view.mask & ~binary_erosion(view.mask, iterations=2)))
        image.thumbnail((_SIDE, _SIDE))
        drawing = {"background": image, "layers": [], "composite": None}
        kinds = gr.Dropdown(value=row.kind or "", choices=self.station.kinds)
        return [path, verdict, drawing, view.heat_map, view.tiles, kinds]

    def answer(self, answer: Answer, path: str, drawing: Any, kind: str | None) -> list[Any]:
        """Take a person's answer; of a defect with what is drawn and its kind."""
        if not path:
            return ["No image is selected.", *self.listing()]
        layers = [layer[..., 3] > 0 for layer in (drawing or {}).get("layers", [])]
        mask_HW = np.any(layers, axis=0) if layers else None
        return [self.station.answer(path, answer, mask_HW, (kind or "").strip()), *self.listing()]

    def undo(self) -> list[Any]:
        """Forget what was taught last."""
        return [self.station.undo(), *self.listing()]


@lru_cache(maxsize=4 * _LISTED)
def _thumbnail(path: str) -> Image.Image:
    image = open_image(path).convert("RGB")
    image.thumbnail((_THUMB, _THUMB))
    return image


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0):.1f} %"


def _drift(station: Station) -> list[Any]:
    """Return what the record says of drift, in words and as a picture."""
    try:
        drift = Drift(from_record(station.record))
    except ValueError as error:
        return [str(error), None]
    return ["\n\n".join(str(drift).splitlines()), drift.draw(station.record.path.with_suffix(".drift.png"))]


def _table(station: Station) -> Path:
    path = station.record.path.with_suffix(".csv")
    station.record.write_csv(path)
    return path
