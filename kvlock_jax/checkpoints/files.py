"""The files of single parts of a checkpoint, which take the place of a folder's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

PARTS = {"transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder"}
"""The fields of `Files`, as messages call them."""

_FOLDERS = ("google/umt5-xxl", "tokenizer", ".")
_TOKENIZERS = ("tokenizer.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Files:
    """A file for each part that a folder does not supply.

    Attributes:
      transformer: safetensors, GGUF or `.pth`, with the publisher's names.
      vae: the same, or with Diffusers' names.
      text_encoder: the same, with the publisher's names, Transformers' or llama.cpp's.
    """

    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None

    def __post_init__(self) -> None:
        for name, path in self.given.items():
            object.__setattr__(self, name, Path(path).expanduser())

    @property
    def given(self) -> Mapping[str, Path]:
        """The files that there are, by the part's name."""
        named = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: path for name, path in named if path}

    def read(self) -> Mapping[str, Path]:
        """Every file that is read for them, a tokenizer's too, by a name of its own."""
        found = {name: beside(path) for name, path in self.given.items()}
        if self.text_encoder:
            paths = tokenizer_beside(self.text_encoder)
            found |= {f"tokenizer/{path.name}": path for path in paths}
        return found


NO_FILES = Files()


def beside(path: Path) -> Path:
    """The file that is read for a path: for a `.pth`, a `.safetensors` of its stem beside it."""
    converted = path.with_suffix(".safetensors")
    return converted if path.suffix == ".pth" and converted.is_file() else path


def holds_tokenizer(folder: Path) -> bool:
    """Whether `Tokenizer` finds its file in a folder."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def tokenizer_beside(encoder: Path) -> tuple[Path, ...]:
    """The files of the tokenizer in the folder of a text encoder's file, or in one within it."""
    for name in _FOLDERS:
        folder = encoder.parent / name
        if holds_tokenizer(folder):
            known = (*_TOKENIZERS, "tokenizer_config.json")
            return tuple(path for name in known if (path := folder / name).is_file())
    return ()
