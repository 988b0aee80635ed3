"""The trace as JSON and as a picture, of a run that is made up here."""

import importlib.metadata
import json
import math
import sys
from fractions import Fraction

import jax
import numpy as np
import pytest

from kvlock_jax import lock
from kvlock_jax.errors import InputError
from kvlock_jax.evaluate.metrics import EditMetrics
from kvlock_jax.media import decode
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.settings.schema import EditConfig, SampleConfig

STEPS, KAPPA = 8, 3


def trace(kappa: int = KAPPA) -> Trace:
    step = np.arange(STEPS, dtype=np.float32)
    return Trace(
        sigma=1 - step / STEPS,
        sigma2=np.where(step < 2, 0, 0.002 * step).astype(np.float32),
        fusion_ratio=step / STEPS,
        guidance_scale=5 - step / 2,
        uncond_scale=0.9 + step / 100,
        scheduled=step >= STEPS - kappa,
        finite=np.ones(STEPS, bool),
    )


def settings(preset: str = "kvlock", seed: int = 7) -> Settings:
    sampling = SampleConfig(steps=STEPS, seed=seed)
    return Settings(preset, sampling, lock.preset(preset, 5.0), EditConfig())


def result() -> Result:
    source = np.zeros((5, 32, 48, 3), np.uint8)
    mask = np.zeros((5, 32, 48), bool)
    mask[:, :16, :12] = True  # an eighth
    measured = EditMetrics(math.inf, 31.5, math.nan, 2.0, 1.0)
    rate, seconds = Fraction(30000, 1001), {"compile": 2.5, "sample": 1.25}
    return Result(source, source, mask, rate, trace(), measured, seconds, settings())


def only(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path) -> dict:
    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_trace_says_all_of_the_run(tmp_path):
    report.write_trace(tmp_path / "t.json", result(), {"prompt": "ein größerer Stern", "box": None})
    found = read(tmp_path / "t.json")
    assert only(tmp_path) == ["t.json"]
    assert found["prompt"] == "ein größerer Stern" and found["box"] is None
    assert found["seed"] == 7
    assert found["settings"]["sample"]["steps"] == STEPS
    assert found["settings"]["lock"]["tau"] == 0.01
    assert found["settings"]["edit"]["dilate"] == 0
    assert found["versions"] == {
        "kvlock_jax": importlib.metadata.version("kvlock-jax"),
        "jax": jax.__version__,
    }
    assert found["mask_coverage"] == 0.125
    assert found["video"] == {"frames": 5, "height": 32, "width": 48, "fps": 30000 / 1001}
    assert found["seconds"] == {"compile": 2.5, "sample": 1.25}


def test_trace_has_every_step(tmp_path):
    report.write_trace(tmp_path / "t.json", result())
    steps = read(tmp_path / "t.json")["steps"]
    assert list(steps) == [
        "sigma",
        "sigma2",
        "fusion_ratio",
        "guidance_scale",
        "uncond_scale",
        "scheduled",
    ]
    assert steps["scheduled"] == [False] * 5 + [True] * 3
    assert steps["guidance_scale"] == [5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5]
    np.testing.assert_array_equal(np.float32(steps["sigma2"]), trace().sigma2)


def test_what_json_does_not_know(tmp_path):
    report.write_trace(tmp_path / "t.json", result())
    found = read(tmp_path / "t.json")
    assert found["metrics"] == {
        "psnr": "Infinity",
        "background_psnr": 31.5,
        "background_ssim": None,
        "ring_error": 2.0,
        "ring_flicker": 1.0,
        "background_ceiling": None,
    }
    assert float(found["settings"]["lock"]["apg_norm"]) == math.inf


def picture(tmp_path, steps: Trace, chosen: Settings) -> np.ndarray:
    report.plot_trace(tmp_path / "t.png", steps, chosen)
    return decode.read_image(tmp_path / "t.png").astype(int)


def near(image: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return abs(image - wanted).max(axis=-1) <= 4


def test_plot_shades_the_window_in_all_panels(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    image = picture(tmp_path, trace(), settings())
    assert image.shape == (600, 900, 3)
    assert only(tmp_path) == ["t.png"]
    assert ("matplotlib.pyplot" in sys.modules) == before  # nothing global is touched
    shaded = near(image, report._WINDOW)
    for rows in (slice(0, 300), slice(300, 600)):
        for columns in (slice(0, 450), slice(450, 900)):
            panel = shaded[rows, columns]
            assert 0.15 < panel.any(axis=0).mean() < 0.4  # 3 of 8 steps, less the margins
    assert not near(picture(tmp_path, trace(kappa=0), settings()), report._WINDOW).any()


def test_plot_marks_tau_and_omega_0(tmp_path):
    guides = near(picture(tmp_path, trace(), settings()), report._GUIDE)
    assert guides[:300, :450].sum() > 100 and guides[300:, :450].sum() > 100
    assert not guides[:, 500:].any()  # the panels of alpha and s


def test_plot_without_a_statistic_or_a_lock(tmp_path):
    steps = trace(kappa=0)
    steps.sigma2[:], steps.guidance_scale[:] = 0, 0
    assert near(picture(tmp_path, steps, settings("cfg")), report._LINE).sum() > 500


@pytest.mark.parametrize("name", ["t.txt", "absent/t.json"])
def test_trace_that_cannot_be_written(tmp_path, name):
    with pytest.raises(InputError, match=r"t\.txt|absent"):
        report.write_trace(tmp_path / name, result())
    with pytest.raises(InputError, match=r"t\.txt|absent"):
        report.plot_trace(tmp_path / name.replace("json", "png"), trace(), settings())
    assert only(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "t.json").write_text("old")
    broken = result()
    broken.seconds["sample"] = object()
    with pytest.raises(TypeError):
        report.write_trace(tmp_path / "t.json", broken)
    assert only(tmp_path) == ["t.json"] and (tmp_path / "t.json").read_text() == "old"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_compare_puts_source_outline_and_edit_side_by_side(unchecked):
    source, edited, mask = noise(2, 8, 10), noise(2, 8, 10, seed=1), np.zeros((2, 8, 10), bool)
    mask[:, 2:6, 3:7] = True
    found = report.compare(source, mask, edited)
    assert found.shape == (2, 8, 34, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[:, :, :10], source)
    np.testing.assert_array_equal(found[:, :, 24:], edited)
    assert (found[:, :, [10, 11, 22, 23]] == 255).all()
    expected = source.copy()
    expected[:, 1:7, 2:8] = 0
    expected[:, 2:6, 3:7] = 255
    expected[:, 3:5, 4:6] = source[:, 3:5, 4:6]
    np.testing.assert_array_equal(found[:, :, 12:22], expected)
    with pytest.raises(InputError, match="of one size"):
        report.compare(source, mask[:, 1:], edited)
