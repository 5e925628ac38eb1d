"""A paged KV cache and fused paged attention for JAX, on TPU and NVIDIA GPU."""

from . import interop as interop
from .allocator import BlockAllocator as BlockAllocator
from .allocator import OutOfBlocksError as OutOfBlocksError
from .cache import PackedKVCache as PackedKVCache
from .cache import PagedKVCache as PagedKVCache
from .cache import allocate_blocks as allocate_blocks
from .cache import append_kv as append_kv
from .cache import gather_kv as gather_kv
from .cache import init_paged_kv_cache as init_paged_kv_cache
from .cache import num_blocks_for as num_blocks_for
from .kernels.core.schedule import Schedule as Schedule
from .ops import append_and_attend as append_and_attend
from .ops import append_tokens as append_tokens
from .ops import apply_sinks as apply_sinks
from .ops import make_schedule as make_schedule
from .ops import merge_attention_states as merge_attention_states
from .ops import paged_attention as paged_attention
from .state import advance as advance
from .state import copy_blocks as copy_blocks
from .state import reset_sequences as reset_sequences
from .state import scrub_blocks as scrub_blocks
from .state import set_block_table as set_block_table
from .state import slot_mapping as slot_mapping
from .state import truncate as truncate

__version__ = "0.1.0"
