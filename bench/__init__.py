"""Benchmarks of the fused ops against PyTorch and other runtimes, on the cases that the tests use.

``python -m bench --help``. A case is checked against fp64 before it is timed; a wrong one stops the run. Rows are
appended to ``bench/results/<machine>.csv`` with their provenance; ``python -m bench.plot`` and
``python -m bench.tables`` turn them into pictures and into the README's tables.
"""
