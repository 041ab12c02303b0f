"""Triton kernels and their launchers, one file per op. The only place that imports triton; loaded on first use."""
