import errno

import click
import pytest
from click.testing import CliRunner

from itae_utils.cli import Group
from itae_utils.errors import ItaeError


@click.group(cls=Group)
@click.option("--level", type=int)
def main(level):
    pass


@pytest.fixture
def run():
    def with_error(error: BaseException | None, *arguments: str):
        @main.command("do")
        @click.option("--kind", type=click.Choice(["a", "b"]))
        def do(kind):
            if error:
                raise error
            click.echo("done")

        return CliRunner().invoke(main, list(arguments) or ["do"])

    return with_error


@pytest.mark.parametrize(("error", "status", "line"), [
    (ItaeError("bad\n  input"), 2, "Error: bad input\n"),
    (KeyboardInterrupt(), 130, "Error: interrupted\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "Error: /a/b: No space left on device\n"),
    (OSError("odd\nreason"), 1, "Error: odd reason\n"),
    (TimeoutError(), 1, "Error: TimeoutError\n"),
    (click.UsageError("no\nuse"), 2, "Error: no use (see main do --help)\n"),
])
def test_errors_are_one_line(run, error, status, line):
    result = run(error)
    assert (result.exit_code, result.stderr, result.stdout) == (status, line, "")


@pytest.mark.parametrize(("arguments", "line"), [
    (("--nonsense",), "Error: No such option"), (("--level", "x"), "Error: Invalid value for '--level'"),
    (("nonsense",), "Error: No such command 'nonsense'"), (("do", "--kind", "c"), "Error: Invalid value for '--kind'"),
    (("do", "more"), "Error: Got unexpected extra"),
])
def test_wrong_usage_is_one_line(run, arguments, line):
    result = run(None, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(line)
    assert result.stderr.endswith(f"(see main{' do' * (arguments[0] == 'do')} --help)\n")
    assert result.stderr.count("\n") == 1
    assert run(None, "do", "--kind").stderr == "Error: Option '--kind' requires an argument.\n"


def test_what_goes_well_is_left_alone(run):
    assert run(None).output == "done\n"
    assert "Usage: main" in CliRunner().invoke(main, []).output
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0


def test_mistakes_of_the_program_itself_are_not_hidden(run):
    assert isinstance(run(TypeError("a bug")).exception, TypeError)


def test_a_closed_pipe_is_left_to_click(run):
    result = run(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.exit_code, result.stderr) == (1, "")
