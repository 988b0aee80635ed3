"""Compiles the programs of one edit in a thread while its weights load."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kvlock_jax.pipeline import pieces, stages
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.seeds import batch_rows
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.runtime.compile_cache import Compiler
from kvlock_jax.sampling.edits import Edits


class BackgroundCompiler:
    """Compiles one edit's programs in a thread, stage by stage, in the order of a run.

    An error here is dropped: it occurs again where the edit runs, which reports it.

    Attributes:
      compiler: compiler that holds the programs; the edit has to run through it.
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
        self._rows = batch_rows([inputs], [settings], noise, model.mesh)
        compile_stages = {"texts": self._texts, "videos": self._videos}
        compile_stages |= {"loop": self._loop, "decoder": self._decoder}
        self._compiled: dict[str, Future] = {}
        pool = ThreadPoolExecutor(1)
        for stage, compile_stage in compile_stages.items():
            self._compiled[stage] = pool.submit(self._on_mesh, compile_stage)
        pool.shutdown(wait=False)

    def wait(self, stage: str) -> None:
        """Waits until a stage is compiled: `texts`, `videos`, `loop` or `decoder`."""
        with contextlib.suppress(Exception):
            self._compiled[stage].result()

    def _on_mesh(self, compile_stage: Callable[[], Any]) -> Any:
        with self._model.on_mesh():
            return compile_stage()

    def _texts(self) -> jax.ShapeDtypeStruct:
        rows, run = self._rows, self.compiler.compile
        return stages.encode_texts(self._model, rows.inputs, rows.settings, len(rows.noise), run)

    def _videos(self) -> tuple[Edits, int]:
        context = self._compiled["texts"].result()
        return stages.encode_rows(self._model, self._rows, context, self.compiler.compile)

    def _loop(self) -> jax.ShapeDtypeStruct:
        settings, run = self._rows.settings[0], self.compiler.compile
        edits, tokens = self._compiled["videos"].result()
        loop = stages.Loop.of(self._model, settings, edits, tokens, self._by_step, run)
        return loop.compile(run)

    def _decoder(self) -> None:
        edits, _ = self._compiled["videos"].result()
        edited = self._compiled["loop"].result()
        run, grid = self.compiler.compile, {"grid": edits.grid, "references": edits.references}
        for latents in run(stages.video_latents, edited, **grid)[:1]:
            for _ in pieces.decode(self._model.checkpoint.vae, latents, run):
                pass
