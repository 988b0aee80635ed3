"""The settings of a loop that are compiled into its program."""

import dataclasses

from kvlock_jax import lock
from kvlock_jax.sampling.windows import Windows
from kvlock_jax.settings.schema import LockConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """The settings that select a compiled program, beside the shapes; all others are traced.

    Attributes:
      passes: kinds of pass that a step may need, from `lock.passes`.
      guidance: `"cfg"` or `"apg"`.
      window: number of clean estimates in the statistic.
      carried: whether the state carries the source's keys and values from step to step.
      tokens: number of tokens that a foreground pass computes.
      contexts: whether the lock acts on context blocks too.
      skips: whether a step may leave out the unconditional branch.
      branches: guidance branches of every pass, the conditional one alone or both.
      clean: whether background tokens are the clean source, at timestep 0.
      idle: whether only the source reaches the result from the background at alpha 1, so that
        windows without foreground can be left out.
      windows: windows of clips that are longer than the model; `None` runs clips whole.
    """

    passes: tuple[str, ...]
    guidance: str
    window: int
    carried: bool = False
    tokens: int | None = None
    contexts: bool = False
    skips: bool = False
    branches: int = 2
    clean: bool = False
    idle: bool = False
    windows: Windows | None = None

    @classmethod
    def of(
        cls,
        settings: LockConfig,
        tokens: int | None = None,
        *,
        branches: int = 2,
        windows: Windows | None = None,
    ) -> "Program":
        """The program that the settings need; without `tokens` every pass computes all tokens.

        With one of the `branches` there is no guidance, so none of its settings counts.
        """
        kinds = lock.passes(settings)
        if tokens is None and "foreground" in kinds:
            kinds = tuple(dict.fromkeys("full" if k == "foreground" else k for k in kinds))
        tokens = tokens if "foreground" in kinds else None
        carried = settings.cache == "carried" and kinds != ("plain",)
        contexts = settings.lock_contexts and kinds != ("plain",)
        skips = settings.skip_guidance and branches == 2
        guidance = settings.guidance if branches == 2 else "cfg"
        clean, idle = settings.background == "clean", lock.background_is_idle(settings)
        rest = (carried, tokens, contexts, skips, branches, clean, idle, windows)
        return cls(kinds, guidance, settings.window, *rest)

    @property
    def locked(self) -> bool:
        """Whether any step may need the source branch."""
        return self.passes != ("plain",)
