"""GPU benchmarks: the search, the training step and the generator's loss at the sizes that matter on a GPU.

``python -m bench.gpu --group search`` measures a group and appends each figure to a CSV once it is known.
``make gpu`` runs all groups after building and testing (tools/gpu_suite.py).
"""
