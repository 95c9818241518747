"""`uncurl recipes`: compare ways to prune on held-out text, and say which one to take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from uncurl_jax.errors import InputError

GIN_MODULES = (
    "uncurl_jax.config",
    "uncurl_jax.data.language_modeling",
    "uncurl_jax.experiments.recipes.recipe_study",
    "uncurl_jax.experiments.recipes.recipe_runner",
)


def add_parser(command: Any) -> None:
    """Adds the command; `command(name, help)` makes a parser."""
    sub = command("recipes", "Compare recipes of pruning by held-out loss; resumable.")
    sub.add_argument("--out", required=True, help="directory of the study")
    sub.add_argument("--data_dir", help="where the texts lie")
    sub.add_argument("--cache_dir", help="token caches, <task>/<split>")
    sub.add_argument(
        "--max_seconds", type=float, help="begin nothing that would end later than this"
    )
    sub.add_argument("--roles", type=_names, help="arms of these roles alone: choose, confirm")
    sub.add_argument("--only", type=_names, help="these recipes alone, as paper,frequency")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def recipes(options: dict[str, Any]) -> Any:
    """Runs the study for as long as it may and returns how far it is."""
    from uncurl_jax.cli.gin_config import bound, configured
    from uncurl_jax.experiments.recipes import recipe_runner

    if "config" not in bound(recipe_runner.run_recipes):
        raise InputError(
            "A comparison of recipes needs a RecipeStudyConfig, got none: give --gin_file, as "
            "gin/runs/reproduce_recipes.gin."
        )
    progress = configured(recipe_runner.run_recipes)(**options)
    for name in progress.left[:3]:
        print(f"left: {name}", file=sys.stderr)
    return {
        "out": str(Path(options["out"])),
        "done": progress.done,
        "left": len(progress.left),
        "seconds": round(progress.seconds, 1),
    }


def report(options: dict[str, Any]) -> Any:
    """`uncurl report` of a recipe study."""
    from uncurl_jax.experiments.reporting.report_recipes import write_recipe_report

    directory = Path(options.pop("directory"))
    if options:
        raise InputError(
            f"A report of recipes has no options, got {', '.join(f'--{name}' for name in options)}."
        )
    result = write_recipe_report(directory)
    for name, loss in result["choice"]["scores"].items():
        print(f"{loss:.4f}  {name}", file=sys.stderr)
    return {
        "report": str(directory / "report.html"),
        "json": str(directory / "report.json"),
        "tables": str(directory / "tables.md"),
        "headline": result["headline"],
    }
