"""A hook of MkDocs that shows notebooks as pages: code, and what it printed and drew when the notebook was executed."""

import json
from pathlib import PurePath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


class Notebook(File):
    """A notebook that is a page, so that links to it and links in it are those of Markdown."""

    def is_documentation_page(self) -> bool:
        """Tell MkDocs to render the file instead of copying it."""
        return True

    @property
    def content_string(self) -> str:
        """The page as Markdown."""
        return "\n\n".join(markdown(cell) for cell in json.loads(super().content_string)["cells"])


def markdown(cell: dict[str, Any]) -> str:
    """Return a cell as Markdown, with its pictures in it."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
        else:
            parts.append(f"```text\n{''.join(data.get('text/plain') or output['text']).rstrip()}\n```")
    return "\n\n".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put pages in the place of notebooks."""
    for file in [each for each in files if PurePath(each.src_uri).suffix == ".ipynb"]:
        files.remove(file)
        files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files
