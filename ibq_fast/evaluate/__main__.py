"""``python -m ibq_fast.evaluate``: the same as ``ibq-fast evaluate``, for torchrun."""

import sys

from ibq_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
