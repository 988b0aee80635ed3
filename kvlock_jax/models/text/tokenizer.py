"""Turns prompts into token ids, and writes tokenizers of whole words for small models."""

import html
import json
import re
from collections.abc import Iterable, Sequence

import ftfy
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Bool, Int

from kvlock_jax.errors import CheckpointError, InputError
from kvlock_jax.models.text import spiece

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
"""T5's special tokens, with ids 0, 1 and 2 in a vocabulary of `write_word_tokenizer`."""

PIECES = "spiece.model"
"""A SentencePiece model, which is read where there is no `tokenizer.json`."""


def clean(prompt: str) -> str:
    """A prompt as the publisher cleans it.

    Repairs broken encodings, full-width characters and curly quotes (ftfy), resolves HTML entities
    twice, and turns each run of white space into one space, with none at the ends.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """The tokenizer of a Diffusers folder (`tokenizer/`) or an original one (`google/umt5-xxl/`).

    Prompts are plain text, with one exception that the publisher's code shares: a special token
    spelled out, such as `</s>` or `<extra_id_0>`, becomes that token.

    Attributes:
      text_len: number of ids of each prompt, after padding or truncation, end token included.
      vocab_size: largest id plus one.
    """

    def __init__(self, folder: epath.PathLike, text_len: int = 512):
        """Opens `tokenizer.json`, or else `spiece.model`, and `tokenizer_config.json`.

        Args:
          folder: folder of the files, local or of a scheme that etils reads, such as `gs://`.
          text_len: tokens of a prompt, end token included; `model_max_length` wins where smaller.

        Raises:
          CheckpointError: a file is missing or damaged, or the tokenizer adds no end token.
        """
        folder = epath.Path(folder)
        settings = _read_settings(folder)
        inner = _read_tokenizer(folder)
        pad = settings.get("pad_token", PAD)
        pad = pad["content"] if isinstance(pad, dict) else pad
        pad_id = inner.token_to_id(pad)
        if pad_id is None:
            raise CheckpointError(f"{folder / 'tokenizer.json'} has no padding token {pad!r}")
        inner.no_padding()
        # an empty prompt is its end token; with no token at all attention would have no keys
        if not inner.encode("").ids:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} must add an end token to a prompt, found none: "
                "its post_processor is missing"
            )
        self.text_len = int(min(text_len, settings.get("model_max_length") or text_len))
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        inner.enable_truncation(self.text_len)
        inner.enable_padding(length=self.text_len, pad_id=pad_id, pad_token=pad)
        self._inner, self._unknown = inner, inner.token_to_id(UNKNOWN)

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Ids of cleaned prompts, and a mask that is true up to and including the end token.

        Both are `text_len` long. A longer prompt loses its tail (`cut_off`), not its end token.

        Raises:
          InputError: `prompts` is one string, or holds something other than strings.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise InputError(f"prompts must be a sequence of strings, found {prompts!r}")
        encoded = self._inner.encode_batch([clean(prompt) for prompt in prompts])
        ids = np.array([e.ids for e in encoded], np.int32).reshape(-1, self.text_len)
        mask = np.array([e.attention_mask for e in encoded], bool).reshape(ids.shape)
        return ids, mask

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt outside the vocabulary, each once."""
        text = clean(prompt)
        encoded = self._inner.encode(text)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        words = [text[first:last] for token, (first, last) in spans if token == self._unknown]
        return list(dict.fromkeys(words))

    def cut_off(self, prompt: str) -> str:
        """The tail of a cleaned prompt beyond `text_len` tokens; empty where the prompt fits."""
        text = clean(prompt)
        encoded = self._inner.encode(text)
        if not encoded.overflowing:
            return ""
        return text[max(last for _, last in encoded.offsets) :].strip()


def write_word_tokenizer(folder: epath.PathLike, words: Iterable[str], text_len: int) -> None:
    """Writes a tokenizer of whole words, for models with a small vocabulary.

    Prompts are lower-cased and lose their punctuation; an unlisted word becomes `<unk>`. Ids are
    `<pad>` 0, `</s>` 1, `<unk>` 2, then the words in order. Transformers and Diffusers' pipelines
    load the folder too.

    Raises:
      InputError: a word is listed twice, or is not one lower-case word.
    """
    words = list(words)
    is_word = re.compile(r"[^\W_]+").fullmatch
    if bad := [w for w in words if not is_word(w) or w != w.lower() or words.count(w) > 1]:
        raise InputError(f"words must be single, lower-case and distinct, found {bad}")
    vocabulary = {word: i for i, word in enumerate((PAD, END, UNKNOWN, *words))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Punctuation("removed"),
        ]
    )
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    inner.add_special_tokens([PAD, END, UNKNOWN])
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(inner.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text_len,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _read_settings(folder: epath.Path) -> dict:
    """The contents of `tokenizer_config.json`; empty where the file is missing."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold a JSON object: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: it is {settings!r:.60}")
    pad = settings.get("pad_token", PAD)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        raise CheckpointError(f"{path}: pad_token must be a string, found {pad!r:.60}")
    longest = settings.get("model_max_length")
    whole = isinstance(longest, (int, float)) and not isinstance(longest, bool) and longest >= 1
    if longest is not None and not whole:
        raise CheckpointError(
            f"{path}: model_max_length must be a number of tokens, found {longest!r:.60}"
        )
    return settings


def _read_tokenizer(folder: epath.Path) -> tokenizers.Tokenizer:
    path, pieces = folder / "tokenizer.json", folder / PIECES
    if not path.exists():
        if pieces.exists():
            return _of_pieces(pieces)
        raise CheckpointError(f"{folder} has no tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error


def _of_pieces(path: epath.Path) -> tokenizers.Tokenizer:
    # Not by Transformers: its converter of T5 drops UMT5's byte fallback, and characters outside
    # the vocabulary would all become `<unk>`.
    try:
        return spiece.tokenizer(spiece.parse(path.read_bytes()))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: {error}") from error
