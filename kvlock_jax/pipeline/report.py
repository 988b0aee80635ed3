"""Reports of a run: its trace as JSON and as a plot, and the edit beside its source."""

import dataclasses
import importlib.metadata
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.lock.masks import dilate
from kvlock_jax.media import encode, room, storage
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.shapes import Frames, Mask

STEPS = ("sigma", "sigma2", "fusion_ratio", "guidance_scale", "uncond_scale", "scheduled")
"""Fields of `Trace` in the JSON, one value per step."""

_INK, _LINE, _GUIDE, _WINDOW = "#222222", "#1f5fa8", "#c0392b", "#f7f0dd"


def write_trace(
    path: storage.FilePath, result: Result, about: Mapping[str, Any] | None = None
) -> None:
    """Writes a run as JSON: `about`, versions, settings, steps, metrics and seconds.

    JSON has neither NaN nor infinity: a NaN becomes null, infinity the string `"Infinity"`, which
    Python's `float` reads.

    Args:
      path: file to write, ending in `.json`; it is replaced as a whole.
      result: result of the run.
      about: further entries, such as the prompt and the names of files.

    Raises:
      InputError: the path cannot be written.
    """
    target = encode.check_output(path, (".json",))
    frames, height, width = result.video.shape[:3]
    content = {
        **(about or {}),
        "versions": {
            "kvlock_jax": importlib.metadata.version("kvlock-jax"),
            "jax": jax.__version__,
        },
        "seed": result.settings.sample.seed,
        "settings": dataclasses.asdict(result.settings),
        "video": {"frames": frames, "height": height, "width": width, "fps": float(result.fps)},
        "windows": result.windows,
        "mask_coverage": room.share(result.mask),
        "steps": {name: getattr(result.trace, name).tolist() for name in STEPS},
        "metrics": result.metrics.as_dict(),
        "seconds": result.seconds,
    }
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    with encode.replacing(target) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value with NaN and infinity replaced, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def plot_trace(path: storage.FilePath, trace: Trace, settings: Settings) -> None:
    """Plots sigma2 against tau, alpha, omega and s over the steps, 900x600 pixels.

    The scheduled window is shaded. sigma2 starts with the first step that had a statistic.

    Args:
      path: file to write, ending in `.png`; it is replaced as a whole.
      trace: trace of one edit, NumPy, with an axis of steps and no other.
      settings: settings of the run.

    Raises:
      InputError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = encode.check_output(path, (".png",))
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_title(trace, settings), fontsize=11, color=_INK)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, sharex=True)
    _draw_statistic(top_left, trace, settings)
    _draw_alpha(top_right, trace, settings)
    _draw_omega(bottom_left, trace, settings)
    _draw_scale(bottom_right, trace, settings)
    for axes in figure.axes:
        _finish(axes, trace)
    for axes in (bottom_left, bottom_right):
        axes.set_xlabel("step")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    with encode.replacing(target) as part:
        part.write_bytes(buffer.getvalue())


def _title(trace: Trace, settings: Settings) -> str:
    window = int(np.sum(trace.scheduled))
    sampling = settings.sample
    return (
        f"{settings.preset}: {len(trace.sigma)} steps of {sampling.solver}, "
        f"shift {sampling.shift:g}, seed {sampling.seed}; shaded: the scheduled last {window}"
    )


def _curve(axes: Any, values: np.ndarray) -> None:
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=_LINE, linewidth=1.6, marker=".", markersize=5)


def _guide(axes: Any, height: float, name: str) -> None:
    axes.axhline(height, color=_GUIDE, linewidth=1, linestyle="--", label=name)
    axes.legend(loc="best", fontsize=8, frameon=False)


def _note(axes: Any, text: str) -> None:
    place = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.3, 0.3, text, fontsize=9, color=_INK, **place)


def _draw_statistic(axes: Any, trace: Trace, settings: Settings) -> None:
    axes.set_title(r"statistic $\sigma^2$", fontsize=10)
    known = np.where(trace.sigma2 > 0, trace.sigma2, np.nan)  # 0 means no statistic yet
    # sigma2 spans three decades within a run.
    axes.set_yscale("log")
    _curve(axes, known)
    _guide(axes, settings.lock.tau, rf"$\tau$ = {settings.lock.tau:g}")


def _draw_alpha(axes: Any, trace: Trace, settings: Settings) -> None:
    axes.set_title(r"fusion ratio $\alpha$", fontsize=10)
    _curve(axes, trace.fusion_ratio)
    axes.set_ylim(-0.05, 1.05)
    if not settings.lock.enabled:
        _note(axes, "no lock")


def _draw_omega(axes: Any, trace: Trace, settings: Settings) -> None:
    axes.set_title(r"guidance scale $\omega$", fontsize=10)
    _curve(axes, trace.guidance_scale)
    start = settings.sample.guidance_scale
    axes.set_ylim(0.0, 1.1 * max(start, float(trace.guidance_scale.max()), 1e-6))
    _guide(axes, start, rf"$\omega_0$ = {start:g}")


def _draw_scale(axes: Any, trace: Trace, settings: Settings) -> None:
    axes.set_title(r"scale of the unconditional velocity, $s^*$", fontsize=10)
    _curve(axes, trace.uncond_scale)
    if not settings.lock.rescale_uncond:
        axes.set_ylim(0.0, 1.5)
        _note(axes, "fixed at 1")


def _finish(axes: Any, trace: Trace) -> None:
    steps = len(trace.sigma)
    if trace.scheduled.any():
        first = int(np.argmax(trace.scheduled)) + 1
        axes.axvspan(first - 0.5, steps + 0.5, color=_WINDOW, zorder=0)
        axes.axvline(first - 0.5, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0.5, steps + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def compare(
    source: Frames, mask: Mask, edited: Frames
) -> UInt8[np.ndarray, "frames height columns 3"]:
    """Source, source with the mask's outline, and edit, side by side, 2 white pixels apart.

    The middle one is that of `outlined`.
    """
    if not source.shape[:3] == mask.shape == edited.shape[:3]:
        shapes = f"{source.shape}, {mask.shape} and {edited.shape}"
        raise InputError(f"source, mask and edit must be of one size, found {shapes}")

    def together(source: Frames, mask: Mask, edited: Frames) -> UInt8[np.ndarray, "_f _h _w 3"]:
        """Some of the frames."""
        gap = np.full((*source.shape[:2], 2, 3), 255, np.uint8)
        return np.concatenate([source, gap, outlined(source, mask), gap, edited], axis=2)

    return room.mapped(together, source, mask, edited, name="the comparison")


def outlined(source: Frames, mask: Mask) -> Frames:
    """The source with the mask's outline, which shows on any picture.

    It is white just inside the mask and black just outside.
    """
    drawn = np.array(source)
    drawn[np.asarray(dilate(mask, 1)) & ~mask] = 0
    drawn[np.asarray(dilate(~mask, 1)) & mask] = 255
    return drawn
