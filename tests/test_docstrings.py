"""Every public name says what it takes, gives and raises, in which units, and whose idea it is.

The rules are in `docstrings`, the names in `public_names`.  That Raises names what is raised, and
no more, is seen in test_contract_errors, where everything is raised.
"""

from pathlib import Path
from typing import Any

import docstrings
import jax
import numpy as np
import public_names
import pytest

import paged_kv

ROOT = Path(__file__).parent.parent
OWN: tuple[str, ...] = ()
VLLM = ("vLLM",)
PAGED = ("PagedAttention", "vLLM")
FLASHINFER = ("FlashInfer",)
ATTENTION = (*PAGED, "FlashAttention", "ALiBi", "Gemma 2", "gpt-oss", "StreamingLLM")
SHARDED = ("Megatron", "vLLM")
RPA = ("tpu-inference", "ragged")
JAX_NN = ("jax.nn.dot_product_attention",)
DLPACK = ("DLPack",)

# Whose idea each name is: words that its Source has.  A name in place of words: that name's idea,
# which says it there.  OWN: nobody else's, and no Source.
SOURCES: dict[str, tuple[str, ...] | str] = {
    "AllocatorStats": VLLM,
    "BlockAllocator": ("vLLM", "RadixAttention"),
    "BlockRemoved": VLLM,
    "BlockStored": VLLM,
    "DeviceAllocator": ("Levanter", "jax-llm-examples"),
    "HostBlocks": VLLM,
    "OutOfBlocksError": OWN,
    "PackedKVCache": OWN,
    "PagedKVCache": (*PAGED, "FlashInfer"),
    "PendingBlocks": "copy_blocks",
    "Schedule": FLASHINFER,
    "advance": OWN,
    "allocate_blocks": "PagedKVCache",
    "append_and_attend": ("tpu-inference",),
    "append_and_attend_rows": "append_and_attend",
    "append_kv": "PagedKVCache",
    "append_rows": "append_tokens",
    "append_tokens": VLLM,
    "apply_pending": VLLM,
    "apply_sinks": ("gpt-oss", "StreamingLLM"),
    "cache_partition_specs": SHARDED,
    "copy_blocks": VLLM,
    "defragment": OWN,
    "device_allocate": ("Levanter", "jax-llm-examples"),
    "device_free": "DeviceAllocator",
    "gather_kv": "PagedKVCache",
    "init_device_allocator": "DeviceAllocator",
    "init_paged_kv_cache": "PagedKVCache",
    "init_sharded_cache": SHARDED,
    "make_schedule": FLASHINFER,
    "merge_attention_states": ("FlashInfer", "FlashAttention"),
    "move_blocks": OWN,
    "num_blocks_for": OWN,
    "pad_to_bucket": VLLM,
    "paged_attention": ATTENTION,
    "paged_dot_product_attention": JAX_NN,
    "reset_sequences": OWN,
    "row_positions": OWN,
    "row_starts": OWN,
    "scrub_blocks": OWN,
    "set_block_table": "PagedKVCache",
    "sharded_append_and_attend": "sharded_paged_attention",
    "sharded_append_tokens": "cache_partition_specs",
    "sharded_paged_attention": ("Ring Attention", "Helix"),
    "slot_mapping": VLLM,
    "swap_in": VLLM,
    "swap_out": VLLM,
    "truncate": OWN,
    "interop.CsrTable": FLASHINFER,
    "interop.RpaArguments": RPA,
    "interop.from_csr": "interop.to_csr",
    "interop.from_dense": OWN,
    "interop.from_dlpack": DLPACK,
    "interop.from_layout": "interop.to_layout",
    "interop.from_rpa": "interop.to_rpa",
    "interop.pack": OWN,
    "interop.read_slots": "interop.write_slots",
    "interop.to_csr": FLASHINFER,
    "interop.to_dense": OWN,
    "interop.to_dlpack": DLPACK,
    "interop.to_layout": ("FlashInfer", "vLLM", "tpu-inference"),
    "interop.to_rpa": RPA,
    "interop.unpack": OWN,
    "interop.write_slots": VLLM,
    "CacheViews": DLPACK,
    "nnx.PagedAttention": OWN,
    "nnx.PagedCache": OWN,
    "nnx.attach": OWN,
    "linen.PagedCache": OWN,
    "linen.Step": OWN,
    "equinox.attend": OWN,
    "equinox.multihead_attention": OWN,
    "equinox.sequence_axes": OWN,
}
KNOWN = public_names.known()


def problems(subject, known=KNOWN):
    """What every docstring must have."""
    for rule in (docstrings.summary, docstrings.parameters, docstrings.results):
        yield from rule(subject)
    yield from docstrings.shapes(subject, known)
    yield from docstrings.units(subject, known)
    yield from docstrings.conditions(subject)


@pytest.mark.parametrize("name", public_names.named())
def test_a_public_name_has_a_complete_docstring(name):
    assert not list(problems(public_names.named()[name].subject))


def is_of_a_class(name):
    return name.rpartition(".")[0] in public_names.named()


def test_every_public_name_says_whose_idea_it_is():
    names = {name for name in public_names.named() if not is_of_a_class(name)}
    is_here = lambda name: public_names.INTEGRATIONS.get(name) not in public_names.MISSING
    assert names == {name for name in SOURCES if is_here(name.partition(".")[0])}
    for name in names:
        owed = SOURCES[name]
        while isinstance(owed, str):
            name, owed = owed, SOURCES[owed]
        assert not list(docstrings.source(public_names.named()[name].subject, owed)), name


def test_constants_are_explained_where_they_are_used():
    constants = [name for name, value in public_names.objects().items() if not callable(value)]
    assert constants == ["interop.LAYOUTS"]
    for name in constants:
        of = f"`{name.rpartition('.')[2]}`"
        assert any(of in each.subject.text for each in public_names.named().values())


@pytest.mark.parametrize("folder", ["paged_kv", "kernels", "benchmarks", "tools", "tests"])
def test_every_file_says_its_idea_in_one_line(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        text = docstrings.module_docstring(file.read_text("utf-8"))
        assert not list(docstrings.summary(docstrings.Subject(str(file), text))), file


def test_names_are_found_on_every_floor():
    names = public_names.named()
    for name in (
        "paged_attention",
        "BlockAllocator.extend",
        "BlockAllocator.commit",
        "interop.pack",
    ):
        assert name in names
    assert {"PendingBlocks", "AllocatorStats", "PagedKVCache.num_layers"} <= names.keys()
    assert "BlockAllocator._get" not in names and "interop" not in names


# ---- each rule can fail --------------------------------------------------------------------------


def complete(
    cache: paged_kv.PagedKVCache,
    keys: np.ndarray,
    /,
    count: int,
    *,
    scale: float = 1.0,
    **rest: Any,
) -> tuple[np.ndarray, int]:
    """Does something to keys.

    Args:
      cache: of one layer.
      keys: (num_tokens, head_dim), new ones.
      count: tokens.
      scale: factor of keys.
      **rest: as in `paged_attention`.

    Returns:
      (num_tokens, head_dim), and how many tokens.

    Raises:
      ValueError: the keys are none.

    Source: vLLM.
    """
    raise NotImplementedError


def changed(old, new):
    """The complete docstring with a piece changed, which must be there."""
    subject = docstrings.of_call("complete", complete)
    assert subject.text.count(old) == 1
    return docstrings.Subject(
        "complete", subject.text.replace(old, new), subject.parameters, subject.returns
    )


def test_a_complete_docstring_has_no_problem():
    subject = docstrings.of_call("complete", complete)
    assert not list(problems(subject))
    assert not list(docstrings.raises(subject, {"ValueError"}))
    assert not list(docstrings.source(subject, VLLM))


BAD = {
    "no full stop": ("to keys.\n", "to keys\n", "full stop"),
    "two lines": ("to keys.\n", "to\nkeys.\n", "one line"),
    "a parameter": ("  count: tokens.\n", "", "no entry for count"),
    "a keyword": ("  scale: factor of keys.\n", "", "no entry for scale"),
    "keywords": ("  **rest: as in `paged_attention`.\n", "", "no entry for rest"),
    "no such parameter": ("  count: t", "  number: t", "number is no parameter"),
    "shape taken": ("(num_tokens, head_dim), new", "new", "no shape of keys"),
    "shape of a stranger": (
        "(num_tokens, head_dim), new ones",
        "as in `gather`",
        "no shape of keys",
    ),
    "shape of one without": ("(num_tokens, head_dim), new ones", "as in `advance`", "of keys"),
    "shape given": ("(num_tokens, head_dim), and", "Keys, and", "no shape of the result"),
    "unit taken": ("count: tokens", "count: how many", "no unit of count"),
    "unit of a keyword": ("scale: factor of keys", "scale: a number", "no unit of scale"),
    "results": ("Returns:\n  (num_tokens, head_dim), and how many tokens.\n\n", "", "no Returns"),
    "condition": ("ValueError: the keys are none.", "ValueError:", "no condition of ValueError"),
}


@pytest.mark.parametrize(("old", "new", "problem"), BAD.values(), ids=BAD)
def test_a_rule_finds(old, new, problem):
    found = list(problems(changed(old, new)))
    assert any(problem in each for each in found)


def test_a_number_that_is_returned_needs_a_unit():
    def size() -> int:
        """How big it is."""
        return 0

    def any_array() -> jax.Array:
        """What is there, in tokens."""
        return jax.numpy.zeros(0)

    assert list(problems(docstrings.of_call("size", size))) == ["no unit of the result"]
    assert "no shape of the result" in list(problems(docstrings.of_call("any", any_array)))


def test_raises_names_what_is_raised_and_no_more():
    subject = docstrings.of_call("complete", complete)
    assert list(docstrings.raises(subject, {"ValueError", "OSError"})) == [
        "raises OSError and does not say so"
    ]
    (problem,) = docstrings.raises(subject, set())
    assert "says that it raises ValueError" in problem


def test_a_source_is_named_where_it_is_owed_and_only_there():
    subject = docstrings.of_call("complete", complete)
    assert list(docstrings.source(subject, ("FlashInfer",)))
    assert list(docstrings.source(changed("Source: vLLM.", ""), VLLM))
    assert list(docstrings.source(subject, OWN))


def test_no_docstring_is_no_summary():
    assert list(docstrings.summary(docstrings.Subject("empty", "")))
    assert docstrings.module_docstring('import this\n\n"""Not it."""\n') == ""
    assert docstrings.module_docstring('"""It.\n\nMore.\n"""\n\nimport this\n') == "It.\n\nMore.\n"
