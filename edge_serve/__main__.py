"""The entry of the `edge-serve` command and of `python -m edge_serve`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit; a service's plain start goes past the command-line library."""
    if sys.argv[1:2] == ["run"]:
        from edge_serve.commands.serve import plain_call, run_plainly

        file = plain_call(sys.argv[1:])
        if file is not None:
            sys.exit(run_plainly(file))
    from edge_serve import cli

    cli.main()


if __name__ == "__main__":
    main()
