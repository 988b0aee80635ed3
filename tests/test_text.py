"""Prompts to ids against Transformers and SentencePiece; to context against the bare encoder."""

import io
import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from flax import nnx

from kvlock_jax import text
from kvlock_jax.config import UMT5Config
from kvlock_jax.errors import CheckpointError, InputError
from kvlock_jax.models.umt5 import UMT5Encoder

WORDS = "a red blue star circle moving left right".split()
ODD = [
    "",
    "  A red\n\tstar,\u00a0moving   left. ",
    "<3 Tom &amp;amp;lt; Jerry &lt;3",
    "\u201cquoted\u201d caf\u00e9, cafe\u0301",
    "schÃ¶n \u7ea2\u8272\uff0c\u661f\u661f\u3002 \uff21\uff22 \U0001f680\u200d",
    "red " * 40,
]


@pytest.fixture
def folder(tmp_path):
    text.write_word_tokenizer(tmp_path / "tokenizer", WORDS, text_len=8)
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("prompt", ODD)
def test_clean_equals_diffusers(prompt):
    assert text.clean(prompt) == prompt_clean(prompt)


def test_clean_by_hand():
    assert text.clean("<3 &amp;amp;lt;") == "<3 &lt;"
    assert text.clean(" Tom &amp;amp;\n Jerry\u3000\u201cx\u201d\uff0c ") == 'Tom & Jerry "x",'


def test_words_by_hand(folder):
    ids, mask = text.Tokenizer(folder)(["A red, STAR.", "", "a zebra", "left " * 20])
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [
        [3, 4, 6, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [3, 2, 1, 0, 0, 0, 0, 0],
        [9, 9, 9, 9, 9, 9, 9, 1],
    ]
    assert mask.sum(axis=1).tolist() == [4, 1, 3, 8]
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()


def test_words_equal_transformers(folder, tmp_path):
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (peer.pad_token_id, peer.eos_token_id, peer.unk_token_id) == (0, 1, 2)
    prompts = [*ODD, "a blue circle moving right"]
    want = peer(list(map(text.clean, prompts)), padding="max_length", max_length=8, truncation=True)
    ids, mask = text.Tokenizer(folder)(prompts)
    assert ids.tolist() == want.input_ids and mask.astype(int).tolist() == want.attention_mask
    peer.save_pretrained(tmp_path / "again")  # as Diffusers writes it beside a pipeline
    again, _ = text.Tokenizer(tmp_path / "again")(prompts)
    assert again.tolist() == ids.tolist()


def test_pieces_equal_sentencepiece(tmp_path):
    rng = random.Random(0)
    alphabet = "abcdefgh klm\u7ea2\u8272\u661f"
    lines = ["".join(rng.choices(alphabet, k=30)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=70,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 20}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*only spiece\.model.*save_pre"):
        text.Tokenizer(tmp_path)

    # the error's own advice
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    prompts = [*ODD, *lines[:5], "zz \u7ea2 top"]
    ids, mask = text.Tokenizer(tmp_path)(prompts)
    for prompt, row, real in zip(prompts, ids, mask, strict=True):
        want = [*oracle.encode(text.clean(prompt))[:19], 1]
        assert row[real].tolist() == want and not row[~real].any()


def test_text_len_is_bounded_by_the_model(folder):
    assert text.Tokenizer(folder).text_len == 8
    assert text.Tokenizer(folder, text_len=5)(["a red star moving left"])[0].shape == (1, 5)
    (folder / "tokenizer_config.json").unlink()
    assert text.Tokenizer(folder).text_len == 512


def encoder(vocab_size=11):
    config = UMT5Config(
        vocab_size=vocab_size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3
    )
    return UMT5Encoder(config, rngs=nnx.Rngs(0))


def test_context_is_the_bare_prompt_then_zeros(folder):
    model, tokenizer = encoder(), text.Tokenizer(folder)
    prompts = ["a red star", "", "a blue circle moving left a red star"]
    context = text.encode_prompts(model, tokenizer, prompts)
    assert context.shape == (3, 8, 16) and context.dtype == jnp.float32
    for row, ids in zip(context, ([3, 4, 6, 1], [1], [3, 5, 7, 8, 9, 3, 4, 1]), strict=True):
        ids = jnp.array([ids], jnp.int32)  # alone, without padding
        bare = model(ids, jnp.ones_like(ids))[0]
        np.testing.assert_allclose(row[: len(bare)], bare, rtol=1e-4, atol=1e-5)
        assert not row[len(bare) :].any()


def test_tokenizer_of_another_model_is_refused(folder):
    with pytest.raises(CheckpointError, match="ids up to 10, the text encoder embeds 10"):
        text.encode_prompts(encoder(10), text.Tokenizer(folder), ["a red star"])


def _without_end(folder):
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = None
    inner.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json$"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json is not a tokenizer"),
        (lambda f: (f / "tokenizer_config.json").write_text("[1]"), "not hold a JSON object"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}'),
            r"no padding token '\[PAD\]'",
        ),
        (_without_end, "must add an end token"),
    ],
)
def test_damaged_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        text.Tokenizer(folder)


@pytest.mark.parametrize("prompts", ["one string", ["a", None]])
def test_prompts_that_are_not(folder, prompts):
    with pytest.raises(InputError, match="sequence of strings"):
        text.Tokenizer(folder)(prompts)


@pytest.mark.parametrize("words", [["two words"], ["Upper"], ["star", "star"], ["a_b"]])
def test_bad_words(tmp_path, words):
    with pytest.raises(InputError, match="lower-case"):
        text.write_word_tokenizer(tmp_path, words, 8)
