"""Compiles what a benchmark times for one model, number of devices and layout."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from uncurl_jax.deployment import bench_programs
from uncurl_jax.deployment.bench_decoding import decode_program, prefill_program
from uncurl_jax.deployment.bench_programs import CommunicationAlone, Forward, LayerKind
from uncurl_jax.deployment.bench_settings import BenchModel, BenchSettings, Layout
from uncurl_jax.deployment.timing import Alternative
from uncurl_jax.models.decoder import Params


class Subject(NamedTuple):
    """What is measured, in several layouts: a model on a number of devices."""

    model: BenchModel
    count: int
    settings: BenchSettings

    @property
    def batch(self) -> int:
        """Rows of a step on all devices."""
        return self.settings.batch_per_device * self.count

    @property
    def tokens(self) -> np.ndarray:
        """The rows themselves, [batch, length]."""
        settings = self.settings
        return bench_programs.random_tokens(
            self.model.config, self.batch, settings.length, settings.seed
        )

    def tokens_per_shard(self, layout: Layout) -> int:
        """Tokens of each device that shares the batch."""
        return self.batch * self.settings.length // layout.token_shards


class Built(NamedTuple):
    """A cell's compiled programs.

    Attributes:
      layout, mesh: where its experts are; no mesh on one device.
      kinds: of its MoE layers.
      forward: the forward pass, if anything needs it.
      alternatives: what is timed.
      num_collectives: by place in `kinds`, of what is timed as communication.
    """

    layout: Layout
    mesh: Mesh | None
    kinds: list[LayerKind]
    forward: Forward | None
    alternatives: dict[str, Alternative]
    num_collectives: dict[int, float]


def build(
    subject: Subject, layouts: Sequence[Layout], *, is_compared: bool
) -> tuple[list[Built], dict[int, Forward]]:
    """Compiles what is to be timed, for all layouts at the same time.

    Args:
      subject: the model and its devices.
      layouts: of its experts.
      is_compared: whether the logits of one device are needed too.

    Returns:
      The programs of each layout; and the forward pass on one device for each number of token
      groups, with shapes in the place of parameters.
    """
    started = [_start(subject, layout) for layout in layouts]
    makers = {
        (place, name): maker
        for place, begun in enumerate(started)
        for name, maker in begun.makers.items()
    }
    groups = sorted({layout.token_shards for layout in layouts}) if is_compared else []
    for count in groups:
        makers[count, "one device"] = functools.partial(_forward_of_one_device, subject, count)
    made = make_all(makers)
    built = [
        _built(begun, {name: made[place, name] for name in begun.makers})
        for place, begun in enumerate(started)
    ]
    return built, {count: made[count, "one device"] for count in groups}


class _Started(NamedTuple):
    """A layout with its parameters in place, and what compiles its programs."""

    layout: Layout
    mesh: Mesh | None
    kinds: list[LayerKind]
    makers: dict[str, Callable[[], Any]]
    measure: tuple[str, ...]


def _start(subject: Subject, layout: Layout) -> _Started:
    config, settings = subject.model.config, subject.settings
    wanted, tokens = settings.measure, subject.tokens
    mesh = layout.make_mesh(jax.devices()[: subject.count])
    params = bench_programs.serving_params(subject.model, mesh, layout, settings.seed)
    kinds = bench_programs.layer_kinds(config, layout, subject.tokens_per_shard(layout))
    makers: dict[str, Callable[[], Any]] = {
        "launch": functools.partial(bench_programs.launch_alone, mesh)
    }
    if {"forward", "equality", "bytes"} & set(wanted):
        makers["forward"] = functools.partial(
            bench_programs.compile_forward, config, params, tokens, mesh, layout
        )
    for place, kind in enumerate(kinds if "layers" in wanted else ()):
        makers |= _layer_makers(subject, layout, mesh, params, place, kind)
    if "prefill" in wanted:
        makers["prefill"] = functools.partial(prefill_program, config, params, tokens, mesh, layout)
    if "decode" in wanted:
        for rows in settings.decode_batches:
            makers[f"decode {rows}"] = functools.partial(
                decode_program, config, params, rows, mesh, layout, settings
            )
    return _Started(layout, mesh, kinds, makers, wanted)


def _built(begun: _Started, made: Mapping[str, Any]) -> Built:
    forward = made.get("forward")
    alternatives, num_collectives = {}, {}
    for name, program in made.items():
        if isinstance(program, CommunicationAlone):
            alternatives[name] = program.alternative
            num_collectives[int(name.partition(" ")[2])] = program.collectives
        elif name != "forward":
            alternatives[name] = program
    if forward is not None and "forward" in begun.measure:
        alternatives["forward"] = Alternative(forward)
    return Built(begun.layout, begun.mesh, begun.kinds, forward, alternatives, num_collectives)


def _forward_of_one_device(subject: Subject, num_groups: int) -> Forward:
    """Compiles it for one group's rows, and parameters that might not fit beside the others."""
    abstract = bench_programs.abstract_serving_params(subject.model.config)
    rows = np.split(subject.tokens, num_groups)[0]
    return bench_programs.compile_forward(subject.model.config, abstract, rows, None, None)


def _layer_makers(
    subject: Subject,
    layout: Layout,
    mesh: Mesh | None,
    params: Params,
    place: int,
    kind: LayerKind,
) -> dict[str, Callable[[], Any]]:
    """What compiles a layer and its parts."""
    config, settings = subject.model.config, subject.settings
    per_shard = subject.tokens_per_shard(layout)
    makers: dict[str, Callable[[], Any]] = {
        f"experts {place}": functools.partial(
            bench_programs.experts_alone, config, kind, mesh, per_shard, settings
        ),
        f"layer {place}": functools.partial(
            bench_programs.layer_alone,
            *(config, kind, layout, mesh, params, subject.batch, settings),
        ),
    }
    if mesh is not None and kind.communication is not None:
        makers[f"communication {place}"] = functools.partial(
            bench_programs.communication_alone, config, kind, mesh, per_shard, settings
        )
    return makers


def make_all(makers: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Calls all at once: they mostly wait for the compiler, which leaves other threads running."""
    threads = min(len(makers), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(maker) for name, maker in makers.items()}
        return {name: future.result() for name, future in futures.items()}
