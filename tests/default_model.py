"""The default model, read once for all tests that need a real one."""

import functools
import os

import pytest

from tools import gguf_model


def default_model():
    """The model; where it cannot be fetched, a skip with the reason, and in CI a failure."""
    outcome = _fetch_and_read()
    if not isinstance(outcome, gguf_model.ModelError):
        return outcome
    if os.environ.get("CI"):
        raise outcome
    pytest.skip(f"no default model: {outcome}")


@functools.cache
def _fetch_and_read():
    try:
        return gguf_model.read_model(gguf_model.default_model_path())
    except gguf_model.ModelError as error:
        return error  # kept too: without a network pip takes its time to give up
