"""`bitdistill mlx COMMAND ...`: a thin click command over mlx_commands.py."""

from __future__ import annotations

import click

from bitdistill.mlx_commands import COMMANDS


@click.command(
    "mlx",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
)
@click.argument("command", type=click.Choice(COMMANDS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mlx(command: str, arguments: tuple[str, ...]) -> None:
    """Run one of mlx-lm's programs on an MLX artifact; arguments are mlx-lm's.

    \b
      bitdistill mlx generate --model runs/tiny/mlx --prompt "..."
      bitdistill mlx server --model runs/tiny/mlx --port 8080
    """
    from bitdistill.mlx_commands import run

    run(command, arguments)
