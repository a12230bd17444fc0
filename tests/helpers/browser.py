"""An installed Chromium for the tests, driven by Playwright, whose own browsers need not be downloaded."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Return the path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running browser with one page: `page` has Playwright's further methods."""

    def __init__(self, program: str) -> None:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415  for the tests alone that look at a page

        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        self.page = self._browser.new_page()
        self._session = self.page.context.new_cdp_session(self.page)
        self._messages: list[Any] = []
        self._exceptions: list[str] = []
        self._addresses: list[str] = []
        self.page.on("console", lambda message: self._messages.append(message))  # noqa: PLW0108  takes functions alone
        self.page.on("pageerror", lambda error: self._exceptions.append(str(error)))
        self.page.on("request", lambda request: self._addresses.append(request.url))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        return self._session.send(method, params)

    def open(
        self, page: Path | str, *, width: int = 1280, height: int = 900, media: Mapping[str, str] | None = None
    ) -> None:
        """Open a file or an address and wait until it has loaded.

        Args:
            page: The file, or the address.
            width: Width of the window, in CSS pixels.
            height: Its height.
            media: Media features to pretend, such as `prefers-color-scheme`.
        """
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.pretend(media or {})
        self.page.goto("about:blank")
        for heard in (self._messages, self._exceptions, self._addresses):
            heard.clear()
        self.page.goto(page if isinstance(page, str) else page.resolve().as_uri())

    def pretend(self, media: Mapping[str, str], kind: str = "") -> None:
        """Pretend media features, and the kind of medium (`print`, `screen`)."""
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page and return its value."""
        return self.page.evaluate(script)

    def wait_for(self, script: str) -> Any:
        """Wait for a minute at most until JavaScript gives something, and return it."""
        return self.page.wait_for_function(script, timeout=60_000).json_value()

    def press(self, key: str) -> None:
        """Press and release a key, such as `Tab`."""
        self.page.keyboard.press(key)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """Save what is to be seen, or the whole page, as PNG."""
        self.page.screenshot(path=path, full_page=whole)
        return path

    def pdf(self, path: Path) -> Path:
        """Print the page to a file."""
        self.page.pdf(path=path, print_background=True, prefer_css_page_size=True)
        return path

    def complaints(self) -> list[str]:
        """Return errors and warnings of the console since the page was opened, and exceptions."""
        found = [message.text for message in self._messages if message.type in {"error", "warning", "assert"}]
        return found + self._exceptions

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for since it was opened, but for pictures within itself."""
        return [address for address in self._addresses if not address.startswith("data:")]

    def close(self) -> None:
        """End the browser."""
        self._browser.close()
        self._playwright.stop()
