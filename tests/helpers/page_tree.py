"""Reads a page into a tree, and refuses one whose tags do not match: a text that was not escaped shows there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input"}


@dataclass
class Element:
    """A tag with its attributes and what is within it."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All texts within, in their order."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def __iter__(self) -> Iterator[Element]:
        """Go through all elements within, in the order of the page."""
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Find elements by tag and attributes; `class_` asks for one of the classes, `_` stands for a dash."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items() if name != "class_"}
        return [
            each
            for each in self
            if (not tag or each.tag == tag)
            and wanted.items() <= each.attributes.items()
            and ("class_" not in attributes or attributes["class_"] in each.classes)
        ]

    def one(self, tag: str = "", **attributes: str) -> Element:
        """Find the only such element."""
        (found,) = self.all(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(page: str) -> Element:
    """Read a page's elements."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]
