"""systemd for edge-serve: the unit's text (unit.py), what hardware it may open (hardware.py), and systemd itself (manager.py)."""
