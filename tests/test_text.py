"""Prompts to ids against Transformers and SentencePiece; to context against the bare encoder."""

import html
import io
import json
import random

import fresh
import fsspec
import ftfy
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from etils import epath
from flax import nnx

from kvlock_jax.errors import CheckpointError, InputError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.prompts import encode_prompts, prompt_warnings
from kvlock_jax.models.text.tokenizer import Tokenizer, clean, write_word_tokenizer
from kvlock_jax.models.text.umt5 import UMT5Encoder

WORDS = "a red blue star circle moving left right".split()
ODD = [
    "",
    "   ",
    "  A red\n\tstar,\u00a0moving   left. ",
    "red\r\n\r\nstar\x0b\x0c\u2028\u3000blue",
    "<3 Tom &amp;amp;lt; Jerry &lt;3 &#28;&nbsp;&zwj;",
    "\u201cquoted\u201d caf\u00e9, cafe\u0301",
    "schÃ¶n \u7ea2\u8272\uff0c\u661f\u661f\u3002 \uff21\uff22 \U0001f680\u200d",
    "\u7ea2\u8272\u7684\u661f\u661f\u79fb\u52a8",
    "\u041a\u0440\u0430\u0441\u043d\u0430\u044f \u0437\u0432\u0435\u0437\u0434\u0430 \U0001d504",
    "\U0001f680 star \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1ee\U0001f1f9",
    "\uff32\uff25\uff24\u3000\uff33\uff34\uff21\uff32 \uff8a\uff9f \ufb01 \u338f \u2460 \u00bd",
    "e\u0301\u0302\u0303 Z\u0324\u0354a\u0308\u0356l \u0301 \u1100\u1161\u11a8 \u0915\u094d\u0937",
    "\u200bred\u200b\u200dstar\ufeff blu\u00ade \u202ered\u202c \u2060",
    "\x00\x07red\x1b[31m star\x1c",
    "red\u2581star \u2581",
    "red " * 40,
]


@pytest.fixture
def folder(tmp_path):
    write_word_tokenizer(tmp_path / "tokenizer", WORDS, text_len=8)
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("prompt", ODD)
def test_clean_equals_diffusers(prompt):
    assert clean(prompt) == prompt_clean(prompt)


@pytest.mark.parametrize("prompt", ODD)
def test_clean_is_the_publishers_two_steps(prompt):
    """Mended and unescaped twice, then every run of white space one space; case is kept."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    assert clean(prompt) == " ".join(mended.split())


def test_clean_by_hand():
    assert clean("<3 &amp;amp;lt;") == "<3 &lt;"
    assert clean(" Tom &amp;amp;\n Jerry\u3000\u201cx\u201d\uff0c ") == 'Tom & Jerry "x",'


def test_words_by_hand(folder):
    ids, mask = Tokenizer(folder)(["A red, STAR.", "", "a zebra", "left " * 20])
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
    want = peer(list(map(clean, prompts)), padding="max_length", max_length=8, truncation=True)
    ids, mask = Tokenizer(folder)(prompts)
    assert ids.tolist() == want.input_ids and mask.astype(int).tolist() == want.attention_mask
    peer.save_pretrained(tmp_path / "again")  # as Diffusers writes it beside a pipeline
    again, _ = Tokenizer(tmp_path / "again")(prompts)
    assert again.tolist() == ids.tolist()


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model in UMT5's ways: T5's ids, unigrams, NFKC, bytes for what is unknown."""
    rng = random.Random(0)
    words, signs = "the red star moves over a blue circle".split(), "\u7ea2\u8272\u7684\u661f\u5706"
    lines = [
        " ".join(rng.choices(words, k=8)) + "".join(rng.choices(signs, k=6)) for _ in range(500)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def umt5(pieces, tmp_path_factory):
    """The tokenizer's folder of an original checkpoint, with `pieces` in place of 256,000."""
    folder = tmp_path_factory.mktemp("original") / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(pieces)
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 3,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(3)],
        "model_max_length": int(1e30),  # as published: none
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    file = folder / "tokenizer.json"
    layout = json.loads(file.read_text())
    assert not layout["model"]["byte_fallback"]  # the converter drops it, whatever the model says
    layout["model"]["byte_fallback"] = True
    file.write_text(json.dumps(layout))
    return folder


@pytest.mark.parametrize("prompt", [*ODD, "the red star moves", "zz \u7ea2 top", "star " * 600])
def test_ids_equal_sentencepiece(umt5, pieces, prompt):
    oracle = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    want = [*oracle.encode(" ".join(prompt_clean(prompt).split()))[:511], 1]
    ids, mask = Tokenizer(umt5)([prompt])
    assert ids.shape == mask.shape == (1, 512)
    assert ids[0][mask[0]].tolist() == want and not ids[0][~mask[0]].any()
    assert mask[0].sum() == len(want) and 2 not in want  # bytes leave nothing unknown


def test_odd_prompts_are_odd(pieces):
    """They do reach bytes, full-width letters, and the length at which prompts are cut."""
    oracle = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    assert oracle.is_byte(oracle.encode("\U0001f680")[-1])
    assert len(oracle.encode("star " * 600)) > 511
    assert oracle.encode("\uff32\uff45\uff44") == oracle.encode("Red")


def test_special_tokens_written_out_are_themselves(umt5, pieces):
    """As in the publisher's code, by way of `tokenizers`; SentencePiece would spell them out."""
    oracle = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    red, star, size = *(oracle.encode(w) for w in ("red", "star")), oracle.vocab_size()
    ids, mask = Tokenizer(umt5)(["red </s> star", "<extra_id_0>", "<pad>red", "&lt;/s&gt;"])
    rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    assert rows == [[*red, 1, *star, 1], [size + 2, 1], [0, *red, 1], [1, 1]]


def test_context_of_512_tokens_is_zero_after_the_last(umt5):
    model, tokenizer = encoder(340), Tokenizer(umt5)
    prompts = ["", "the red star \U0001f680", "star " * 600]
    context, (_, mask) = encode_prompts(model, tokenizer, prompts), tokenizer(prompts)
    assert context.shape == (3, 512, 16) and mask.sum(axis=1).tolist()[::2] == [1, 512]
    np.testing.assert_array_equal(np.abs(context).max(axis=-1) > 0, mask)


@pytest.mark.parametrize("prompt", ["", "  red  star ", "star " * 511, "red &lt;3 " * 60])
def test_a_prompt_that_fits_loses_nothing(umt5, prompt):
    assert Tokenizer(umt5).cut_off(prompt) == ""
    assert prompt_warnings(Tokenizer(umt5), prompt) == []


@pytest.mark.parametrize("tail", ["circle", "blue circle \u7ea2", "\U0001f680 over a  blue circle"])
def test_the_tail_of_a_long_prompt_is_named(umt5, tail):
    tokenizer, whole = Tokenizer(umt5), "star " * 511 + tail
    assert tokenizer.cut_off(whole) == " ".join(tail.split())
    (line,) = prompt_warnings(tokenizer, whole)
    assert "over 512 tokens" in line and line.endswith(repr(" ".join(tail.split())))
    assert len(line) < 250 and "\n" not in line
    assert prompt_warnings(tokenizer, "star", whole, "star") == [line]  # a negative prompt


def test_a_negative_prompt_in_another_vocabulary_is_passed_over(folder):
    long = "left " * 20
    assert len(prompt_warnings(Tokenizer(folder), "a red star", long)) == 1
    assert prompt_warnings(Tokenizer(folder), "a red star", "zebra " + long) == []


def test_pieces_alone_give_the_same_ids(umt5, pieces, tmp_path):
    (tmp_path / "spiece.model").write_bytes(pieces)
    prompts = [*ODD, "the red star moves", "star </s> " * 300, "<pad>red"]
    for one, other in zip(Tokenizer(tmp_path)(prompts), Tokenizer(umt5)(prompts), strict=True):
        np.testing.assert_array_equal(one, other)
    for content in (b"", pieces[:-9], b"{}", pieces.replace(b"<unk>", b"<nuk>", 1)[:9]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"spiece\.model: it.* SentencePiece model"):
            Tokenizer(tmp_path)


def test_folder_in_a_bucket(umt5, monkeypatch):
    """With memory in place of the network; etils has no other scheme to spare."""
    monkeypatch.setattr(
        type(epath.backend.fsspec_backend),
        "_get_filesystem",
        lambda self, name: fsspec.filesystem("memory" if name == "gcs" else "file"),
    )
    bucket = epath.Path("gs://bucket/umt5-xxl")
    bucket.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bucket / file).write_bytes((umt5 / file).read_bytes())
    ours, theirs = Tokenizer("gs://bucket/umt5-xxl"), Tokenizer(umt5)
    np.testing.assert_array_equal(ours(ODD)[0], theirs(ODD)[0])
    write_word_tokenizer("gs://bucket/words", WORDS, 8)
    assert Tokenizer("gs://bucket/words")(["a red star"])[0][0, :4].tolist() == [3, 4, 6, 1]
    with pytest.raises(CheckpointError, match=r"gs://bucket/none has no tokenizer\.json"):
        Tokenizer("gs://bucket/none")


def test_text_len_is_bounded_by_the_model(folder):
    assert Tokenizer(folder).text_len == 8
    assert Tokenizer(folder, text_len=5)(["a red star moving left"])[0].shape == (1, 5)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).text_len == 512


def encoder(vocab_size=11):
    config = UMT5Config(
        vocab_size=vocab_size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3
    )
    return fresh.module(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))


def test_context_is_the_bare_prompt_then_zeros(folder):
    model, tokenizer = encoder(), Tokenizer(folder)
    prompts = ["a red star", "", "a blue circle moving left a red star"]
    context = encode_prompts(model, tokenizer, prompts)
    assert context.shape == (3, 8, 16) and context.dtype == jnp.float32
    for row, ids in zip(context, ([3, 4, 6, 1], [1], [3, 5, 7, 8, 9, 3, 4, 1]), strict=True):
        ids = jnp.array([ids], jnp.int32)  # alone, without padding
        bare = model(ids, jnp.ones_like(ids))[0]
        np.testing.assert_allclose(row[: len(bare)], bare, rtol=1e-4, atol=1e-5)
        assert not row[len(bare) :].any()


def test_tokenizer_of_another_model_is_refused(folder):
    with pytest.raises(CheckpointError, match="ids up to 10, the text encoder embeds 10"):
        encode_prompts(encoder(10), Tokenizer(folder), ["a red star"])


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
        Tokenizer(folder)


@pytest.mark.parametrize("prompts", ["one string", ["a", None]])
def test_prompts_that_are_not(folder, prompts):
    with pytest.raises(InputError, match="sequence of strings"):
        Tokenizer(folder)(prompts)


@pytest.mark.parametrize("words", [["two words"], ["Upper"], ["star", "star"], ["a_b"]])
def test_bad_words(tmp_path, words):
    with pytest.raises(InputError, match="lower-case"):
        write_word_tokenizer(tmp_path, words, 8)


def test_words_that_are_not_known(tmp_path):
    write_word_tokenizer(tmp_path / "tokenizer", WORDS, text_len=8)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    known = WORDS[0]
    assert tokenizer.unknown(f"{known} {known}") == []
    assert tokenizer.unknown(f"{known}  blurred {known} foggy blurred") == ["blurred", "foggy"]
    assert tokenizer.unknown("") == []
