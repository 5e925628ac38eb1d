"""Writes small Llama models as GGUF files: random weights, a vocabulary of bytes and a few words.

The matrices are random but not alike in size: the head is large, so that the likeliest token is
likelier than the next by far more than rounding in bfloat16 can change.
"""

import gguf
import numpy as np
from tokenizers import pre_tokenizers

EMBED, FFN, LAYERS = 128, 192, 2
QUERY_HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
CONTEXT = 96
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, CONTROL = 1, 3


def write_tiny_gguf(
    path, *, fields=None, without=(), tensors=None, kind=None, architecture="llama"
):
    """Writes a model to `path` and returns its matrices as float32, by GGUF's names.

    `fields` adds or replaces metadata (GGUF's key: value), `without` leaves keys or tensors out,
    `tensors` adds or replaces some, and `kind` quantises the matrices (a GGMLQuantizationType).
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(), **(fields or {})}.items():
        if key not in without:
            _add(writer, key, value)
    arrays = {**random_tensors(), **(tensors or {})}
    for name in without:
        arrays.pop(name, None)
    kept = {}
    for name, array in arrays.items():
        if kind is None or array.ndim == 1:
            writer.add_tensor(name, array)
            kept[name] = array
        else:
            quantised = gguf.quantize(array, kind)
            writer.add_tensor(name, quantised, raw_dtype=kind)
            kept[name] = gguf.dequantize(quantised, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def random_tensors(seed=0):
    """Weights by GGUF's names; matrices (out, in), so that activations stay about normal."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, gain=1.0):
        return (gain * rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    def norm():
        return rng.uniform(0.5, 1.5, EMBED).astype(np.float32)

    tensors = {"token_embd.weight": matrix(len(pieces()), EMBED, EMBED**0.5)}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            f"blk.{layer}.attn_q.weight": matrix(QUERY_HEADS * HEAD_DIM, EMBED, 1.5),
            f"blk.{layer}.attn_k.weight": matrix(KV_HEADS * HEAD_DIM, EMBED, 1.5),
            f"blk.{layer}.attn_v.weight": matrix(KV_HEADS * HEAD_DIM, EMBED, 2.0),
            f"blk.{layer}.attn_output.weight": matrix(EMBED, QUERY_HEADS * HEAD_DIM, 2.0),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.ffn_gate.weight": matrix(FFN, EMBED),
            f"blk.{layer}.ffn_up.weight": matrix(FFN, EMBED),
            f"blk.{layer}.ffn_down.weight": matrix(EMBED, FFN),
        }
    return tensors | {
        "output_norm.weight": norm(),
        "output.weight": matrix(len(pieces()), EMBED, 4.0),
    }


def pieces():
    """The vocabulary: control tokens, every byte as GPT-2 writes it, and three words."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return [*control, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell"]


def _metadata():
    types = [CONTROL if piece.startswith("<|") else NORMAL for piece in pieces()]
    return {
        "general.name": "Tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": EMBED,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": QUERY_HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces(),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer, key, value):
    """Adds a field with the type that files of this kind give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
