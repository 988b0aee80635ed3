"""Compiles the programs of one edit in a thread, while its weights load."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kvlock_jax.models.vae import autoencoder
from kvlock_jax.pipeline import stages
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.runtime.compile_cache import Compiler
from kvlock_jax.sampling.edits import Edits


class BackgroundCompiler:
    """Compiles in a thread what one edit will run, stage by stage, in the order of a run.

    What goes wrong with it does so again where the edit runs, and is told there.

    Attributes:
      compiler: which the edit has to run by, to find what was compiled.
    """

    def __init__(
        self,
        model: Model,
        inputs: EditInputs,
        settings: Settings,
        noise: Float[np.ndarray, "one T H W C"],
        by_step: bool,
        compiler: Compiler | None = None,
    ):
        self.compiler = compiler or Compiler()
        self._model, self._by_step = model, by_step
        self._inputs, self._settings, self._noise = [inputs], [settings], noise
        parts = {"texts": self._texts, "videos": self._videos}
        parts |= {"loop": self._loop, "decoder": self._decoder}
        self._made: dict[str, Future] = {}
        pool = ThreadPoolExecutor(1)
        for stage, make in parts.items():
            self._made[stage] = pool.submit(self._on_mesh, make)
        pool.shutdown(wait=False)

    def wait(self, stage: str) -> None:
        """Waits until a stage is compiled: `texts`, `videos`, `loop` or `decoder`."""
        with contextlib.suppress(Exception):
            self._made[stage].result()

    def _on_mesh(self, make: Callable[[], Any]) -> Any:
        with self._model.on_mesh():
            return make()

    def _texts(self) -> jax.ShapeDtypeStruct:
        return stages.encode_texts(
            self._model, self._inputs, self._settings, 1, self.compiler.compile
        )

    def _videos(self) -> tuple[Edits, int]:
        given = self._inputs, self._noise, self._made["texts"].result(), self._settings[0]
        return stages.encode_inputs(self._model, *given, self.compiler.compile)

    def _loop(self) -> jax.ShapeDtypeStruct:
        network, settings = self._model.checkpoint.transformer, self._settings[0]
        edits, tokens = self._made["videos"].result()
        run = self.compiler.compile
        return stages.Loop.of(network, settings, edits, tokens, self._by_step, run).compile(run)

    def _decoder(self) -> None:
        edits, _ = self._made["videos"].result()
        edited = self._made["loop"].result()
        run, grid = self.compiler.compile, {"grid": edits.grid, "references": edits.references}
        for latents in run(stages.video_latents, edited, **grid)[:1]:
            run(autoencoder.decode, self._model.checkpoint.vae, latents)
