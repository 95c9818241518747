"""`uncurl export` and `uncurl verify-artifact`: checkpoints in, what servers load out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from uncurl_jax.cli import convert_commands
from uncurl_jax.errors import InputError

Options = dict[str, Any]


def add_parser(command: Any) -> None:
    """Adds the commands; `command(name, help)` makes a parser."""
    sub = command("export", "Write a checkpoint as what a server loads.")
    sub.add_argument(
        "--checkpoint",
        action="append",
        dest="checkpoints",
        required=True,
        metavar="[NAME=]DIR",
        help="repeatable where models of one base may share an artifact; named for its directory",
    )
    sub.add_argument(
        "--format",
        required=True,
        help="stablehlo (runs with jax alone), saved_model (TensorFlow Serving), orbax (arrays for "
        "a serving mesh) or hf (a directory of transformers)",
    )
    sub.add_argument("--out", required=True, help="directory to write")
    sub.add_argument(
        "--dtype",
        help="bfloat16 or float32 (hf: float16 too) to store and serve in; default the model's "
        "own, of orbax bfloat16",
    )
    sub.add_argument("--max_length", type=int, help="most tokens of prompt and continuation")
    sub.add_argument("--quantize", dest="quantization", help="int8: the kernels of experts")
    sub.add_argument(
        "--cache",
        action="append",
        dest="caches",
        metavar="[NAME=]DIR",
        help="token cache to score checkpoint and artifact on; repeatable, of all models or of one",
    )
    sub.add_argument("--vocabulary", help="spec, if the files of the checkpoint's own have moved")
    sub.add_argument("--max_new_tokens", type=int, help="of saved_model's generate (default 16)")
    sub.add_argument("--serving", help="of orbax: name or file of configs/serving")
    sub.add_argument("--placement", help="of orbax: what uncurl placement --mode serve wrote")
    convert_commands.add_hf_arguments(sub)

    sub = command("verify-artifact", "Reload an artifact in a fresh process and compare.")
    sub.add_argument("artifact", metavar="DIR")


# Options that not every format takes.
_TAKES = {
    "stablehlo": {"max_length", "quantization", "caches", "vocabulary"},
    "saved_model": {"max_length", "quantization", "caches", "vocabulary", "max_new_tokens"},
    "orbax": {"max_length", "quantization", "caches", "vocabulary", "serving", "placement"},
    "hf": {"max_shard_bytes"},
}


def export(options: Options) -> Any:
    """`uncurl export`."""
    name = options.pop("format")
    if name not in _TAKES:
        raise InputError(f"--format must be {', '.join(_TAKES)}, got {name!r}: choose one.")
    for option in sorted(set(options) & set().union(*_TAKES.values()) - _TAKES[name]):
        shown = {"quantization": "quantize", "caches": "cache"}.get(option, option)
        raise InputError(f"--format {name} takes no --{shown}, got it: leave it out.")
    if name == "hf":
        if len(options["checkpoints"]) > 1:
            raise InputError("--format hf takes one --checkpoint, got several: export them apart.")
        (options["checkpoint"],) = options.pop("checkpoints")
        return convert_commands.export_hf(options)
    from uncurl_jax.cli.commands import new_output

    out = new_output(options.pop("out"))
    checkpoints = _named(options.pop("checkpoints"), "--checkpoint")
    if "caches" in options:
        options["caches"] = _caches(options["caches"], list(checkpoints))
    with _progress() as show:
        result = _write(name, checkpoints, out, {**options, "progress": show})
    _say(result)
    return result


def _write(name: str, checkpoints: dict[str, str], out: Path, options: Options) -> dict[str, Any]:
    from uncurl_jax.export.manifest import ExportOptions

    own = {
        key: options.pop(key)
        for key in ("max_new_tokens", "serving", "placement")
        if key in options
    }
    common = ExportOptions(evaluate=_evaluate, **options)
    if name == "stablehlo":
        from uncurl_jax.export.stablehlo import export_stablehlo

        return export_stablehlo(checkpoints, out, common)
    if name == "saved_model":
        from uncurl_jax.export.saved_model import export_saved_model

        return export_saved_model(checkpoints, out, common, **own)
    from uncurl_jax.export.serving_checkpoint import export_orbax

    return export_orbax(checkpoints, out, _serving_config(checkpoints, **own), common)


def _say(result: dict[str, Any]) -> None:
    """Prints sizes and scores, before and after."""
    sizes = result["checkpoint_bytes"]
    print(
        f"uncurl export: {sizes['parameters'] / 2**20:.1f} MiB of parameters "
        f"({sizes['on_disk'] / 2**20:.1f} MiB on disk) became {result['bytes'] / 2**20:.1f} MiB.",
        file=sys.stderr,
    )
    for name, model in result["models"].items():
        found = model.get("scores") or {}
        if "checkpoint" in found:
            print(
                f"uncurl export: {name} scores {found['checkpoint']['score']:.2f} before and "
                f"{found['artifact']['score']:.2f} as exported, on "
                f"{found['artifact']['num_examples']} examples of {model['task']}.",
                file=sys.stderr,
            )


def _serving_config(
    checkpoints: dict[str, str], serving: str | None = None, placement: str | None = None
) -> Any:
    """Returns the mesh that --serving or --placement names; one device if neither is given."""
    from uncurl_jax.checkpoints import layout
    from uncurl_jax.cli.gin_config import files_root
    from uncurl_jax.deployment.placement import load_placement, model_hash
    from uncurl_jax.export.serving_config import ServingConfig, load_serving_config

    if placement is None:
        return load_serving_config(serving or "one_device", files_root() / "configs" / "serving")
    if serving is not None:
        raise InputError("--serving and --placement both name a mesh: leave out one of them.")
    placed = load_placement(placement)
    models = [layout.resolve(path).model_config() for path in checkpoints.values()]
    if placed.mode != "serve" or any(model_hash(m) != placed.model_hash for m in models):
        raise InputError(
            f"--placement must be of this model and made with --mode serve, got {placement} for "
            f"num_experts {list(placed.num_experts)} and mode {placed.mode}: make it again."
        )
    sizes = (placed.data_partitions, placed.expert_partitions, placed.model_partitions)
    return ServingConfig(Path(placement).stem, sizes, expert_axes=placed.expert_axes)


def _named(texts: list[str], option: str) -> dict[str, str]:
    """Splits NAME=DIR; a directory without a name is called by its own."""
    named: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():
            name, path = Path(text).absolute().name, text
        if name in named:
            raise InputError(
                f"{option} must have different names, got {name!r} twice: write NAME=DIR."
            )
        named[name] = path
    return named


def _caches(texts: list[str], models: list[str]) -> dict[str, Any]:
    """Opens the token cache of each model."""
    from uncurl_jax.data.token_cache import TokenCache

    paths: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():
            paths = {model: text for model in models} | paths
        elif name not in models:
            raise InputError(
                f"--cache must be of one of the models, got {name!r}: they are {', '.join(models)}."
            )
        else:
            paths[name] = path
    opened = {}
    for name, path in paths.items():
        inner = Path(path) / "validation"
        opened[name] = TokenCache.open(inner if inner.is_dir() else path)
    return opened


def _evaluate(model: Any, cache: Any) -> dict[str, Any]:
    from uncurl_jax.evaluation.evaluator import evaluate_model

    return evaluate_model(model, cache, quiet=True).summary


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yields show(name of a part that is done)."""
    from tqdm import tqdm

    with tqdm(desc="export", file=sys.stderr, unit="part", delay=1.0) as bar:

        def show(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield show


def verify_artifact(options: Options) -> Any:
    """`uncurl verify-artifact`."""
    from uncurl_jax.export.verify import verify_artifact as verify

    return verify(options["artifact"])
