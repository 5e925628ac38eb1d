"""What a case asks, how a backend cuts it and who does what: `python -m tools.explain CASE`."""
