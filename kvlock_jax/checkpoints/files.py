"""The files beside a checkpoint's folder: those of single parts, and LoRAs."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvlock_jax.errors import InputError

PARTS = {
    "transformer": "transformer",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "transformer_high": "high-noise expert",
    "transformer_low": "low-noise expert",
}
"""The parts of a checkpoint, fields of `Files`, as messages call them."""

ROLES = ("high", "low")
"""The roles of experts, in the order of their steps."""

_FOLDERS = ("google/umt5-xxl", "tokenizer", ".")
_TOKENIZERS = ("tokenizer.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Files:
    """A file for each part that a folder does not supply.

    Attributes:
      transformer: safetensors, GGUF or `.pth`, with the publisher's names.
      vae: the same, or with Diffusers' names.
      text_encoder: the same, with the publisher's names, Transformers' or llama.cpp's.
      transformer_high: as `transformer`, of the expert for high noise (Wan 2.2's A14B).
      transformer_low: of the expert for low noise.
    """

    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    transformer_high: Path | None = None
    transformer_low: Path | None = None

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


def by_role(transformers: Sequence[str | Path]) -> dict[str, str | Path]:
    """The parts that files of transformers are: one, or two experts, which their names tell apart.

    One file alone is an expert if its name says `high_noise` or `low_noise`.

    Raises:
      InputError: there are more than two, or two whose names do not say which is which.
    """
    if not transformers:
        return {}
    noise = "[-_ ]?noise" if len(transformers) == 1 else "(?![a-z])|[-_ ]?noise"
    pattern = rf"(?i)(?<![a-z])(high|low)(?:{noise})"
    found = [re.search(pattern, Path(file).name) for file in transformers]
    roles = [match[1].lower() for match in found if match]
    if len(transformers) == 1 and not roles:
        return {"transformer": transformers[0]}
    if len(transformers) > 2 or len(roles) < len(transformers) or len(set(roles)) < len(roles):
        raise InputError(
            f"{len(transformers)} transformers: name one, or two experts whose names say high and "
            "low, or say which is which by --transformer_high and --transformer_low"
        )
    return {f"transformer_{role}": file for role, file in zip(roles, transformers, strict=True)}


Lora = tuple[Path, float]
"""A file and its strength."""


@dataclasses.dataclass(frozen=True)
class Loras:
    """The LoRA files that change a checkpoint's transformers.

    Attributes:
      every: of all transformers.
      high: of the high-noise expert alone.
      low: of the low-noise expert alone.
    """

    every: tuple[Lora, ...] = ()
    high: tuple[Lora, ...] = ()
    low: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            loras = parse_loras(given) if isinstance(given, str) else given
            checked = tuple((Path(path).expanduser(), by) for path, by in loras)
            object.__setattr__(self, field.name, checked)

    def of(self, role: str) -> tuple[Lora, ...]:
        """Those of an expert, or of the one transformer, whose role is empty."""
        return self.every + (getattr(self, role) if role else ())

    @property
    def named(self) -> Iterable[tuple[str, Lora]]:
        """Each of them, with a name that says which it is."""
        for field in dataclasses.fields(self):
            for path, strength in getattr(self, field.name):
                expert = "" if field.name == "every" else f"{field.name}:"
                yield f"{expert}{path.name}:{strength:g}", (path, strength)


NO_LORAS = Loras()


def parse_loras(text: str) -> tuple[Lora, ...]:
    """The files and strengths of `FILE[:STRENGTH],...`; a strength is 1 by default.

    Raises:
      InputError: a file is missing, or a strength is not finite.
    """
    loras = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.rpartition(":")
        try:
            strength = float(number)
        except ValueError:
            name, strength = part, 1.0
        if not name:
            name, strength = part, 1.0
        if not math.isfinite(strength):
            raise InputError(f"the strength of the LoRA {name} must be finite, found {number}")
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"{name}: no such LoRA file")
        loras.append((path, strength))
    return tuple(loras)


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
