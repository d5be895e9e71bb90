"""A headless Chromium for the tests of the page: this machine's, or one that Playwright brought.

Fixtures in a file of their own: who imports them has one browser for all tests, closed at their
end, as what drives it has an event loop beside which no other test could run one.
"""

import os
import re
import shutil

import httpx
import pytest
from playwright.sync_api import Error, expect, sync_playwright

WHOLE = "The answer is whole"  # what the page says then
PATIENCE_MS = 30_000  # the tests beside it may have the processor


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests: this machine's, or one that Playwright brought."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as driver:
        try:
            # root, as in containers, has no sandbox
            started = driver.chromium.launch(
                executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else []
            )
        except Error as error:
            pytest.skip(f"needs Chromium (a package, or `playwright install chromium`): {error}")
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """Open a page of a server; in the end none has complained, asked elsewhere, or run what it was
    only told."""
    contexts = []
    heard = []

    def opened(url, at="", **options):
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        contexts.append(context)
        host = httpx.URL(url).netloc.decode()

        def asks(request):
            place = httpx.URL(request.url)
            if place.scheme not in ("blob", "data") and place.netloc.decode() != host:
                heard.append(f"asked {request.url}")

        def says(message):
            # a refused request is an error of the console's and no fault of the page's
            is_refusal = re.search(r"status of [45]", message.text)
            if message.type in ("error", "warning") and not is_refusal:
                heard.append(message.text)

        page.on("request", asks)
        page.on("console", says)
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append("a dialog"), dialog.dismiss()))
        page.goto(f"{url}/{at}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not heard


def generate(page, prompt="The tide"):
    """Type a prompt, send it, and wait for the whole answer."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#status")).to_contain_text(WHOLE)


def painted(page):
    """Wait for the next frame: what a canvas shows is drawn just before it."""
    page.wait_for_function("() => new Promise((done) => requestAnimationFrame(() => done(true)))")
