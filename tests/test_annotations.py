"""The shapes in the public annotations hold for every call of README.md, eager and traced.

Beartype checks them in a process of its own: switched on everywhere, its errors would come before
the ValueErrors that the other tests are about.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
API = ("allocator", "cache", "device_allocator", "moving", "ops", "sequences", "state")
HOOK = ",".join([*(f"paged_kv.{name}" for name in API), "beartype.beartype"])
WRONG_CALL = """
import jax.numpy as jnp, jaxtyping, paged_kv, pytest

def test_a_wrong_shape_breaks_an_annotation():
    cache = paged_kv.init_paged_kv_cache(num_blocks=2, block_size=4, num_kv_heads=1, head_dim=8,
                                         batch_size=1, max_blocks_per_seq=2, dtype=jnp.float32)
    with pytest.raises(jaxtyping.TypeCheckError, match="query"):
        paged_kv.paged_attention(jnp.zeros((1, 8)), cache)
"""


def pytest_with_hook(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", f"--jaxtyping-packages={HOOK}"]
    # Caches of PartitionSpecs, and of the shapes an engine lowers with, are no caches of arrays.
    command += ["-k", "not sharding and not engine"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_the_annotations_hold_when_the_readme_runs(tmp_path):
    wrong_call = tmp_path / "test_wrong_call.py"
    wrong_call.write_text(WRONG_CALL)
    run = pytest_with_hook(ROOT / "tests" / "test_readme.py", wrong_call)
    assert run.returncode == 0, run.stdout
