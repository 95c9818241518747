"""The report in a real headless Chromium: nothing cut, nothing fetched, usable without a mouse."""

from __future__ import annotations

import itertools

import pytest

from uncurl_jax import artifacts
from uncurl_jax.experiments.reporting import report

FIGURES = (
    *("score-mean", "score-rte", "score-cb", "sizes", "dropped", "curves", "costs"),
    *("loss-memory-of-the-parameters", "loss-bytes-on-the-wire-per-token"),
    "loss-latency-of-a-forward-pass",
    *(f"{kind}-{task}" for kind in ("clusters", "affinity", "embedding", "load") for task in
      ("rte", "cb")),
)  # fmt: skip
# Size on the screen of every text in a figure, CSS pixels.
_TEXT_SIZES = """() => [...document.querySelectorAll('figure svg[role=img] text')].map(text => {
  const svg = text.ownerSVGElement;
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(text).fontSize) * scale;
})"""
# Boxes that stand out of the page on the right or left, but for what scrolls by itself.
_OUTSIDE = """() => [...document.querySelectorAll('main *')].filter(node => {
  if (node.closest('.scroll, .plot') !== null && !node.matches('.scroll, .plot')) return false;
  const box = node.getBoundingClientRect();
  return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(node => node.outerHTML.slice(0, 80))"""
_CUT = """() => [...document.querySelectorAll('.scroll, .plot')].filter(
  node => node.scrollWidth > node.clientWidth + 1).map(node => node.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="session")
def page_address(report_study, tmp_path_factory):
    directory = report_study.write(tmp_path_factory.mktemp("browser") / "study")
    report.write_report(directory)
    return (directory / "report.html").as_uri()


@pytest.fixture
def open_page(browser, page_address):
    """Opens the report at a width and in a colour scheme; fails on any message or request."""
    contexts, messages = [], []

    def open_at(width=1280, scheme="light", address=page_address):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("requestfailed", lambda request: messages.append(request.url))
        page.on("request", lambda request: request.url == address or messages.append(request.url))
        page.goto(address)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert messages == []


@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_there_and_nothing_stands_out_of_the_page(open_page, width):
    page = open_page(width)
    for key in FIGURES:
        panels = page.locator(f"figure#{key} svg[role=img]")
        assert panels.count() > 0, key
        for place in range(panels.count()):
            box = panels.nth(place).bounding_box()
            assert box is not None and box["width"] > 100 and box["height"] > 60, (key, box)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_OUTSIDE) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_text_in_figures_is_at_least_ten_pixels_high(open_page, width):
    sizes = open_page(width).evaluate(_TEXT_SIZES)
    assert len(sizes) > 300
    assert min(sizes) >= 10 and max(sizes) < 16


def test_unfolded_numbers_do_not_widen_the_page(open_page):
    page = open_page(390)
    count = page.evaluate(
        "() => { const all = document.querySelectorAll('details');"
        " all.forEach(node => node.open = true); return all.length; }"
    )
    assert count == len(FIGURES) + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(_OUTSIDE) == []
    # Each figure has its numbers as a table with headings.
    assert page.locator("figure details tbody tr").count() > 100
    assert page.locator("figure details th[scope=col]").count() > 60


def test_figures_follow_the_dark_scheme(open_page):
    colours = {}
    for scheme in ("light", "dark"):
        page = open_page(1280, scheme)
        colours[scheme] = page.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('#score-rte text')).fill]"
        )
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert colours["dark"] == ["rgb(20, 23, 27)", "rgb(232, 234, 237)"]


def test_the_keyboard_reaches_the_skip_link_and_what_scrolls(open_page):
    page = open_page(390)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.keyboard.press("Tab")
    # What scrolls on this narrow page can be reached, in the order of the page.
    reached = []
    for _ in range(80):
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        page.keyboard.press("Tab")
    scrolling = page.evaluate(
        "() => [...document.querySelectorAll('.scroll, .plot')].filter(node =>"
        " node.scrollWidth > node.clientWidth && node.checkVisibility())"
        ".map(node => node.getAttribute('aria-label'))"
    )
    assert len(scrolling) >= 2 and None not in scrolling
    # After the last one the browser begins again.
    assert [label for label in dict.fromkeys(reached) if label in scrolling] == scrolling


def test_a_screen_reader_finds_headings_in_order_and_a_name_for_each_picture(open_page):
    page = open_page()
    levels = page.evaluate(
        "() => [...document.querySelectorAll('h1,h2,h3,h4')].map(node => +node.tagName[1])"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    unnamed = page.evaluate(
        "() => [...document.querySelectorAll('svg')].filter(node =>"
        " !node.getAttribute('aria-label') && node.getAttribute('aria-hidden') !== 'true').length"
    )
    assert unnamed == 0
    doubles = page.evaluate(
        "() => { const ids = [...document.querySelectorAll('[id]')].map(node => node.id);"
        " return ids.length - new Set(ids).size; }"
    )
    assert doubles == 0


def test_print_cuts_nothing_unfolds_the_numbers_and_is_light(open_page):
    # A4 without margins of 12 mm is 703 pixels wide.
    page = open_page(703, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    assert page.evaluate(_OUTSIDE) == []
    assert page.evaluate(_CUT) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    table = page.locator("#score-rte details table")
    assert table.is_visible() and table.bounding_box()["height"] > 100
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_study_of_scores_alone_is_shown_with_what_is_missing(open_page, report_study, tmp_path):
    directory = report_study.write(tmp_path / "study", is_whole=False)
    report.write_report(directory)
    page = open_page(390, address=(directory / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    text = page.inner_text("main")
    assert "No training curves: the study has no curves/*.jsonl." in text
    assert "Loss against measured latency is left out" in text
    assert page.locator("figure#affinity-rte").count() == 0
    assert artifacts.read_json(directory / "report.json")["recommendation"]["tasks"].keys() == {
        "rte", "cb",
    }  # fmt: skip
