"""Why an image or a region is taken for a defect, in one word and a kind."""

from typing import Literal, NamedTuple


class Reason(NamedTuple):
    """Why an image or a region is taken for a defect.

    Attributes:
        reason: "known" if it resembles defects of the training images, "unfamiliar" if it resembles neither these nor
            normal images.
        kind: Kind of the defects that it resembles, such as "scratch"; None for an unfamiliar one, and if the kind of
            these defects is not known.
        kind_share: Share of the deciding patches whose nearest defect is of that kind, 0 to 1.
    """

    reason: Literal["known", "unfamiliar"]
    kind: str | None = None
    kind_share: float | None = None

    def __str__(self) -> str:
        """Return the reason in words, for pictures."""
        if self.reason == "unfamiliar":
            return self.reason
        if self.kind is None or self.kind_share is None:
            return "resembles known defects"
        return f"resembles {self.kind} ({self.kind_share:.0%})".replace("%", " %")
