"""`python -m edge_serve` is the `edge-serve` command."""

from edge_serve.cli import main

main()
