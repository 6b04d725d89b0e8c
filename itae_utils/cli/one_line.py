"""Errors of commands, as one line on stderr and an exit status."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from itae_utils.errors import ItaeError


class Failure(click.ClickException):
    """One line on stderr, and an exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Report bad input in one line with exit status 2, Ctrl-C with 130, and a failing disk with 1."""
    try:
        yield
    except getattr(click.exceptions, "NoArgsIsHelpError", ()):
        raise
    except click.UsageError as error:
        raise Failure(f"{error.format_message()}{_remedy(error)}", 2) from error
    except ItaeError as error:
        raise Failure(str(error), 2) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has gone; click handles it
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error) or type(error).__name__
        raise Failure(message, 2 if error.errno == errno.ENAMETOOLONG else 1) from error
    except KeyboardInterrupt as interrupt:
        raise Failure("interrupted", 130) from interrupt


def _remedy(error: click.UsageError) -> str:
    """Return where to look; for a parameter of the notebooks that is no option of `itae report`, how to set it."""
    if error.ctx is None:
        return ""
    if isinstance(error, click.NoSuchOption) and any("-p" in each.opts for each in error.ctx.command.params):
        from itae_utils.report.rules import RULES

        name = error.option_name.lstrip("-").replace("-", "_")
        if name in RULES:
            return f" Set it by -p {name} VALUE"
    return f" (see {error.ctx.command_path} --help)"


class Group(click.Group):
    """A group of commands whose errors are one line."""

    def make_context(self, *arguments: object, **options: object) -> click.Context:
        """Parse the options before a command's name; characters that the terminal lacks will be replaced."""
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        with errors_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        with errors_in_one_line():
            return super().invoke(context)
