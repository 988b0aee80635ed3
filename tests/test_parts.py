"""Files of single parts: every layout that people hold, with a folder or without one."""

import io
import shutil

import gguf
import ml_dtypes
import numpy as np
import originals
import pytest
import sentencepiece
from flax import nnx
from safetensors.numpy import load_file, save_file

import kvlock_jax as kvl
from kvlock_jax.batch.fingerprint import checkpoint_identity
from kvlock_jax.checkpoints import format
from kvlock_jax.cli import main
from kvlock_jax.convert import converter, diffusers, original
from kvlock_jax.convert.source import open_source
from kvlock_jax.convert.table import published_names
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text import spiece, tokenizer

FLOAT8 = ml_dtypes.float8_e4m3fn
PROMPTS = ["a red star", "", "\u7ea2\u8272  \U0001f680\u3000star"]


def under_other_names(network, config, tensors, of, to):
    """Tensors of one layout under the names of another."""
    model = nnx.state(diffusers.abstract(network, config))
    renamed = {}
    for path, variable in nnx.to_flat_state(model):
        ours, theirs = (published_names(path, variable.shape, table)[1] for table in (of, to))
        for one, other in zip(ours, theirs, strict=True):
            renamed[other[0]] = tensors[one[0]]
    assert len(renamed) == len(tensors)
    return renamed


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model in UMT5's ways, with fewer ids than the tiny encoder knows."""
    model, lines = io.BytesIO(), ["a red star", "red a star star"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    return model.getvalue()


def scaled(tensors):
    """ComfyUI's scaled float8: matrices of blocks, each with a scale."""
    written = {"scaled_fp8": np.zeros(0, FLOAT8)}
    for key, tensor in tensors.items():
        if tensor.ndim == 2 and "block" in key and "bias" not in key:
            scale = np.float32(np.abs(tensor).max() / 448)
            written[key] = (tensor / scale).astype(FLOAT8)
            written[key.removesuffix("weight") + "scale_weight"] = np.asarray(scale)
        else:
            written[key] = tensor.astype(np.float16)
    return written


def exact(written):
    """What `scaled` stands for."""
    found = {}
    for key, tensor in written.items():
        scale = written.get(key.removesuffix("weight") + "scale_weight", np.float32(1))
        if key != "scaled_fp8" and not key.endswith("scale_weight"):
            found[key] = tensor.astype(np.float32) * scale
    return found


def write_gguf(path, tensors, model):
    """The text encoder as llama.cpp writes it, tokenizer and unused pieces included."""
    names = {
        "attn.": "attn_", "norm1.": "attn_norm.", "norm2.": "ffn_norm.", "ffn.gate.0.": "ffn_gate.",
        "ffn.fc1.": "ffn_up.", "ffn.fc2.": "ffn_down.", "pos_embedding.embedding.": "attn_rel_b.",
        "blocks.": "enc.blk.", "token_embedding.": "token_embd.",
    }  # fmt: skip
    writer, found = gguf.GGUFWriter(path, "t5encoder"), spiece.parse(model)
    columns = list(zip(*found.pieces, ("[PAD]", -10000.0, spiece.UNUSED), strict=True))
    writer.add_tokenizer_model("t5")
    writer.add_token_list(list(columns[0]))
    writer.add_token_scores(list(columns[1]))
    writer.add_token_types(list(columns[2]))
    writer.add_precompiled_charsmap(found.charsmap)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    for key, tensor in tensors.items():
        key = "enc.output_norm.weight" if key == "norm.weight" else key
        for old, new in names.items():
            key = key.replace(old, new)
        writer.add_tensor(key, tensor)
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()


@pytest.fixture(scope="module")
def held(tmp_path_factory, pieces):
    """One folder of files as ComfyUI has them, and the same parts in other layouts."""
    root = tmp_path_factory.mktemp("comfy")
    (root / "text_encoders").mkdir()
    published = open_source(originals.write_folder(root / "wan"))
    vae, umt5 = (load_file(originals.DATA / f"{name}.safetensors") for name in ("vae", "umt5"))
    # 97 ids are too few for the bytes of a SentencePiece model
    umt5["token_embedding.weight"] = np.random.default_rng(1).normal(size=(320, 48))
    umt5 = {key: np.float32(tensor) for key, tensor in umt5.items()}
    config = published.configs.vae
    table = original.vae(config)
    save_file(originals.wide_transformer(), root / "wan.safetensors")
    save_file(vae, root / "vae.safetensors")
    renamed = under_other_names(diffusers.AUTOENCODER, config, vae, table, diffusers.VAE)
    save_file(renamed, root / "vae_diffusers.safetensors")
    save_file(umt5, root / "umt5.safetensors")
    config = published.configs.text_encoder
    config = type(config)(**(vars(config) | {"vocab_size": 320}))
    tables = original.UMT5, diffusers.UMT5
    renamed = under_other_names(diffusers.TEXT_ENCODER, config, umt5, *tables)
    own = {"spiece_model": np.frombuffer(pieces, np.uint8)}
    save_file(renamed | own, root / "text_encoders" / "umt5_fp32.safetensors")
    save_file(scaled(renamed) | own, root / "text_encoders" / "umt5_fp8.safetensors")
    save_file(exact(scaled(renamed)) | own, root / "text_encoders" / "umt5_exact.safetensors")
    write_gguf(root / "text_encoders" / "umt5.gguf", umt5, pieces)
    shutil.copy(root / "wan" / "models_t5_umt5-xxl-enc-bf16.pth", root / "umt5.pth")
    return root


def files(held, vae="vae", encoder="text_encoders/umt5_fp32.safetensors"):
    return kvl.Files(held / "wan.safetensors", held / f"{vae}.safetensors", held / encoder)


def same(one, other):
    wanted = other.parameters()
    for name, values in one.parameters().items():
        for path, value in values.items():
            want = wanted[name][path].whole()
            np.testing.assert_array_equal(value.whole(), want, err_msg=f"{name}.{path}")


def test_every_layout_is_the_same_model(held):
    want = open_source(None, files(held))
    for vae, encoder in (("vae_diffusers", "umt5_fp32.safetensors"), ("vae", "umt5.gguf")):
        found = open_source(None, files(held, vae, f"text_encoders/{encoder}"))
        assert found.configs == want.configs and found.layout == "files"
        same(found, want)
    beside = shutil.copytree(held / "wan" / "google", held / "google")
    same(open_source(None, files(held, encoder="umt5.safetensors")), want)
    shutil.rmtree(beside)
    pair = (f"text_encoders/umt5_{name}.safetensors" for name in ("fp8", "exact"))
    same(*(open_source(None, files(held, encoder=name)) for name in pair))


@pytest.mark.parametrize("name", ["umt5_fp32.safetensors", "umt5.gguf"])
def test_the_tokenizer_in_a_file_has_sentencepieces_ids(held, pieces, name):
    oracle = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    model = kvl.load(files=files(held, encoder=f"text_encoders/{name}"))
    ids, mask = model.tokenizer(PROMPTS)
    assert ids.max() < model.checkpoint.configs.text_encoder.vocab_size
    for prompt, row, real in zip(PROMPTS, ids, mask, strict=True):
        want = [*oracle.encode(" ".join(tokenizer.clean(prompt).split())), 1]
        assert row[real].tolist() == want


def test_a_tokenizer_beside_a_file_comes_first(held, tmp_path):
    for where in (".", "tokenizer", "google/umt5-xxl"):
        folder = tmp_path / where.replace("/", "-")
        shutil.copytree(held / "text_encoders", folder / "a")
        encoder = folder / "a" / "umt5_fp32.safetensors"
        alone = kvl.Files(held / "wan.safetensors", held / "vae.safetensors", encoder)
        before = checkpoint_identity(None, alone)
        tokenizer.write_word_tokenizer(encoder.parent / where, ["red"], 24)
        opened = open_source(None, alone)
        assert {path.name for path in opened.tokenizer.iterdir()} == {
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert tokenizer.Tokenizer(opened.tokenizer).text_len == 24
        assert "tokenizer/tokenizer.json" in opened.apart
        assert checkpoint_identity(None, alone) != before


def test_a_folder_supplies_what_is_not_given(held, tiny_checkpoint, tmp_path):
    """Its own tokenizer too; and it need not hold a part whose file is given."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "wan")
    for part in ("transformer", "vae", "text_encoder"):
        shutil.rmtree(folder / part)
    found = open_source(folder, files(held))
    assert found.configs.scheduler == open_source(tiny_checkpoint).configs.scheduler
    assert found.tokenizer == folder / "tokenizer" and found.layout == "diffusers"
    two = kvl.Files(*list(files(held).given.values())[:2])
    with pytest.raises(CheckpointError, match="wan has no text_encoder/"):
        open_source(folder, two)
    shutil.rmtree(folder / "tokenizer")
    assert tokenizer.Tokenizer(open_source(folder, files(held)).tokenizer).vocab_size < 320
    (tmp_path / "pth").mkdir()
    shutil.copy(held / "wan" / "Wan2.1_VAE.pth", tmp_path / "pth")
    one = kvl.Files(held / "wan.safetensors", None, held / "text_encoders" / "umt5.gguf")
    same(open_source(tmp_path / "pth", one), open_source(None, files(held)))


def test_files_are_converted_with_their_sums(held, tmp_path):
    given = files(held, encoder="text_encoders/umt5_fp8.safetensors")
    converter.convert(None, tmp_path / "own", files=given)
    want, found = kvl.load(files=given), kvl.load(tmp_path / "own")
    np.testing.assert_array_equal(want.tokenizer(PROMPTS)[0], found.tokenizer(PROMPTS)[0])
    embeddings = (m.checkpoint.text_encoder.block.layer[0] for m in (want, found))
    one, other = (nnx.to_flat_state(nnx.state(part)) for part in embeddings)
    for (_, a), (_, b) in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.get_value(), b.get_value())
    assert set(format.describe(tmp_path / "own").source["files"]) == {
        "transformer/wan.safetensors",
        "vae/vae.safetensors",
        "text_encoder/umt5_fp8.safetensors",
    }


def test_every_file_counts_in_the_identity(held):
    given = files(held)
    want = checkpoint_identity(None, given)
    others = (
        files(held, vae="vae_diffusers"),
        files(held, encoder="text_encoders/umt5_fp8.safetensors"),
        kvl.Files(held / "vae.safetensors", given.vae, given.text_encoder),
    )
    assert all(checkpoint_identity(None, other) != want for other in others)
    assert set(want) == {"transformer", "vae", "text_encoder"}


def flags(files):
    return [f"--{name}={path}" for name, path in files.given.items()]


def test_info_and_convert_take_files_alone(held, tmp_path, capsys):
    assert main.main(["info", *flags(files(held)), "--size=64*64", "--frame_num=5"]) == 0
    assert "wan2.1-t2v" in capsys.readouterr().out
    assert main.main(["convert", *flags(files(held)), f"--dst={tmp_path / 'own'}"]) == 0
    assert "files layout" in capsys.readouterr().out
    assert main.main(["info", *flags(files(held))[:2]]) == 2
    assert "files of all parts are needed; not given: --text_encoder" in capsys.readouterr().err


def test_parts_that_do_not_go_together(held, tmp_path):
    tensors = load_file(held / "wan.safetensors")
    key = "patch_embedding.weight"
    tensors[key] = np.repeat(tensors[key], 3, axis=1)
    save_file(tensors, tmp_path / "5b.safetensors")
    _, vae, encoder = files(held).given.values()
    with pytest.raises(CheckpointError, match=r"5b.* is for 48 latent .* VAE of .* has 16$"):
        open_source(None, kvl.Files(tmp_path / "5b.safetensors", vae, encoder))


def t5(tensors):
    lost = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    return {key: tensor for key, tensor in tensors.items() if key != lost}


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("vae", lambda tensors: tensors, "is no VAE of Wan: it has neither encoder.conv1.weight"),
        ("text_encoder", t5, "is a T5, not a UMT5: 1 of 2 blocks have a relative_attention_bias"),
        ("text_encoder", lambda _: {"a": np.zeros(1)}, "is no UMT5 encoder: it has no token_emb"),
        ("text_encoder", lambda t: t | {"spiece_model": np.zeros(9, np.uint8)}, "SentencePiece m"),
        (
            "text_encoder",
            lambda t: {k: v for k, v in t.items() if k != "spiece_model"},
            r"holds no tokenizer: put the published tokenizer\.json",
        ),
    ],
)
def test_other_files_are_refused_by_name(held, tmp_path, part, change, message):
    path = tmp_path / "other.safetensors"
    save_file(change(load_file(files(held).text_encoder)), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        kvl.load(files=kvl.Files(**dict(files(held).given) | {part: path}))
    assert len(str(caught.value).splitlines()) == 1 and "other.safetensors" in str(caught.value)
