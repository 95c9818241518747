"""The page at / in a real headless Chromium: used with mouse and keyboard, wide and narrow."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
from typing import Any

import numpy as np
import pytest
import uvicorn

from uncurl_jax.pruning.statistics import LayerStatistics, RouterStatistics
from uncurl_jax.serving.app import make_app
from uncurl_jax.serving.service import Service
from uncurl_jax.serving.settings import ServeConfig

_OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(node => {
  if (node.closest('.scroll') !== null && !node.matches('.scroll')) return false;
  const box = node.getBoundingClientRect();
  return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(node => node.outerHTML.slice(0, 80))"""
# Contrast of text and what is behind it (WCAG 2.1, 1.4.3), for opaque colours.
_CONTRAST = """selector => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(part => {
      const value = part / 255;
      return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const node = document.querySelector(selector);
  let behind = node;
  const ground = each => getComputedStyle(each).backgroundColor;
  while (ground(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
  const values = [getComputedStyle(node).color, ground(behind)].map(luminance);
  return (Math.max(...values) + 0.05) / (Math.min(...values) + 0.05);
}"""


def reversed_experts(statistics: RouterStatistics) -> RouterStatistics:
    """Statistics of a task that uses the experts the other way round."""

    def turn(fields: LayerStatistics) -> LayerStatistics:
        def flip(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else np.flip(array)

        return LayerStatistics(*map(flip, fields))

    layers = {layer: turn(fields) for layer, fields in statistics.layers.items()}
    return RouterStatistics(layers, statistics.manifest)


@pytest.fixture(scope="module")
def address(artifact, made):
    """A server with drift to show, run by another thread."""
    started: concurrent.futures.Future[Any] = concurrent.futures.Future()
    stop = threading.Event()

    async def run():
        config = ServeConfig(batch_sizes=(4,), lengths=(96,), max_wait_ms=0.0)
        service = Service(artifact, config, {"base": reversed_experts(made.statistics)})
        options = {"port": 0, "log_level": "warning", "lifespan": "off", "ws": "none"}
        server = uvicorn.Server(
            uvicorn.Config(make_app(service, host="127.0.0.1"), loop="asyncio", **options)
        )
        serving = asyncio.create_task(server.serve())
        await service.start()
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        started.set_result(f"http://127.0.0.1:{port}/")
        await asyncio.to_thread(stop.wait)
        await service.drain()
        server.should_exit = True
        await serving

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running: concurrent.futures.Future[Any] = pool.submit(asyncio.run, run())
        concurrent.futures.wait([started, running], return_when="FIRST_COMPLETED")
        if running.done():
            running.result()
        yield started.result()
        stop.set()
        running.result()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; fails on any message, and on any request to elsewhere."""
    contexts, messages = [], []

    def open_at(width=1280, scheme="light", expected=()):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()

        def note(text):
            if not any(part in text for part in expected):
                messages.append(text)

        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("requestfailed", lambda request: note(request.url))
        page.on(
            "request",
            lambda request: request.url.startswith((address, "data:")) or note(request.url),
        )
        page.goto(address)
        page.wait_for_selector("#drift section")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert messages == []


def run(page, prompt="the salty sailor", tokens="4"):
    page.fill("#prompt", prompt)
    page.fill("#tokens", tokens)
    page.click("#run")
    page.wait_for_selector("#models section")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_prompt_shows_the_experts_of_two_models_side_by_side(open_page, width):
    page = open_page(width)
    # The example of the task that the pruned model was made for.
    assert page.input_value("#prompt").endswith("Topic:")
    run(page)
    sections = page.locator("#models section")
    assert [sections.nth(n).locator("h2").inner_text() for n in range(2)] == ["base", "topic"]
    boxes = [sections.nth(n).bounding_box() for n in range(2)]
    if width > 1000:
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    else:
        assert boxes[0]["y"] < boxes[1]["y"] and boxes[0]["x"] == boxes[1]["x"]
    for number in range(2):
        table = sections.nth(number).locator("table")
        head = table.locator("thead th").all_inner_texts()
        assert head[:5] == ["Layer", "start", "t", "h", "e"] and head[5] == "␣"
        assert table.locator("tbody tr").count() == 2
        # A cell for each token of both layers: the start, the prompt, what was made and read.
        assert table.locator("tbody td").count() == 2 * (len(head) - 1)
        assert len(head) - 1 >= 1 + len("the salty sailor")
    assert "0 from" in sections.nth(1).locator("details").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_OUTSIDE) == []


def test_cells_hold_the_experts_and_gates_that_the_server_tells(open_page):
    page = open_page()
    run(page, prompt="music", tokens="1")
    told = page.evaluate(
        """async () => (await (await fetch('/experts', {method: 'POST', headers:
        {'content-type': 'application/json'}, body: JSON.stringify({prompt: 'music',
        models: ['base'], max_tokens: 1})})).json()).models[0]"""
    )
    rows = page.locator("#models section").first.locator("tbody tr")
    for place, layer in enumerate(told["layers"]):
        texts = [text.split("\n") for text in rows.nth(place).locator("td").all_inner_texts()]
        assert [[int(expert)] for expert, _ in texts] == layer["experts"]
        gates = [float(gate) for _, gate in texts]
        np.testing.assert_allclose(gates, np.ravel(layer["gates"]), atol=0.006)
    # The colour follows the gate, which is written in the cell too.
    alphas = rows.first.locator("td").evaluate_all(
        "cells => cells.map(cell => +getComputedStyle(cell).backgroundColor.split(',')[3]"
        ".replace(')', ''))"
    )
    gates = np.ravel(told["layers"][0]["gates"])
    np.testing.assert_allclose(alphas, 0.55 * gates, atol=0.01)


def test_the_keyboard_alone_runs_a_prompt(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("cow")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["left", "right", "tokens", "run"]
    page.keyboard.press("Enter")
    page.wait_for_selector("#models table")
    # What scrolls can be reached too, and Control and Enter run from the text.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"
    page.focus("#prompt")
    page.keyboard.type("s")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#models th:text-is('s')")


def test_what_is_wrong_is_said_and_announced(open_page):
    page = open_page(expected=["422"])
    page.fill("#prompt", "x" * 200)
    page.click("#run")
    page.wait_for_selector("#error:not(:empty)")
    assert "must fit into 97 tokens" in page.inner_text("#error")
    assert page.get_attribute("#error", "role") == "alert"
    assert page.get_attribute("#status", "role") == "status"
    assert page.is_enabled("#run")


def test_drift_is_a_bar_per_layer_with_words(open_page):
    page = open_page()
    section = page.locator("#drift section[aria-label='Drift of base']")
    assert "too few requests" in section.inner_text()
    page.evaluate(
        """async () => { for (let n = 0; n < 12; n++) await fetch('/v1/completions', {
        method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify({
        model: 'base', prompt: [0, 1, 2, 3].map(k => `number ${n} of ${k}`), max_tokens: 1})}); }"""
    )
    page.click("#refresh")
    page.wait_for_selector("#drift .over")
    # Not by colour alone.
    assert section.locator("p").first.inner_text().startswith("drift; ")
    bars = section.locator("[role=img]")
    assert bars.count() == 2
    labels = [bars.nth(n).get_attribute("aria-label") for n in range(2)]
    assert any(label.endswith(": drift") for label in labels)
    assert all("bits, chance" in label for label in labels)
    over = section.locator(".over").first
    fill, mark = (over.locator(f".{name}").bounding_box() for name in ("fill", "mark"))
    assert fill["x"] + fill["width"] > mark["x"] > fill["x"]


def test_both_colour_schemes_can_be_read(open_page):
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme)
        run(page)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in ("body", ".soft", "#run", "label", "#models h2", "thead th"):
            assert page.evaluate(_CONTRAST, selector) >= 4.5, (scheme, selector)
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_a_screen_reader_finds_labels_and_headings_in_order(open_page):
    page = open_page()
    run(page)
    unlabelled = page.evaluate(
        "() => [...document.querySelectorAll('input,select,textarea')]"
        ".filter(node => node.labels.length === 0).length"
    )
    assert unlabelled == 0
    levels = page.evaluate(
        "() => [...document.querySelectorAll('h1,h2,h3')].map(node => +node.tagName[1])"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.get_attribute("html", "lang") == "en"
    scopes = page.locator("#models th:not([scope])").count()
    assert scopes == 0 and page.locator("#models caption").count() == 2


def test_the_policy_lets_no_other_script_run(open_page):
    page = open_page(expected=["Content Security Policy", "violates the following"])
    page.evaluate(
        """() => { const script = document.createElement('script');
        script.textContent = 'document.title = "changed"'; document.body.append(script); }"""
    )
    assert page.title() == "uncurl serve"
