"""`uncurl t5x train|eval|infer|adopt`: T5X as a runner, and its checkpoints as ours."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from uncurl_jax.errors import InputError

Options = dict[str, Any]

_T5X_IMPORT = re.compile(
    r"^(from t5x[\w.]* import |import t5x|from uncurl_jax\.t5x_adapter )", re.MULTILINE
)
_MODES = {
    "train": "Pretrain or fine-tune with T5X.",
    "eval": "Score a checkpoint with T5X.",
    "infer": "Write predictions or scores of each row with T5X.",
}


def add_parser(command: Callable[[str, str], argparse.ArgumentParser], add_common: Any) -> None:
    """Adds the command; `add_common` gives a mode's parser what all commands take."""
    sub = command("t5x", "T5X as a runner: train, eval, infer; and adopt its checkpoints.")
    modes = sub.add_subparsers(dest="mode", metavar="MODE", required=True)

    def mode(name: str, text: str) -> argparse.ArgumentParser:
        parser = modes.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        add_common(parser)
        return parser

    for name, text in _MODES.items():
        parser = mode(name, f"{text} Give --gin_file gin/t5x/*.gin; see docs/t5x.md.")
        add_source(parser)
        parser.add_argument(
            "--distributed", action="store_true", help="one process of several (jax.distributed)"
        )
    parser = mode(
        "adopt",
        "Let our commands read a checkpoint that T5X wrote without us. A --gin_file that binds "
        "ModelConfig, as gin/models/354m.gin, says what it is of; T5X itself is not needed.",
    )
    parser.add_argument("checkpoint", metavar="DIR", help="directory of checkpoint_<step> folders")
    parser.add_argument("--vocabulary", required=True, help="spec of the vocabulary of its tokens")
    parser.add_argument(
        "--out",
        help="new directory; needed where DIR holds steps of T5X's older layout, or an "
        "encoder-decoder of Flaxformer's, which are copied. Without it three JSON files are added "
        "to DIR",
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says where T5X is."""
    parser.add_argument(
        "--t5x_src", metavar="DIR", help="checkout of T5X; default UNCURL_T5X_SRC, or installed"
    )


def prepare(name: str, options: Options, files: Sequence[str], bindings: Sequence[str]) -> None:
    """Makes T5X importable before gin files that import it are parsed, and finds typos in them.

    Raises:
      InputError: If T5X is needed and cannot be found, or a gin file or binding is mistyped.
    """
    source = options.pop("t5x_src", None)
    if name not in ("t5x", "gin") or options.get("mode") == "adopt":
        return
    from uncurl_jax.cli.gin_config import read_with_includes

    texts = read_with_includes(files)
    if name == "gin" and not any(_T5X_IMPORT.search(text) for text in texts.values()):
        return
    from uncurl_jax.cli import commands, gin_static
    from uncurl_jax.t5x_adapter import availability

    availability.find(source)
    gin_static.check(texts, bindings, commands.GIN_MODULES[name])
    availability.make_importable(source)


def t5x(options: Options) -> Any:
    """`uncurl t5x`."""
    mode = options.pop("mode")
    if mode == "adopt":
        return _adopt(options)
    from uncurl_jax.cli.commands import initialize_distributed, only_first_process

    initialize_distributed(options)
    from uncurl_jax.t5x_adapter import launch

    return only_first_process(launch.run(mode))


def _adopt(options: Options) -> Any:
    from uncurl_jax.checkpoints import adopt
    from uncurl_jax.cli.gin_config import bound, configured
    from uncurl_jax.config import ModelConfig
    from uncurl_jax.data.vocabulary import load_vocabulary

    if not bound(ModelConfig):
        raise InputError(
            "A checkpoint is adopted as that of a model, got no ModelConfig: give the --gin_file "
            "that binds the one it was trained with, as gin/models/354m.gin."
        )
    config = configured(ModelConfig)()
    vocabulary = load_vocabulary(options["vocabulary"]).describe()
    if config.has_encoder:
        return _adopt_flaxformer(options, config, vocabulary)
    result = adopt.adopt_checkpoint(
        options["checkpoint"],
        config,
        vocabulary,
        out=options.get("out"),
        progress=lambda text: print(f"uncurl t5x: {text}", file=sys.stderr),
    )
    return {"checkpoint": str(result.directory), "steps": result.steps}


def _adopt_flaxformer(options: Options, config: Any, vocabulary: dict[str, Any]) -> Any:
    from uncurl_jax.checkpoints.convert import import_t5x
    from uncurl_jax.cli.commands import new_output, show_progress

    if "out" not in options:
        raise InputError(
            "An encoder-decoder of Flaxformer's is copied to a new directory, under the names of "
            f"this package, got {options['checkpoint']} without --out: give one."
        )
    out = options["out"]
    # Because Orbax refuses to write below a relative directory.
    out = out if "://" in out else str(new_output(out).absolute())
    with show_progress("import", "piece") as show:
        return import_t5x(
            options["checkpoint"],
            out,
            config,
            vocabulary,
            progress=lambda _, done, total: show(done, total),
        )
