"""`bitdistill mlx PROGRAM ...`, thin over mlx_commands.py, and MLX's options of `export`."""

from __future__ import annotations

import functools
from typing import Any

import click

from bitdistill.cli_options import with_options
from bitdistill.mlx_commands import COMMANDS, run

DTYPES = ("float16", "bfloat16", "float32")
EXPORT_OPTIONS = (
    click.option("--activation-bits", type=click.Choice(["8", "none"]), help="mlx  [as trained]."),
    click.option("--dtype", type=click.Choice(DTYPES), help="mlx: type of all else  [16 bits]."),
    click.option(
        "--with-model-file",
        "model_file",
        is_flag=True,
        help="mlx: add code for --trust-remote-code.",
    ),
)
export_options = with_options(EXPORT_OPTIONS)  # those that only MLX has


def values(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `export` as the Python function takes them."""
    bits = {"8": 8, "none": None}.get(options["activation_bits"], "trained")
    return options | {"activation_bits": bits}


@click.group()
def mlx() -> None:
    """Run mlx-lm's programs on MLX artifacts.

    \b
      bitdistill mlx generate --model DIR --prompt "..."
      bitdistill mlx server --model DIR --port 8080

    Arguments are mlx-lm's own; PROGRAM --help lists them.
    """


def _program(name: str) -> click.Command:
    arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    return click.Command(
        name,
        callback=functools.partial(run, name),
        params=[arguments],
        short_help=f"mlx_lm.{name}",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )


for _name in COMMANDS:
    mlx.add_command(_program(_name))
