"""Pallas's TPU interpreter at its strictest: finds races, fresh memory is NaN, in two modes."""

import contextlib

import pytest
from jax.experimental.pallas import tpu as pltpu

# "on_wait" performs a copy when it is waited for, so that a missing wait shows as NaN; "eager"
# performs it at once, so that a buffer that is still being read shows as a race.
MODES = ("on_wait", "eager")
INTERPRETERS = {
    mode: pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan"
    )
    for mode in MODES
}


@contextlib.contextmanager
def no_races():
    """Fails if the last kernel run within it had a race; newer JAX raises by itself."""
    yield
    # there is no public name for it before jax 0.12, where a race is an exception
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    assert races is not None, "no kernel was interpreted with race detection"
    assert not races.races_found, "the interpreter found a race"


@contextlib.contextmanager
def copied_bytes():
    """The sizes of the copies that kernels start within it, as a list that fills up."""
    # there is no public way to see copies
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    sizes, read = [], interpreter.DMA.execute_read

    def counted(copy):
        read(copy)
        sizes.append(copy.data.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.DMA, "execute_read", counted)
        yield sizes
