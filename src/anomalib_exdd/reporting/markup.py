"""What the pages of this package share: escaping, templates, and a common look.

Whatever comes from a file (paths, errors, names, settings) goes through :func:`escape` before it stands in a page.
"""

import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def escape(text: object) -> str:
    """Turn any text into HTML that shows it, within elements as well as in quoted attributes."""
    return html.escape(str(text))


def script_json(content: Any) -> str:
    """Write JSON that may stand in a script: nothing is escaped there, but `</script>` and `<!--` would end it."""
    return json.dumps(content).replace("<", "\\u003c")


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Replace the marks of a template, such as `@TITLE@`.

    In one pass: what is filled in may hold such marks itself.

    Args:
        template: Text with marks.
        parts: Mark without the signs -> HTML that takes its place.
    """
    return re.sub("@([A-Z]+)@", lambda mark: parts[mark[1]], template)


def asset(name: str) -> str:
    """Read a file that lies beside this module, such as `base.css`.

    Args:
        name: File, relative to `reporting/`.
    """
    return files("anomalib_exdd.reporting").joinpath(name).read_text(encoding="utf-8")
