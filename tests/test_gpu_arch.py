"""What the GPU kernels offer on each architecture: what compiles for it, or a way out."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from gpu_interpreter import NEEDS_JAX

import paged_kv
from paged_kv.kernels.gpu import device
from tools.gpu_compile import compiler
from tools.gpu_compile.__main__ import compile_case

pytestmark = NEEDS_JAX

WAY_OUT = 'use implementation="xla", or None, which does'
AHEAD = [
    pytest.mark.aot,
    pytest.mark.skipif(compiler.missing() is not None, reason=f"{compiler.missing()}"),
]
HOPPER, BLACKWELL, AMPERE, ADA = (9, 0), (10, 0), (8, 0), (8, 9)


def step(head_dim=64):
    cache = paged_kv.init_paged_kv_cache(
        num_blocks=4, block_size=16, num_kv_heads=8, head_dim=head_dim, batch_size=2,
        max_blocks_per_seq=2, dtype=jnp.bfloat16,
    )  # fmt: skip
    return cache, jnp.zeros((2, 8, head_dim), jnp.bfloat16)


def attend(cache, new, **options):
    return paged_kv.paged_attention(new, cache, **options)


def append(cache, new, **options):
    return paged_kv.append_tokens(cache, new, new, **options).key_pool


def on(monkeypatch, capability):
    jax.clear_caches()
    monkeypatch.setattr(device, "capability", lambda: capability)


@pytest.mark.parametrize("capability", [BLACKWELL, AMPERE, ADA])
def test_attention_of_another_architecture_names_the_way_out(monkeypatch, capability):
    on(monkeypatch, capability)
    has = "attention needs compute capability 9.0, and this GPU has "
    with pytest.raises(NotImplementedError, match=has + ".".join(map(str, capability))) as raised:
        attend(*step(), implementation="mosaic_gpu")
    assert WAY_OUT in str(raised.value)


@pytest.mark.parametrize(
    ("capability", "head_dim", "needs"), [((7, 5), 64, r"8\.0 or"), (AMPERE, 8, r"9\.0 or")]
)
def test_append_of_another_architecture_names_the_way_out(monkeypatch, capability, head_dim, needs):
    on(monkeypatch, capability)
    with pytest.raises(NotImplementedError, match=f"needs compute capability {needs} later"):
        append(*step(head_dim), implementation="mosaic_gpu")


KERNELS = {attend: (HOPPER,), append: (HOPPER, BLACKWELL, AMPERE, ADA)}


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL, AMPERE, ADA])
def test_the_default_takes_a_kernel_where_there_is_one(monkeypatch, capability, op):
    on(monkeypatch, capability)
    lowered = jax.jit(op).trace(*step()).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == (capability in KERNELS[op])
    jax.clear_caches()


SLOW = [*AHEAD, pytest.mark.slow]
COMPILED = [
    pytest.param("append_64", "B200", marks=AHEAD),
    pytest.param("ci_append", "B200", marks=SLOW),
    pytest.param("append_64", "A100", marks=SLOW),
    pytest.param("append_64", "L40S", marks=SLOW),
]


@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_append_compiles(name, arch, tmp_path):
    """In a process of its own: one that compiled for an older architecture fails for a newer."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.gpu_compile", name, "--arch", arch]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(file.read_text())
    assert record["kernel"] == "paged_append"
    assert record["spill_stores"] == record["spill_loads"] == 0


@pytest.mark.parametrize("name", [pytest.param("8b_b1_1k", marks=AHEAD)])
def test_a_program_compiled_for_another_architecture_asks_its_device(name):
    """Which need not be here."""
    with pytest.raises(NotImplementedError, match=r"9\.0, and this GPU has 10\.0"):
        compile_case(name, "B200")
