"""The Llama decoder by its definition, in NumPy, with a dense cache: a list of keys per layer.

Shares no code with tools/llama.py or the package.  In float64 it is the truth for small models; in
float32 it is the dense model that a real one is compared with, token for token.
"""

import numpy as np


class DenseLlama:
    """One sequence; every call appends tokens to it."""

    def __init__(self, config, weights, dtype: type = np.float32):
        self.config, self.dtype = config, dtype
        self.embedding, self.final_norm, self.head, self.inverse_frequencies = (
            np.asarray(weights.embedding, dtype),
            np.asarray(weights.final_norm, dtype),
            np.asarray(weights.head, dtype),
            np.asarray(weights.inverse_frequencies, np.float64),
        )
        stacked = {name: np.asarray(w, dtype) for name, w in weights.layers._asdict().items()}
        self.layers = [
            {name: w[layer] for name, w in stacked.items()} for layer in range(config.num_layers)
        ]
        self.reset()

    def reset(self):
        """Forgets the sequence."""
        self.length = 0
        none = np.zeros((0, self.config.num_kv_heads, self.config.head_dim), self.dtype)
        self.keys = [none] * self.config.num_layers
        self.values = [none] * self.config.num_layers

    def __call__(self, tokens):
        """Logits after each of these tokens, (tokens, vocab)."""
        positions = np.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        x = self.embedding[tokens]
        for layer, w in enumerate(self.layers):
            x = x + self._attention(layer, w, self._norm(x, w["attention_norm"]), positions)
            normed = self._norm(x, w["ffn_norm"])
            gate = normed @ w["gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ w["up"].T)) @ w["down"].T
        return self._norm(x, self.final_norm) @ self.head.T

    def greedy(self, prompt, num_tokens, stop_tokens=frozenset()):
        """The likeliest tokens after a prompt, one after another, and how much likelier each was
        than the next: (tokens, the least difference of logits)."""
        self.reset()
        logits, tokens, margin = self(prompt)[-1], [], np.inf
        while True:
            second, first = np.argsort(logits)[-2:]
            margin = min(margin, logits[first] - logits[second])
            tokens.append(int(first))
            if first in stop_tokens or len(tokens) == num_tokens:
                return tokens, margin
            logits = self([first])[-1]

    def greedy_along(self, prompt, tokens):
        """The likeliest token after a prompt and after each of `tokens` but the last, in one pass,
        and by how much: (tokens, the least difference of logits).  The same as `greedy` as long as
        they are `tokens`."""
        self.reset()
        logits = self([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        second, first = np.sort(logits)[:, -2:].T
        return logits.argmax(-1).tolist(), (first - second).min()

    def _attention(self, layer, w, x, positions):
        config = self.config
        query, key, value = (
            (x @ w[name].T).reshape(len(x), -1, config.head_dim)
            for name in ("query", "key", "value")
        )
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        self.keys[layer] = np.concatenate([self.keys[layer], key])
        self.values[layer] = np.concatenate([self.values[layer], value])
        group = config.num_query_heads // config.num_kv_heads
        keys, values = (np.repeat(a[layer], group, axis=1) for a in (self.keys, self.values))
        scores = np.einsum("qhd,khd->hqk", query, keys) / np.sqrt(config.head_dim).astype(
            self.dtype
        )
        scores = np.where(np.arange(self.length) <= positions[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1) @ w["output"].T

    def _norm(self, x, weight):
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.rms_epsilon)
        return (x / scale * weight).astype(self.dtype)

    def _rotate(self, x, positions):
        """Pairs of neighbouring dimensions are complex numbers, turned by position * frequency."""
        turns = np.exp(1j * positions[:, None, None] * self.inverse_frequencies)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(self.dtype)
