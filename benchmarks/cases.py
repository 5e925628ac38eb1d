"""The one table of named cases that tests, benchmarks and tools share.

Names say model, batch and context: `8b` has 32/8 heads, `70b` 64/8, `70btp8` the 8/1 of one of
eight chips.  Letters are the short names of the peers' table.  A case with `_block64` in its name
differs from the one without in the block size alone.
"""

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches

import numpy as np

from .workload import APPEND, FUSED, Case

K = 1024


def lognormal_lengths(
    batch: int, *, mean: int, low: int, high: int, seed: int = 0
) -> tuple[int, ...]:
    """Lengths as a server sees them: many short, few long."""
    draw = np.random.default_rng(seed).lognormal(0.0, 1.0, batch)
    return tuple(np.clip((draw / draw.mean() * mean).astype(int), low, high).tolist())


def _decode(name: str, batch: int, heads: tuple[int, int], length: int, **fields) -> Case:
    about = f"decode, {batch} x {length} tokens"
    fields = {"about": about, "tags": ("decode",), "seq_lengths": (length,) * batch} | fields
    return Case(name=name, num_query_heads=heads[0], num_kv_heads=heads[1], **fields)


def _prefill(
    name: str, batch: int, heads: tuple[int, int], new: int, context: int = 0, **fields
) -> Case:
    kind = "chunked prefill" if context else "prefill"
    about = f"{kind}, {batch} x {new} tokens" + (f" after {context}" if context else "")
    return Case(
        name=name,
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        seq_lengths=(context + new,) * batch,
        query_lengths=(new,) * batch,
        **{"about": about, "tags": ("prefill", *(("chunked",) if context else ()))} | fields,
    )


def _append(name: str, batch: int, new: int, context: int) -> Case:
    return Case(
        name=name,
        about=f"append of {batch * new} tokens",
        seq_lengths=(context + new,) * batch,
        query_lengths=None if new == 1 else (new,) * batch,
        op=APPEND,
        tags=("append",),
    )


def _with_blocks(cases: Iterable[Case], *block_sizes: int) -> list[Case]:
    return [
        replace(case, name=f"{case.name}_block{size}", block_size=size, letter="")
        for case in cases
        for size in block_sizes
    ]


DECODE = [
    _decode("8b_b64_4k", 64, (32, 8), 4 * K, letter="A"),
    _decode("8b_b1_128k", 1, (32, 8), 128 * K, letter="B"),
    _decode("8b_b8_16k", 8, (32, 8), 16 * K, letter="C"),
    _decode("70btp8_b64_8k", 64, (8, 1), 8 * K, letter="D"),
    _decode(
        "8b_ragged128",
        128,
        (32, 8),
        0,
        letter="E",
        about="decode, 128 sequences, lognormal lengths, mean 2.4k",
        seq_lengths=lognormal_lengths(128, mean=2400, low=16, high=16 * K),
    ),
    _decode("8b_b16_1k", 16, (32, 8), K, letter="F"),
    _decode("mha_b16_4k", 16, (32, 32), 4 * K, letter="G"),
    _decode("8b_b256_512", 256, (32, 8), 512, letter="H"),
    _decode("8b_b1_1k", 1, (32, 8), K, letter="I"),
    _decode("8b_b1_4k", 1, (32, 8), 4 * K, letter="J"),
    _decode("8b_b1_256k", 1, (32, 8), 256 * K),
    _decode("8b_b1_512", 1, (32, 8), 512),
    _decode("8b_b64_512", 64, (32, 8), 512),
    _decode("8b_b64_128", 64, (32, 8), 128),
    _decode("70b_b64_4k", 64, (64, 8), 4 * K),
    _decode("70btp4_b64_4k", 64, (16, 2), 4 * K),
    _decode("mha8_b64_4k", 64, (8, 8), 4 * K),
    _decode("70btp8_b64_8k_runs4", 64, (8, 1), 8 * K, adjacent_blocks=4),
    _decode(
        "8b_b256_1m",
        256,
        (32, 8),
        K * K,
        about="decode, 256 x 1M tokens over a small shared pool: for compilers only",
        pool_blocks=4 * K,
        tags=("compile_only",),
    ),
]
# head_dim other than 128, and the variants of models that have them
MODELS = [
    _decode("smollm_b8_1k", 8, (9, 3), K, head_dim=64),
    _decode(
        "gptoss_b64_4k",
        64,
        (64, 8),
        4 * K,
        head_dim=64,
        has_sinks=True,
        about="decode, 64 x 4096 tokens, attention sinks",
    ),
    _decode(
        "gptoss_b64_4k_window",
        64,
        (64, 8),
        4 * K,
        head_dim=64,
        has_sinks=True,
        local_window_size=(127, 0),
        about="decode, 64 x 4096 tokens, attention sinks, window of 128",
    ),
    _decode(
        "gptoss_b64_4k_packed",
        64,
        (64, 8),
        4 * K,
        head_dim=64,
        has_sinks=True,
        about="decode, 64 x 4096 tokens, in packed pools: for compilers only",
        tags=("compile_only", "packed_pools"),
    ),
    _decode("phi2_b16_2k", 16, (32, 32), 2 * K, head_dim=80),
    _decode("phi3_b16_4k", 16, (32, 32), 4 * K, head_dim=96),
    _decode("hd192_b16_4k", 16, (32, 8), 4 * K, head_dim=192),
    _decode(
        "gemma2_b16_4k",
        16,
        (16, 8),
        4 * K,
        head_dim=256,
        logits_soft_cap=50.0,
        about="decode, 16 x 4096 tokens, soft cap",
    ),
    _decode(
        "bloom_b16_2k",
        16,
        (32, 32),
        2 * K,
        has_alibi=True,
        about="decode, 16 x 2048 tokens, ALiBi",
    ),
]
PREFILL = [
    _prefill("8b_prefill_4x4k", 4, (32, 8), 4 * K),
    _prefill("8b_prefill_1x16k", 1, (32, 8), 16 * K),
    _prefill("8b_prefill_1x4k", 1, (32, 8), 4 * K),
    _prefill("70btp8_prefill_1x4k", 1, (8, 1), 4 * K),
    _prefill("8b_chunk_4x2k_at_8k", 4, (32, 8), 2 * K, context=8 * K),
    _prefill("8b_chunk_4x1k", 4, (32, 8), K),
    _prefill("hd64_prefill_4x4k", 4, (32, 8), 4 * K, head_dim=64),
    _prefill("hd256_prefill_4x4k", 4, (16, 8), 4 * K, head_dim=256),
    _prefill(
        "8b_prefill_1x16k_window",
        1,
        (32, 8),
        16 * K,
        local_window_size=(4 * K - 1, 0),
        about="prefill, 1 x 16384 tokens, window of 4096",
    ),
    _prefill("8b_speculate_64x4_at_4k", 64, (32, 8), 4, context=4 * K, tags=("speculative",)),
]
MIXED = [
    Case(
        name="8b_mixed_60x4k_4x1k",
        about="60 decode rows at 4096 tokens beside 4 prefill chunks of 1024",
        seq_lengths=(4 * K,) * 60 + (K,) * 4,
        query_lengths=(1,) * 60 + (K,) * 4,
        tags=("mixed",),
    ),
    _decode("8b_b60_4k", 60, (32, 8), 4 * K, about="the decode rows of the mixed batch"),
]
WRITES = [
    _append("append_64", 64, 1, 4 * K - 1),
    _append("append_8k", 4, 2 * K, 0),
    _append("append_32k", 8, 4 * K, 0),
    _decode("8b_b64_4k_fused", 64, (32, 8), 4 * K, op=FUSED, tags=("fused",)),
    _prefill("8b_prefill_1x4k_fused", 1, (32, 8), 4 * K, op=FUSED, tags=("fused",)),
]


def _ci(name: str, about: str, heads: tuple[int, int], lengths: tuple[int, ...], **fields) -> Case:
    """Small enough for an interpreter: a few hundred tokens, lengths at the edges of blocks."""
    fields = {"head_dim": 64, "dtype": "float32"} | fields
    kind = ("packed",) if "query_lengths" in fields else ("decode",)
    return Case(
        name=f"ci_{name}",
        about=about,
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        seq_lengths=lengths,
        tags=("ci", *kind),
        **fields,
    )


RAGGED = (0, 1, 15, 16, 17, 150)
CHUNKS = (0, 1, 15, 7, 17, 40)
CI = [
    _ci("mha", "decode, group 1", (4, 4), RAGGED),
    _ci("mqa", "decode, one kv head", (8, 1), RAGGED, head_dim=128),
    _ci("gqa3", "decode, group 3", (9, 3), RAGGED),
    _ci("gqa5", "decode, group 5, head_dim 80", (10, 2), RAGGED, head_dim=80),
    _ci("gqa7", "decode, group 7, head_dim 96", (7, 1), RAGGED, head_dim=96),
    _ci("hd128", "decode, bfloat16", (8, 2), RAGGED, head_dim=128, dtype="bfloat16"),
    _ci("hd192", "decode, float16", (4, 2), RAGGED, head_dim=192, dtype="float16"),
    _ci("hd256", "decode, bfloat16", (4, 2), RAGGED, head_dim=256, dtype="bfloat16"),
    _ci("block32", "decode, blocks of 32", (4, 2), (0, 1, 31, 32, 33, 150), block_size=32),
    _ci("block128", "decode, blocks of 128", (4, 2), (0, 1, 127, 128, 129), block_size=128),
    _ci("runs", "decode, blocks in runs of 4", (4, 2), RAGGED, adjacent_blocks=4),
    _ci("window", "decode, window", (4, 2), RAGGED, local_window_size=(20, 0)),
    _ci("soft_cap", "decode, soft cap", (4, 2), RAGGED, logits_soft_cap=5.0),
    _ci("sinks", "decode, sinks", (4, 2), RAGGED, has_sinks=True),
    _ci("alibi", "decode, ALiBi", (4, 2), RAGGED, has_alibi=True),
    _ci("prefill", "prefill", (4, 2), CHUNKS, query_lengths=CHUNKS, head_dim=128, dtype="bfloat16"),
    _ci("chunked", "chunked prefill", (4, 2), RAGGED, query_lengths=CHUNKS),
    _ci("full", "packed, not causal", (4, 2), RAGGED, query_lengths=CHUNKS, is_causal=False),
    _ci(
        "mixed",
        "decode rows beside chunks, everything at once",
        (6, 2),
        RAGGED,
        query_lengths=(0, 1, 1, 1, 17, 40),
        local_window_size=(40, 0),
        logits_soft_cap=5.0,
        has_sinks=True,
        has_alibi=True,
    ),
    _ci("append", "append, one token each", (4, 2), RAGGED, op=APPEND),
    _ci("append_packed", "append, ragged", (4, 2), RAGGED, query_lengths=CHUNKS, op=APPEND),
    _ci("fused", "append and attend", (4, 2), RAGGED, query_lengths=CHUNKS, op=FUSED),
]

CASES: dict[str, Case] = {
    case.name: case
    for case in [
        *DECODE,
        *_with_blocks((c for c in DECODE if c.letter in ("A", "D")), 64, 128),
        *_with_blocks((c for c in DECODE if c.name == "8b_b1_512"), 128),
        *MODELS,
        *PREFILL,
        *_with_blocks(
            (c for c in PREFILL if c.name.endswith(("prefill_4x4k", "8b_prefill_1x16k"))), 128
        ),
        *MIXED,
        *WRITES,
        *_with_blocks((c for c in WRITES if c.name == "8b_b64_4k_fused"), 128),
        *CI,
    ]
}
_LETTERS = {case.letter: case.name for case in CASES.values() if case.letter}


def find(name: str) -> Case:
    """The case of this name or letter; a KeyError names the nearest ones."""
    name = _LETTERS.get(name, name)
    if name not in CASES:
        near = get_close_matches(name, CASES)
        raise KeyError(f"no case {name!r}" + (f", perhaps {' or '.join(near)}" if near else ""))
    return CASES[name]


def tagged(*tags: str) -> list[Case]:
    """The cases that carry every one of these tags, in the table's order."""
    return [case for case in CASES.values() if set(tags) <= set(case.tags)]
