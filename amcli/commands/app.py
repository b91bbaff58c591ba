"""The command line `amkv`: the Typer application, and how errors are reported.

Importing this module must stay fast: no torch or transformers in anything it imports.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from amcli.commands import (
    bench,
    chat,
    compact,
    demo,
    diff,
    export,
    importing,
    inspect,
    prefill,
    verify,
)
from amcli.commands import eval as evaluation
from amcli.commands import list as listing
from amcli.commands.failures import TyperUsageError, as_amkv_error
from amcli.commands.options import Debug, Quiet
from amcli.commands.screen import console
from amcli.commands.screen.console import ReaderGoneError, Switches, remark, report
from amcli.errors import AmkvError, AmkvWarning, OutOfMemoryError
from amcli.system import settings, versions
from amcli.system.processes import follows
from amcli.system.stopping import StoppedError, stoppable

INTERRUPTED = 130

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 80}

_INSTEAD = ("ratio", "tokens", "fidelity")
"""Options of `compact` that exclude each other: a typed one overrides one that is set."""


class _Command(TyperCommand):
    """A command whose defaults the user can set; its usage has no braces around required words."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """The arguments typed, with settings as defaults; see `settings`."""
        found: dict[str, settings.Setting] = {}
        typed = list(args)  # the parser consumes its list
        helping = set(args) & set(_SETTINGS["help_option_names"])
        if not helping and not ctx.resilient_parsing:  # help and completion work, whatever is set
            found = settings.of(self.name or "")
            found.pop("model", None)  # `commands.shared.choose_model` asks for it
            for warning in settings.unknown_variables():
                console.caution(warning)
        names = {name.replace("-", "_"): setting for name, setting in found.items()}
        ctx.default_map = {name: setting.value for name, setting in names.items()}
        try:
            rest = super().parse_args(ctx, args)
        except (AmkvError, TyperUsageError) as error:
            raise _of_setting(as_amkv_error(error), found, typed) from error
        if any(_typed(ctx, name) for name in _INSTEAD):
            for name in _INSTEAD:
                if name in names and not _typed(ctx, name):
                    ctx.params[name] = None
        return rest

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The words after the command's name in the usage line."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]


def _of_setting(
    error: AmkvError, found: Mapping[str, settings.Setting], args: Sequence[str]
) -> AmkvError:
    """The error, with the place where its value was set if it was not typed."""
    name = (error.field or "").replace("_", "-")
    if name not in found or any(word.startswith(f"--{name}") for word in args):
        return error
    return error.at(found[name].origin)


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


app = typer.Typer(
    name="amkv",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "prefill": prefill.prefill,
    "compact": compact.compact,
    "chat": chat.chat,
    "inspect": inspect.inspect,
    "list": listing.list_artifacts,
    "diff": diff.diff,
    "verify": verify.verify,
    "export": export.export,
    "import": importing.import_,
    "demo": demo.demo,
    "eval": evaluation.evaluate,
    "bench": bench.bench,
}
for _name, _function in _COMMANDS.items():
    app.command(_name, cls=_Command, context_settings=_SETTINGS)(_function)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and those of the libraries.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a document into a compact KV cache, and chat with it.

    \b
      amkv prefill doc.txt
      amkv compact --ratio 20
      amkv chat --context doc.amkv

    amkv demo shows it all on an example, offline. Results go to standard
    output, everything else to standard error. Defaults can be set by AMKV_*
    variables and in a configuration file; --version says where it would be.
    """
    out = console.Console(quiet=quiet, debug=debug)
    if version:
        out.data(versions.text())
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
        warnings.simplefilter("ignore")  # those of the libraries; -W brings them back
    warnings.filterwarnings("always", category=AmkvWarning)
    warnings.showwarning = _show_warning
    try:
        with stoppable():
            code = typer.main.get_command(app).main(words, prog_name="amkv", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except StoppedError as stopped:
        remark("terminated")
        return stopped.exit_code
    except ReaderGoneError:
        return 0
    except Exception as error:
        if console.switches.debug:
            traceback.print_exception(error)
        found = as_amkv_error(error, words)
        if follows() and found.exit_code in (AmkvError.exit_code, OutOfMemoryError.exit_code):
            sys.stderr = sys.__stderr__  # it may be the only process that fails
        report(found)
        return found.exit_code
    if code == INTERRUPTED:  # Typer has caught the KeyboardInterrupt itself
        remark("interrupted")
    return code or 0


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
    """Replaces Python's own format, which quotes the source, for what is meant for users."""
    if issubclass(category, AmkvWarning):
        console.caution(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))
