"""Backend-neutral parts that every kernel traces; nothing here imports Pallas."""
