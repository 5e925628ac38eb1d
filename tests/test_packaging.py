"""What is shipped is what is here: the package list, the wheel, and the guard of kernels/."""

import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 11, 2)


def python(*arguments, interpreter=sys.executable, cwd=ROOT):
    command = [interpreter, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=250)


def test_the_declared_packages_are_the_folders_of_the_tree():
    folders = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            if parts[:1] != ("kernels",):  # an editor's symlink
                folders.add(".".join([package, *parts]))
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)


def test_every_folder_of_code_is_a_package():
    for folder in ("paged_kv", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_a_top_level_import_of_kernels_says_what_to_do():
    run = python("-c", "import kernels")
    assert run.returncode != 0
    assert "this folder is the package `paged_kv.kernels`" in run.stderr
    assert "run `pip install -e .` and import `paged_kv.kernels`" in run.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python of an environment that holds the wheel and, from here, what the wheel depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build in the tree would leave, and find, a folder build/
    for name in ("paged_kv", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--quiet", "--wheel-dir", folder, source]
    run = python("-m", "pip", *build, cwd=folder)
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("paged_kv-*.whl")
    venv.create(folder / "venv", with_pip=False)
    interpreter = folder / "venv" / "bin" / "python"
    target = _site_packages(interpreter)
    unpack = ["install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel]
    run = python("-m", "pip", *unpack, cwd=folder)
    assert run.returncode == 0, run.stderr
    # The path file brings in dependencies only: an editable install works through import hooks,
    # which `site` sets up for the environment's own folder alone.
    (target / "dependencies.pth").write_text(f"{_site_packages(sys.executable)}\n")
    return interpreter


def _site_packages(interpreter):
    run = python(
        "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", interpreter=interpreter
    )
    return Path(run.stdout.strip())


def test_the_wheel_imports_from_another_folder(installed, tmp_path):
    script = """
import importlib, paged_kv, paged_kv.kernels.tpu.attention
from pathlib import Path
folder = Path(paged_kv.__file__).parent
assert (folder / "py.typed").exists()
assert Path(paged_kv.kernels.__file__).parent == folder / "kernels"
print(folder)
"""
    run = python("-c", script, interpreter=installed, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(installed.parent.parent)


@pytest.mark.skipif(not HAS_MOSAIC_GPU, reason="the GPU kernels need jax >= 0.11.2")
def test_the_wheel_imports_the_gpu_kernels(installed, tmp_path):
    run = python("-c", "import paged_kv.kernels.gpu.attention", interpreter=installed, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(HAS_MOSAIC_GPU, reason="this jax has what the GPU kernels need")
def test_the_gpu_kernels_of_the_wheel_ask_for_a_newer_jax(installed, tmp_path):
    run = python("-c", "import paged_kv.kernels.gpu.attention", interpreter=installed, cwd=tmp_path)
    assert run.returncode != 0
    assert "jax >= 0.11.2" in run.stderr.splitlines()[-1]
