"""Takes the picture of a report that the README shows: the top of the page, at 1280 pixels.

    python benchmarks/report_picture.py STUDY/report.html --out docs/images/report.png

Needs playwright and a Chromium, as the tests do: on the PATH, or `make browser`.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Parses the command line and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html")
    parser.add_argument("--until", default="Models", help="heading that is not shown any more")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write, over an older one")
    arguments = parser.parse_args()
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page(
            viewport={"width": 1280, "height": 900}, color_scheme=arguments.scheme
        )
        page.goto(arguments.report.resolve().as_uri())
        heading = page.locator("h2", has_text=arguments.until).first.bounding_box()
        assert heading is not None
        box = {"x": 80, "y": 0, "width": 1120, "height": heading["y"] - 16}
        page.screenshot(path=arguments.out, full_page=True, clip=box)
        started.close()


if __name__ == "__main__":
    main()
