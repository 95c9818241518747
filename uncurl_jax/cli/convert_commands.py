"""`uncurl import` and `uncurl export --format hf`: between Hugging Face's format and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uncurl_jax.errors import InputError

Options = dict[str, Any]


def add_import_parser(command: Any) -> None:
    """Adds `uncurl import`; `command(name, help)` makes a parser."""
    sub = command("import", "Make a checkpoint of a Hugging Face directory, tensor by tensor.")
    sub.add_argument(
        "--from_hf",
        required=True,
        metavar="DIR",
        help="directory with config.json, safetensors files and tokenizer.json",
    )
    sub.add_argument(
        "--max_length", type=int, help="longest sequence (default max_position_embeddings)"
    )
    sub.add_argument("--vocabulary", help="spec, for directories without tokenizer.json alone")
    sub.add_argument("--out", required=True, help="directory to write")


def add_hf_arguments(sub: Any) -> None:
    """Adds what `uncurl export --format hf` alone takes."""
    sub.add_argument("--max_shard_bytes", type=int, help="largest file of --format hf (5 GB)")


def import_hf(options: Options) -> Any:
    """`uncurl import`."""
    from uncurl_jax.checkpoints.convert import import_checkpoint
    from uncurl_jax.cli.commands import show_progress

    out = _absolute(options.pop("out"))
    directory = options.pop("from_hf")
    with show_progress("import", "piece") as show:
        return import_checkpoint(
            directory, out, progress=lambda _, done, total: show(done, total), **options
        )


def export_hf(options: Options) -> Any:
    """`uncurl export --format hf`."""
    from uncurl_jax.checkpoints.convert import export_checkpoint
    from uncurl_jax.cli.commands import show_progress

    out = _absolute(options.pop("out"))
    checkpoint = options.pop("checkpoint")
    with show_progress("export", "piece") as show:
        return export_checkpoint(
            checkpoint, out, progress=lambda _, done, total: show(done, total), **options
        )


def check_plan(plan: Any, manifest: dict[str, Any], file_format: str | None) -> None:
    """Refuses a plan whose result could not be written in the format that it is meant for.

    Args:
      plan: what was decided.
      manifest: of its statistics.
      file_format: "uncurl" or "hf"; None is "hf" for models that came from there.
    """
    model_type = manifest.get("hf_model_type")
    if file_format is None and model_type is None:
        return  # before the imports below, which bring Orbax along
    from uncurl_jax.checkpoints.huggingface.translate import check_plan as check
    from uncurl_jax.checkpoints.sinks import FORMATS

    if file_format not in (None, *FORMATS):
        raise InputError(f'--format must be "uncurl" or "hf", got {file_format!r}: choose one.')
    if file_format != "uncurl":
        check(plan.num_experts, plan.router, model_type or "transformers")


def _absolute(out: str) -> str:
    from uncurl_jax.cli.commands import new_output

    # Because Orbax refuses to write below a relative directory.
    return out if "://" in out else str(Path(new_output(out)).absolute())
