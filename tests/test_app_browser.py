"""The page of `kvlock app` in a browser: marks, a run, a cancelled run, a page opened again."""

import json
import pathlib
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from kvlock_jax.app import clips
from kvlock_jax.media import decode

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import browsing

REASON = browsing.missing()
pytestmark = [
    pytest.mark.usefixtures("swept"),
    pytest.mark.skipif(bool(REASON), reason=f"no browser test: {REASON}"),
    pytest.mark.filterwarnings("ignore"),  # of Gradio, Playwright and what they import
]

AUTH = "me:a word"
OBSERVE = """() => {
  window.seen = []; window.estimates = new Set();
  new MutationObserver(() => {
    const drawn = document.querySelector('.kvlock-curves');
    if (drawn) window.seen.push(Number(drawn.dataset.steps));
    const estimate = document.querySelector('.kvlock-estimate img');
    if (estimate) window.estimates.add(estimate.src);
  }).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""
"""Notes the steps of the curves, and the pictures of estimates, as they are drawn."""

WIPE = """share => {
  const wipe = document.querySelector('.kvlock-wipe'), canvas = wipe.querySelector('canvas');
  wipe.querySelector('input[type=range]').value = 1000 * share;
  return new Promise(done => setTimeout(() => {
    const {width, height} = canvas, middle = [width / 2, height / 2, 1, 1].map(Math.floor);
    done([...canvas.getContext('2d').getImageData(...middle).data]);
  }, 300));
}"""
"""Moves the slider of a result, and takes the colour in the middle of the picture."""


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(temporary):
    flags = "--listen=0.0.0.0", f"--auth={AUTH}"
    with browsing.served(*flags, folder=str(temporary)) as (url, _):
        yield url.replace("0.0.0.0", "127.0.0.1")
    assert not [path for path in temporary.rglob("*") if path.is_file()]


@pytest.fixture
def page(url):
    with browsing.page_of(url, auth=AUTH) as page:
        yield page


def told(page, text):
    page.wait_for_function(
        "text => document.querySelector('#coverage').innerText.includes(text)", arg=text
    )


def downloaded(page, name, path):
    with page.expect_download() as download:
        page.get_by_text(name, exact=True).click()
    download.value.save_as(path)
    return path


def test_an_example_is_edited_in_the_browser(page, tmp_path):
    page.fill("#box textarea, #box input", "28,28,76,76")
    page.click("#put_box")
    told(page, "box 28,28,76,76")
    page.fill("#steps input", "8")
    page.evaluate(OBSERVE)
    page.click("#run")
    browsing.until_status(page, "done")
    seen = page.evaluate("window.seen")
    assert seen == sorted(seen) and len(set(seen)) > 2 and seen[-1] == 8
    assert page.evaluate("window.estimates.size") > 2
    page.wait_for_selector("#result canvas")
    assert "background PSNR" in page.inner_text("#result")
    red, blue = page.evaluate(WIPE, 1), page.evaluate(WIPE, 0)
    assert red[0] > 150 > 100 > red[2] and blue[2] > 150 > 100 > blue[0], (red, blue)

    edited = decode.read_video(downloaded(page, "Video", tmp_path / "edit.mp4")).frames
    source = decode.read_video(clips.examples(tmp_path)[0].video).frames
    assert edited.shape == source.shape
    outside = np.ones(source.shape[:3], bool)
    outside[:, 20:84, 20:84] = False
    assert np.abs(edited.astype(int) - source)[outside].mean() < 8

    with zipfile.ZipFile(downloaded(page, "All, with the command", tmp_path / "all.zip")) as all_:
        all_.extractall(tmp_path / "all")
    (folder,) = (tmp_path / "all").iterdir()
    own = decode.read_video(folder / "edit.mp4").frames
    (folder / "edit.mp4").unlink()
    line = (folder / "edit.sh").read_text().strip() + " --trace=again.json"
    subprocess.run(["bash", "-c", line], cwd=folder, env=browsing.environment(), check=True)
    again, first = (json.loads((folder / n).read_text()) for n in ("again.json", "trace.json"))
    for name in ("steps", "metrics"):  # of the frames before they are written
        assert again[name] == first[name]
    # Equal but for x264, which once in dozens of runs wrote the same frames differently.
    off = np.abs(decode.read_video(folder / "edit.mp4").frames.astype(int) - own)
    assert off.max() <= 16 and off.mean() < 1


def test_a_page_that_is_opened_again_finds_its_edit_and_cancels_it(page):
    page.fill("#steps input", "1000")
    page.click("#run")
    browsing.until_status(page, "left")
    page.reload()
    browsing.until_status(page, "left")
    browsing.until_shown(page)
    page.fill("#prompt textarea", "a green star")
    page.fill("#steps input", "3")
    page.click("#run")
    page.wait_for_selector(".kvlock-queue")
    queue = page.inner_text(".kvlock-queue").splitlines()
    assert "of 1000" in queue[0] and queue[1] == "a green star: waits"
    page.click("#cancel")
    browsing.until_status(page, "cancelled")
    page.click("#cancel")  # its own is over: the one that runs
    browsing.until_status(page, "stopping")
    page.click("#run")
    browsing.until_status(page, "done")
    assert browsing.steps_of(page) == 3


def test_an_object_is_followed_from_one_box(page):
    page.click("text=Unmark all")
    told(page, "nothing is marked yet")
    page.fill("#box textarea, #box input", "24,24,74,74")
    page.click("#put_box")
    page.click("text=Follow the object")
    told(page, "followed between")
    told(page, "in 9 of 9 frames")


def test_what_a_page_uploaded_goes_when_it_is_closed(url, temporary, tmp_path):
    small = clips.examples(tmp_path)[1].video
    with browsing.page_of(url, auth=AUTH) as page:
        page.set_input_files("#upload input[type=file]", small)
        told(page, "nothing is marked yet")
        (uploaded,) = temporary.rglob(f"gradio/*/{small.name}")
    end = time.monotonic() + 20
    while uploaded.exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_small_screen_and_a_bad_file(page, tmp_path):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    upload = tmp_path / "text.mp4"
    upload.write_text("no video")
    page.set_input_files("#upload input[type=file]", upload)
    page.get_by_text("text.mp4: not a readable video").first.wait_for()
    assert "Traceback" not in page.inner_text("body")
