"""The page: nothing from data becomes markup, nothing is requested, the markup is well formed and legible."""

import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snapgen import report
from snapgen.report import Card, Section

HOSTILE = "<script>alert('x')</script>\" onload=\"y\" & 'z' <b>"
VOID = {"meta", "link", "img", "br"}
KNOWN_ATTRIBUTES = {"class", "id", "style", "href", "src", "alt", "title", "rel", "lang", "charset", "name", "content",
                    "role", "aria-label"}  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.said = ""
        self.feed(markup)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said += data


@pytest.fixture
def square() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def full_page(square: Image.Image, word: str) -> str:
    body = report.join(
        report.paragraph(word, report.code(word)),
        report.note(word),
        report.heading(word),
        report.table([word, "n"], [[word, 1]], strong=[0]),
        report.table(["", ""], [[word, 1]]),
        report.gallery([Card(square, word, True), Card(square, word, False, word), Card(square, word)]),
        report.bars({word: {"a_b": 0.5}, "other": {"a_b": 1.5}}, ["a_b"]),
        report.details(word, report.paragraph(word)),
        word,
    )
    sections = [Section(word, word, body, word, word, 3.2), Section("two", "Two", report.Html())]
    return report.page(word, report.paragraph(word), report.figures([(word, word)]), sections, report.paragraph(word))


def test_data_never_becomes_markup(square: Image.Image) -> None:
    harmless, hostile = Reader(full_page(square, "word")), Reader(full_page(square, HOSTILE))
    assert hostile.tags == harmless.tags
    assert [a[:2] for a in hostile.attributes] == [a[:2] for a in harmless.attributes]
    assert {name for _, name, _ in hostile.attributes} <= KNOWN_ATTRIBUTES
    assert hostile.said.count(HOSTILE) == harmless.said.count("word")  # and nothing of it is lost


def test_page_requests_nothing(square: Image.Image) -> None:
    markup = full_page(square, "word")
    page = Reader(markup)
    for _, name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:", "#")), value
    assert not page.tags.keys() & {"script", "iframe", "object", "embed", "video", "audio", "base"}
    assert "url(" not in markup and "@import" not in markup and "http" not in markup
    assert [v for tag, n, v in page.attributes if (tag, n) == ("link", "rel")] == ["icon"]  # or browsers ask for one


def test_contents_lead_to_the_sections(square: Image.Image) -> None:
    page = Reader(full_page(square, "word"))
    links = [value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert (
        links == [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == ["word", "two"]
    )


def test_picture_is_inlined_unchanged(square: Image.Image, tmp_path: Path) -> None:
    def inlined(markup: str) -> tuple[str, bytes]:
        kind, data = re.findall(r'src="data:([^;]+);base64,([^"]+)"', markup)[0]
        return kind, base64.b64decode(data)

    kind, raw = inlined(report.picture(square, "noise"))
    assert kind == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(raw))), np.asarray(square))
    square.save(tmp_path / "a.JPG")
    assert inlined(report.picture(tmp_path / "a.JPG", "noise")) == ("image/jpeg", (tmp_path / "a.JPG").read_bytes())
    with pytest.raises(ValueError, match=r"source: got a\.txt; allowed are \.png"):
        report.picture(tmp_path / "a.txt", "words")


def test_table_columns() -> None:
    markup = report.table(["name", "unit", "value"], [["a", "b", 1], ["c", "d", 2]], left=2, strong=[1])
    assert re.findall(r"<td( class=\"n\")?>(.)</td>", markup) == [
        ("", "a"), ("", "b"), (' class="n"', "1"), ("", "c"), ("", "d"), (' class="n"', "2"),
    ]  # fmt: skip
    assert markup.index('<tr class="strong">') > markup.index(">b<")
    assert "<thead" in markup and "<thead" not in report.table(["", ""], [[1, 2]])
    with pytest.raises(ValueError, match="one has 1 cells, there are 2 headings"):
        report.table(["a", "b"], [["c"]])


def test_bars_are_as_long_as_their_values() -> None:
    markup = report.bars({"x": {"a": 0.25, "b": 0.0}, "y": {"a": 1.0, "b": 1.5}}, ["a", "b"])
    assert re.findall(r"width:([\d.]+)%", markup) == ["25.0", "100.0", "0.0", "100.0"]
    assert re.findall(r"<b>([\d.]+)</b>", markup) == ["0.25", "1.00", "0.00", "1.50"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s")],
)
def test_duration(seconds: float, said: str) -> None:
    assert report.duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(812, "812 B"), (3210, "3.2 kB"), (1.44e6, "1.4 MB"), (2e9, "2.0 GB")])
def test_size(count: float, said: str) -> None:
    assert report.size(count) == said


def test_words_are_legible_in_light_and_dark() -> None:
    """WCAG 2.1: a contrast of at least 4.5 for text."""
    style = report._STYLE
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6});", block)) for block in style.split("@media")[:2])
    for colors in (light, dark):
        for ink in ("ink", "soft", "accent", "right", "wrong"):
            assert contrast(colors[ink], colors["ground"]) >= 4.5, ink
        assert contrast(colors["soft"], colors["panel"]) >= 4.5
    assert light.keys() == dark.keys()


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
