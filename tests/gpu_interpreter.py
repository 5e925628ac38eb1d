"""The Mosaic GPU interpreter at its strictest: finds races, fresh memory is NaN.

Its blind spots, so that passing here is not enough (ahead-of-time compiles and device_check.py see
some of them):
  - a wgmma with its left side in registers, or that starts from an accumulator, does not run at
    all, and no wgmma is known to the race detector: `blocks.matmul` reads the operands plainly
    instead, and those reads are tracked, so that a slot released too early shows
  - CTAs run one after another: a race between CTAs, or a wait for another one, does not show
  - the order of asynchronous wgmmas, TMA writes seen by another CTA, fences beyond `commit_smem`
  - waits for registers (setmaxreg): warpgroups that hold more than a CTA has hang on a device only
  - atomics, semaphores, predicated copies and inline code do not run
  - a TMA copy outside an array fills zeros, as on the device: a wrong block id does not raise
  - barrier phases left unawaited at the end of a kernel: reported by JAX 0.11, not by 0.12
  - two views of one buffer (RefUnion) that warpgroups have parts of each: taken for a race, so
    such a kernel runs with one view here
  - shared memory that does not fit, alignment, bank conflicts, spills, time

Tests that use it need jax >= 0.11.2, and a limit on their time: a barrier that is never completed
is waited for in C++, for ever.
"""

import contextlib
from unittest import mock

import jax
import pytest

from paged_kv.kernels.gpu import unsupported_version

NEEDS_JAX = pytest.mark.skipif(unsupported_version() is not None, reason=f"{unsupported_version()}")
TIME_LIMIT = pytest.mark.timeout(120, method="thread")


def interpreter():
    """Its parameters."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


@contextlib.contextmanager
def no_races():
    """Fails if a kernel run within it had a race; leaves the interpreter fit for the next test."""
    # neither has a public name; from jax 0.12 on a race is an exception
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState

    of_kernels = []

    def remember(*args, **kwargs):  # the next kernel's takes the place of the last one's
        of_kernels.append(GPURaceDetectionState(*args, **kwargs))
        return of_kernels[-1]

    try:
        with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", remember):
            yield
        assert of_kernels, "no kernel ran in the interpreter"
        assert not any(races.races_found for races in of_kernels), "the interpreter found a race"
    except BaseException:
        gpu_callbacks.reset_gpu_interpret_mode_state()
        raise


def run(function, *args):
    """`function(*args)`, finished and without races."""
    with no_races():
        return jax.block_until_ready(function(*args))


def release_early(mutate):
    """Slots of rings are given back before they are read.

    Plain reads stand for wgmma in the interpreter, which does not track the latter.
    """
    from paged_kv.kernels.gpu.blocks import Ring

    await_full, release = Ring.await_full, Ring.release

    def await_and_release(self, step):
        await_full(self, step)
        release(self, step)

    mutate(Ring, "await_full", await_and_release)
    mutate(Ring, "release", lambda self, step: None)
