"""What a report is made of, whatever it is written as: sections of text, tables, pictures and verdicts."""

from dataclasses import dataclass

VERDICTS = ("holds", "holds under conditions", "does not hold", "not tested")


@dataclass(frozen=True)
class Table:
    """Cells as a reader sees them. `note` says units, what was held equal, and what marks mean."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure in figures/<name>.svg and figures/<name>.png; `alt` says what it shows."""

    name: str
    alt: str


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a study shows of one claim: one of VERDICTS, and the numbers behind it."""

    claim: str
    verdict: str
    evidence: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r}: one of {', '.join(VERDICTS)}")
