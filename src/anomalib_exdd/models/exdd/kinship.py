"""Which images share content: a synthetic defect has that of the normal image and of the defect it was made from.

Distances that training is judged by leave out whatever shares content with the image that is measured. A real defect
would otherwise be close to its own copies in synthetic images, and the calibration would trust such closeness.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

Origins = dict[str, list[str]]
"""Path of a synthetic image -> paths of the real images that it was made from."""


class Kinship:
    """Finds the sources of a bank that share content with an image.

    Args:
        sources: Paths of the bank's source images.
        origins: What synthetic images were made from.
    """

    def __init__(self, sources: Sequence[str], origins: Mapping[str, Iterable[str]]) -> None:
        self._origins = origins
        self._rows: defaultdict[str, list[int]] = defaultdict(list)
        for row, source in enumerate(sources):
            for path in (source, *origins.get(source, ())):
                self._rows[path].append(row)

    def rows(self, path: str) -> list[int]:
        """Return the rows of the sources that share content with an image, ascending; none if it is a stranger."""
        found = {row for each in (path, *self._origins.get(path, ())) for row in self._rows.get(each, ())}
        return sorted(found)
