"""Benchmarks: every timed thing is checked against the formula first, and timed in turns with its peers.

``pytest bench --benchmark-json=run.json`` measures, ``python -m bench.report`` measures, appends to
``bench/results/results.csv`` and writes ``docs/benchmarks.md``.
"""
