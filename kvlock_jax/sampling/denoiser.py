"""The model as the sampling loop calls it."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int

from kvlock_jax.grid import Cut, Grid, Patches
from kvlock_jax.lock import Lock


class Denoiser(Protocol):
    """The model's interface to the loop: a pytree of weights with methods, as `WanTransformer` is.

    Conditioning and times may be any pytrees; the loop only passes them on.
    """

    def condition(self, context: Any, grid: Grid) -> Any:
        """The conditioning of a pass over latents of a grid, from its text (and more).

        Where clips run as windows, the grid is a window's, and what the context has for each token
        is of the whole clip.
        """

    def cut(self, conditioning: Any, cut: Cut) -> Any:
        """The conditioning of windows, which count as rows. Called where clips run as windows."""

    def conditional(self, conditioning: Any) -> Any:
        """The conditioning of the edits' conditional branches, the first of every two rows.

        Called where steps do without the others: all of them where there is no guidance, some with
        `LockConfig.skip_guidance`.
        """

    def times(self, timestep: Float[Array, "*rows"]) -> Any:
        """Embeddings of timesteps (0-1000): a tree of arrays with one row for each."""

    def per_token(self, time: Any, of_token: Int[Array, "B L"]) -> Any:
        """The times of rows whose tokens have several, which `of_token` chooses among.

        Called with background "clean" alone, on a tree with an axis of several times after that of
        rows.
        """

    def __call__(
        self, latents: Patches, time: Any, conditioning: Any, lock: Lock | None = None
    ) -> Patches:
        """The velocity of each row at its time, of all tokens or of those that the lock computes.

        The lock's cache may be a `SourcePass`, which the model runs beside its own, block by block.
        """

    def keys_values(
        self, latents: Patches, time: Any, conditioning: Any, *, into: Any
    ) -> tuple[Patches, Any]:
        """The velocity, and the cache with each block's self-attention keys and values."""

    def empty_cache(self, latents: Patches, *, contexts: bool = False) -> Any:
        """A cache of the size that `keys_values` fills for such latents.

        `contexts` asks for those of blocks that condition the main ones too (`Lock.contexts`); a
        model that has none need not take it.
        """
