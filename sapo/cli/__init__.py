"""The command `sapo`. Every option is a field of a dataclass; `sapo COMMAND --help` explains them."""

import io
import sys
from typing import Annotated

import tyro

import sapo
from sapo.cli.ask import Evaluate, Recommend
from sapo.cli.data import Data
from sapo.cli.plan import Plan
from sapo.cli.record import Claims, Figures, Lab, Publish
from sapo.cli.train import Baselines, Run, Study
from sapo.errors import InputError

Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Baselines, tyro.conf.subcommand("baselines")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Recommend, tyro.conf.subcommand("recommend")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Figures, tyro.conf.subcommand("figures")]
    | Annotated[Publish, tyro.conf.subcommand("publish")]
    | Annotated[Claims, tyro.conf.subcommand("claims")]
    | Annotated[Lab, tyro.conf.subcommand("lab")]
    | Annotated[Data, tyro.conf.subcommand("data")]
)


def main() -> None:
    """Run a command; a mistake in the input is one message on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal's alphabet lacks a sign, as on stderr
    if sys.argv[1:] == ["--version"]:
        print(f"sapo {sapo.__version__}")
        return
    try:
        tyro.cli(Command, prog="sapo", description="Step-Aligned Policy Optimization for recommenders that think.")()
    except (InputError, FloatingPointError) as error:
        sys.exit(f"sapo: {error}")
    except OSError as error:
        sys.exit(f"sapo: {error.strerror or error}: {error.filename or 'no file named'}. Finished runs are intact.")
    except KeyboardInterrupt:
        print("\nsapo: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
