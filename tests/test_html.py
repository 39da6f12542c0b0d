"""The report as its readers see it: one HTML page that needs nothing else, in a browser, in light and dark."""

import functools
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from research.analysis import claims, report, study
from tests.fake_runs import write_study

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@functools.cache
def made() -> Path:
    """The folder of a report of fabricated runs, with everything that a report can show."""
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    keys = write_study(folder, seeds=(42, 43), settings=("independent", "paired", "recall"))
    study.save(study.collect(folder, keys, {}), folder / "report")
    report.write(folder / "report")
    return folder / "report"


def html() -> str:
    return (made() / "report.html").read_text()


def test_the_page_needs_nothing_beside_it():
    for attribute in re.findall(r'\b(?:src|href|xlink:href)="([^"]*)"', html()):
        assert attribute.startswith(("#", "data:")), attribute
    assert not re.search(r"<script|@import|url\((?!#)", html())
    assert html().count("<figure") == len(list((made() / "figures").glob("*.svg"))) == html().count('<svg role="img"')


def test_both_reports_have_the_same_parts_verdicts_and_tables():
    text = (made() / "report.md").read_text()
    titles = re.findall(r"^## (.*)$", text, flags=re.M)
    assert len(titles) >= 10
    for title in titles:
        assert f'id="{re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")}"' in html()
    assert (
        html().count('class="claim"')
        == len(claims.CLAIMS)
        == sum(text.count(f"| {claim} |") for claim, _ in claims.CLAIMS)
    )
    assert html().count("<table>") + 1 == len(re.findall(r"^\| --- ", text, flags=re.M))  # one is of the verdicts


def test_it_is_made_from_results_json_alone(tmp_path):
    report.render(json.loads((made() / "results.json").read_text()), tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (made() / name).read_bytes()


def test_what_runs_are_called_cannot_break_the_page(tmp_path):
    results = json.loads((made() / "results.json").read_text().replace("a processor", "<b>|a & b|</b>"))
    report.render(results, tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<b>|a" not in page and "&lt;b&gt;" in page
    assert "<b>" not in text


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_in_light_and_dark_without_a_page_that_scrolls_sideways(tmp_path, width):
    looks = {}
    for dark in (0, 1):
        file = tmp_path / f"{dark}.png"
        browse(
            f"--screenshot={file}", f"--window-size={width},2400", f"--blink-settings=preferredColorScheme={1 - dark}"
        )
        looks[dark] = matplotlib.image.imread(file)[..., :3]
    light, dark = looks[0], looks[1]
    assert light.shape == dark.shape == (2400, max(width, light.shape[1]), 3)
    assert light.mean() > 0.8 and dark.mean() < 0.4  # paper, and ink
    assert min(light.std(), dark.std()) > 0.05
    # a page wider than its window would be cut: its text would touch the right edge
    edge = light[:, width - 6 : width]
    assert np.ptp(edge) < 0.1


@needs_browser
def test_the_page_is_whole_in_the_browser():
    dom = browse("--dump-dom").stdout
    assert dom.rstrip().endswith("</html>") and dom.count("<section") == html().count("<section")


def browse(*arguments: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", *arguments, f"file://{made() / 'report.html'}",
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
