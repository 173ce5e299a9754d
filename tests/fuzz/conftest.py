"""Hypothesis keeps what it learns outside of the tree."""

from __future__ import annotations

import atexit
import shutil
import tempfile

from hypothesis import configuration

HOME = tempfile.mkdtemp(prefix="edge-serve-hypothesis-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
configuration.set_hypothesis_home_dir(HOME)
