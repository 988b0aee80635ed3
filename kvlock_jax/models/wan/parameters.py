"""The rules of the parameters of Wan's transformers."""

from kvlock_jax.models.layout import ParameterRules

PARAMETERS = ParameterRules(
    letters={
        r"to_[qkv]\.kernel": "layers D N",
        r"to_[qkv]\.bias": "layers N",
        r"norm_[qk]\.scale": "layers N",
        r"to_out\.kernel": "layers N D",
        r"net_0\.kernel": "layers D F",
        r"net_0\.bias": "layers F",
        r"net_2\.kernel": "layers F D",
        r"vace_blocks\.proj_out\.kernel": "layers D I",
        r"condition_embedder\.time_proj\.kernel": "D I",
    },
    # the time embedding's products stay float32
    large=r"(vace_)?blocks\..+\.kernel",
    rounded=r"(?!condition_embedder\.time_)(.+\.)?kernel",
)
