"""The command `opt-zoo`: its subcommands, its exit codes, and one clear line for what went wrong."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from opt_core.errors import InputError, MissingFrameworkError, ProblemsError
from opt_zoo.console import stderr_console
from opt_zoo.environment import package_version

COMMANDS = {
    "inspect": "inspection",
    "convert": "converting",
    "diff": "diff",
    "parity": "parity",
    "generate": "generating",
    "perplexity": "perplexity",
    "bench": "benching",
}
OK, FAILED, BAD_INPUT, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
EXIT_CODES = (
    "exit codes: 0 done, 1 parity or a measurement failed or checkpoints differ, 2 wrong usage, bad input or "
    "a missing framework, 130 interrupted, 141 nobody reads stdout any more"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; prints expected errors without a traceback."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's greetings on stderr
    os.environ["KERAS_BACKEND"] = "tensorflow"  # the one that `opt_tf` runs on, whatever the shell is set to
    args = build_parser().parse_args(arguments)
    try:
        code = args.run(args)
        print(end="", flush=True)  # a closed pipe shows here, and not when Python exits
        return code
    except BrokenPipeError:  # of `opt-zoo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except (ProblemsError, MissingFrameworkError, OSError) as error:
        text = f"opt-zoo {args.command}: error: {_without_command(error, args.command)}"
        stderr_console().print(text, style="red", markup=False)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


def _without_command(error: Exception, command: str) -> str:
    """The text of an error whose title may be the command or the call behind it, `generate`."""
    if isinstance(error, InputError) and error.title in (command, "opt-zoo", f"opt-zoo {command}"):
        return str(error).removeprefix(f"{error.title}: ")
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    """One subparser for each command, built by the module of the command."""
    parser = argparse.ArgumentParser(
        prog="opt-zoo", description="OPT language models in PyTorch, TensorFlow and JAX/Flax.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"opt-zoo {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"opt_zoo.{module_name}")
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.DESCRIPTION, epilog=EXIT_CODES, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
