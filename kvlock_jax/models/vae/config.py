"""Sizes of Wan's VAE, and the statistics of its latents."""

import dataclasses
import math

from kvlock_jax.settings.fields import require, require_positive


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of Wan's causal video VAE, and the mean and deviation of its latents' channels."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16

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
