"""Hostile bytes for everything that reads what came from outside."""
