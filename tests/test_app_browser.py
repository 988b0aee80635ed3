"""The page of `kvlock app` in a browser: a box, a run, a cancelled run, a small screen."""

import pathlib
import sys

import numpy as np
import pytest

from kvlock_jax.app import clips
from kvlock_jax.media import decode

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import browsing

REASON = browsing.missing()
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=f"no browser test: {REASON}"),
    pytest.mark.filterwarnings("ignore"),  # of Gradio, Playwright and what they import
]

OBSERVE = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const drawn = document.querySelector('.kvlock-curves');
    if (drawn) window.seen.push(Number(drawn.dataset.steps));
  }).observe(document.querySelector('#curves'), {subtree: true, childList: true, attributes: true});
}"""
"""Notes the steps of the curves as they are drawn."""


def test_an_example_is_edited_in_the_browser(tmp_path):
    with browsing.served() as (url, _), browsing.page_of(url) as page:
        page.fill("#box textarea, #box input", "28,28,76,76")
        page.click("#put_box")
        page.wait_for_function(
            "document.querySelector('#coverage').innerText.includes('box 28,28,76,76')"
        )
        page.fill("#steps input", "8")
        page.evaluate(OBSERVE)
        page.click("#run")
        browsing.until_status(page, "done")
        seen = page.evaluate("window.seen")
        assert seen == sorted(seen) and len(set(seen)) > 2 and seen[-1] == 8
        page.wait_for_selector("#result video")
        assert "background PSNR" in page.inner_text("#result")
        assert "--steps=8" in page.input_value("#command textarea")
        with page.expect_download() as download:
            page.get_by_text("Video", exact=True).click()
        download.value.save_as(tmp_path / "edit.mp4")
        with page.expect_download() as download:
            page.get_by_text("All, with the command").click()
        download.value.save_as(tmp_path / "edit.zip")

        page.fill("#steps input", "1000")
        page.click("#run")
        browsing.until_status(page, "left")
        page.click("#cancel")
        browsing.until_status(page, "cancelled")
        assert browsing.steps_of(page) < 1000

        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400

        upload = tmp_path / "text.mp4"
        upload.write_text("no video")
        page.set_input_files("#upload input[type=file]", upload)
        page.get_by_text("text.mp4: not a readable video").first.wait_for()
    edited = decode.read_video(tmp_path / "edit.mp4").frames
    source = decode.read_video(clips.examples(tmp_path)[0].video).frames
    assert edited.shape == source.shape
    outside = np.ones(source.shape[:3], bool)
    outside[:, 20:84, 20:84] = False
    assert np.abs(edited.astype(int) - source)[outside].mean() < 8
