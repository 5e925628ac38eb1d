"""Hooks for models written in a framework: `nnx` and `linen` for Flax, `equinox`.

Each is imported by its own name and needs its framework: `pip install 'paged_kv[flax]'` or
`'paged_kv[equinox]'`.  `import paged_kv` needs neither.  `tools/examples/` has a model for each.
"""


def missing(framework: str, extra: str, error: ImportError) -> ImportError:
    """The error of an integration whose framework cannot be imported."""
    return ImportError(f"{framework} cannot be imported ({error}); pip install 'paged_kv[{extra}]'")
