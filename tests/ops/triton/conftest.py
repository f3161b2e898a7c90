"""Tests of the Triton kernels. Those under ``interpreted/`` need a process of their own: Triton chooses
between its compiler and its interpreter when a kernel is defined (test_interpreter.py runs them)."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
