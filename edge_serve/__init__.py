"""edge-serve: an edge inference runtime for small devices."""

__version__ = "0.1.0"
