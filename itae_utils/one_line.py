"""What the `itae` command says where it can't go on: one line on stderr, never a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import click

from itae_utils.errors import ItaeError


class Failure(click.ClickException):
    """One line on stderr, and an exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns bad input into one line and exit status 2, Ctrl-C into one and 130, a disk that fails into one and 1."""
    try:
        yield
    except getattr(click.exceptions, "NoArgsIsHelpError", ()):
        raise
    except click.UsageError as error:
        see = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        raise Failure(" ".join(error.format_message().split()) + see, 2) from error
    except ItaeError as error:
        raise Failure(" ".join(str(error).split()), 2) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads on: click's to handle
            raise
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error) or type(error).__name__
        raise Failure(" ".join(told.split()), 1) from error
    except KeyboardInterrupt as interrupt:
        raise Failure("interrupted", 130) from interrupt


class Group(click.Group):
    """Says whatever goes wrong in one line."""

    def make_context(self, *arguments: object, **options: object) -> click.Context:
        """Read the options before a command's name."""
        with in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        with in_one_line():
            return super().invoke(context)
