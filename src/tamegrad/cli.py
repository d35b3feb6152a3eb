"""The command `tamegrad`: its subcommands, its exit codes, and one clear line for each user-fixable error.

Third-party packages are imported only when needed: help is instant, and a missing extra gets a message like any other.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from tamegrad import __version__
from tamegrad.errors import MissingExtraError, SettingError, TamegradError, closest, quoted
from tamegrad.streams import ReaderGoneError, checked_stdout, printable, write_error_line

if TYPE_CHECKING:
    import click

__all__ = ["main"]

EXIT_DONE = 0
EXIT_FIXABLE = 2
EXIT_INTERRUPTED = 130

# A longer argument is shortened in a message, so that the rest of the message is not lost from sight.
_LONGEST_SHOWN = 300

# The extra that installs each package, by import name.
_EXTRAS = {
    "click": "study",
    "rich": "study",
    "plotly": "study",
    "jinja2": "study",
    "markupsafe": "study",
    "torch": "torch",
}

_HELP = """Gradient normalization: compare the strategies on a training run, or read them from a Deeplearning4j model.

\b
Examples:
  tamegrad compare          train one network under every strategy, about a minute
  tamegrad compare --help   all options of compare
  tamegrad dl4j model.zip   what a Deeplearning4j model does to its gradients
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and ends the process.

    Args:
        arguments: The arguments after `tamegrad`; None for those of the process.

    Raises:
        SystemExit: Always; its code is 0, 2 for user-fixable errors, or 130 for Ctrl-C.
    """
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    try:
        with checked_stdout():
            return _run_click(arguments)
    except ReaderGoneError:
        return EXIT_DONE
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        return _refuse(_missing_extra(missing))
    except TamegradError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        write_error_line("tamegrad: interrupted")
        return EXIT_INTERRUPTED


def _run_click(arguments: list[str]) -> int:
    import click

    try:
        code = _commands().main(arguments, prog_name="tamegrad", standalone_mode=False)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.UsageError as error:
        return _refuse(_usage_error(error))
    return code if isinstance(code, int) else EXIT_DONE


def _commands() -> "click.Group":
    """Returns the command with its subcommands; a new one takes one more line."""
    import click

    from tamegrad.dl4j.command import dl4j
    from tamegrad.study.command import compare

    class Commands(click.Group):
        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            if args[0] not in self.commands:
                got, allowed = f"unknown command {args[0]!r}", _allowed(args[0], list(self.commands))
                raise SettingError("tamegrad", got=got, allowed=allowed, advice="tamegrad --help")
            return super().resolve_command(ctx, args)

    @click.group(cls=Commands, help=_HELP, invoke_without_command=True, context_settings={"max_content_width": 100})
    @click.version_option(__version__, message="tamegrad %(version)s")
    @click.pass_context
    def tamegrad(context: click.Context) -> None:
        if context.invoked_subcommand is None:
            click.echo(context.get_help())

    tamegrad.add_command(compare)
    tamegrad.add_command(dl4j)
    return tamegrad


def _usage_error(error: "click.UsageError") -> SettingError:
    """Converts a usage error of click to a `SettingError` with its four parts."""
    import click

    context = error.ctx
    where = "tamegrad" if context is None else context.command_path
    if isinstance(error, click.NoSuchOption):
        parameters = [] if context is None else context.command.get_params(context)
        options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
        known = [name for option in options for name in option.opts]
        got, allowed = f"unknown option {error.option_name!r}", _allowed(error.option_name, known)
    elif isinstance(error, click.BadOptionUsage):
        # click does not say which command it was.
        where, advice = f"tamegrad {error.option_name}", "tamegrad COMMAND --help"
        return SettingError(where, got=_said(error), allowed="the usage in its help", advice=advice)
    else:
        got, allowed = _said(error), "the usage in its help"
    return SettingError(where, got=got, allowed=allowed, advice=f"{where} --help")


def _said(error: "click.UsageError") -> str:
    message = error.format_message().rstrip(".").removeprefix("Got ")
    return message[:1].lower() + message[1:]


def _allowed(name: str, known: Sequence[str]) -> str:
    return f"{', '.join(known)}; closest: {quoted(closest(name, known, most=1))}"


def _missing_extra(module: str) -> MissingExtraError:
    extra = _EXTRAS[module]
    return MissingExtraError(
        "tamegrad",
        got=f"a Python environment without {module}",
        allowed=f"one with the extra {extra!r}",
        advice="pip install 'tamegrad[torch,study]'",
    )


def _refuse(error: TamegradError) -> int:
    where, got = _shown(error.where), _shown(error.got)
    line = str(TamegradError(where, got=got, allowed=error.allowed, advice=error.advice))
    write_error_line(line if line.startswith("tamegrad") else f"tamegrad: {line}")
    return EXIT_FIXABLE


def _shown(text: str) -> str:
    """Returns a text on one line, without the middle of a long one."""
    line = printable(text)
    half = _LONGEST_SHOWN // 2
    return line if len(line) <= _LONGEST_SHOWN else f"{line[:half]}...{line[-half:]}"
