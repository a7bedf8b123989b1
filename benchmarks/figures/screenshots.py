"""Take the screenshots of README and docs in a headless Chromium, into docs/images/.

make train-demo                     first, for the token-credit page; without it the old picture stays
python -m benchmarks.figures.screenshots
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import flowgraph as fg
from flowgraph.demo import PROMPT, load_demo_model

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
CREDIT_PAGE = ROOT / "out" / "train" / "credit.html"
WRONG = "1. Tom has 3 apples.\n2. He buys 4 more apples.\n3. Tom now has 4 - 3 = 1 apple.\n\nThe answer is 1."


def write_pages(folder: Path) -> None:
    """Write the page of the demo trace, and the page that compares it with a wrong answer."""
    model, tokenizer = load_demo_model()
    prompt: list[dict[str, Any]] = [{"role": "user", "content": PROMPT}]
    right = fg.trace(model, tokenizer, prompt)
    right.to_html(folder / "demo.html", relevance=right.relevance(model))
    right.to_html(folder / "steps.html")
    fg.compare(right, fg.trace(model, tokenizer, prompt, WRONG)).to_html(folder / "compare.html")
    if CREDIT_PAGE.is_file():
        shutil.copy(CREDIT_PAGE, folder / "credit.html")


def main() -> None:
    """Take a picture of every page, and of the steps of the demo trace."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("needs chromium or google-chrome on the PATH")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        write_pages(folder)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860}, reduced_motion="reduce")
        for path in sorted(folder.glob("*.html")):
            page.goto(path.as_uri())
            if path.stem == "steps":
                page.get_by_role("button", name="Steps", exact=True).click()
            page.screenshot(path=IMAGES / f"{path.stem}.png")
            print(IMAGES / f"{path.stem}.png")
        browser.close()


if __name__ == "__main__":
    main()
