"""``python -m ibq_fast.train tokenizer|generator --config configs/….yaml [--section.field=value …]
[--resume]``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

DESCRIPTION = """\
Train a tokenizer (images to code indices and back) or a generator (classes to code indices).

Everything a run writes goes below run.dir: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and, at the
end, the model itself in tokenizer/ or generator/, which from_pretrained loads.
"""

EXAMPLES = """\
examples:
  python -m ibq_fast.train tokenizer --config configs/quickstart_tokenizer.yaml --run.dir=runs/tok
  python -m ibq_fast.train tokenizer --config configs/quickstart_tokenizer.yaml --run.dir=runs/tok --resume
  python -m ibq_fast.train generator --config configs/quickstart_generator.yaml --tokenizer=runs/tok/tokenizer
  torchrun --nproc-per-node=8 -m ibq_fast.train tokenizer --config configs/imagenet256_ibq_16384.yaml
  python -m ibq_fast.train tokenizer --help      every setting with its type and default

stopping:
  Ctrl-C or SIGTERM finishes the step, saves and exits with 130 or 143; a second one leaves at once.
  --resume goes on from the newest checkpoint that is whole.

exit codes: 0 trained; 1 stopped by an error; 2 wrong arguments; 75 another process of the run was lost;
130, 143 stopped by a signal
"""

KINDS = ("tokenizer", "generator")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ibq_fast.train") -> int:
    """Train as the command line says; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(
            f"usage: {prog} {{{','.join(KINDS)}}} --config FILE [--section.field=value ...] [--resume]\n"
        )
        sys.stdout.write(f"\n{DESCRIPTION}\n{EXAMPLES}")
        return 0 if words else 2
    kind, options = words[0], words[1:]
    if kind not in KINDS:
        return _refuse(f"expected tokenizer or generator, got {kind!r}")
    from ibq_fast.train.config import GeneratorRun, TokenizerRun, build_parser, parse_run

    run_class: Any = TokenizerRun if kind == "tokenizer" else GeneratorRun
    if "--help" in options or "-h" in options:
        build_parser(run_class, f"{prog} {kind}", DESCRIPTION).print_help()
        return 0
    try:
        config = parse_run(run_class, options, f"{prog} {kind}")
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    return _train(config)


def _train(config: object) -> int:
    from safetensors import SafetensorError

    from ibq_fast.data import DataError
    from ibq_fast.train.config import TokenizerRun
    from ibq_fast.train.errors import NonFiniteError, TrainingInterrupted
    from ibq_fast.train.generator import train_generator
    from ibq_fast.train.peers import EXIT_CODE as PEER_LOST
    from ibq_fast.train.peers import PeerLostError
    from ibq_fast.train.tokenizer import train_tokenizer

    try:
        if isinstance(config, TokenizerRun):
            train_tokenizer(config)
        else:
            train_generator(config)  # type: ignore[arg-type]
    except TrainingInterrupted as stopped:
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before the first step; nothing to save\n")
        return 130
    except PeerLostError as error:
        sys.stderr.write(f"error: {error}\n")
        return PEER_LOST
    except (DataError, NonFiniteError, OSError, SafetensorError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _refuse(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
