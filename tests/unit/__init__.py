"""Unit tests: one module each, real models and a real interpreter, no other process and no network."""
