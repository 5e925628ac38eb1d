"""A paged KV cache and fused paged attention for JAX, on TPU and NVIDIA GPU."""

from . import interop as interop
from .allocator import BlockAllocator as BlockAllocator
from .cache import PackedKVCache as PackedKVCache
from .cache import PagedKVCache as PagedKVCache
from .cache import allocate_blocks as allocate_blocks
from .cache import append_kv as append_kv
from .cache import gather_kv as gather_kv
from .cache import init_paged_kv_cache as init_paged_kv_cache
from .cache import num_blocks_for as num_blocks_for
from .device_allocator import DeviceAllocator as DeviceAllocator
from .device_allocator import device_allocate as device_allocate
from .device_allocator import device_free as device_free
from .device_allocator import init_device_allocator as init_device_allocator
from .kernels.core.schedule import Schedule as Schedule
from .moving import HostBlocks as HostBlocks
from .moving import apply_pending as apply_pending
from .moving import defragment as defragment
from .moving import move_blocks as move_blocks
from .moving import swap_in as swap_in
from .moving import swap_out as swap_out
from .ops import append_and_attend as append_and_attend
from .ops import append_tokens as append_tokens
from .ops import apply_sinks as apply_sinks
from .ops import make_schedule as make_schedule
from .ops import merge_attention_states as merge_attention_states
from .ops import paged_attention as paged_attention
from .padding import pad_to_bucket as pad_to_bucket
from .rows import append_and_attend_rows as append_and_attend_rows
from .rows import append_rows as append_rows
from .rows import paged_dot_product_attention as paged_dot_product_attention
from .rows import row_positions as row_positions
from .rows import row_starts as row_starts
from .sequences import OutOfBlocksError as OutOfBlocksError
from .state import advance as advance
from .state import copy_blocks as copy_blocks
from .state import reset_sequences as reset_sequences
from .state import scrub_blocks as scrub_blocks
from .state import set_block_table as set_block_table
from .state import slot_mapping as slot_mapping
from .state import truncate as truncate

__version__ = "0.1.0"
