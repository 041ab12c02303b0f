"""One self-contained HTML page: pictures inlined, no scripts, no requests; light or dark as the reader's system is.

Everything that comes from data is escaped; only `Html`, which the functions here make, is taken as it stands.
"""

from __future__ import annotations

import base64
import html
import io as memory
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


class Html(str):
    """Markup; any other string is text and is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading. name: its anchor.
        body: what it shows.
        command: what a reader types to get the same, or more.
        seconds: how long it took to make.
        summary: its result in a few words, for the terminal.
    """

    name: str
    title: str
    body: Html
    command: str = ""
    summary: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Card:
    """A picture of a gallery.

    Attributes:
        right: what a checker says, or None without a verdict. why: its reason, shown on hovering.
    """

    picture: Image.Image
    caption: str
    right: bool | None = None
    why: str = ""


def text(value: object) -> Html:
    """`value` as markup: escaped, unless it is markup."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(*parts: object) -> Html:
    """Parts one after the other, each escaped unless it is markup."""
    return Html("".join(text(part) for part in parts))


def paragraph(*parts: object) -> Html:
    """A paragraph of text and markup."""
    return Html(f"<p>{join(*parts)}</p>\n")


def note(*parts: object) -> Html:
    """A paragraph that says why something is not there."""
    return Html(f'<p class="note">{join(*parts)}</p>\n')


def heading(value: object) -> Html:
    """A heading inside a section."""
    return Html(f"<h3>{text(value)}</h3>\n")


def code(value: object) -> Html:
    """A command or a name."""
    return Html(f"<code>{text(value)}</code>")


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, strong: Sequence[int] = ()
) -> Html:
    """A table that scrolls sideways where it is wider than the page.

    Args:
        headings: all empty for a table without them.
        left: the first so many columns are words, set left; the others are numbers, set right.
        strong: rows to stress, by index.

    Raises:
        ValueError: a row has not as many cells as there are headings.
    """

    def line(cells: Sequence[object], tag: str, attributes: str = "") -> str:
        if len(cells) != len(headings):
            raise ValueError(f"rows: one has {len(cells)} cells, there are {len(headings)} headings")
        inner = "".join(
            f"<{tag}{'' if column < left else number}>{text(cell)}</{tag}>" for column, cell in enumerate(cells)
        )
        return f"<tr{attributes}>{inner}</tr>\n"

    number = ' class="n"'
    body = "".join(line(row, "td", ' class="strong"' if at in strong else "") for at, row in enumerate(rows))
    head = f"<thead>{line(headings, 'th')}</thead>\n" if any(headings) else ""
    plain = "" if head else ' class="plain"'
    return Html(f'<div class="wide"><table{plain}>\n{head}<tbody>\n{body}</tbody></table></div>\n')


def picture(source: Image.Image | Path, alt: str, *, plate: bool = False) -> Html:
    """A picture, inlined: an image as PNG, a file as it is.

    Args:
        alt: what it shows, for readers who do not see it.
        plate: put it on white, for plots with dark lettering.

    Raises:
        ValueError: the file is of no kind that browsers show.
    """
    if isinstance(source, Path):
        if source.suffix.lower() not in _KINDS:
            raise ValueError(f"source: got {source.name}; allowed are {', '.join(_KINDS)}")
        kind, raw = _KINDS[source.suffix.lower()], source.read_bytes()
    else:
        buffer = memory.BytesIO()
        source.save(buffer, "PNG", optimize=True)
        kind, raw = "image/png", buffer.getvalue()
    style = ' class="plate"' if plate else ""
    return Html(f'<img{style} src="data:{kind};base64,{base64.b64encode(raw).decode()}" alt="{html.escape(alt)}">')


def gallery(cards: Iterable[Card], *, small: bool = False) -> Html:
    """Pictures with their captions, as many beside each other as fit."""
    items = []
    for card in cards:
        verdict = ""
        if card.right is not None:
            kind, sign = ("right", "✓") if card.right else ("wrong", "✗")
            verdict = f'&nbsp;<span class="{kind}" role="img" aria-label="{kind}">{sign}</span>'
        why = f' title="{html.escape(card.why)}"' if card.why else ""
        items.append(
            f"<figure{why}>{picture(card.picture, card.caption)}"
            f"<figcaption>{text(card.caption)}{verdict}</figcaption></figure>\n"
        )
    return Html(f'<div class="gallery{" small" if small else ""}">\n{"".join(items)}</div>\n')


def bars(scores: Mapping[str, Mapping[str, float]], groups: Sequence[str]) -> Html:
    """A bar chart of shares in [0, 1]: for each group one bar of each series.

    Args:
        scores: series name -> group -> share; at most four series.
        groups: in order; underscores are shown as spaces.
    """
    legend = "".join(f'<span><i class="s{at}"></i>{text(name)}</span>' for at, name in enumerate(scores))
    blocks = []
    for group in groups:
        lines = "".join(
            f'<div class="bar"><i class="s{at}" style="width:{100 * min(1.0, max(0.0, series[group])):.1f}%"></i>'
            f"<b>{series[group]:.2f}</b></div>"
            for at, series in enumerate(scores.values())
        )
        blocks.append(f'<div class="group"><span>{text(group.replace("_", " "))}</span><div>{lines}</div></div>\n')
    return Html(f'<div class="legend">{legend}</div>\n<div class="bars">\n{"".join(blocks)}</div>\n')


def figures(pairs: Iterable[tuple[str, str]]) -> Html:
    """Headline figures: (value, what it is)."""
    items = "".join(f"<div><b>{text(value)}</b><span>{text(label)}</span></div>" for value, label in pairs)
    return Html(f'<div class="figures">{items}</div>\n')


def details(summary: object, body: Html) -> Html:
    """Something to fold out."""
    return Html(f"<details><summary>{text(summary)}</summary>\n{body}</details>\n")


def page(title: str, lead: Html, hero: Html, sections: Sequence[Section], colophon: Html) -> str:
    """The whole document: a header with what matters most, then the sections, then how it was made."""
    contents = " ".join(f'<a href="#{html.escape(part.name)}">{text(part.title)}</a>' for part in sections)
    blocks = "".join(
        f'<section id="{html.escape(part.name)}">\n<h2>{text(part.title)}</h2>\n{part.body}{_made(part)}</section>\n'
        for part in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
{lead}{hero}<nav>{contents}</nav>
</header>
<main>
{blocks}</main>
<footer>
{colophon}</footer>
</body>
</html>
"""


def duration(seconds: float) -> str:
    """A time as people say it: 0.4 s, 12 s, 3 min 5 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """A number of bytes: 812 B, 3.2 kB, 1.4 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def _made(part: Section) -> Html:
    command = code(part.command) if part.command else ""
    return Html(f'<p class="made">{command}<span>{duration(part.seconds)}</span></p>\n')


_STYLE = """
:root {
  --ink: #1b1c1e; --soft: #63666b; --line: #e3e4e6; --ground: #fff; --panel: #f6f6f7; --accent: #3056c8;
  --s0: #3056c8; --s1: #8fa8ec; --s2: #b4b6ba; --s3: #d9dade; --right: #1d7f46; --wrong: #c0342b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e9eb; --soft: #9a9ea6; --line: #2f3136; --ground: #141517; --panel: #1d1f22; --accent: #8fa8ff;
    --s0: #7f9bff; --s1: #48599c; --s2: #6c7078; --s3: #44474d; --right: #5cc98a; --wrong: #ff7b70;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 0 24px; max-width: 1008px; color: var(--ink); background: var(--ground);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
header { padding: 72px 0 8px; }
h1 { margin: 0 0 12px; font-size: 44px; line-height: 1.1; font-weight: 650; letter-spacing: -.02em; }
h2 { margin: 0 0 12px; font-size: 25px; line-height: 1.25; font-weight: 620; letter-spacing: -.01em; }
h3 { margin: 36px 0 8px; font-size: 16px; font-weight: 620; }
p { margin: 0 0 16px; max-width: 68ch; }
header > p { font-size: 18px; color: var(--soft); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code {
  font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  padding: .14em .4em; border-radius: 4px; background: var(--panel); overflow-wrap: anywhere;
}
nav { display: flex; flex-wrap: wrap; gap: 4px 24px; padding: 16px 0; border-top: 1px solid var(--line); }
nav a { font-size: 15px; }
section { padding: 52px 0 20px; border-top: 1px solid var(--line); }
img { display: block; max-width: 100%; height: auto; }
.plate { margin: 24px 0 16px; padding: 8px; border-radius: 8px; background: #fff; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 20px 32px; margin: 36px 0; }
.figures b { display: block; font-size: 34px; line-height: 1.2; font-weight: 600; letter-spacing: -.02em; }
.figures span { display: block; font-size: 14px; line-height: 1.4; color: var(--soft); }
.gallery { display: grid; grid-template-columns: repeat(4, 1fr); gap: 20px 16px; margin: 24px 0 32px; }
.gallery.small { grid-template-columns: repeat(8, 1fr); gap: 16px 12px; margin: 12px 0 24px; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; border-radius: 6px; }
figcaption { margin-top: 6px; font-size: 14px; line-height: 1.35; color: var(--soft); }
.small figcaption { font-size: 12.5px; }
.right, .wrong { font-weight: 700; white-space: nowrap; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.wide { overflow-x: auto; margin: 16px 0 24px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; line-height: 1.4; }
table.plain { width: auto; }
th, td { padding: 8px 20px 8px 0; text-align: left; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th { font-size: 13px; font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--ink); white-space: nowrap; }
td { border-bottom: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; }
td code { white-space: nowrap; }
.strong td { font-weight: 620; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 24px 0 16px; font-size: 14px; color: var(--soft); }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 8px; border-radius: 2px; }
.bars { margin: 0 0 32px; }
.group { display: grid; grid-template-columns: 120px 1fr; gap: 16px; align-items: center; padding: 7px 0; }
.group > span { font-size: 15px; }
.bar { display: flex; align-items: center; gap: 8px; height: 15px; padding-right: 40px; }
.bar i { flex: none; height: 9px; min-width: 2px; border-radius: 2px; }
.bar b { margin-right: -40px; font-size: 12px; font-weight: 500; color: var(--soft); }
.s0 { background: var(--s0); }
.s1 { background: var(--s1); }
.s2 { background: var(--s2); }
.s3 { background: var(--s3); }
.note { padding: 12px 16px; border-left: 3px solid var(--line); background: var(--panel); color: var(--soft); }
details { margin: 0 0 20px; }
summary { cursor: pointer; font-size: 15px; color: var(--accent); }
.made { display: flex; flex-wrap: wrap; gap: 6px 16px; max-width: none; margin-top: 28px; }
.made, .made span { font-size: 14px; color: var(--soft); }
footer { padding: 40px 0 80px; border-top: 1px solid var(--line); font-size: 15px; color: var(--soft); }
footer h2 { color: var(--ink); }
@media (max-width: 600px) {
  body { padding: 0 16px; }
  header { padding-top: 36px; }
  h1 { font-size: 34px; }
  header > p { font-size: 17px; }
  .gallery { grid-template-columns: repeat(2, 1fr); gap: 16px 12px; }
  .gallery.small { grid-template-columns: repeat(4, 1fr); gap: 10px 8px; }
  .figures { grid-template-columns: repeat(2, 1fr); margin: 28px 0; }
  .figures b { font-size: 28px; }
  .group { grid-template-columns: 1fr; gap: 2px; }
  section { padding-top: 36px; }
  th, td { padding-right: 14px; }
}
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""
