"""Peers that live in PyTorch: FlashInfer, and vLLM's unified attention in Triton.

They read the same pools, and are timed by the same clock.  Plans are made outside the time.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from .inputs import Inputs
from .workload import APPEND, ATTEND, Case

Run = Callable[[int], Any]
WORKSPACE_BYTES = 128 * 2**20
SEGMENTS, MAX_SPLIT_BATCH = 16, 128  # of vLLM's split decode


def _missing(*modules: str) -> str | None:
    lacks = [name for name in modules if find_spec(name) is None]
    return f"no {' and no '.join(lacks)} here" if lacks else None


def _not_plain(case: Case) -> str | None:
    if case.dtype not in ("bfloat16", "float16"):
        return "16 bits only"
    if case.has_sinks or case.has_alibi or case.logits_soft_cap or case.local_window_size:
        return "plain attention only"
    return None


def flashinfer_unsupported(case: Case) -> str | None:
    if (reason := _missing("torch", "flashinfer")) is not None:
        return reason
    return _not_plain(case) or (None if case.op in (ATTEND, APPEND) else "not fused")


def vllm_unsupported(case: Case) -> str | None:
    if (reason := _missing("torch", "vllm")) is not None:
        return reason
    return _not_plain(case) or (None if case.op == ATTEND else "attends only")


def _tensor(array: jax.Array | np.ndarray) -> Any:
    """The same memory as a tensor; NumPy arrays are copied to the device."""
    torch: Any = import_module("torch")

    if isinstance(array, np.ndarray):
        return torch.as_tensor(array).cuda()
    return torch.from_dlpack(jax.block_until_ready(array))


def _finished(call: Callable[[], Any]) -> Any:
    torch: Any = import_module("torch")

    result = call()
    torch.cuda.synchronize()
    return result


class _Rows:
    """The used blocks of each sequence, one after the other, as FlashInfer wants them."""

    def __init__(self, case: Case, table: jax.Array):
        used = np.asarray(table)
        counts = (used >= 0).sum(1)
        lengths = np.asarray(case.seq_lengths)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.blocks = used[used >= 0].astype(np.int32)
        self.last = np.where(lengths > 0, (lengths - 1) % case.block_size + 1, 0).astype(np.int32)

    @property
    def tensors(self) -> tuple[Any, Any, Any]:
        return _tensor(self.starts), _tensor(self.blocks), _tensor(self.last)


def make_flashinfer(case: Case, inputs: Inputs) -> Run:
    if case.op == APPEND:
        return _flashinfer_append(case, inputs)
    flashinfer: Any = import_module("flashinfer")
    torch: Any = import_module("torch")

    pools = _tensor(inputs.key_pool), _tensor(inputs.value_pool)
    query, heads = _tensor(inputs.arrays.query), (case.num_query_heads, case.num_kv_heads)
    dtypes = {"q_data_type": query.dtype, "kv_data_type": query.dtype}
    wrappers = []
    for table in inputs.tables:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        rows = _Rows(case, table).tensors
        if case.query_lengths is None:
            # its tensor-core kernel is the faster one but for small groups
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=case.group >= 4
            )
            wrapper.plan(*rows, *heads, case.head_dim, case.block_size, **dtypes)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            starts = _tensor(np.asarray(case.query_start_loc))
            sizes = (*heads, case.head_dim, case.block_size)
            wrapper.plan(starts, *rows, *sizes, causal=case.is_causal, **dtypes)
        wrappers.append(wrapper)
    call = lambda index: wrappers[index % len(wrappers)].run(query, pools)
    return lambda index: _finished(lambda: call(index))


def _flashinfer_append(case: Case, inputs: Inputs) -> Run:
    flashinfer: Any = import_module("flashinfer")

    pools = tuple(_tensor(pool).clone() for pool in (inputs.key_pool, inputs.value_pool))
    new = _tensor(inputs.arrays.keys), _tensor(inputs.arrays.values)
    sequence = np.repeat(np.arange(case.batch), case.queries).astype(np.int32)
    before = np.asarray(case.seq_lengths) - case.queries
    within = np.arange(len(sequence)) - (np.cumsum(case.queries) - case.queries)[sequence]
    places = _tensor(sequence), _tensor((before[sequence] + within).astype(np.int32))
    copies = [_Rows(case, table).tensors for table in inputs.tables]

    def call(index):
        starts, blocks, last = copies[index % len(copies)]
        flashinfer.append_paged_kv_cache(*new, *places, pools, blocks, starts, last, "NHD")

    return lambda index: _finished(lambda: call(index))


def make_vllm(case: Case, inputs: Inputs) -> Run:
    torch: Any = import_module("torch")
    module: Any = import_module("vllm.v1.attention.ops.triton_unified_attention")

    arrays, query = inputs.arrays, _tensor(inputs.arrays.query)
    out = torch.empty_like(query)
    starts = case.query_start_loc
    starts = np.arange(case.batch + 1, dtype=np.int32) if starts is None else np.asarray(starts)
    float32 = {"dtype": torch.float32, "device": "cuda"}
    segments = (MAX_SPLIT_BATCH, case.num_query_heads, SEGMENTS)
    width = 1 << (case.head_dim - 1).bit_length()
    options = {
        "q": query,
        "k": _tensor(inputs.key_pool),
        "v": _tensor(inputs.value_pool),
        "out": out,
        "cu_seqlens_q": _tensor(starts),
        "max_seqlen_q": int(case.queries.max()),
        "seqused_k": _tensor(arrays.seq_lengths),
        "max_seqlen_k": max(case.seq_lengths),
        "softmax_scale": case.head_dim**-0.5,
        "causal": case.is_causal,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "seq_threshold_3D": MAX_SPLIT_BATCH,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty(*segments, width, **float32),
        "softmax_segm_max": torch.empty(*segments, **float32),
        "softmax_segm_expsum": torch.empty(*segments, **float32),
    }
    tables = [_tensor(np.maximum(np.asarray(table), 0)) for table in inputs.tables]

    def call(index):
        module.unified_attention(block_table=tables[index % len(tables)], **options)
        return out

    return lambda index: _finished(lambda: call(index))
