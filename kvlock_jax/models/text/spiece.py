"""Makes a tokenizer of a SentencePiece model's pieces, as `tokenizers` writes one for UMT5.

ComfyUI's text encoders hold such a model's bytes, and GGUF files its pieces; neither has the
`tokenizer.json` of a published folder.
"""

import dataclasses
import struct
from collections.abc import Iterator

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; ggml numbers them as SentencePiece does."""

_UNIGRAM = 1


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a SentencePiece model of unigrams consists of.

    Attributes:
      pieces: text, score and type of each piece, by id.
      charsmap: compiled map of characters that are normalised; none if empty.
      prefixed: whether a text gets a space in front.
      squeezed: whether runs of spaces become one, and those at the ends none.
      end: text of the piece after every prompt.
    """

    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes = b""
    prefixed: bool = True
    squeezed: bool = True
    end: str = "</s>"


def parse(model: bytes) -> Pieces:
    """Reads the bytes of a `spiece.model`.

    Raises:
      ValueError: they are no SentencePiece model, or one of another kind than unigrams.
    """
    pieces, trainer, normalizer = [], {}, {}
    try:
        for field, value in _fields(model):
            if field == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normalizer = dict(_fields(value))
        prefixed, squeezed = (bool(normalizer.get(field, 1)) for field in (3, 4))
        found = Pieces(tuple(pieces), bytes(normalizer.get(2, b"")), prefixed, squeezed)
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise ValueError(f"it is no SentencePiece model: {error}") from error
    if not pieces:
        raise ValueError("it is no SentencePiece model: it has no pieces")
    if (kind := trainer.get(3, _UNIGRAM)) != _UNIGRAM:
        raise ValueError(f"its SentencePiece model is of type {kind}, expected {_UNIGRAM}, unigram")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: a number, or its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field {field} has wire type {wire}")
        if at + size > len(data):
            raise ValueError(f"field {field} of {size} bytes is cut short")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits to a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def tokenizer(model: Pieces) -> tokenizers.Tokenizer:
    """A tokenizer with SentencePiece's ids, but special tokens spelled out are themselves.

    The `<extra_id_...>` of T5, which lie behind the pieces in a published `tokenizer.json`, are
    text to it.

    Raises:
      ValueError: there is no piece for what is unknown, or none at the end of prompts.
    """
    kinds = [kind for _, _, kind in model.pieces]
    names = [text for text, _, _ in model.pieces]
    if UNKNOWN not in kinds or model.end not in names:
        raise ValueError(f"its SentencePiece model lacks <unk> or {model.end}")
    while kinds[-1] == UNUSED:  # of GGUF files, which fill the vocabulary up
        kinds.pop()
    vocabulary = [_unigram(*piece) for piece in model.pieces[: len(kinds)]]
    inner = tokenizers.Tokenizer(
        tokenizers.models.Unigram(vocabulary, kinds.index(UNKNOWN), byte_fallback=BYTE in kinds)
    )
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeezed:
        steps += [
            normalizers.Replace(tokenizers.Regex("^ +| +$"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if steps:
        inner.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.prefixed else "never"
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {model.end}", special_tokens=[(model.end, names.index(model.end))]
    )
    named = list(zip(names, kinds, strict=False))
    inner.add_special_tokens([name for name, kind in named if kind in (UNKNOWN, CONTROL)])
    own = [name for name, kind in named if kind == USER_DEFINED]
    inner.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in own])
    return inner


def _unigram(text: str, score: float, kind: int) -> tuple[str, float]:
    """A piece as the model of unigrams wants it."""
    # An unused piece keeps its id, but no text has it: normalising removes a NUL. Its score would
    # count as the least of all, from which that of unknown characters follows.
    return (f"\0{text}", 0.0) if kind == UNUSED else (text, score)
