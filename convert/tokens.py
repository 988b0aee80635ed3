"""Finds the tokenizer that belongs to a text encoder's file."""

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlock_jax.checkpoints.files import tokenizer_beside
from kvlock_jax.convert.published import Tokens
from kvlock_jax.convert.quantised import open_reader
from kvlock_jax.convert.weights import lazy_tensors
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text import spiece
from kvlock_jax.models.text.tokenizer import PIECES

SPIECE = "spiece_model"
"""The tensor in which ComfyUI's text encoders keep the bytes of a `spiece.model`."""


def of_encoder(encoder: Path) -> Tokens:
    """The tokenizer beside a text encoder's file, or else the one in it.

    Raises:
      CheckpointError: there is none, or the one in the file is damaged.
    """
    if files := tokenizer_beside(encoder):
        apart = {f"tokenizer/{path.name}": path for path in files}
        return Tokens(_kept({path.name: path.read_bytes() for path in files}), apart=apart)
    if encoder.suffix == ".gguf" and (found := _in_gguf(encoder)):
        return Tokens(_kept(found))
    if encoder.suffix == ".safetensors" and (model := lazy_tensors(encoder).get(SPIECE)):
        return Tokens(_kept({PIECES: _checked(encoder, model.read().tobytes())}))
    raise CheckpointError(
        f"{encoder} holds no tokenizer: put the published tokenizer.json (google/umt5-xxl) beside "
        "it"
    )


def _kept(files: Mapping[str, bytes]) -> Path:
    """A folder of files until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="kvlock-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _checked(path: Path, model: bytes) -> bytes:
    """A SentencePiece model's bytes, if they are some; `Tokenizer` does not know their origin."""
    try:
        spiece.parse(model)
    except ValueError as error:
        raise CheckpointError(f"{path}: its {SPIECE} is damaged: {error}") from error
    return model


def _in_gguf(path: Path) -> Mapping[str, bytes]:
    """The tokenizer of a text encoder's GGUF file, whose pieces lie in its metadata."""
    fields = open_reader(path).fields

    def value(name: str, default: Any = None) -> Any:
        """The contents of a field."""
        field = fields.get(f"tokenizer.ggml.{name}")
        return default if field is None else field.contents()

    if value("model") != "t5":
        return {}
    columns = [value(name, []) for name in ("tokens", "scores", "token_type")]
    try:
        pieces = spiece.Pieces(
            tuple(zip(*columns, strict=True)),
            bytes(value("precompiled_charsmap", [])),
            bool(value("add_space_prefix", True)),
            bool(value("remove_extra_whitespaces", True)),
        )
        return {"tokenizer.json": spiece.tokenizer(pieces).to_str().encode()}
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error}") from error
