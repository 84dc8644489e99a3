"""``normuon-lens VERB``: one verb, one command; only here do errors become text and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

import click

import normuon_lens
from normuon_lens.errors import LensError

NAME = "normuon-lens"
GROUP = "normuon_lens.commands"


class Verbs(click.Group):
    """A click group whose commands are the entry points of :data:`GROUP`, loaded when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all installed verbs, sorted."""
        return sorted(point.name for point in entry_points(group=GROUP))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Load one verb; None if it is not installed."""
        for point in entry_points(group=GROUP, name=name):
            command: click.Command = point.load()
            return command
        return None


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: normuon-lens demo",
)
@click.version_option(normuon_lens.__version__, package_name="normuon-lens")
def verbs() -> None:
    """See what an optimizer really does to every weight matrix.

    Record a training in two lines with normuon_lens.hooks.attach, then look at it, compare it
    and check it here. A RUN is a run file such as runs/normuon.h5, finished or still being
    recorded.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        ``sys.argv[1:]`` if None.

    Returns
    -------
    int
        As of :func:`run_command`.
    """
    return run_command(verbs, NAME, arguments)


def run_command(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command, and turn its errors into text and an exit code.

    Parameters
    ----------
    command : click.Command
    name : str
        What a user types to start it.
    arguments : sequence of str, optional
        ``sys.argv[1:]`` if None.

    Returns
    -------
    int
        0; 2 for a user's error, told in one line on standard error; 130 after Ctrl-C.
    """
    try:
        result = command.main(args=arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else name
        return _refuse(f"{error.format_message()} (see: {where} --help)")
    except click.ClickException as error:
        return _refuse(error.format_message())
    except LensError as error:
        return _refuse(str(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as head, has seen enough.
        sys.stderr.close()
        return 0


def _refuse(message: str) -> int:
    click.echo(f"{NAME}: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
