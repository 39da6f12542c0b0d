"""Text, cells and figures as a report's templates need them: as HTML, and as Markdown.

A section's text is paragraphs divided by empty lines, with **bold**, `code` and [links](https://...); lines that begin
with `- ` are a list. Everything else is literal: nothing of it reaches a page as HTML.
"""

import colorsys
import re
from collections.abc import Iterable

from markupsafe import Markup, escape

_INLINE = re.compile(
    r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`|\[(?P<words>[^\]]+)\]\((?P<url>https?://[^\s)]+)\)|(?P<leak>\bLEAKING\b)"
)
_TYPE = (  # what a typesetter would put for what is typed
    (re.compile(r"(?<![\w.)\]])-(?=\d)"), "\u2212"),
    (re.compile(r"(?<=[\w)]) - (?=[\w(])"), " \u2212 "),
    (re.compile(r"(?<=\b[\dA-Z]) x (?=[\dA-Z]\b)|(?<=\d) x (?=\d)"), "\u202f×\u202f"),
    (re.compile(r"(?<=\[)([^\[\] ]+,) ([^\[\] ]+)(?=\])"), "\\1\u00a0\\2"),  # an interval stays on one line
    (re.compile(r"(?<=\d) (?=\[|%)"), "\u00a0"),
    (re.compile(r"(?<= )->(?= )"), "\u2192"),
)
_COLOR = re.compile(r"(?P<paint>\b(?:fill|stroke|stop-color): ?)(?P<color>#[0-9a-f]{6})\b")
_ID = re.compile(r'(?P<before>\bid="|href="#|url\(#)(?P<id>[^")]+)')
_DARK_PAPER = (0.086, 0.098, 0.122)  # of the template's dark style, red green blue
_MANY_COLORS = 14  # more are a colour scale, which has to stay as it is


def inline(text: str) -> Markup:
    """One line of text as HTML; the word LEAKING is marked as a warning."""
    parts, end = [], 0
    for found in _INLINE.finditer(text):
        parts.append(escape(_set(text[end : found.start()])))
        if found["leak"]:
            parts.append(Markup('<strong class="leaking">LEAKING</strong>'))
        elif (bold := found["bold"]) is not None:
            parts.append(inline(bold) if bold == "LEAKING" else Markup("<strong>") + inline(bold) + Markup("</strong>"))
        elif (code := found["code"]) is not None:
            parts.append(Markup("<code>") + escape(code) + Markup("</code>"))
        else:
            parts.append(Markup('<a href="%s">%s</a>') % (found["url"], found["words"]))
        end = found.end()
    return Markup("").join([*parts, escape(_set(text[end:]))])


def _set(text: str) -> str:
    """Minus signs, times signs, and spaces that do not break."""
    for typed, put in _TYPE:
        text = typed.sub(put, text)
    return text


def paragraphs(text: str) -> Markup:
    """A section's text as HTML paragraphs and lists."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines and all(line.startswith("- ") for line in lines):
            items = (Markup("<li>") + inline(line[2:]) + Markup("</li>") for line in lines)
            blocks.append(Markup("<ul>") + Markup("").join(items) + Markup("</ul>"))
        elif block:
            blocks.append(Markup("<p>") + inline(" ".join(lines)) + Markup("</p>"))
    return Markup("\n").join(blocks)


def plain(text: str) -> str:
    """Text without marks, for titles and descriptions."""
    return _INLINE.sub(lambda found: found["bold"] or found["code"] or found["words"] or found[0], text)


def markdown(text: str) -> str:
    """Text for Markdown: what a renderer could take for an HTML tag or entity is escaped, outside of code."""
    pieces = re.split(r"(`[^`]+`)", text)
    pieces[::2] = (re.sub(r"<(?=[\w!/?])", "&lt;", re.sub(r"&(?=[#\w]+;)", "&amp;", piece)) for piece in pieces[::2])
    return "".join(pieces)


def cell(text: str) -> str:
    """A cell of a Markdown table: on one line, its pipes escaped."""
    return markdown(" ".join(str(text).split())).replace("\\", "\\\\").replace("|", "\\|")


def is_number(text: str) -> bool:
    """Whether a cell is read as a number (and so set to the right)."""
    return bool(re.match(r"[+\-−–≥≤<>~*]*\s*\d|[–-]$", text.strip()))


def slug(title: str) -> str:
    """A title as an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", plain(title).lower()).strip("-") or "section"


def figure(svg: str, name: str, alt: str) -> Markup:
    """An SVG file's text, to stand in an HTML page beside others.

    Its ids begin with `name`; what points outside is gone; it scales with its place. Its colours are variables
    (`palette` gives them their values) unless it is painted by a scale of colours.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="([\d. -]+)"', head)
    if box is None or re.search(r"<script|<foreignObject|\bon\w+=|href=\"(?!#|data:image/png)", body):
        raise ValueError(f"figure {name}: not a drawing that can stand in a page")
    body = _ID.sub(lambda found: f"{found['before']}{name}-{found['id']}", body)
    if not scaled(body):
        body = _COLOR.sub(lambda found: f"{found['paint']}var(--k{found['color'][1:]})", body)
    width = float(box[1].split()[2])
    opening = Markup('<svg role="img" aria-label="%s" viewBox="%s" style="--w:%dpx">') % (plain(alt), box[1], width)
    return opening + Markup(re.sub(r"\s*\n\s*", " ", body).strip())


def scaled(svg: str) -> bool:
    """Whether a figure is painted by a scale of colours, which would not survive being recoloured."""
    colorful = {c for c in colors([svg]) if max(_rgb(c)) - min(_rgb(c)) > 0.08}
    return "<image" in svg or "QuadMesh" in svg or len(colorful) > _MANY_COLORS


def colors(svgs: Iterable[str]) -> set[str]:
    return {found["color"] for svg in svgs for found in _COLOR.finditer(svg)}


def palette(svgs: Iterable[str], extra: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """Every colour of the figures that are recoloured, and `extra` -> (its name as a CSS variable, itself on dark)."""
    found = colors(svg for svg in svgs if not scaled(svg)) | set(extra)
    return {color: (f"--k{color[1:]}", on_dark(color)) for color in sorted(found)}


def on_dark(color: str) -> str:
    """Greys are turned over between dark paper and light ink; other colours lightened until they can be read."""
    rgb = _rgb(color)
    if max(rgb) - min(rgb) <= 0.08:
        turned = 1 - sum(rgb) / 3
        return _hex(tuple(paper + (0.93 - paper) * turned**0.85 for paper in _DARK_PAPER))
    hue, light, saturation = colorsys.rgb_to_hls(*rgb)
    while contrast(rgb, _DARK_PAPER) < 5 and light < 0.9:
        light += 0.01
        rgb = colorsys.hls_to_rgb(hue, light, saturation)
    return _hex(rgb)


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(rgb: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _hex(rgb: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
