"""A trained pipeline on a phone: Core ML packages and Core AI assets, made and checked without a Mac.

`coreml.export_pipeline` is the way in. ARCHITECTURE.md says what is in which file. coremltools is imported on first use
only.
"""
