"""The report as its readers see it: one HTML page that needs nothing else, in a browser, in light and dark."""

import copy
import functools
import html.parser
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jinja2
import matplotlib.image
import numpy as np
import pytest

from research.analysis import archive, claims, comparison, markup, render, report, waterfall_report
from research.analysis.page import Table
from tests.fake_runs import write_study

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WATERFALL = Path(__file__).resolve().parents[1] / "experiments/results/waterfall/cpu"
WIDE, NARROW, HEIGHT = 1280, 400, 1500
HOSTILE = '<script>alert(1)</script> & a|b `c` "d" [e](javascript:f) <img src=x onerror=g> **h'


@functools.cache
def made() -> Path:
    """The folder of a report of fabricated runs, with everything that a report can show."""
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    keys = write_study(folder, seeds=(42, 43), settings=("independent", "paired", "recall"))
    archive.save(archive.collect(folder, keys, {}), folder / "report")
    report.write(folder / "report")
    return folder / "report"


def results() -> dict:
    return json.loads((made() / "results.json").read_text())


def page(folder: Path | None = None) -> str:
    return ((folder or made()) / "report.html").read_text()


def text(folder: Path | None = None) -> str:
    return ((folder or made()) / "report.md").read_text()


class Elements(html.parser.HTMLParser):
    """Every element's name and attributes, and the words between them."""

    def __init__(self, content: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_beside_it():
    found = Elements(page()).elements
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(tag for tag, _ in found)
    for tag, attributes in found:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href") and not (tag == "a" and value.startswith("https://")):
                assert value.startswith(("#", "data:image/png")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", page()) and "default-src 'none'" in page()


def test_every_link_inside_has_its_place_and_no_place_is_named_twice():
    found = [attributes for _, attributes in Elements(page()).elements]
    ids = [attributes["id"] for attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a[name][1:] for a in found for name in ("href", "xlink:href") if a.get(name, "").startswith("#")}
    links |= set(re.findall(r"url\(#([^)]+)\)", page()))
    assert len(links) > 20 and links <= set(ids)


def test_every_figure_that_was_drawn_stands_inside_with_words_for_who_cannot_see_it():
    drawn = {path.stem for path in (made() / "figures").glob("*.svg")}
    assert len(drawn) >= 6 and all((made() / "figures" / f"{name}.png").exists() for name in drawn)
    found = Elements(page()).elements
    assert {a["id"].removeprefix("figure-") for tag, a in found if tag == "figure"} == drawn
    svgs = [attributes for tag, attributes in found if tag == "svg"]
    assert len(svgs) == len(drawn) and all(len(svg["aria-label"]) > 10 and svg["role"] == "img" for svg in svgs)
    assert set(re.findall(r"\(figures/(\w+)\.png\)", text())) == drawn


def test_both_reports_have_the_same_parts_tables_and_verdicts_in_one_order():
    titles = re.findall(r"^## (.*)$", text(), re.M)
    found = Elements(page()).elements
    assert [markup.slug(title) for title in titles] == [a["id"] for tag, a in found if tag == "section"]
    wanted = ["What was run", "Findings", "On the same held-out tokens", "The original's claims, one by one"]
    wanted += ["What context is worth", "Five budgets", "Row length or diversity?", "How far back can it recall?"]
    wanted += ["What a step costs", "The original's table, and ours", "What the words mean"]
    assert [title for title in titles if title in wanted] == wanted
    tables = re.findall(r"^\|(?: --- \|)+$", text(), re.M)
    assert len([tag for tag, _ in found if tag == "table"]) + 1 == len(tables)  # one is of the verdicts
    assert [a.get("class") for _, a in found].count("claim") == len(claims.CLAIMS)
    for claim, _ in claims.CLAIMS:
        assert text().count(f"| {claim} |") == 1


def test_every_row_of_a_markdown_table_has_its_columns():
    tables = re.findall(r"(?:^\|.*\n)+", text(), re.M)
    assert len(tables) > 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table


def test_the_report_is_made_from_results_json_alone(tmp_path):
    report.render(results(), tmp_path)
    for path in (p for p in made().rglob("*") if p.is_file() and p.suffix in (".md", ".html", ".svg")):
        assert (tmp_path / path.relative_to(made())).read_bytes() == path.read_bytes(), path.name


def test_what_leaks_is_marked_wherever_it_is_shown():
    words = " ".join(Elements(page()).words)
    original = page()[page().index('id="the-original-s-table-and-ours"') :]
    assert original.count('class="leaking"') >= 6  # a loss and an accuracy of each of its strategies
    assert "0.0239" in words and "0.0060" in words and "0.0015" in words  # their floors
    assert not [line for line in text().splitlines() if "0.1025" in line and "LEAKING" not in line]


def test_hostile_names_are_shown_as_they_are(tmp_path, monkeypatch):
    """In a device, a corpus, a strategy, a status and a warning."""
    monkeypatch.setattr(report.figures, "draw", lambda analysis, folder: {})
    changed = copy.deepcopy(results())
    for run in changed["runs"]:
        run["result"] |= {"device": HOSTILE, "corpus": HOSTILE}
    changed["runs"].append(
        {"strategy": HOSTILE, "setting": "independent", "seed": 1, "status": HOSTILE, "result": None}
    )
    for part in ("arms", "differences", "context", "decomposition", "recall", "rankings", "power"):
        changed["analysis"][part] = json.loads(json.dumps(changed["analysis"][part]).replace("balanced", "<b>|a"))
    changed["analysis"]["warnings"] = [HOSTILE]
    report.render(changed, tmp_path)
    found = Elements(page(tmp_path))
    tags = {tag for tag, _ in found.elements}
    assert "b" in {tag for tag, _ in Elements(page()).elements} and tags.isdisjoint({"script", "img"})  # captions
    assert not [a for tag, a in found.elements if tag == "b"]
    assert not [a for _, a in found.elements if "onerror" in a or "javascript" in a.get("href", "")]
    assert sum(word.count("<script>alert(1)</script> & a|b") for word in found.words) >= 4
    assert not re.search(r"<(?:script|img|b)\b", re.sub(r"`[^`\n]*`", "", text(tmp_path)))
    assert text(tmp_path).count("&lt;b>\\|a") > 10  # a pipe would end its cell


@pytest.mark.parametrize("settings", [(), ("recall",)])
def test_a_study_without_text_still_has_a_report(tmp_path, settings):
    runs = [run for run in results()["runs"] if run["setting"] in settings]
    missing = {"strategy": "balanced", "setting": "independent", "seed": 42, "status": "missing", "result": None}
    analysis = comparison.analyse([]) | {"reach": {"pairs": [], "gains": []}}
    if settings:
        analysis["recall"] = results()["analysis"]["recall"]
    report.render({"runs": [*runs, missing], "analysis": analysis}, tmp_path)
    assert "balanced-independent-42 missing" in text(tmp_path) and "balanced-independent-42 missing" in page(tmp_path)
    assert ("How far back" in text(tmp_path)) == bool(settings) and "nan" not in page(tmp_path).lower().split()


def test_a_report_without_a_value_fails_and_prints_nothing_in_its_place():
    with pytest.raises(jinja2.UndefinedError):
        render.environment().get_template("report.md").render({})


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("a **b** `c|d` <e>", "a <strong>b</strong> <code>c|d</code> &lt;e&gt;"),
        ("LEAKING and **LEAKING**", 2 * '<strong class="leaking">LEAKING</strong> and '),
        ("[x](https://y.org/z)", '<a href="https://y.org/z">x</a>'),
        ("[x](javascript:y)", "[x](javascript:y)"),
        ("-0.3 [-0.4, -0.2]", "\u22120.3\u00a0[\u22120.4,\u00a0\u22120.2]"),
        ("4 x 2048, B x T, long_seq - balanced", "4\u202f×\u202f2048, B\u202f×\u202fT, long_seq \u2212 balanced"),
        ("one -> two, `a -> b`", "one \u2192 two, <code>a -&gt; b</code>"),
        ("1e-05, 2026-11-23, `a - 1`", "1e-05, 2026-11-23, <code>a - 1</code>"),
    ],
)
def test_text_is_set_as_html(typed, shown):
    assert str(markup.inline(typed)) == shown.removesuffix(" and ")


def test_columns_of_numbers_are_known():
    table = Table(("a", "b", "c"), (("x", "-0.1 [-0.2, +0.1]", "1.2 s"), ("1", "–", "equal")))
    assert render.numeric(table) == {1}


def test_colours_of_figures_can_be_read_on_dark_paper():
    paper = markup._rgb(markup.on_dark("#ffffff"))
    for color in ("#333333", "#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b03a00"):
        assert markup.contrast(markup._rgb(markup.on_dark(color)), paper) > 4.4, color
    assert markup.contrast(markup._rgb(markup.on_dark("#e6e6e6")), paper) < 1.6  # a grid stays faint


def test_a_drawing_that_could_do_more_than_be_seen_is_refused():
    for inside in ("<script>x</script>", '<a href="https://y.org"/>', '<g onload="x"/>', "<foreignObject/>"):
        with pytest.raises(ValueError, match="figure f"):
            markup.figure(f'<svg viewBox="0 0 1 1">{inside}</svg>', "f", "alt")


@functools.cache
def waterfall() -> Path:
    """The folder of the report of the committed waterfall study, made again."""
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    waterfall_report.write(json.loads((WATERFALL / "results.json").read_text()), folder)
    return folder


def test_a_waterfall_is_a_page_too():
    found = Elements(page(waterfall()))
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(tag for tag, _ in found.elements)
    sections = [a["id"] for tag, a in found.elements if tag == "section"]
    assert sections == [markup.slug(title) for title in re.findall(r"^## (.*)$", text(waterfall()), re.M)]
    assert sum(section.startswith("stage-") for section in sections) == 7
    stages = json.loads((WATERFALL / "results.json").read_text())["analysis"]["waterfall"]["stages"]
    for row in (row for stage in stages for row in stage["rows"]):
        assert any(f"{row['loss']:.4f}" in word for word in found.words)
    first = page(waterfall())
    first = first[first.index('<section id="stage-0') : first.index('<section id="stage-1')]
    assert first.count('class="leaking"') >= 7 and f"{stages[0]['rows'][0]['floor']:.4f}" in first


@functools.cache
def seen(scheme: int, folder: Path) -> tuple[str, np.ndarray]:
    """The page in a wide and in a narrow frame, one above the other: the browser's document, and its picture."""
    frames = "".join(
        f'<iframe id="at{width}" style="width:{width}px;height:{HEIGHT}px;border:0;display:block" srcdoc="'
        f'{page(folder).replace("&", "&amp;").replace(chr(34), "&quot;")}"></iframe>'
        for width in (WIDE, NARROW)
    )
    measure = """<script>onload = () => { for (const frame of document.querySelectorAll('iframe')) {
        const inside = frame.contentDocument.documentElement
        const out = [...inside.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .skip') &&
            e.getBoundingClientRect().right > inside.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))
        frame.dataset.measured = JSON.stringify({width: inside.clientWidth, scroll: inside.scrollWidth, out: out,
            sections: inside.querySelectorAll('section').length})
        frame.srcdoc = '' } }</script>"""
    place = Path(tempfile.mkdtemp(prefix="page-"))
    head = '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body style="margin:0">'
    picture, document = place / "page.png", place / "page.html"
    document.write_text(head + frames)
    _browse(document, scheme, f"--screenshot={picture}")
    document.write_text(head + frames + measure)
    return _browse(document, scheme, "--dump-dom"), matplotlib.image.imread(picture)[..., :3]


def _browse(document: Path, scheme: int, *arguments: str) -> str:
    with tempfile.TemporaryDirectory(prefix="profile-") as profile:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={WIDE},{2 * HEIGHT}",
            f"--blink-settings=preferredColorScheme={scheme}", *arguments, f"file://{document}",
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("of", [made, waterfall])
def test_the_page_is_no_wider_than_a_browsers_window(width, of):
    (found,) = re.findall(rf'id="at{width}"[^>]*data-measured="([^"]*)"', seen(1, of())[0])
    found = json.loads(html.unescape(found))
    assert found["sections"] == page(of()).count("<section")
    assert found["width"] == width and found["scroll"] == width and found["out"] == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("of", [made, waterfall])
def test_a_browser_shows_light_paper_to_some_and_dark_paper_to_others(of):
    for place in (np.s_[:HEIGHT, :WIDE], np.s_[HEIGHT:, :NARROW]):
        dark, light = (seen(scheme, of())[1][place] for scheme in (0, 1))
        assert light.shape == dark.shape and min(light.shape[:2]) >= NARROW
        assert light.mean() > 0.85 and dark.mean() < 0.3  # paper
        assert light.min() < 0.2 and dark.max() > 0.8  # ink
        assert min(light.std(), dark.std()) > 0.04
