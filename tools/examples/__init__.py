"""A model in each framework, that writes the same tokens through its dense and a paged cache."""
