"""Chromium for tests, and what the accessibility checker says of a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

# Milliseconds for anything that the page is to show, on a busy machine.
PATIENCE = 120_000
# Where pictures of the page are left.
PICTURES = Path(__file__).parent.parent.parent / "build/pictures"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's. Skips the test where there is none."""
    program = shutil.which("chromium")
    if not program:
        pytest.skip("needs chromium: `make test-packages` installs Debian's as root")
    # A container has little shared memory, and its root no sandbox.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments, timeout=PATIENCE)
        yield browser
        browser.close()


def violations(page: Page) -> list[str]:
    """What axe-core finds serious or critical, a line each."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {each['help']}: {[node['html'][:200] for node in each['nodes'][:3]]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def picture(page: Page, name: str) -> None:
    """Leave a picture of the whole page."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
