"""Sizes of Wan's VAE, and the statistics of its latents."""

import dataclasses
import math

from kvlock_jax.settings.fields import require, require_positive


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of Wan's causal video VAE, and the mean and deviation of its latents' channels.

    Named as in Diffusers' `config.json`; the defaults are Wan 2.1's, whose latents have 16
    channels. Wan 2.2's have 48: `is_residual`, with a shortcut around every level (`residual`), and
    a `patch_size` of 2, whose 2x2 pixels are one cell of the first and the last layer.
    `decoder_base_dim` is `base_dim` where it is None.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16
    decoder_base_dim: int | None = None
    is_residual: bool = False
    patch_size: int = 1

    def __post_init__(self) -> None:
        require_positive(self)
        require(
            len(self.dim_mult) == len(self.temperal_downsample) + 1,
            self,
            "dim_mult",
            "one entry longer than temperal_downsample",
        )
        for name in ("latents_mean", "latents_std"):
            numbers = getattr(self, name)
            require(len(numbers) == self.z_dim, self, name, f"{self.z_dim} numbers")
            require(all(map(math.isfinite, numbers)), self, name, "finite")
        require(min(self.latents_std) > 0, self, "latents_std", "positive")
        require(min(self.dim_mult) > 0, self, "dim_mult", "positive")
        if self.is_residual:
            expected = "of widths that the shortcuts' means and copies divide"
            require(self._shortcuts_divide(), self, "dim_mult", expected)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent cell along time, height and width: (4, 8, 8), Wan 2.2's (4, 16, 16)."""
        side = self.patch_size * 2 ** len(self.temperal_downsample)
        return 2 ** sum(self.temperal_downsample), side, side

    @property
    def pixel_channels(self) -> int:
        """Channels of the first and the last layer: the colours of a patch."""
        return 3 * self.patch_size**2

    @property
    def encoder_widths(self) -> list[int]:
        """Channels before the encoder's first level, and of every level."""
        return [self.base_dim * m for m in (1, *self.dim_mult)]

    @property
    def decoder_widths(self) -> list[int]:
        """Channels before the decoder's first level, and of every level."""
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        return [base * m for m in (self.dim_mult[-1], *reversed(self.dim_mult))]

    @property
    def halvings(self) -> tuple[bool | None, ...]:
        """Whether each level of the encoder halves time as well as space; the last neither."""
        return (*self.temperal_downsample, None)

    @property
    def doublings(self) -> tuple[bool | None, ...]:
        """Whether each level of the decoder doubles time as well as space; the last neither."""
        return (*reversed(self.temperal_downsample), None)

    def _shortcuts_divide(self) -> bool:
        """Whether each output of a level's shortcut is the mean, or the copy, of whole inputs."""
        cells = {None: 1, False: 4, True: 8}
        down, up = self.encoder_widths, self.decoder_widths[:-1]  # the last level has none
        means = zip(down[:-1], down[1:], self.halvings, strict=True)
        copies = zip(up[1:], up[:-1], self.doublings[:-1], strict=True)
        return all(many * cells[time] % few == 0 for many, few, time in (*means, *copies))
