"""Data flows one way: who may import whom, how large a piece may be, what an import may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("paged_kv", "kernels", "benchmarks", "tools", "tests")
PACKAGE = ("paged_kv", "kernels")
# The public attention ops take what attention has; a kernel's body takes its refs.
MANY_PARAMETERS = {"paged_attention", "append_and_attend"}
MANY_PARAMETERS |= {"sharded_paged_attention", "sharded_append_and_attend"}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 80, 12


def files(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if (ROOT / "paged_kv" / "kernels") not in path.parents  # an editor's symlink
    )


def module(path: Path) -> str:
    """The name a file is imported by: kernels/ is paged_kv.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("paged_kv", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in files("paged_kv", "kernels", "benchmarks", "tools")}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Absolute names that a file imports, an imported submodule by its own name."""
    name = module(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _statements(parse(path)) if at_import_time else ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            names = {f"{base}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= names if base in ("jax", "jax.experimental") else submodules
            if len(submodules) < len(names):
                found.add(base)
    return found


def _statements(tree: ast.AST):
    """Every statement that runs at import: bodies of functions and TYPE_CHECKING left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(*PACKAGE), ids=ids)
def test_no_import_runs_back_up(path):
    name = module(path)
    forbidden = ["benchmarks", "tools", "tests"]
    if under(name, "paged_kv.kernels"):
        forbidden += sorted(other for other in MODULES if not under(other, "paged_kv.kernels"))
    if under(name, "paged_kv.kernels.core"):
        forbidden += ["paged_kv.kernels.tpu", "paged_kv.kernels.gpu"]
    if under(name, "paged_kv.kernels.tpu"):
        forbidden += ["paged_kv.kernels.gpu"]
    if under(name, "paged_kv.kernels.gpu"):
        forbidden += ["paged_kv.kernels.tpu"]
    # `paged_kv` is above the kernels, yet the prefix of their own name
    wrong = {
        used
        for used in imports(path)
        if any(used == bad or (bad != "paged_kv" and under(used, bad)) for bad in forbidden)
    }
    assert not wrong, f"{name} imports {wrong}, which stands above or beside it"


def test_the_reference_shares_no_code_with_the_kernels():
    """An oracle that shares code with a kernel shares its bugs, through helpers too."""
    reached, todo = set(), ["paged_kv.reference"]
    while todo:
        name = todo.pop()
        if name in MODULES and name not in reached:
            reached.add(name)
            todo += imports(MODULES[name])
    assert "paged_kv.reference" in reached
    shared = {name for name in reached if under(name, "paged_kv.kernels")}
    assert not shared, f"the reference reaches {shared}"


def test_imports_have_no_circle():
    graph = {
        name: (imports(path, at_import_time=True) & MODULES.keys()) - {name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for used in graph[name]:
                visit(used, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", files(*PACKAGE), ids=ids)
def test_the_package_uses_public_jax_only(path):
    assert "jax._src" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", files("kernels/core"), ids=ids)
def test_core_imports_no_pallas(path):
    assert not {name for name in imports(path) if "pallas" in name}


@pytest.mark.parametrize("path", files(*FOLDERS), ids=ids)
def test_pieces_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{lines} lines, at most {MAX_FILE}: split it along its ideas"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[min(1, len(node.body) - 1)] if ast.get_docstring(node) else node.body[0]
        length = (node.end_lineno or 0) - first.lineno + 1
        assert length <= MAX_FUNCTION, (
            f"{node.name} has {length} lines of body, at most {MAX_FUNCTION}"
        )
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        plain = [a.arg for a in arguments if not a.arg.endswith(("_ref", "_refs"))]
        if node.name not in MANY_PARAMETERS:
            assert len(plain) <= MAX_PARAMETERS, f"{node.name} has {len(plain)} parameters"


COST = """
import sys, time
import jax, jax.export
before = set(sys.modules)
begin = time.process_time()
import paged_kv
print(time.process_time() - begin)
added = sorted(name for name in set(sys.modules) - before if "pallas" in name or "mosaic" in name)
assert not added, added
"""


def test_importing_the_package_costs_little_and_touches_no_device():
    # without a platform of that name, whatever asks for a device fails
    run = subprocess.run(
        [sys.executable, "-c", COST],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 0.5, "seconds of processor time beyond JAX's own"
