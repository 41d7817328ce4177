"""One row of a probe set: what is asked about one picture, or about its caption, and what is true of it.

Data flow: ``probing`` makes rows -> ``probe_sets`` holds them -> ``probe_collator`` turns them into tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_mm.data.sample import Sample

Role = Literal["entailment", "picture", "text"]
Label = int | tuple[int, ...]


@dataclass(frozen=True)
class ObjectBox:
    """A thing and where it is: x0, y0, x1, y1 in pixels of the picture as stored, the far edges exclusive."""

    name: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ProbeRow:
    """One question, never answered: what counts is what the model holds of it.

    Args:
        id: ``picture:question``, unique within the set, and the same whenever it is drawn from the same data.
        group: What splits and intervals must not tear apart: the picture, or the group that its file puts it into; for
            entailment rows all that trade captions, since a caption that is true in one row is false in another: a
            probe that saw one of them would be wrong about the other.
        role: ``entailment`` (picture and caption: do they agree?), ``picture`` (picture and question) or ``text`` (its
            caption in place of the picture, and the same question).
        sample: One user turn; it has no picture for role ``text``.
        span: The part of the turn that is read as site ``text``: the caption, or the question of a picture row.
        labels: Probe -> index into its classes; for ``objects`` one 0 or 1 per class; for ``object_at_patches`` one
            index per box.
        boxes: The things that have sites ``object:0``, ``object:1``, ...
        blank: Whether the picture is withheld: a grey one of its size takes its place.
    """

    id: str
    group: str
    role: Role
    sample: Sample
    span: str
    labels: Mapping[str, Label]
    boxes: tuple[ObjectBox, ...] = ()
    blank: bool = False

    def __post_init__(self) -> None:
        assert self.text.count(self.span) == 1, f"the span {self.span!r} is to be found in {self.text!r}"

    @property
    def text(self) -> str:
        """The user's turn."""
        return self.sample.turns[0].text

    @property
    def subject(self) -> str:
        """The picture that it is about, whether it shows it or says its caption.

        Example:
            >>> from lightning_mm.data.sample import Turn
            >>> sample = Sample("7:text", (Turn("user", "A cat. What is it?"),))
            >>> ProbeRow("7:text", "clip 3", "text", sample, "A cat.", {}).subject
            '7'
        """
        return self.id.rpartition(":")[0] or self.id

    def told(self) -> dict[str, Any]:
        """All that the row says, but for its picture, in JSON's types."""
        labels = {probe: list(label) if isinstance(label, tuple) else label for probe, label in self.labels.items()}
        boxes = [{"name": each.name, "box": [float(edge) for edge in each.box]} for each in self.boxes]
        return {
            "id": self.id,
            "group": self.group,
            "role": self.role,
            "text": self.text,
            "span": self.span,
            "labels": labels,
            "boxes": boxes,
            "blank": self.blank,
        }
