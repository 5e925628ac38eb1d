"""Kernels of paged_kv: `core` is shared, `tpu` and `gpu` are the two backends.

core   what is asked (problem), which keys a query sees (variant), running softmax (softmax),
       work lists (schedule), slot arithmetic and row packing (layout); no Pallas import
tpu    Pallas Mosaic TPU: plan (tile sizes), blocks (copies), append, attention
gpu    Pallas Mosaic GPU: the same names
"""

if __name__ != "paged_kv.kernels":
    raise ImportError(
        f"this folder is the package `paged_kv.kernels`, but it was imported as {__name__!r}; "
        "run `pip install -e .` and import `paged_kv.kernels`"
    )
