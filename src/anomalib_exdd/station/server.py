"""The page and ``POST /predict`` in one process.

Gradio, FastAPI and uvicorn come with the extra ``station`` and are imported here and in :mod:`.page` only.
"""

import asyncio
import base64
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from .page import CSS, THEME, build_page
from .station import Station

USER = "review"  # goes with the password
MOST_BYTES = 100 << 20  # of a request; larger ones are refused before they are read
MOST_WAITING = 32  # requests at once; further ones are told to come back


def make_app(station: Station, password: str | None = None) -> FastAPI:
    """Put page and HTTP interface of a station into one application; with a password, both ask for it."""
    app = FastAPI(title="anomalib-exdd", docs_url=None, redoc_url=None, openapi_url=None)
    waiting = asyncio.Semaphore(MOST_WAITING)
    worker = ThreadPoolExecutor(1)  # several threads would wait for each other, and keep memory of their own

    async def predict(request: Request) -> JSONResponse:
        """Predict the image of the form field `image`; the answer is a row of `predictions.json`."""
        if password is not None and not _knows(request, password):
            return _error(401, "Give user and password (HTTP Basic).", **{"WWW-Authenticate": "Basic"})
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return _error(411, "The header Content-Length is missing.")
        if int(length) > MOST_BYTES:
            return _error(413, f"The request has {length} bytes; {MOST_BYTES} are the most.")
        if waiting.locked():
            return _error(503, f"{MOST_WAITING} requests are waiting already. Try again.", **{"Retry-After": "1"})
        async with waiting, request.form(max_files=1, max_fields=1) as form:
            image = form.get("image")
            if not isinstance(image, UploadFile):
                return _error(400, "Send one image file as the form field `image` (multipart/form-data).")
            sent = (image.file, image.filename or "image")
            row = await asyncio.get_running_loop().run_in_executor(worker, station.predict_sent, *sent)
        return _error(400, row.error) if row.error is not None else JSONResponse(row.to_dict())

    app.add_api_route("/predict", predict, methods=["POST"])
    options: Any = {"theme": THEME, "css": CSS, "footer_links": [], "run_history": False, "ssr_mode": False}
    options |= {"max_file_size": MOST_BYTES, "app_kwargs": {"docs_url": None, "redoc_url": None}, "show_error": True}
    auth = None if password is None else (USER, password)
    return gr.mount_gradio_app(app, build_page(station), path="/", auth=auth, **options)


def _knows(request: Request, password: str) -> bool:
    given = request.headers.get("authorization", "").encode()
    wanted = b"Basic " + base64.b64encode(f"{USER}:{password}".encode())
    return secrets.compare_digest(given, wanted)


def _error(status: int, message: str, **headers: Any) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


def serve(station: Station, host: str, port: int, password: str | None) -> None:
    """Serve until the process is interrupted."""
    uvicorn.run(make_app(station, password), host=host, port=port, log_level="warning")
