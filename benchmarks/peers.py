"""What a case is set beside: other implementations, where they are importable and take the case."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import cudnn, torch_peers
from .inputs import Inputs
from .runner import BASELINE, Program, Runner
from .workload import Case


class Peer(NamedTuple):
    """Another implementation.

    unsupported: why it does not take a case, or None.
    make: `run(i)` for a case and its inputs, one call on copy i; it returns `out`, if anything.
    """

    name: str
    unsupported: Callable[[Case], str | None]
    make: Callable[[Case, Inputs], Callable[[int], Any]]


def _make_xla(case: Case, inputs: Inputs) -> Callable[[int], Any]:
    return Runner(Program(case, BASELINE), inputs).run


XLA = Peer("xla", lambda case: None, _make_xla)
CUDNN_PAGED = Peer("cudnn_paged", cudnn.paged_unsupported, cudnn.make_paged)
CUDNN_DENSE = Peer("cudnn_dense", cudnn.dense_unsupported, cudnn.make_dense)
FLASHINFER = Peer("flashinfer", torch_peers.flashinfer_unsupported, torch_peers.make_flashinfer)
VLLM = Peer("vllm_triton", torch_peers.vllm_unsupported, torch_peers.make_vllm)
PEERS = (XLA, CUDNN_PAGED, CUDNN_DENSE, FLASHINFER, VLLM)


def of_case(case: Case) -> list[Peer]:
    """The peers that take a case here."""
    return [peer for peer in PEERS if peer.unsupported(case) is None]
