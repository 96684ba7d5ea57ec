"""`bitdistill mlx PROGRAM ...`: thin click commands over mlx_commands.py."""

from __future__ import annotations

import functools

import click

from bitdistill.mlx_commands import COMMANDS, run


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
