"""README.md does what it says: its examples run, its commands name what exists."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import stand_in_programs
from bitwise import assert_same_bits
from tiny_gguf import write_tiny_gguf
from tolerances import tolerance

import paged_kv
from tools import gguf_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLE, MODEL, FLAX, MEMORY, ENGINE, INTEROP, SHARDING = EXAMPLES
COMMANDS = re.findall(r"^python3 .*$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def example():
    """The names that the first example leaves behind."""
    names = {}
    exec(compile(EXAMPLE, "README.md, first example", "exec"), names)
    return names


def test_the_example_has_twelve_statements_lines():
    assert len(EXAMPLE.strip().replace("\n\n", "\n").splitlines()) <= 12


def test_the_example_attends_over_what_it_appended(example):
    query, keys, values = (
        jax.random.normal(jax.random.key(heads), (62, heads, 64), jnp.bfloat16)
        for heads in (8, 2, 2)
    )
    start = 0
    for length in example["prompts"]:
        rows = slice(start, start + length)
        expected = jax.nn.dot_product_attention(
            *(x[None, rows].astype(jnp.float32) for x in (query, keys, values)), is_causal=True
        )[0]
        result = example["out"][rows].astype(jnp.float32)
        np.testing.assert_allclose(result, expected, atol=2e-2, rtol=2e-2)
        start += length
    assert example["cache"].seq_lengths.tolist() == example["prompts"]


def test_the_model_example_decodes_like_dense_attention(example):
    layers, batch, hidden, heads, kv_heads, head_dim, steps = 2, 3, 32, 8, 2, 16, 5
    exec(compile(MODEL, "README.md, second example", "exec"), example)
    decode = example["decode"]
    shapes = {
        "q": (layers, hidden, heads, head_dim),
        "k": (layers, hidden, kv_heads, head_dim),
        "v": (layers, hidden, kv_heads, head_dim),
        "o": (layers, heads, head_dim, hidden),
    }
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape) / 6, jnp.float32)
    weights = {name: draw(shape) for name, shape in shapes.items()}
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=batch * 2,
        block_size=4,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        batch_size=batch,
        max_blocks_per_seq=2,
        dtype=jnp.float32,
        num_layers=layers,
    )
    cache = paged_kv.set_block_table(
        cache, jnp.asarray(rng.permutation(6).reshape(3, 2), jnp.int32)
    )
    inputs = [draw((batch, hidden)) for _ in range(steps)]
    past = [[] for _ in range(layers)]
    for x in inputs:
        result, cache = decode(weights, x, cache)
        for layer in range(layers):
            w = {name: value[layer] for name, value in weights.items()}
            q, k, v = (jnp.einsum("bi,ihd->bhd", x, w[name]) for name in ("q", "k", "v"))
            past[layer].append((k, v))
            keys, values = (jnp.stack(part, axis=1) for part in zip(*past[layer], strict=True))
            out = jax.nn.dot_product_attention(q[:, None], keys, values)[:, 0]
            x = x + jnp.einsum("bhd,hdi->bi", out, w["o"])
        np.testing.assert_allclose(result, x, atol=2e-5, rtol=2e-5)


def test_the_flax_example_attends_as_without_a_cache(example):
    names = dict(example)
    exec(compile(FLAX, "README.md, Flax example", "exec"), names)
    nnx, x = names["nnx"], jax.random.normal(jax.random.key(0), (2, 8, 32))
    for row, length in enumerate((6, 3)):
        expected = x[row : row + 1, :length]
        for seed in range(2):
            dense = nnx.MultiHeadAttention(num_heads=4, in_features=32, rngs=nnx.Rngs(seed))
            mask = nnx.make_causal_mask(jnp.ones((1, length)))
            expected = dense(expected, mask=mask, decode=False)
        np.testing.assert_allclose(
            names["y"][row, :length], expected[0], **tolerance("reference float32")
        )
    assert names["paged"].kv.get_value().seq_lengths.tolist() == [6, 3]


def test_the_interop_example_goes_there_and_back(example):
    names = {**example, "cache": jax.tree.map(jnp.copy, example["cache"])}
    exec(compile(INTEROP, "README.md, interop example", "exec"), names)
    interop, before, after = names["interop"], example["cache"], names["cache"]
    assert_same_bits(after, before)  # what was written is what was there
    assert names["csr"].last_page_len.tolist() == [5, 8, 1]
    assert_same_bits(interop.to_csr(interop.from_csr(before, names["csr"])), names["csr"])
    assert_same_bits(names["pools"], jnp.stack([before.key_pool, before.value_pool]))
    for row, length in enumerate(example["prompts"]):
        keys, values, _ = paged_kv.gather_kv(before, row)
        assert_same_bits(
            (names["keys"][row, :length], names["values"][row, :length]), (keys, values)
        )
    assert names["arguments"].kv_lens.tolist() == example["prompts"]


def test_the_memory_example_shares_a_prefix(example):
    names = {**example, "prompt": list(range(40))}
    names["cache"] = paged_kv.reset_sequences(
        jax.tree.map(jnp.copy, example["cache"]), jnp.ones(3, jnp.bool_)
    )
    names["cache"] = jax.tree.map(
        lambda leaf: leaf[:2] if leaf.ndim < 3 else leaf, names["cache"]
    )  # two rows
    exec(compile(MEMORY, "README.md, memory example", "exec"), names)
    allocator = names["allocator"]
    assert len(names["host"].keys) == 4 and "bob" not in allocator
    assert allocator.blocks("ann") == [0, 1, 2]
    assert allocator.match_prefix("cid", range(40), salt="tenant 1") == 32
    assert allocator.match_prefix("dan", range(40), salt="tenant 2") == 0


def test_the_engine_example_serves(monkeypatch, tmp_path):
    stand_in_programs(monkeypatch)
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    monkeypatch.setattr(gguf_model, "default_model_path", lambda: path)
    names = {}
    exec(compile(ENGINE, "README.md, engine example", "exec"), names)
    for request, prompt, answer in zip(
        names["requests"], names["prompts"], names["answers"], strict=True
    ):
        assert request.tokens[: len(prompt)] == prompt
        assert request.generated == [10 + len(prompt) + i for i in range(8)]
        assert answer == names["model"].text.decode(request.generated) and len(answer) > 0
    assert names["engine"].record.total("generated") == 16


def test_the_sharding_example_decodes_as_one_device(example):
    rows = np.arange(4)[:, None] % 2 * 8 + np.arange(8)
    names = {**example, "functools": functools, "table": jnp.asarray(rows, jnp.int32)}
    exec(compile(SHARDING, "README.md, sharding example", "exec"), names)
    query, keys, values = (
        jax.random.normal(jax.random.key(h), (4, h, 64), jnp.bfloat16) for h in (8, 2, 2)
    )
    out, cache = names["decode"](query, keys, values, names["cache"])
    np.testing.assert_array_equal(out, jnp.repeat(values, 4, axis=1))  # each sees only itself
    assert cache.seq_lengths.tolist() == [1] * 4
    assert {shard.data.shape for shard in cache.key_pool.addressable_shards} == {(32, 16, 1, 64)}


def test_each_command_sets_up_everything():
    assert len(COMMANDS) == 2
    for command, extra, program in zip(
        COMMANDS, ["demo", "test"], ["tools.generate", "pytest"], strict=True
    ):
        assert command.startswith("python3 -m venv .venv && ")
        assert f"'.[{extra}]'" in command and f"-m {program}" in command


def test_the_names_in_the_text_exist():
    for name in re.findall(r"paged_kv\.([a-z_]+)\(", README):
        assert hasattr(paged_kv, name), name
    folders = "paged_kv|kernels|tools|benchmarks|tests"
    paths = re.findall(rf"`((?:{folders})/[\w/*]*(?:\.py|\.json)?)`", README)
    assert {"kernels/core/variant.py", "paged_kv/validate_*.py", "tools/serving/"} <= {*paths}
    for path in paths:
        assert any(Path(__file__).parent.parent.glob(path)), path
