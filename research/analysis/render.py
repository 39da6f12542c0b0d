"""A report written: its parts as report.md, and as one report.html with style and figures inside.

report.html needs nothing beside it, and follows the reader's light or dark.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from research.analysis import markup
from research.analysis.page import VERDICTS, Picture, Table, Verdict
from research.analysis.style import styles_of
from research.files import write_text

MARKS = dict(zip(VERDICTS, "✓◐✕○", strict=True))
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Part:
    """A section as the templates show it; `kind` is `findings`, `warnings` or empty."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    terms: tuple[tuple[str, str], ...] = ()
    kind: str = ""

    @property
    def anchor(self) -> str:
        return markup.slug(self.title)

    @property
    def tally(self) -> list[tuple[str, int]]:
        """(verdict, how many), in the order of VERDICTS."""
        return [(name, sum(v.verdict == name for v in self.verdicts)) for name in VERDICTS]


@dataclass(frozen=True)
class Page:
    """What both templates show. `facts`: (term, fact); `strategies`: their names are marked by their colours."""

    title: str
    kicker: str
    question: str
    facts: Sequence[tuple[str, str]]
    parts: Sequence[Part]
    footer: str
    strategies: Sequence[str] = ()


def write(page: Page, folder: Path) -> None:
    """Writes report.md and report.html into `folder`, whose figures/ holds the pictures of the parts, already drawn."""
    pictures = [picture for part in page.parts for picture in part.pictures]
    svgs = {picture.name: (folder / "figures" / f"{picture.name}.svg").read_text() for picture in pictures}
    shown = {name: getattr(page, name) for name in ("title", "kicker", "question", "facts", "parts", "footer")}
    shown |= dict(marks=MARKS)
    write_text(folder / "report.md", environment().get_template("report.md").render(shown))
    shown |= _looks(pictures, svgs, page.strategies)
    write_text(folder / "report.html", environment().get_template("report.html").render(shown))


def _looks(pictures: Sequence[Picture], svgs: Mapping[str, str], strategies: Sequence[str]) -> dict[str, Any]:
    """What the HTML template needs beside: style, figures to stand inside the page, and their colours."""
    dots = {name: style["color"].lower() for name, style in styles_of(strategies).items()}
    return dict(
        css=Markup((_TEMPLATES / "report.css").read_text()),
        palette=markup.palette(svgs.values(), extra=dots.values()),
        dots={name: f"--k{color[1:]}" for name, color in dots.items()},
        svgs={p.name: markup.figure(svgs[p.name], p.name, p.alt) for p in pictures},
        cards={name for name, svg in svgs.items() if markup.scaled(svg)},
        numbers={picture.name: number for number, picture in enumerate(pictures, 1)},
    )


def environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable] = {
        name: getattr(markup, name) for name in ("inline", "paragraphs", "plain", "markdown", "cell", "slug")
    }
    environment.filters |= filters
    environment.globals["numeric"] = numeric
    return environment


def numeric(table: Table) -> set[int]:
    """Columns whose every cell is read as a number: they are set to the right."""
    columns = np.array(table.rows, dtype=object).T if table.rows else []
    return {i for i, cells in enumerate(columns) if all(markup.is_number(str(c)) for c in cells)}
