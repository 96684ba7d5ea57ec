"""The command line: thin click commands over the Python functions of the same names.

Results go to stdout, talk and progress to stderr. Heavy packages are imported inside the commands,
so `--help` answers at once. Library errors become one sentence and exit code 1; only an error that
nobody foresaw shows a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bitdistill import __version__
from bitdistill.cli_eval import evaluate, plot, report
from bitdistill.cli_mlx import export_options, mlx, values

EXPECTED = (ValueError, OSError, RuntimeError, ImportError)
NOT_FOR_TEXT = ("scipy", "soundfile", "torchaudio", "torchvision")


class Commands(click.Group):
    """A group that suggests the command that was probably meant, and words expected errors."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from bitdistill.names import suggest

        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise click.UsageError(f"no command {args[0]!r}{suggest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            foreign = isinstance(error, RuntimeError) and not _is_ours(error)
            if foreign or isinstance(error, BrokenPipeError):  # `| head`: click ends quietly
                raise
            message = str(error) or type(error).__name__
            raise click.ClickException(message) from error


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith("bitdistill.")


def _quiet_libraries() -> None:
    """Third-party chatter does not belong between a user and a result."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs what it then raises
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def import_transformers() -> None:
    """As if it had nothing to read images and sound with, and to detect objects.

    Its classes for text import these packages where they are installed: a second or two before a
    run begins, and an error where torchvision is of another torch. Only for a process of our own:
    they can be imported afterwards, but transformers goes on without them.
    """
    if "transformers" in sys.modules:  # it remembers what it has found
        return
    hidden = [name for name in NOT_FOR_TEXT if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is "not found"
    try:
        import transformers.modeling_utils
        import transformers.processing_utils  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="bitdistill")
def main() -> None:
    """Turn a language model into a 1.58-bit ternary student, and run it in stock runtimes.

    \b
      bitdistill train                       the embedded example, or --recipe NAME
      bitdistill export STUDENT --target onnx --out DIR
      bitdistill eval DIR...                 a table of accuracy, speed, memory and size
      bitdistill generate DIR "prompt"
    """
    _quiet_libraries()


main.add_command(mlx)


@main.command()
@click.option(
    "--recipe", default="tiny", show_default=True, help="Shipped names or YAML files, joined by +."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one setting.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [runs/NAME].")
@click.option("--resume", is_flag=True, help="Continue an interrupted stage.")
@click.option("--until", default="student", show_default=True, help="The last stage to run.")
@click.option("--dry-run", is_flag=True, help="Check everything and run one step; write nothing.")
def train(
    recipe: str,
    settings: tuple[str, ...],
    out: Path | None,
    resume: bool,
    until: str,
    dry_run: bool,
) -> None:
    """Run a recipe's stages: teacher, baselines, refine, pre-train, distil.

    Complete stages are skipped. Prints the last stage's directory. `bitdistill recipes` lists the
    recipes, and `--dry-run` prints every setting.
    """
    from bitdistill.config import load_config

    config = load_config(recipe, settings)
    if dry_run:
        from bitdistill.dry_run import dry_run as check

        click.echo(check(config, out, until))
        return
    from bitdistill.hardware import start_compilers

    start_compilers(config.machine)  # they take as long as the imports that follow
    import_transformers()
    from bitdistill.recipe import train as run

    click.echo(run(config, out, resume=resume, until=until))


@main.command()
@click.argument("name", required=False)
@click.option("--parts", is_flag=True, help="List models, tasks and methods to join by + instead.")
def recipes(name: str | None, parts: bool) -> None:
    """List the shipped recipes, or print one with every setting (to copy and change).

    Recipes, parts and YAML files are joined by +: smollm2-135m-sst2+paper, qwen3-4b+mnli+authors.
    """
    from bitdistill.config import dump_config, load_config, part_names, recipe_names

    if name:
        click.echo(dump_config(load_config(name)), nl=False)
        return
    for known in part_names() if parts else recipe_names():
        click.echo(known)


@main.command()
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="onnx or mlx.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Artifact directory.")
@click.option("--embed-bits", default=16, show_default=True, help="32, 16, 8, 4; mlx: also 6.")
@click.option("--weight-bits", default=2.0, show_default=True, help="2; onnx: also 1.6.")
@click.option("--ops", help="onnx: custom (default), portable or integer.")
@click.option("--with-library", is_flag=True, help="onnx: copy the operators in, for GenAI.")
@click.option("--kv-bits", type=int, help="onnx: 32, 16 or 8, of keys and values  [16; stock: 32].")
@click.option("--task", help="onnx: a classifier, whose head has this label task's answers alone.")
@export_options
@click.option("--context", type=int, help="Longest sequence [the model's, at most 8192].")
@click.option("--parity/--no-parity", default=True, help="Compare with PyTorch.  [default: parity]")
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
def export(student: Path, target: str, out: Path, parity: bool, **options: Any) -> None:
    """Write a student as an ONNX or MLX artifact, and compare it with PyTorch.

    Every trit and scale is read back and compared; whole-model parity is measured against the
    noise floor of PyTorch itself and stored in the artifact's manifest.
    """
    from bitdistill import exporters
    from bitdistill.progress import step_bar

    progress = step_bar()
    check: Callable[[Path], dict[str, Any]] | None = None
    if parity:
        from bitdistill.evals import report, task_prompts, verdict

        prompts = task_prompts(student)

        def check(artifact: Path) -> dict[str, Any]:
            parity = report(student, artifact, prompts, progress=progress)
            click.echo(f"parity with PyTorch: {verdict(parity)}", err=True)
            return parity

    options = values(options) | {"progress": progress, "check": check}
    written = exporters.export(student, target, out, **options)
    click.echo(f"bits per weight: {exporters.bits_per_weight(written)}", err=True)
    click.echo(written)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0 is no limit.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--task-prompt", is_flag=True, help="Put the prompt into the task's template.")
def generate(
    directory: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    threads: int | None,
    task_prompt: bool,
) -> None:
    """Continue a prompt with any teacher, student or artifact, as it is generated."""
    from bitdistill import backends

    model = backends.load(directory, threads=threads)
    if task_prompt:
        prompt = _in_template(model.manifest, prompt)
    tokens = model.generate(
        model.tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    for text in model.tokenizer.stream(tokens):
        click.echo(text, nl=False)
        sys.stdout.flush()
    click.echo()


def _in_template(content: dict[str, Any], text: str) -> str:
    from bitdistill.tasks import Task

    if not content.get("task"):
        raise ValueError("this directory records no task; leave out --task-prompt")
    task = Task.from_json(content["task"])
    if len(task.columns) != 1:
        raise ValueError(
            f"the task has {len(task.columns)} inputs; write the whole prompt yourself"
        )
    return task.fill([text.strip()])  # as the texts that it learnt


@main.command()
def doctor() -> None:
    """Say what works on this machine: versions, runtimes, instruction sets, what is missing."""
    from bitdistill.doctor import examine

    report, healthy = examine()
    click.echo(report)
    if not healthy:
        raise click.ClickException("something that is required is missing; see above")


main.add_command(evaluate)
main.add_command(report)
main.add_command(plot)
