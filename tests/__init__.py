"""The tests: unit (no processes), contract (one suite over every source and sink), system (real broker, real processes)."""
