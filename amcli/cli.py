"""The command line `amkv`: the Typer application, and what becomes of errors.

Importing this module must stay fast: no torch, no transformers, in nothing it imports.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from amcli import __version__, console
from amcli.commands import bench, chat, compact, demo, diff, inspect, prefill
from amcli.commands import eval as evaluation
from amcli.commands import list as listing
from amcli.commands.options import Debug, Quiet
from amcli.console import ReaderGoneError, Switches, remark, report
from amcli.errors import AmkvError, OutOfMemoryError, UsageError
from amcli.processes import follows

INTERRUPTED = 130

# BadParameter is the one usage error that Typer exports; its base is what all of them share.
_TyperUsageError: type[Exception] = typer.BadParameter.__bases__[0]

_KERNELS = r"the \w+ kernels cannot run here"
"""How the one warning of our own begins: whoever waits for answers should know why."""

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


class _Command(TyperCommand):
    """A command whose usage line has no braces around what is required."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The words of the usage line after the command's name."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


app = typer.Typer(
    name="amkv",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
for _function in (prefill.prefill, compact.compact, chat.chat, inspect.inspect):
    app.command(cls=_Command, context_settings=_SETTINGS)(_function)
app.command("list", cls=_Command, context_settings=_SETTINGS)(listing.list_artifacts)
app.command(cls=_Command, context_settings=_SETTINGS)(diff.diff)
app.command(cls=_Command, context_settings=_SETTINGS)(demo.demo)
app.command("eval", cls=_Command, context_settings=_SETTINGS)(evaluation.evaluate)
app.command(cls=_Command, context_settings=_SETTINGS)(bench.bench)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a document into a compact KV cache, and chat with it.

    \b
      amkv prefill doc.txt
      amkv compact --ratio 20
      amkv chat --context doc.amkv

    amkv demo shows it all on an example, offline. Results go to standard
    output, everything else to standard error.
    """
    out = console.Console(quiet=quiet, debug=debug)
    if version:
        out.data(f"amkv {__version__}\n")
    elif ctx.invoked_subcommand is None:
        out.data(f"{ctx.get_help()}\n")
    else:
        return
    raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (the process's own when None) and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if follows():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - to the end
    console.switches = Switches()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries below; -W brings them back
        warnings.filterwarnings("always", message=_KERNELS)
        warnings.showwarning = _show_warning
    try:
        code = typer.main.get_command(app).main(words, prog_name="amkv", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ReaderGoneError:
        return 0
    except Exception as error:
        if console.switches.debug:
            traceback.print_exception(error)
        found = as_amkv_error(error)
        if follows() and found.exit_code in (AmkvError.exit_code, OutOfMemoryError.exit_code):
            sys.stderr = sys.__stderr__  # it may be the only one of the processes that fails
        report(found)
        return found.exit_code
    if code == INTERRUPTED:  # Typer has caught the KeyboardInterrupt itself
        remark("interrupted")
    return code or 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In place of Python's own form, which quotes the source."""
    console.caution(str(message))


def as_amkv_error(error: Exception) -> AmkvError:
    """What to tell the user about any exception."""
    if isinstance(error, AmkvError):
        return error
    if isinstance(error, _TyperUsageError):
        return _usage_error(error)
    if _out_of_memory(error):
        return OutOfMemoryError(
            "out of memory", "try a shorter document, --dtype bfloat16, or --device cpu"
        )
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return AmkvError(f"unexpected {what}", "add --debug to see where it comes from")


def _usage_error(error: Exception) -> UsageError:
    """Typer's own complaint about the command line, in the form of ours."""
    context = getattr(error, "ctx", None)
    path = "amkv" if context is None else context.command_path
    near = getattr(error, "possibilities", None)
    message = getattr(error, "message", "") if near is not None else ""
    message = message or error.format_message()  # type: ignore[attr-defined]
    text, _, meant = message.strip().rstrip(".").partition(". Did you mean ")
    hint = f"{path} --help"
    if near:
        hint = f"did you mean {', '.join(sorted(near))}? see {hint}"
    elif meant:
        hint = f"did you mean {meant} see {hint}"
    return UsageError(text[:1].lower() + text[1:], hint)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    failures = sys.modules.get("amcli.models.failures")  # loaded wherever torch is
    return failures is not None and bool(failures.out_of_memory(error))
