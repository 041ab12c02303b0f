"""Core ML packages from a trained pipeline, checked without a Mac.

`coreml` converts, `modules` and `parts` hold the model in the form that is converted, `interpreter` runs a package's
program with PyTorch, `parity` compares it with the model, `inspect` tells what is in a package. coremltools is imported
on first use only.
"""
