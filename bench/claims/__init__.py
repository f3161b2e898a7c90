"""What the method is said to do, tried on small tokenizers: `python -m bench.claims`, docs/claims.md."""
