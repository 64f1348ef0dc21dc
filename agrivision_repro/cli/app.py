"""The `agrivision` command."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from agrivision_repro.cli.data import data_app
from agrivision_repro.cli.predict import export, predict, share, submission_app
from agrivision_repro.cli.report import report
from agrivision_repro.cli.reproduce import plan, reproduce
from agrivision_repro.cli.runs import runs_app, train

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)
for command in (reproduce, report, plan, train, predict, export, share):
    app.command()(command)
for name, group in {"runs": runs_app, "data": data_app, "submission": submission_app}.items():
    app.add_typer(group, name=name)


@app.callback(invoke_without_command=True)
def agrivision(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    "Rerun Yang et al. (CVPR-W 2020): RGB, near-infrared and Switchable Normalization."
    if version:
        from agrivision_repro import __version__

        print(__version__)
        raise typer.Exit()


def main() -> None:
    "Run the command; a usage error prints one line to stderr and exits with code 2 (set AGRIVISION_TRACEBACK for the traceback)."
    gc.set_threshold(20_000)  # the default seeks garbage among a million imported objects: a fifth of a start
    atexit.register(gc.freeze)  # and at the end another second
    warnings.formatwarning = lambda message, *_: f"agrivision: {message}\n"  # one line, without the source line
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs about a damaged file is raised, too
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if hasattr(error, "signum"):  # training.Stopped
            sys.exit(_say_stopped(128 + error.signum))
        explain = getattr(error, "format_message", None)  # an error of the command-line parser
        if os.environ.get("AGRIVISION_TRACEBACK") or not (explain or isinstance(error, (ValueError, OSError))):
            raise
        message = explain() + " (see --help)" if explain else str(error)
        print("agrivision: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    sys.exit(_say_stopped(code) if code == 128 + signal.SIGINT else code)  # Typer's exit code for Ctrl-C


def _say_stopped(code: int) -> int:
    "Print how to resume a stopped command; return its exit code."
    print("agrivision: stopped; the same command resumes from the last saved state", file=sys.stderr)
    return code
