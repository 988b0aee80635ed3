"""One small file per run, each with a `get_config()`; here is what the published models share."""

from typing import Any

from ml_collections import ConfigDict

from kvlock_jax.settings.schema import run_config

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"  # noqa: RUF001
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"  # noqa: RUF001
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""The publisher's default negative prompt: `sample_neg_prompt`, of its
`shared_config.py` (Wan-Video/Wan2.1). In English: garish colours, overexposed, static, blurred
details, subtitles, style, work of art, painting, picture, still, greyish overall, worst quality,
low quality, JPEG residue, ugly, incomplete, extra fingers, badly drawn hands, badly drawn faces,
deformed, disfigured, misshapen limbs, fused fingers, motionless picture, cluttered background,
three legs, many people in the background, walking backwards."""


def published(preset: str, **sample: Any) -> ConfigDict:
    """`run_config` with what most published models of Wan share.

    50 steps of UniPC, as `generate.py` takes for videos from text, and `NEGATIVE_PROMPT`.
    """
    run = run_config(preset, **{"steps": 50, "solver": "unipc"} | sample)
    run.edit.negative_prompt = NEGATIVE_PROMPT
    return run
