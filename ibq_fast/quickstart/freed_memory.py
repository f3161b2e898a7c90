"""Keeping freed memory for the next request.

glibc gives memory back to the system once more than a few megabytes lie free at the end of its heap. The
decoder's activations of forty small images are 5 MB each, and freed one after the other: every operation then
faults in fresh pages, 57,000 of them for 200 images, which took a third of decoding them.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_KEPT = 64 << 20
_LARGEST = 32 << 20  # larger requests have pages of their own, which go back when they are freed


def keep_freed_memory() -> bool:
    """Let malloc keep up to 64 MB that are free, from now on, in this process.

    Returns whether this system's malloc takes that (glibc does); elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such way to find it
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))
