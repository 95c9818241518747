"""The command line: `uncurl COMMAND`. Progress on stderr, one JSON line on stdout.

Exit status: 0 success, 1 a gate failed or the program did, 2 the input was wrong (one sentence on
stderr says what), 143 a training run stopped on SIGTERM with everything saved. Importing this
module imports neither JAX nor TensorFlow; a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from uncurl_jax import __version__
from uncurl_jax.cli import (
    convert_commands,
    export_commands,
    recipe_commands,
    serve_command,
    t5x_commands,
)
from uncurl_jax.errors import InputError

_GIN_PREFIX = "--gin."


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text; options are never abbreviated."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what it does not know here, where the command's own options are known."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, list(self._option_string_actions), n=2)
            remedy = f": nearest {', '.join(near)}" if near else ""
            self.error(f"an argument must be one that the command takes, got {name}{remedy}")
        return namespace, unknown


def _count_list(text: str) -> int | tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"counts must be whole numbers with commas between them, as 8 or 8,4, got {text!r}"
        ) from None
    return counts[0] if len(counts) == 1 else counts


def _number_list(text: str) -> tuple[int, ...]:
    counts = _count_list(text)
    return (counts,) if isinstance(counts, int) else counts


def _name_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shard must be i/n with 0 <= i < n, as 0/4, got {text!r}"
        ) from None


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = _Parser(
        prog="uncurl",
        description="Prune the experts of sparse mixture-of-experts language models for a task.",
        epilog="Each command has --help. Docs: README.md and docs/.",
    )
    parser.add_argument("--version", action="version", version=f"uncurl_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        _add_gin_arguments(sub)
        return sub

    sub = command("gin", "Show what gin files come to, with every default filled in.")
    sub.add_argument(
        "--show", action="append", dest="gin_file", metavar="FILE", help="as --gin_file"
    )
    t5x_commands.add_source(sub)
    _add_data_commands(command)
    _add_model_commands(command)
    _add_study_commands(command)
    _add_placement_command(command)
    _add_bench_command(command)
    _add_aot_command(command)
    recipe_commands.add_parser(command)
    serve_command.add_parser(command)
    t5x_commands.add_parser(command, _add_gin_arguments)
    return parser


def _add_gin_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--gin_file",
        action="append",
        metavar="FILE",
        help="gin file, from this directory or the package; may be repeated",
    )
    sub.add_argument("--gin.X=Y", dest="unused", metavar="", help="one more gin binding")


def _add_data_commands(command: Any) -> None:
    sub = command("cache", "Tokenise a task once into memory-mapped files.")
    sub.add_argument("--task", help="a task's name (rte, boolq, ...) or seqio:<name>")
    sub.add_argument("--data_dir", help="directory with <Task>/{train,val}.jsonl")
    sub.add_argument("--vocabulary", help='"bytes" (default), a .model file, or a GPT-2 directory')
    sub.add_argument("--max_length", type=int, help="most tokens per row (default 512)")
    sub.add_argument("--split", action="append", dest="splits", help="may be repeated")
    sub.add_argument("--out", required=True, help="directory to write")


def _add_task_arguments(
    sub: argparse.ArgumentParser, split: str, *, is_required: bool = True
) -> None:
    sub.add_argument("--task", required=is_required, help="a token cache, or a task's name")
    sub.add_argument("--split", help=f"split of the task (default {split})")
    sub.add_argument("--data_dir", help="where the files of a named task lie")
    sub.add_argument("--vocabulary", help="spec; by default the checkpoint's own")


def _add_mesh_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--expert_partitions", type=int, help="devices that share a layer's experts")
    sub.add_argument("--model_partitions", type=int, help="devices that share heads and units")
    _add_distributed_argument(sub)


def _add_distributed_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--distributed",
        action="store_true",
        help="one process of several (jax.distributed); addresses come from the TPU pod, or from "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )


def _add_model_commands(command: Any) -> None:
    sub = command("train", "Pretrain, warm up a router or fine-tune, as a gin file says.")
    sub.add_argument("--cache", help="token cache of the training split")
    sub.add_argument("--checkpoint", help="checkpoint to begin with")
    sub.add_argument("--validation", help="token cache that TrainConfig.early_stopping scores")
    sub.add_argument("--teacher", help="checkpoint that distillation learns from (distill.gin)")
    sub.add_argument("--placement", help="what uncurl placement --mode train wrote: mesh and axes")
    sub.add_argument("--out", required=True, help="directory for checkpoints and metrics")
    _add_distributed_argument(sub)

    sub = command("calibrate", "Gather router statistics of a checkpoint on a task.")
    sub.add_argument("--checkpoint", required=True)
    _add_task_arguments(sub, "train")
    sub.add_argument("--out", required=True, help="router_statistics.npz to write")
    sub.add_argument("--batch_size", type=int)
    sub.add_argument("--max_batches", type=int)
    sub.add_argument("--dropless", action="store_true", dest="is_dropless")
    sub.add_argument(
        "--collect",
        action="append",
        help="optional statistics: outputs (for ean, reap), all_outputs (for hc_smoe); repeatable",
    )
    sub.add_argument(
        "--inputs_out", help="also sample the layers' inputs, for router fit and merge errors"
    )
    sub.add_argument("--sample_tokens", type=int, help="tokens of that sample (default 4096)")
    sub.add_argument(
        "--shard", type=_shard, metavar="i/n", help="part i of n batches; see merge-statistics"
    )
    sub.add_argument(
        "--layer_by_layer",
        action="store_true",
        help="for models larger than memory: parameters are read as they are needed",
    )
    sub.add_argument("--activations_dir", help="with --layer_by_layer: keep activations on disk")
    _add_mesh_arguments(sub)

    sub = command("merge-statistics", "Add statistics of different tokens: shards, or more tasks.")
    sub.add_argument("statistics", nargs="+", metavar="STATISTICS")
    sub.add_argument("--out", required=True, help="router_statistics.npz to write")

    _add_plan_command(command)

    sub = command("inspect-plan", "Show a plan's diagnostics as a table, and as a picture.")
    sub.add_argument("plan", metavar="PLAN")
    sub.add_argument(
        "--picture", help="HTML page to write: the table, clusters and loads of every layer"
    )

    sub = command("prune", "Carry out a plan: checkpoint in, smaller checkpoint out.")
    sub.add_argument("--checkpoint", required=True)
    sub.add_argument("--plan", required=True)
    sub.add_argument("--workers", type=int, help="processes for the alignment; chosen if not given")
    sub.add_argument("--format", help="of the result: uncurl (default), or hf (transformers)")
    sub.add_argument("--max_shard_bytes", type=int, help="largest file of --format hf (5 GB)")
    sub.add_argument("--out", required=True)

    convert_commands.add_import_parser(command)
    export_commands.add_parser(command)

    sub = command("evaluate", "Score a checkpoint on a task.")
    sub.add_argument("--checkpoint", required=True)
    _add_task_arguments(sub, "validation")
    sub.add_argument("--out", required=True, help="metrics.json to write")
    sub.add_argument("--mode", help="rank (default): option log-likelihoods; or generate")
    sub.add_argument("--length_normalized", action="store_true", dest="is_length_normalized")
    sub.add_argument("--dropless", action="store_true", dest="is_dropless")
    sub.add_argument("--examples_per_batch", type=int)
    sub.add_argument("--max_new_tokens", type=int)
    _add_mesh_arguments(sub)

    sub = command("compare", "Compare two checkpoints on a task, example by example.")
    sub.add_argument("a", metavar="A", help="the model before: a checkpoint, or its metrics.json")
    sub.add_argument("b", metavar="B", help="the model after: the same")
    _add_task_arguments(sub, "validation", is_required=False)
    sub.add_argument("--out", required=True, help="compare.json to write")
    sub.add_argument("--length_normalized", action="store_true", dest="is_length_normalized")
    sub.add_argument("--dropless", action="store_true", dest="is_dropless")
    sub.add_argument("--examples_per_batch", type=int)

    sub = command("verify", "Replay a pruned checkpoint's plan and compare every array.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("--source", help="the unpruned checkpoint, if it was moved")
    sub.add_argument("--workers", type=int, help="processes for the alignment; chosen if not given")

    sub = command("inspect", "Describe a checkpoint: layers, experts, parameters, bytes, origin.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")


def _add_plan_command(command: Any) -> None:
    sub = command("plan", "Decide which experts are merged or dropped.")
    sub.add_argument("--statistics", required=True, help="what calibrate wrote")
    sub.add_argument(
        "--num_experts",
        type=_count_list,
        help="experts per MoE layer afterwards: one number, or one per MoE layer with commas",
    )
    sub.add_argument("--total_experts", type=int, help="experts of all MoE layers together")
    sub.add_argument("--multiple_of", type=int, help="every count a multiple of this")
    sub.add_argument("--method", help="uncurl (default) or another of docs/methods.md")
    sub.add_argument(
        "--layer_methods",
        type=_name_list,
        help="with --method composite: a method per MoE layer, the last for all that follow",
    )
    sub.add_argument("--router", help="reference (default), mean, fit, reinit, remap")
    sub.add_argument("--affinity", help="cosine (default), pearson, centered")
    sub.add_argument("--assign_labels", help="kmeans (default), cluster_qr")
    sub.add_argument("--merge_weights", help="frequency (default), gate_mass, uniform")
    sub.add_argument("--max_cluster_size", type=int)
    sub.add_argument("--num_protected", type=int, help="of uncurl_protected; by default by rule")
    sub.add_argument("--alignment", help="features (default), unit_features, none")
    sub.add_argument("--no_align", action="store_const", const="none", dest="alignment")
    sub.add_argument("--gate_compensation", action="store_true")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--checkpoint", help="what was calibrated; methods that look at weights ask")
    sub.add_argument("--base_checkpoint", help="of router_norm: an earlier checkpoint")
    sub.add_argument("--router_inputs", help="what calibrate --inputs_out wrote")
    sub.add_argument(
        "--diagnose",
        action="store_true",
        help="with --checkpoint: align and merge in memory, and measure what is lost",
    )
    sub.add_argument("--workers", type=int, help="processes for that alignment (default 0)")
    sub.add_argument(
        "--format",
        help="that the result must fit: hf for models that came from there, else uncurl",
    )
    sub.add_argument("--out", required=True, help="pruning_plan.json to write")


def _add_study_commands(command: Any) -> None:
    sub = command("quickstart", "The whole job on built-in data, in minutes on a CPU.")
    sub.add_argument("--out", default="quickstart_out", help="directory (default quickstart_out)")

    sub = command("sweep", "Run a study: counts, methods, tasks and seeds; resumable.")
    sub.add_argument("--out", required=True)
    sub.add_argument("--data_dir", help="where the files of the tasks lie")
    sub.add_argument("--cache_dir", help="token caches, <task>/<split>")
    sub.add_argument("--shard", type=_shard, metavar="i/n", help="do part i of n (from 0)")
    sub.add_argument(
        "--dry_run", action="store_true", help="say what would be done and what it costs"
    )

    sub = command("pilot", "From a checkpoint and a task to a decision: prune, fine-tune, judge.")
    sub.add_argument("--checkpoint", required=True, help="what to prune")
    sub.add_argument("--task", help="a registered task, or a name for DATA_DIR/train.jsonl")
    sub.add_argument("--data_dir", help="where the files of the task lie")
    sub.add_argument("--cache_dir", help="token caches, <task>/<split>")
    sub.add_argument("--target_experts", type=_count_list, required=True, help="as 4,8,16")
    sub.add_argument("--gate", help="limits to keep, as configs/gates/default.json")
    sub.add_argument("--seeds", type=_number_list, help="of prune and training (default 0,1,2)")
    sub.add_argument("--out", required=True, help="directory of study, report and verdicts")

    sub = command("report", "Write report.html and report.json of a study.")
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument(
        "--margin", type=float, help="points below a model from scratch that may be (default 0)"
    )
    sub.add_argument(
        "--tolerance", type=float, help="points below the unpruned model that may be (default 1)"
    )

    sub = command("gate", "Judge a pruned model of a report by limits; exit status 1 if it fails.")
    sub.add_argument("report", metavar="REPORT", help="report.json that uncurl report wrote")
    sub.add_argument("--gate", required=True, help="limits, as configs/gates/default.json")
    sub.add_argument("--candidate", help="as 16to4-uncurl-reference; default the threshold's")
    sub.add_argument("--bench", help="what uncurl bench wrote, for min_latency_gain")
    sub.add_argument("--out", required=True, help="gate.json to write")


def _add_placement_command(command: Any) -> None:
    sub = command(
        "placement", "Choose the mesh and where experts are, for a TPU slice and a batch."
    )
    sub.add_argument("--checkpoint", help="the model; or give a --gin_file that binds ModelConfig")
    sub.add_argument(
        "--slice", required=True, help="of configs/slices or configs/hosts: v5e-16, h100-2"
    )
    sub.add_argument("--batch", type=int, required=True, help="rows per step, over all chips")
    sub.add_argument("--length", type=int, required=True, help="tokens per row; 1 to decode")
    sub.add_argument("--mode", choices=("train", "serve"), help="train (default) or serve")
    sub.add_argument("--accumulation_steps", type=int, help="parts that a batch is trained in")
    sub.add_argument(
        "--param_dtype",
        choices=("bfloat16", "float32"),
        help="of parameters when serving (default bfloat16); training keeps float32",
    )
    sub.add_argument(
        "--cache_length",
        type=int,
        help="positions of the key-value cache when serving (default the model's max_length)",
    )
    sub.add_argument("--plan", help="pruning_plan.json: place the model after this prune")
    sub.add_argument(
        "--num_experts",
        type=_count_list,
        help="what if: experts per MoE layer after a prune, one number or one per layer",
    )
    sub.add_argument("--statistics", help="what calibrate wrote: predicts what capacity drops")
    sub.add_argument(
        "--max_drop_fraction", type=float, help="refuse layouts that drop more of any layer"
    )
    sub.add_argument("--expert_partitions", type=int, help="only meshes with so many")
    sub.add_argument("--model_partitions", type=int, help="only meshes with so many")
    sub.add_argument("--headroom", type=float, help="share of HBM that stays free (default 0.1)")
    sub.add_argument("--picture", help="memory and times of the layouts, .svg or .png")
    sub.add_argument("--out", help="placement.json to write, which train --placement takes")


def _add_bench_command(command: Any) -> None:
    sub = command("bench", "Measure latency, throughput and communication on the devices present.")
    sub.add_argument(
        "--checkpoint", action="append", dest="checkpoints", help="repeatable: before, after, ..."
    )
    sub.add_argument(
        "--num_experts",
        type=_count_list,
        help="with a --gin_file that binds ModelConfig: random models of 8,32,... experts",
    )
    sub.add_argument("--devices", type=_count_list, help="counts, as 1,2,8 (default: powers of 2)")
    sub.add_argument(
        "--layouts",
        type=_name_list,
        help="of experts: sharded,replicated (default), group:G, placement",
    )
    sub.add_argument("--placement", help="what uncurl placement wrote; adds the layout placement")
    sub.add_argument("--batch_per_device", type=int, help="rows on each device (default 2)")
    sub.add_argument("--length", type=int, help="tokens per row (default 256)")
    sub.add_argument(
        "--decode_batches", type=_count_list, help="rows of decoding, all devices (default 1,64)"
    )
    sub.add_argument("--decode_steps", type=int, help="steps timed together (default 16)")
    sub.add_argument("--layer_calls", type=int, help="calls of a layer in a launch (default 16)")
    sub.add_argument("--repeats", type=int, help="measured rounds (default 20)")
    sub.add_argument("--warmup", type=int, help="rounds before them (default 2)")
    sub.add_argument("--seed", type=int, help="of parameters, tokens and orders (default 0)")
    sub.add_argument(
        "--measure",
        type=_name_list,
        help="some of forward,layers,prefill,decode,equality,bytes (default all)",
    )
    sub.add_argument("--training", action="store_true", dest="has_training", help="its step too")
    sub.add_argument(
        "--so_far",
        metavar="PARTIAL",
        help="measure nothing: write the record of what an interrupted benchmark left",
    )
    sub.add_argument("--out", required=True, help="bench.json to write, with pictures beside it")


def _add_aot_command(command: Any) -> None:
    sub = command(
        "aot", "Compile a stage's programs for a TPU slice without a TPU: memory, communication."
    )
    sub.add_argument("--slice", required=True, help="name or file of configs/slices: v5e-16, ...")
    sub.add_argument(
        "--programs",
        type=_name_list,
        help="some of train,calibrate,evaluate,decode (default all of them)",
    )
    sub.add_argument("--checkpoint", help="the model, if the gin files name none")
    sub.add_argument(
        "--num_experts",
        type=_count_list,
        help="as if pruned: experts per MoE layer, one number or one per MoE layer",
    )
    sub.add_argument("--batch", type=int, help="rows per optimizer step, over all chips")
    sub.add_argument("--length", type=int, help="tokens per row (default the longest of the model)")
    sub.add_argument("--expert_partitions", type=int, help="devices that share a layer's experts")
    sub.add_argument("--model_partitions", type=int, help="devices that share heads and units")
    sub.add_argument("--placement", help="what uncurl placement wrote: mesh and axes")
    sub.add_argument("--out", required=True, help="JSON to write, also if a program does not fit")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    bindings = [a.removeprefix(_GIN_PREFIX) for a in arguments if a.startswith(_GIN_PREFIX)]
    parser = build_parser()
    options = vars(parser.parse_args([a for a in arguments if not a.startswith(_GIN_PREFIX)]))
    name = options.pop("command")
    files = options.pop("gin_file", [])
    # TensorFlow and XLA would mix their logs into the progress on stderr.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from uncurl_jax.cli import commands, gin_config
    from uncurl_jax.training import preemption

    os.environ.update(commands.ENVIRONMENT.get(name, {}))
    try:
        default = commands.DEFAULT_GIN_FILES.get(name)
        files = files or ([default] if default else [])
        t5x_commands.prepare(name, options, files, bindings)
        gin_config.parse(files, bindings, commands.GIN_MODULES[name])
        result = commands.COMMANDS[name](options)
    except InputError as error:
        return _fail(name, str(error))
    except OSError as error:
        return _fail(name, gin_config.system_refused(error))
    except preemption.Preempted as stopped:
        print(f"uncurl {name}: {stopped}.", file=sys.stderr)
        return preemption.EXIT_STATUS
    except KeyboardInterrupt:
        print(f"uncurl {name}: interrupted; run the same command again.", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = gin_config.explain(error)
        if sentence is None:
            raise
        return _fail(name, sentence)
    if result is not None:
        print(json.dumps(result))
    has_failed = commands.HAS_FAILED.get(name)
    return int(has_failed is not None and result is not None and has_failed(result))


def _fail(name: str, message: str) -> int:
    # gin appends where a configurable was called to the messages of errors that pass it.
    print(f"uncurl {name}: error: {message.splitlines()[0]}", file=sys.stderr)
    return 2
