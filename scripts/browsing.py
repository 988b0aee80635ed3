"""A browser for the page of `kvlock app`, where one can be had."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time


def missing() -> str:
    """Why there is no browser, or nothing."""
    for name in ("gradio", "playwright"):
        try:
            __import__(name)
        except ImportError:
            return f"{name} is not installed"
    return "" if executable() else "there is no Chromium"


def executable() -> str | None:
    """The system's Chromium, or Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if os.path.exists(own) else None


def environment() -> dict[str, str]:
    """The environment of programs: `kvlock` is found, and there is one device."""
    programs = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    rest = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return {**rest, "PATH": programs}


@contextlib.contextmanager
def served(*flags: str, seconds: float = 240, folder: str | None = None):
    """Runs `kvlock app` on a free port; yields its address, and how long it took.

    Its temporary files lie in a folder where one is given.
    """
    command = [sys.executable, "-m", "kvlock_jax.cli.main", "app", "--port=0", *flags]
    start = time.monotonic()
    own = environment() | ({"TMPDIR": folder} if folder else {})
    process = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True)
    try:
        lines = ""
        while not (found := re.search(r"http://\S+(?=,)", lines)):
            ready, _, _ = select.select([process.stdout], [], [], 1)
            line = process.stdout.readline() if ready else ""
            lines += line
            if time.monotonic() - start > seconds or (ready and not line):
                raise RuntimeError(f"kvlock app did not start:\n{lines}")
        yield found[0], time.monotonic() - start
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@contextlib.contextmanager
def page_of(url: str, width: int = 1200, height: int = 1000, auth: str = ""):
    """A page in the browser, opened, with the first example shown; `auth` is `USER:PASSWORD`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable(), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(180_000)
            page.goto(url)
            if auth:
                user, password = auth.split(":")
                page.fill("input >> nth=0", user)
                page.fill("input[type=password]", password)
                page.keyboard.press("Enter")
            until_shown(page)
            yield page
        finally:
            browser.close()


def until_shown(page) -> None:
    """Waits until the page shows a clip with its mask."""
    page.wait_for_selector("#picture img")
    page.wait_for_function("document.querySelector('#coverage').innerText.includes('%')")


def steps_of(page) -> int:
    """Steps that the curves show."""
    drawn = page.query_selector(".kvlock-curves")
    return int(drawn.get_attribute("data-steps")) if drawn else 0


def until_status(page, text: str) -> None:
    """Waits until the line over the bar says something."""
    page.wait_for_function(
        "text => document.querySelector('#status')?.innerText.includes(text)", arg=text
    )
