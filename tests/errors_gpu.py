"""Errors of the GPU kernels' folder: see errors_api."""

import importlib.util
import pathlib
from unittest import mock

from errors_api import Row

from paged_kv.kernels import gpu


def import_blocks_of_an_old_jax():
    """A second copy of the module, imported as by a JAX that is too old."""
    path = pathlib.Path(gpu.__file__).parent / "blocks.py"
    spec = importlib.util.spec_from_file_location(f"{gpu.__name__}.blocks_again", path)
    assert spec is not None and spec.loader is not None
    with mock.patch.object(gpu, "NEEDS_JAX", (99, 0, 0)):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


ROWS = [
    Row(
        "gpu kernels on an old jax",
        import_blocks_of_an_old_jax,
        "the GPU kernels need jax >= 99.0.0 .* upgrade it, or use implementation",
        ImportError,
    ),
]
