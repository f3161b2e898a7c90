"""The error that means: the data, not the program, has to be looked at."""

from __future__ import annotations


class DataError(RuntimeError):
    """A data set that is missing, damaged, or holds more bad images than it may."""
