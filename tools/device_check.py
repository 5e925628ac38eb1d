"""Checks and times all kernels on an NVIDIA GPU: `python tools/device_check.py --out DIR`.

Runs from a plain checkout, with nothing installed but JAX and what it needs.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def import_paged_kv() -> None:
    """Imports the package of this checkout, with the folder kernels/ as `paged_kv.kernels`."""
    sys.path.insert(0, ROOT)
    spec = importlib.util.find_spec("paged_kv")
    assert spec is not None and spec.loader is not None
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(ROOT)
    package = importlib.util.module_from_spec(spec)
    sys.modules["paged_kv"] = package
    spec.loader.exec_module(package)


def main() -> int:
    # peers in PyTorch and the sanitizer's process need memory too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import_paged_kv()
    from tools.device.check import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
