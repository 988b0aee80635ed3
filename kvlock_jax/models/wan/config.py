"""Sizes of Wan's transformers."""

import dataclasses
import itertools
import math

from kvlock_jax.settings.fields import require, require_positive


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer, named as in Diffusers' `config.json`.

    `vace_layers` are the blocks after which VACE adds a hint (METHOD.md section 11), increasing
    from 0. The text-to-video model has none, and ignores `vace_in_channels`.
    """

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    vace_layers: tuple[int, ...] = ()
    vace_in_channels: int = 96

    def __post_init__(self) -> None:
        require_positive(self)
        require(0 < self.eps < math.inf, self, "eps", "over 0, and finite")
        require(min(self.patch_size) > 0, self, "patch_size", "positive")
        require(self.attention_head_dim % 2 == 0, self, "attention_head_dim", "even")
        layers = self.vace_layers
        expected = f"empty, or increasing from 0 and under num_layers, {self.num_layers}"
        first = tuple(layers[:1]) in ((), (0,))
        increasing = all(a < b for a, b in itertools.pairwise((*layers, self.num_layers)))
        require(first and increasing, self, "vace_layers", expected)

    @property
    def dim(self) -> int:
        """Width `D = N K` of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hint_groups(self) -> list[tuple[list[int], list[int], int]]:
        """The layers from each hint up to the next, in runs of groups of equal length.

        For each run: its context blocks, the first main block of each group, and the number of main
        blocks in a group.
        """
        ends = (*self.vace_layers, self.num_layers)[1:]
        gaps = [end - first for first, end in zip(self.vace_layers, ends, strict=True)]
        runs = []
        for length, run in itertools.groupby(enumerate(gaps), key=lambda gap: gap[1]):
            contexts = [context for context, _ in run]
            runs.append((contexts, [self.vace_layers[c] for c in contexts], length))
        return runs
