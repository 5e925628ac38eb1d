"""A small serving engine on a paged cache: what `python -m tools.serve_bench` measures."""
