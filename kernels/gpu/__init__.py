"""Pallas Mosaic GPU kernels; they need jax >= 0.11.2."""
