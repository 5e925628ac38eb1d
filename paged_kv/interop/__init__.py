"""Caches from one form of storage to another and back; the values are the same, bit by bit.

Pools and arguments of other engines (FlashInfer, vLLM, RPA), dense arrays, and DLPack views.
"""

from .dense import from_dense as from_dense
from .dense import from_dlpack as from_dlpack
from .dense import to_dense as to_dense
from .dense import to_dlpack as to_dlpack
from .packing import pack as pack
from .packing import unpack as unpack
from .pools import LAYOUTS as LAYOUTS
from .pools import from_layout as from_layout
from .pools import to_layout as to_layout
from .rpa import RpaArguments as RpaArguments
from .rpa import from_rpa as from_rpa
from .rpa import to_rpa as to_rpa
from .tables import CsrTable as CsrTable
from .tables import from_csr as from_csr
from .tables import read_slots as read_slots
from .tables import to_csr as to_csr
from .tables import write_slots as write_slots
