"""``python -m bench``: see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from bench import malloc
from bench.options import Options, UsageError


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run the benchmark in this process. Exit codes: 0 done, 1 a fused op is wrong, 2 bad options, 130 interrupted."""
    console = console or Console(highlight=False)
    options = parse(arguments)
    from bench.session import session

    try:
        return session(options, console)
    except UsageError as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("\nstopped; the rows of finished cases are kept")
        return 130


def parse(arguments: Sequence[str] | None) -> Options:
    return tyro.cli(Options, args=arguments, prog="python -m bench")


def _entry() -> int:
    # Kineto, which counts memory, writes to stderr whenever it starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    options = parse(None)
    anew = None if options.dry_run or options.device == "cuda" else malloc.command(options.malloc, sys.argv[1:])
    if anew is not None:
        sys.stdout.flush()
        os.execve(anew[0][0], *anew)
    return main()


if __name__ == "__main__":
    sys.exit(_entry())
