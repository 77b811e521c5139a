"""The report page: complete without a network, true to its rows, safe with any text, readable without scripts."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image as PILImage

from meddam_core.records import Label
from meddam_core.reports.pictures import box_path, data_uri, mask_path
from meddam_core.reports.plots import binned, histogram_svg
from meddam_core.reports.run_report import run_report
from meddam_core.reports.tally import CaptionTally
from tests.meddam_core.reports.made import made_captions, made_entry, made_facts, made_tally


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text that a reader sees."""

    VOID = frozenset({"meta", "input", "br", "img", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    captions = made_captions(600)
    entries = [made_entry(c, with_mask=i % 2 == 0) for i, c in enumerate(captions[:8])]
    failures = [c for c in captions if c.status == "failed"][:5]
    return run_report(made_facts(), made_tally(captions), entries, failures)


def test_the_page_is_well_formed_and_its_ids_are_unique(html: str) -> None:
    page = Page(html)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert used <= set(ids)


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    page = Page(html)
    sources = [v for tag, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href") and tag != "a"]
    assert sources
    assert all((v or "").startswith(("data:", "#")) for v in sources)
    assert not re.search(r"url\(\s*['\"]?(?!#)", html)
    assert "default-src 'none'" in html
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "form")]


def test_figures_are_those_of_the_rows(html: str) -> None:
    captions = made_captions(600)
    text = Page(html).text
    with_text = sum(c.text is not None for c in captions)
    failed = sum(c.status == "failed" for c in captions)
    corrupt = sum(c.reason == "corrupt" for c in captions)
    assert "600 captions of 600 regions in 300 images" in text
    assert f"{with_text} captions {failed} failed" in text
    assert f"corrupt {corrupt} {100 * corrupt / 600:.1f} %" in text
    assert "610 expected, 10 missing, 0 duplicated" in text
    assert "lidc-idri CT 200" in text


def test_what_was_run_is_said(html: str) -> None:
    text = Page(html).text
    for fact in ("incomplete", "dam-tiny", "6a1f0c72b39de4418f0e", "greedy, at most 128 new tokens", "ray 2.60.0"):
        assert fact in text
    assert "<image> Describe the marked region in detail." in text
    assert text.count("not for diagnosis") == 2


def test_people_who_see_no_pictures_are_told_what_they_show(html: str) -> None:
    page = Page(html)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert 'lang="en"' in html
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_every_control_has_a_label_and_the_gallery_needs_no_script(html: str) -> None:
    page = Page(html)
    assert {"by-status", "by-group", "by-words", "outlines"} <= {a.get("id") for _, a in page.tags}
    without_script = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert without_script.count("<article>") == 8


def test_text_from_data_stays_text() -> None:
    evil = "</p><script>alert(1)</script><img src=http://x/y>"
    (caption,) = made_captions(1)
    caption = dataclasses.replace(caption, text=evil, dataset=evil, labels=[Label(name='a"><b>', value=evil)])
    facts = dataclasses.replace(made_facts(), title=evil, prompts={"p": evil}, licences=[evil])
    page = Page(run_report(facts, made_tally([caption]), [made_entry(caption, with_mask=False)]))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert evil in page.text
    assert not [a for tag, a in page.tags if tag == "img" and "http" in (a["src"] or "")]


def test_a_run_without_captions_has_a_page() -> None:
    facts = dataclasses.replace(made_facts(), speed=None, num_expected=None, num_missing=None, num_duplicated=None)
    text = Page(run_report(facts, CaptionTally(), [])).text
    assert "0 captions of 0 regions in 0 images" in text
    assert "has not been audited" in text


def test_the_same_run_gives_the_same_page() -> None:
    captions = made_captions(30)
    pages = {
        run_report(made_facts(), made_tally(captions), [made_entry(captions[0], with_mask=True)]) for _ in range(2)
    }
    assert len(pages) == 1


def test_a_thumbnail_keeps_its_shape_and_is_never_enlarged() -> None:
    image = np.zeros((300, 1200, 3), np.uint8)
    image[:, :600] = 200
    encoded = data_uri(image, 400).partition(",")[2]
    small = np.asarray(PILImage.open(io.BytesIO(base64.b64decode(encoded))))
    assert small.shape == (100, 400, 3)
    assert small[50, 100].min() > 190
    assert small[50, 300].max() < 10
    tiny = data_uri(image[:5, :9], 400).partition(",")[2]
    assert PILImage.open(io.BytesIO(base64.b64decode(tiny))).size == (9, 5)
    with pytest.raises(ValueError, match="uint8"):
        data_uri(image.astype(np.float32), 400)  # type: ignore[arg-type]


def test_an_outline_runs_around_its_mask() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 7
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", mask_path(mask))]
    x, y = numbers[::2], numbers[1::2]
    assert (min(x), max(x)) == (30, 50)
    assert (min(y), max(y)) == (10, 20)
    assert mask_path(np.zeros((4, 4), np.uint8)) == ""
    assert mask_path(np.ones((4, 6), np.uint8)).count("M") == 1
    assert box_path((1, 2, 3, 4)) == "M1 2H3V4H1Z"


def test_two_parts_of_a_mask_have_two_outlines_and_a_pixel_has_one() -> None:
    mask = np.zeros((400, 400), np.uint8)
    mask[5:9, 5:9] = mask[300:350, 20:90] = 1
    assert mask_path(mask).count("M") == 2
    mask[:] = 0
    mask[200, 200] = 1
    assert mask_path(mask).count("L") >= 3


def test_bins_keep_every_count() -> None:
    counts = {3: 5, 4: 1, 250: 2}
    edges, joined, width = binned(counts, 40)
    assert sum(joined) == 8
    assert len(joined) <= 42
    assert edges[0] <= 3
    assert edges[-1] > 250
    assert joined[(250 - int(edges[0])) // width] == 2
    assert binned({7: 3}, 40) == ([7.0, 8.0], [3], 1)


def test_a_plot_takes_its_colours_from_the_page_and_tells_what_it_shows() -> None:
    svg = histogram_svg([0, 1, 2], [3, 4], x_label="x", y_label="y", alt='Lengths <of> "captions"')
    assert "var(--accent)" in svg
    assert "#01020" not in svg
    assert 'aria-label="Lengths &lt;of&gt; &quot;captions&quot;"' in svg
    with pytest.raises(ValueError, match="2 bins need 3 edges"):
        histogram_svg([0, 1], [3, 4], x_label="x", y_label="y", alt="")
