"""Takes the pictures of `kvlock app` in docs/, and measures how long the page takes.

    pip install '.[app]' playwright    # and the system's Chromium
    python scripts/app_pictures.py

Prints the seconds until the page is ready, and the steps from Cancel until nothing runs.
"""

import pathlib
import time

import browsing

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def main() -> None:
    """Edits an example and takes pictures of that."""
    if reason := browsing.missing():
        raise SystemExit(f"no pictures: {reason}")
    start = time.monotonic()
    with browsing.served() as (url, seconds), browsing.page_of(url, 1200, 1180) as page:
        opened = time.monotonic() - start
        print(f"page served after {seconds:.1f} s, shown in a browser after {opened:.1f} s")
        page.fill("#steps input", "1000")  # not over before it is cancelled
        page.click("#run")
        page.wait_for_selector("#curves polyline")
        print("1 click from the opened page to a running edit")
        browsing.until_status(page, "left")
        page.click("#cancel")
        heard = browsing.steps_of(page)
        clicked = time.monotonic()
        browsing.until_status(page, "cancelled")
        took, steps = time.monotonic() - clicked, browsing.steps_of(page) - heard
        print(f"cancelled {steps} steps and {took:.2f} s after the click was taken")

        page.fill("#steps input", "50")
        page.click("text=tokens that are edited")
        page.click("#run")
        page.wait_for_function(
            "document.querySelector('#status').innerText.match(/step (3[3-9]|4.) of 50/)"
        )
        page.screenshot(path=DOCS / "app.png", full_page=True)
        browsing.until_status(page, "done")
        page.wait_for_selector("#result video")
        page.click("text=outline of the mask")
        page.locator("#strip img").scroll_into_view_if_needed()  # or it is not loaded
        time.sleep(2)  # for the video to be drawn
        page.screenshot(path=DOCS / "app_result.png", full_page=True)
        page.set_viewport_size({"width": 400, "height": 900})
        time.sleep(1)
        page.screenshot(path=DOCS / "app_narrow.png", full_page=True)
        print(f"{page.evaluate('document.documentElement.scrollWidth')} px wide at 400 px")


if __name__ == "__main__":
    main()
