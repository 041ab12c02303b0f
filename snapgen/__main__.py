"""`python -m snapgen`, for launchers such as torchrun."""

from snapgen.cli import main

main()
