"""Programs that use paged_kv: `python -m tools.generate` writes text with a language model."""
