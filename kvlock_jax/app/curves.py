"""The curves of a run that is under way, as a drawing of the page (SVG)."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.sampling.loop import Trace

_WIDTH, _HEIGHT = 420, 130
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 26, 22
_LINE, _GUIDE, _WINDOW = "#1f5fa8", "#c0392b", "#f7f0dd"
_LEAST = 1e-4  # of sigma2's axis, which is logarithmic


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One curve: its title, values, lower and upper end of its axis, and a line with its name."""

    title: str
    values: Sequence[float]
    low: float
    high: float
    guide: float | None = None
    guide_name: str = ""
    is_log: bool = False


def drawn(rows: Sequence[Trace], settings: Settings) -> str:
    """Curves of sigma2 against tau, alpha and omega over the steps so far, as HTML.

    The axis has all steps from the start; the scheduled window is shaded.

    Args:
      rows: traces of the finished steps.
      settings: settings of the run.
    """
    steps, kappa = settings.sample.steps, settings.lock.kappa
    tau, omega = settings.lock.tau, settings.sample.guidance_scale
    known = [float(row.sigma2) if row.sigma2 > 0 else math.nan for row in rows]
    largest = max([tau, *(value for value in known if math.isfinite(value))])
    smallest = min([tau, *(value for value in known if math.isfinite(value))])
    omegas = [float(row.guidance_scale) for row in rows]
    panels = (
        _Panel(
            "statistic \N{GREEK SMALL LETTER SIGMA}²",
            known,
            max(_LEAST / 100, smallest / 3),
            largest * 3,
            tau,
            f"τ = {tau:g}",
            is_log=True,
        ),
        _Panel(
            "fusion ratio \N{GREEK SMALL LETTER ALPHA}",
            [float(row.fusion_ratio) for row in rows],
            0.0,
            1.05,
        ),
        _Panel(
            "guidance scale ω",
            omegas,
            0.0,
            1.15 * max([omega, 1e-6, *(value for value in omegas if math.isfinite(value))]),
            omega,
            f"ω₀ = {omega:g}",
        ),
    )
    first = max(0, steps - kappa)
    drawings = "".join(_drawing(panel, steps, first) for panel in panels)
    return f'<div class="kvlock-curves" data-steps="{len(rows)}">{drawings}</div>'


def _drawing(panel: _Panel, steps: int, first: int) -> str:
    def x(step: float) -> float:
        """Where a step lies, counted from 1; half a step of room on both sides."""
        return _LEFT + (step - 0.5) / steps * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        """Where a value lies."""
        low, high = (math.log(v) if panel.is_log else v for v in (panel.low, panel.high))
        at = math.log(max(value, panel.low)) if panel.is_log else value
        share = min(max((at - low) / (high - low), 0), 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 15, panel.title, "start", 13)]
    bottom = _HEIGHT - _BOTTOM
    if first < steps:
        left = x(first + 0.5)
        size = f'width="{x(steps + 0.5) - left:.1f}" height="{bottom - _TOP}"'
        parts.append(f'<rect x="{left:.1f}" y="{_TOP}" {size} fill="{_WINDOW}"/>')
    parts += _ticks(panel, y)
    for step in sorted({1, max(1, round(steps / 2)), steps}):
        parts.append(_text(x(step), _HEIGHT - 6, str(step), "middle", 11))
    parts.append(
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none" stroke="#999"/>'
    )
    if panel.guide is not None:
        at = y(panel.guide)
        dash = f'stroke="{_GUIDE}" stroke-dasharray="4 3"'
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" {dash}/>')
        parts.append(_text(_WIDTH - _RIGHT, 15, panel.guide_name, "end", 12, _GUIDE))
    points = [
        f"{x(number):.1f},{y(value):.1f}"
        for number, value in enumerate(panel.values, 1)
        if math.isfinite(value)
    ]
    if points:
        line = f'fill="none" stroke="{_LINE}" stroke-width="1.8"'
        parts.append(f'<polyline points="{" ".join(points)}" {line}/>')
        last = points[-1].split(",")
        parts.append(f'<circle cx="{last[0]}" cy="{last[1]}" r="3" fill="{_LINE}"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _ticks(panel: _Panel, y: Callable[[float], float]) -> list[str]:
    """Numbers at the axis of values, and lines across."""
    if panel.is_log:
        ends = (math.ceil(math.log10(panel.low)), math.floor(math.log10(panel.high)))
        values = [10.0**power for power in range(ends[0], ends[1] + 1)]
    else:
        values = np.linspace(0, panel.high / 1.05 if panel.high < 1.1 else panel.high, 3).tolist()
    parts = []
    for value in values:
        across = f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
        parts += [across, _text(_LEFT - 5, y(value) + 4, f"{value:.3g}", "end", 11)]
    return parts


def _text(x: float, y: float, text: str, anchor: str, size: int, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{colour}">{text}</text>'
