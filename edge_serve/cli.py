"""The `edge-serve` command. Sub-commands are imported when they are called, so that `--help` costs nothing."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from edge_serve import __version__
from edge_serve.commands import COMMANDS
from edge_serve.errors import EXIT_INTERRUPTED, EXIT_UNAVAILABLE, EXIT_USAGE, EdgeServeError


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        for parameter in command.params:
            # By the option's name as the user writes it; click's own way would take the Python parameter's.
            long = next((name for name in parameter.opts if name.startswith("--")), None)
            if long is not None:
                parameter.envvar = f"EDGE_SERVE_{cmd_name}_{long[2:]}".upper().replace("-", "_")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for a mistyped one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from edge_serve.schema import closest

            raise click.UsageError(f"no command {args[0]!r}. {closest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.command(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    epilog='Shell completion, bash: eval "$(_EDGE_SERVE_COMPLETE=bash_source edge-serve)" (zsh, fish: likewise).',
)
@click.version_option(__version__, prog_name="edge-serve", message="%(prog)s %(version)s")
def cli() -> None:
    """Run trained models on small devices, unattended.

    \b
    edge-serve convert saved_model -o models/digits --quantize int8 --calibration photos/
    edge-serve run -c edge-serve.toml
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the check said no, 2 wrong use, 3 not now, 130 interrupted."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        outcome: Any = cli.main(args=arguments, prog_name="edge-serve", standalone_mode=False)
    except EdgeServeError as error:
        click.echo(f"edge-serve: {error}", err=True)
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except BrokenPipeError:
        # Whoever read our output has enough of it; Python shall not complain at exit either.
        sys.stdout = None
        return EXIT_UNAVAILABLE
    except OSError as error:
        click.echo(f"edge-serve: {error}", err=True)
        return EXIT_UNAVAILABLE
    return outcome if isinstance(outcome, int) else 0
