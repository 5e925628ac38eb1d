"""The program that a case is compiled as, and the runs its schedule is followed through."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged_kv
from benchmarks import cases
from benchmarks.workload import APPEND, ATTEND, FUSED, Case

# Pools as large as a server's: XLA would keep small ones in vector memory.
POOL_BYTES = 1 << 30
IMPLEMENTATION = "mosaic_tpu"
PACKED, LANES = "packed_pools", 128  # a case's tag, and the width of such pools


@dataclass(frozen=True)
class Run:
    """Numbers that a program is followed with, and the work they ask for.

    num_bytes: of keys and values that have to move.
    """

    numbers: Mapping[str, np.ndarray]
    num_bytes: int
    useful_flops: int


@dataclass(frozen=True)
class Program:
    """A function of named arrays.

    arguments: shapes, in the function's order; those that a run gives numbers for, and tensors.
    pools: names of the tensors that hold keys and values.
    run: what the case asks for.
    context: two runs with the same queries whose difference is full tiles, one with less context
      and one with more; None if the case has no such tiles.
    whole: time is that of all kernels from end to end, not that of the hot loop.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, jax.ShapeDtypeStruct]
    pools: tuple[str, ...]
    run: Run
    context: tuple[Run, Run] | None = None
    whole: bool = False
    donated: tuple[str, ...] = ()


def load(target: str, kv_len: int | None = None, implementation: str = IMPLEMENTATION) -> Program:
    """The program of a named case, or what a function returns, `FILE.py:function`."""
    if ":" not in target:
        return of_case(cases.find(target), kv_len, implementation)
    path, _, name = target.partition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def of_case(case: Case, kv_len: int | None = None, implementation: str = IMPLEMENTATION) -> Program:
    """The public ops on a case; with `kv_len`, every sequence has that many tokens."""
    if kv_len is not None:
        case = _with_length(case, kv_len)
    block_bytes = case.block_size * case.token_bytes
    num_blocks = max(case.num_blocks, ceil(POOL_BYTES / block_bytes))
    heads = case.num_kv_heads, case.head_dim
    shape = jax.ShapeDtypeStruct
    pool = shape((num_blocks, case.block_size, *heads), case.dtype)
    if PACKED in case.tags:
        pool = shape((num_blocks, prod(pool.shape[1:]) // LANES, LANES), case.dtype)
    arguments = {
        "key_pool": pool,
        "value_pool": pool,
        "block_table": shape((case.batch, case.max_blocks_per_seq), jnp.int32),
        "seq_lengths": shape((case.batch,), jnp.int32),
    }
    if case.op != APPEND:
        tokens = case.num_tokens, case.num_query_heads, case.head_dim
        arguments["query"] = shape(tokens, case.dtype)
        for name, is_there in (("sinks", case.has_sinks), ("alibi_slopes", case.has_alibi)):
            if is_there:
                arguments[name] = shape((case.num_query_heads,), jnp.float32)
    if case.op != ATTEND:
        for name in ("keys", "values"):
            arguments[name] = shape((case.num_tokens, *heads), case.dtype)
    if case.query_lengths is not None:
        arguments["query_start_loc"] = shape((case.batch + 1,), jnp.int32)
    pools = "key_pool", "value_pool"
    return Program(
        function=_function(case, tuple(arguments), implementation),
        arguments=arguments,
        pools=pools,
        run=_run(case, case),
        context=_context(case) if kv_len is None and case.op != APPEND else None,
        whole=case.op != ATTEND,
        donated=() if case.op == ATTEND else pools,
    )


def _function(case: Case, names: tuple[str, ...], implementation: str) -> Callable[..., Any]:
    """The case's op as a function of arrays in the order of `names`."""

    def run(*arrays: Any) -> Any:
        given = dict(zip(names, arrays, strict=True))
        fields = [given.pop(n) for n in ("key_pool", "value_pool", "block_table", "seq_lengths")]
        if PACKED in case.tags:
            token = case.num_kv_heads, case.head_dim
            cache = paged_kv.PackedKVCache(*fields, token_shape=token)
        else:
            cache = paged_kv.PagedKVCache(*fields)
        options = {**given, "implementation": implementation}
        if case.op == APPEND:
            cache = paged_kv.append_tokens(cache, **options)
            return cache.key_pool, cache.value_pool
        options |= case.options | {"return_residual": True}
        if case.op == FUSED:
            out, cache = paged_kv.append_and_attend(cache=cache, **options)
            return out, cache.key_pool, cache.value_pool
        return paged_kv.paged_attention(cache=cache, **options)

    return run


def _run(case: Case, compiled: Case) -> Run:
    """A run of a case in the program of another that differs in lengths."""
    width = compiled.max_blocks_per_seq
    table = np.full((case.batch, width), -1, np.int32)
    (own,) = case.block_tables()
    table[:, : own.shape[1]] = own
    numbers = {"block_table": table, "seq_lengths": np.asarray(case.seq_lengths, np.int32)}
    if case.query_start_loc is not None:
        numbers["query_start_loc"] = case.query_start_loc
    num_bytes = case.append_bytes if case.op == APPEND else case.kv_bytes
    return Run(numbers, num_bytes, case.useful_flops)


def _with_length(case: Case, kv_len: int) -> Case:
    """The case with every sequence `kv_len` tokens long, and no more queries than tokens."""
    queries = case.query_lengths
    return replace(
        case,
        seq_lengths=(kv_len,) * case.batch,
        query_lengths=queries and tuple(min(count, kv_len) for count in queries),
    )


def _context(case: Case) -> tuple[Run, Run] | None:
    """The same chunk of queries with less context and with more, for a case of chunks."""
    queries = case.query_lengths
    if queries is None or min(queries) < 2 or case.local_window_size or not case.is_causal:
        return None
    if all(length > count for length, count in zip(case.seq_lengths, queries, strict=True)):
        less, more = replace(case, seq_lengths=queries), case
    else:
        half = tuple(count // 2 for count in queries)
        less = replace(case, seq_lengths=half, query_lengths=half)
        more = replace(case, seq_lengths=tuple(2 * n for n in half), query_lengths=half)
    return _run(less, case), _run(more, case)
