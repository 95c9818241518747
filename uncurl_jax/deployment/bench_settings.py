"""What a benchmark measures: models, numbers of devices, layouts of experts; all checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from uncurl_jax import artifacts
from uncurl_jax.checkpoints import layout as checkpoint_layout
from uncurl_jax.config import ModelConfig
from uncurl_jax.errors import InputError
from uncurl_jax.models.architecture import count_parameters
from uncurl_jax.partitioning import ExpertAxes, check_expert_axes, make_mesh

SINGLE, SHARDED, REPLICATED, PLACEMENT = "single", "sharded", "replicated", "placement"
MEASURES = ("forward", "layers", "prefill", "decode", "equality", "bytes")
_GROUP = re.compile(r"group:(\d+)")
_PLACEMENT_KEYS = ("expert_partitions", "model_partitions", "expert_axes")


class Placement(NamedTuple):
    """A mesh and, per layer, the axes that divide its experts, as `uncurl placement` writes it."""

    expert_partitions: int
    model_partitions: int
    expert_axes: ExpertAxes | None


class Layout(NamedTuple):
    """Where the experts of one model are on some devices.

    Attributes:
      name: "single" (one device), "sharded" (every layer's experts divided among all devices),
        "group:G" (divided among G devices; each group of G holds all), "replicated", "placement".
      data, expert, model: sizes of the mesh's axes.
      expert_axes: see partitioning.ExpertAxes.
    """

    name: str
    data: int
    expert: int
    model: int
    expert_axes: ExpertAxes | None

    @property
    def token_shards(self) -> int:
        """Devices among which a batch is divided."""
        return self.data * self.expert

    def make_mesh(self, devices: Sequence[Any]) -> Mesh | None:
        """Returns the mesh on the first devices, None for one device."""
        count = self.data * self.expert * self.model
        if self.name == SINGLE:
            return None
        return make_mesh(
            expert_partitions=self.expert, model_partitions=self.model, devices=devices[:count]
        )


class BenchModel(NamedTuple):
    """A model to measure.

    Attributes:
      name: unique in a record: a checkpoint's directory, or size and experts as "354M+32e".
      config: its architecture.
      checkpoint: where its parameters come from; None for random ones.
    """

    name: str
    config: ModelConfig
    checkpoint: checkpoint_layout.CheckpointPath | None

    def to_json(self) -> dict[str, Any]:
        """Returns the object that records hold."""
        counts = count_parameters(self.config)
        moe_layers = self.config.moe_layers
        found = None
        if self.checkpoint is not None:
            found = {
                "name": self.name,
                "step": self.checkpoint.step,
                "fingerprint": checkpoint_layout.fingerprint(self.checkpoint),
            }
        return {
            "name": self.name,
            "backbone": backbone_name(self.config),
            "parameters_from": "random" if self.checkpoint is None else "checkpoint",
            "checkpoint": found,
            "num_experts": [self.config.num_experts[layer] for layer in moe_layers],
            "parameters": counts.total,
            "active_parameters": counts.active,
            "config": self.config.to_dict(),
        }


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """How models are measured, the same for all of them.

    Attributes:
      devices: numbers of devices, each the first so many of those present.
      layouts: see Layout; at one device there is only "single".
      placement: of the layout "placement".
      batch_per_device: rows of the forward pass, the prefill and the training step.
      length: tokens per row.
      decode_batches: rows, over all devices, of decoding with the key-value cache.
      decode_steps: steps in a row that are timed together.
      layer_calls: repetitions in one launch of what is timed alone (a layer and its parts).
      repeats, warmup: rounds.
      seed: of parameters, tokens and orders.
      measure: of MEASURES.
      has_training: whether the training step is measured too.
    """

    devices: tuple[int, ...]
    layouts: tuple[str, ...]
    placement: Placement | None
    batch_per_device: int
    length: int
    decode_batches: tuple[int, ...]
    decode_steps: int
    layer_calls: int
    repeats: int
    warmup: int
    seed: int
    measure: tuple[str, ...]
    has_training: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the object that records hold."""
        values = dataclasses.asdict(self)
        if self.placement is not None:
            values["placement"] = self.placement._asdict()
        return values


def load_placement(path: str | os.PathLike[str]) -> Placement:
    """Reads the three keys of a placement file; others, such as its reasons, are left unread.

    Raises:
      InputError: If the file is missing, lacks a key or holds something else.
    """
    values = artifacts.read_json(path)
    is_object = isinstance(values, Mapping)
    missing = [key for key in _PLACEMENT_KEYS if not is_object or key not in values]
    if missing:
        raise InputError(
            f"A placement must have {', '.join(_PLACEMENT_KEYS)}, got {Path(path).name} without "
            f"{missing[0]}: make it with uncurl placement."
        )
    counts = (values["expert_partitions"], values["model_partitions"])
    if not all(isinstance(count, int) and count >= 1 for count in counts):
        raise InputError(
            f"expert_partitions and model_partitions of a placement must be whole numbers of at "
            f"least 1, got {counts[0]!r} and {counts[1]!r}."
        )
    axes = values["expert_axes"]
    is_list = isinstance(axes, list) and all(isinstance(entry, list) for entry in axes)
    if axes is not None and not is_list:
        raise InputError(
            "expert_axes of a placement must be a list of lists of mesh axes, one per layer, or "
            f"null, got {axes!r}."
        )
    return Placement(*counts, None if axes is None else tuple(tuple(entry) for entry in axes))


@functools.lru_cache(maxsize=64)
def backbone_name(config: ModelConfig) -> str:
    """Names the size of the model with dense layers in place of its experts, as "354M".

    Cut, not rounded: GPT-2 medium's shape has 354.8M parameters, and the paper says 354M.
    """
    total = count_parameters(config.with_experts(0)).total
    power = min((len(str(total)) - 1) // 3, 3)
    size = total / 1000**power
    shown = f"{math.floor(size)}" if size >= 10 else f"{math.floor(10 * size) / 10:g}"
    return shown + ("", "K", "M", "B")[power]


def find_models(
    model: ModelConfig | None,
    num_experts: Sequence[int],
    checkpoints: Sequence[str | os.PathLike[str]],
) -> list[BenchModel]:
    """Returns the models to measure: the checkpoints, then `model` with each number of experts.

    Raises:
      InputError: If there are none, or a checkpoint or number does not exist.
    """
    models = []
    for path in checkpoints:
        found = checkpoint_layout.resolve(path)
        models.append(BenchModel(found.directory.name, found.model_config(), found))
    if num_experts and model is None:
        raise InputError(
            "--num_experts needs an architecture, got none: give --gin_file gin/models/354m.gin or "
            "another file of gin/models."
        )
    if model is not None and num_experts and not model.moe_layers:
        raise InputError(
            "--num_experts needs an architecture with layers of experts, got a dense one: leave it "
            "out or set NUM_EXPERTS above 0."
        )
    for count in num_experts or ((None,) if model is not None else ()):
        config = model if model is None or count is None else model.with_experts(count)
        assert config is not None
        counts = sorted({config.num_experts[layer] for layer in config.moe_layers})
        experts = f"+{'-'.join(map(str, counts))}e" if counts else " dense"
        models.append(BenchModel(f"{backbone_name(config)}{experts}", config, None))
    if not models:
        raise InputError(
            "A benchmark needs a model, got none: give --checkpoint, or --gin_file "
            "gin/models/354m.gin with --num_experts 8,32."
        )
    names = [entry.name for entry in models]
    return [
        entry._replace(name=f"{entry.name}-{names[:place].count(entry.name) + 1}")
        if entry.name in names[:place]
        else entry
        for place, entry in enumerate(models)
    ]


def resolve_layout(
    name: str, num_devices: int, num_layers: int, placement: Placement | None = None
) -> Layout:
    """Returns what a layout's name means for a model on some devices.

    Raises:
      InputError: If the devices cannot be divided so.
    """
    if num_devices == 1:
        return Layout(SINGLE, 1, 1, 1, None)
    everywhere: ExpertAxes = ((),) * num_layers
    group = _GROUP.fullmatch(name)
    if name == SHARDED or (group and int(group[1]) == num_devices):
        return Layout(SHARDED, 1, num_devices, 1, None)
    if name == REPLICATED or (group and int(group[1]) == 1):
        return Layout(REPLICATED, num_devices, 1, 1, everywhere)
    if group:
        size = int(group[1])
        if not size or num_devices % size:
            possible = [f"group:{g}" for g in range(2, num_devices) if num_devices % g == 0]
            raise InputError(
                f"A layout group:G must divide the number of devices, got {name} on {num_devices}: "
                f"choose {' or '.join(possible) or 'sharded or replicated'}, or other --devices."
            )
        return Layout(name, num_devices // size, size, 1, None)
    if name == PLACEMENT:
        assert placement is not None
        expert, model, axes = placement
        if num_devices % (expert * model):
            raise InputError(
                "expert_partitions * model_partitions of the placement must divide the number of "
                f"devices, got {expert} * {model} on {num_devices}: choose --devices "
                f"{expert * model} or a multiple."
            )
        check_expert_axes(axes, num_layers)
        return Layout(PLACEMENT, num_devices // (expert * model), expert, model, axes)
    raise ValueError(f"A layout must be checked before it is resolved, got {name!r}.")


def _check_layout_name(name: str, placement: Placement | None) -> None:
    if name == PLACEMENT and placement is None:
        raise InputError(
            "The layout placement needs a file, got no --placement: give one or leave it out."
        )
    if name not in (SHARDED, REPLICATED, PLACEMENT) and not _GROUP.fullmatch(name):
        known = [SHARDED, "group:2", REPLICATED, PLACEMENT]
        near = difflib.get_close_matches(name, known, n=1) or [SHARDED]
        raise InputError(
            f"layouts must be sharded, replicated, group:G or placement, got {name!r}: nearest "
            f"{near[0]}."
        )


def default_devices(num_present: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all that are present."""
    powers = [1 << power for power in range(num_present.bit_length())]
    return tuple(sorted({*(count for count in powers if count <= num_present), num_present}))


def check_settings(
    settings: BenchSettings, models: Sequence[BenchModel], num_present: int
) -> dict[tuple[str, int], list[Layout]]:
    """Checks everything that can be wrong, and lists the layouts of each model and device count.

    Raises:
      InputError: If something is.
    """
    _check_numbers(settings)
    for name in settings.layouts:
        _check_layout_name(name, settings.placement)
    if max(settings.devices) > num_present or min(settings.devices) < 1:
        wrong = next(count for count in settings.devices if not 1 <= count <= num_present)
        raise InputError(
            f"--devices must be from 1 to the {num_present} present, got {wrong}: choose some of "
            f"{', '.join(map(str, default_devices(num_present)))}."
        )
    unknown = [name for name in settings.measure if name not in MEASURES]
    if unknown or not settings.measure:
        near = difflib.get_close_matches(unknown[0] if unknown else "", MEASURES, n=1)
        raise InputError(
            f"--measure must name some of {', '.join(MEASURES)}, got "
            f"{repr(unknown[0]) if unknown else 'none'}: nearest {(near or MEASURES)[0]}."
        )
    found: dict[tuple[str, int], list[Layout]] = {}
    for entry in models:
        entry.config.check_decoder("uncurl bench")
        _check_lengths(settings, entry)
        for count in settings.devices:
            layouts = [
                resolve_layout(name, count, entry.config.num_layers, settings.placement)
                for name in settings.layouts
            ]
            if not entry.config.moe_layers:
                # Layouts differ in where experts are.
                layouts = layouts[:1]
            found[entry.name, count] = list({layout.name: layout for layout in layouts}.values())
            if "decode" in settings.measure:
                for layout in found[entry.name, count]:
                    _check_decode_batches(settings.decode_batches, layout)
    return found


def _check_numbers(settings: BenchSettings) -> None:
    for name in ("batch_per_device", "length", "decode_steps", "layer_calls", "repeats"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(settings, name)}.")
    if settings.warmup < 1:
        raise InputError(
            f"warmup must be at least 1, got {settings.warmup}: the first round compiles."
        )
    for name in ("devices", "layouts", "decode_batches"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} must name at least one, each once, got {values}.")


def _check_lengths(settings: BenchSettings, entry: BenchModel) -> None:
    longest = entry.config.max_length
    if settings.length > longest:
        raise InputError(
            f"--length must be at most the max_length of each model, got {settings.length} for "
            f"{entry.name} with {longest}: choose --length {longest} or less."
        )
    needed = settings.length + settings.decode_steps
    if "decode" in settings.measure and needed > longest:
        best = max(1, longest - settings.decode_steps)
        raise InputError(
            f"--length and --decode_steps together must be at most the max_length of each model, "
            f"got {settings.length} + {settings.decode_steps} for {entry.name} with {longest}: "
            f"choose --length {best}."
        )


def _check_decode_batches(batches: Sequence[int], layout: Layout) -> None:
    shards = layout.token_shards
    for batch in batches:
        if batch != 1 and (batch < 1 or batch % shards):
            nearest = max(shards, batch // shards * shards)
            raise InputError(
                "--decode_batches must be 1 or a multiple of the devices that share a batch, got "
                f"{batch} on {shards}: choose {nearest} or {nearest + shards}."
            )
