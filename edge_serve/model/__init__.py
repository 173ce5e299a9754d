"""Models: which runtime, which delegate, which version, and one interpreter per thread."""
