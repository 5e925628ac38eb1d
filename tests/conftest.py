"""Strict JAX on the CPU for every test; what cannot run here is skipped with the reason.

Set JAX_PLATFORMS to run the tests marked `tpu` or `gpu` on a device.
"""

import contextlib
import functools
import gc
import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of NumPy's products would wait for those of the other test processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# libtpu locks the machine for one process; a compile needs no such lock.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# shard_map needs several devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
# The same examples on every run, and no clock: the first example compiles.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

COMPILERS = ("libtpu", "jax_cuda13_plugin")


def _missing_compilers() -> list[str]:
    return [name for name in COMPILERS if importlib.util.find_spec(name) is None]


@functools.cache
def _least_options() -> dict[str, int | bool]:
    """What makes XLA's CPU compiler do its least: half the time of an interpreted kernel's."""
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    of_some = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    return options | {name: value for name, value in of_some.items() if _is_option(name, value)}


def _is_option(name: str, value: int | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def _quick_compiles():
    # options of all programs at once have no public name
    from jax._src import compiler

    make, least = compiler.get_compile_options, _least_options()

    def make_quick(*args, env_options_overrides=None, **kwargs):
        options = least | dict(env_options_overrides or {})
        return make(*args, **kwargs, env_options_overrides=options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", make_quick)
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """XLA at its least: for modules of many programs, each run once or twice on little.

    Not where bits of NaN count: jax 0.10 then loses some of bfloat16.
    """
    with _quick_compiles():
        yield


@pytest.fixture
def quick_compiles_here():
    """The same, for one test of a module."""
    with _quick_compiles():
        yield


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """The file of a small Llama model."""
    from tiny_gguf import write_tiny_gguf  # few tests need it, and it takes a second to import

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_path):
    """The small Llama model."""
    from tools import gguf_model

    return gguf_model.read_model(tiny_path)


@pytest.fixture
def mutate(monkeypatch):
    """Breaks a kernel, to show that its tests can fail."""
    jax.clear_caches()
    yield monkeypatch.setattr
    jax.clear_caches()


@pytest.fixture
def programs(monkeypatch):
    """Steps that stand in for compiled ones, as `stand_in_programs` has them."""
    from batches import stand_in_programs

    return stand_in_programs(monkeypatch)


def pytest_collection_finish() -> None:
    """The collector's walks over JAX and all it has traced take a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what no compiler or device here can run."""
    platform = jax.default_backend()
    missing = _missing_compilers()
    reasons = {
        "tpu": platform != "tpu" and f"needs a TPU, and this is {platform}",
        "gpu": platform != "gpu" and f"needs an NVIDIA GPU, and this is {platform}",
        "aot": missing and f"needs `pip install -e '.[aot]'`: no {' and no '.join(missing)}",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
