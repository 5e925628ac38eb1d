"""The default model, read once for all tests that need a real one."""

import functools
import os

import pytest

from tools import gguf_model


@functools.cache
def default_model():
    """The model; where it cannot be fetched, a skip with the reason, and in CI a failure."""
    try:
        return gguf_model.read_model(gguf_model.default_model_path())
    except gguf_model.ModelError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no default model: {error}")
