"""Errors of commands are one line on stderr, with an exit status."""

import errno

import click
import pytest
from click.testing import CliRunner

from itae_utils.cli.one_line import Group
from itae_utils.errors import ItaeError


@click.group(cls=Group)
@click.option("--level", type=int)
def main(level):
    pass


def run(*arguments: str, error: BaseException | None = None):
    @main.command("do")
    @click.option("--kind", type=click.Choice(["a", "b"]))
    def do(kind):
        if error:
            raise error
        click.echo("done")

    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(("error", "status", "line"), [
    (ItaeError("bad\n  input"), 2, "Error: bad input\n"),
    (KeyboardInterrupt(), 130, "Error: interrupted\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "Error: /a/b: No space left on device\n"),
    (OSError("odd\nreason"), 1, "Error: odd reason\n"),
    (TimeoutError(), 1, "Error: TimeoutError\n"),
    (click.UsageError("no\nuse"), 2, "Error: no use (see main do --help)\n"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),  # click handles it
])
def test_errors_are_one_line(error, status, line):
    result = run("do", error=error)
    assert (result.exit_code, result.stderr, result.stdout) == (status, line, "")


@pytest.mark.parametrize(("arguments", "named", "hint"), [
    (("--nonsense",), "--nonsense", "(see main --help)"), (("--level", "x"), "--level", "(see main --help)"),
    (("nonsense",), "nonsense", "(see main --help)"), (("do", "--kind", "c"), "--kind", "(see main do --help)"),
    (("do", "more"), "more", "(see main do --help)"), (("do", "--kind"), "--kind", ""),  # click names no command here
])
def test_wrong_usage_is_one_line_that_names_the_argument_and_the_help(arguments, named, hint):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert named in result.stderr.partition(" (see ")[0]
    assert result.stderr.endswith(f"{hint}\n")
    assert result.stderr.count("\n") == 1


def test_success_help_and_bugs_are_left_alone():
    assert run("do").output == "done\n"
    assert "Usage: main" in run().output
    assert run("--help").exit_code == 0
    assert isinstance(run("do", error=TypeError("a bug")).exception, TypeError)
