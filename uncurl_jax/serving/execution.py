"""Runs batches on the device: continues rows, scores options, reads rows for their statistics.

Batches are filled up to a few sizes and lengths, so that few shapes are compiled. All of this is
called from one thread, which owns the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from uncurl_jax.data.vocabulary import PAD_ID
from uncurl_jax.export.runner import Model
from uncurl_jax.serving.continuation import Continuation
from uncurl_jax.serving.routing_sums import Routing, RoutingSums, add_routing, routing_sums
from uncurl_jax.serving.settings import bucket


class Observer(Protocol):
    """Is shown what the routers chose, call by call of a model's programs."""

    def observe(self, routing: Routing, mask: np.ndarray) -> None:
        """Takes the routing of [batch, length] tokens, of which those in the mask are real."""
        ...


class SumsObserver:
    """Sums over the real tokens, on the device.

    Attributes:
      sums: None before the first call.
    """

    def __init__(self):
        """Has seen nothing."""
        self.sums: RoutingSums | None = None

    def observe(self, routing: Routing, mask: np.ndarray) -> None:
        """See `Observer`."""
        if self.sums is None:
            self.sums = routing_sums(routing, mask)
        else:
            self.sums = add_routing(self.sums, routing, mask)


class TokenChoices(NamedTuple):
    """What a layer's router chose for the tokens of one row.

    Attributes:
      expert_index: [token, topk] int32.
      gate: [token, topk] float32.
    """

    expert_index: np.ndarray
    gate: np.ndarray


class TraceObserver:
    """Every choice, token by token."""

    def __init__(self, num_rows: int):
        """Will be shown batches with so many real rows."""
        self._parts: list[dict[str, list[TokenChoices]]] = [{} for _ in range(num_rows)]

    def observe(self, routing: Routing, mask: np.ndarray) -> None:
        """See `Observer`."""
        names = ("expert_index", "gate")
        found = jax.device_get(
            {layer: [choice[name] for name in names] for layer, choice in routing.items()}
        )
        for layer, (index, gate) in found.items():
            for row, parts in enumerate(self._parts):
                is_real = mask[row]
                parts.setdefault(layer, []).append(
                    TokenChoices(index[row, is_real], gate[row, is_real])
                )

    def row(self, number: int) -> dict[str, TokenChoices]:
        """Returns {"layers_<i>": choices for the tokens of a row that the model has read}."""
        return {
            layer: TokenChoices(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            for layer, parts in self._parts[number].items()
        }


class Shapes(NamedTuple):
    """What batches are filled up to.

    Attributes:
      batch_sizes: rows, ascending.
      lengths: tokens, ascending.
      targets: tokens of options; doubled until the longest of a batch fits.
    """

    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    targets: int


def _inputs(rows: Sequence[Sequence[int]], shapes: Shapes) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs [b, l], filled with padding, and lengths [b]; empty rows have length 1."""
    lengths = np.ones(bucket(len(rows), shapes.batch_sizes), np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    inputs = np.full((len(lengths), bucket(int(lengths.max()), shapes.lengths)), PAD_ID, np.int32)
    for number, row in enumerate(rows):
        inputs[number, : len(row)] = row
    return inputs, lengths


def _real_tokens(inputs: np.ndarray, lengths: np.ndarray, num_rows: int) -> np.ndarray:
    mask = np.arange(inputs.shape[1]) < lengths[:, None]
    mask[num_rows:] = False
    return mask


def continue_rows(
    model: Model,
    rows: Sequence[Continuation],
    shapes: Shapes,
    observer: Observer,
    *,
    on_token: Callable[[Continuation], None],
    is_wanted: Callable[[Continuation], bool],
) -> None:
    """Continues rows together until each has finished or nobody wants it any more.

    Args:
      model: the model.
      rows: at most as many as the largest batch.
      shapes: what the batch is filled up to.
      observer: is shown every token that the model reads.
      on_token: called with a row after each of its tokens.
      is_wanted: asked before each token.
    """
    inputs, positions = _inputs([row.prompt for row in rows], shapes)
    result = model.prefill(inputs, positions)
    observer.observe(result["routing"], _real_tokens(inputs, positions, len(rows)))
    while True:
        logits = np.asarray(result["logits"])
        tokens = np.zeros(len(positions), np.int32)
        is_running = np.zeros(len(positions), bool)
        for number, row in enumerate(rows):
            if row.finish_reason is None and is_wanted(row):
                tokens[number] = row.choose(logits[number])
                on_token(row)
                is_running[number] = row.finish_reason is None
        if not is_running.any():
            return
        # A row that has ended reads its last place again, for nobody.
        places = np.where(is_running, positions, np.minimum(positions, model.max_length - 1))
        result = model.decode(result["cache"], tokens, places, is_running)
        observer.observe(result["routing"], is_running[:, None])
        positions = positions + is_running


class Scored(NamedTuple):
    """Scores of option rows, and what the routers chose for them.

    Attributes:
      log_likelihood: [row] float64, nats, summed over the option's tokens.
      num_tokens: [row] int, tokens of the option.
      routing: of all tokens of the batch, on the device.
      mask: [batch, length] bool, the tokens that are real.
    """

    log_likelihood: np.ndarray
    num_tokens: np.ndarray
    routing: Routing
    mask: np.ndarray


def score_rows(model: Model, rows: Sequence[tuple[list[int], list[int]]], shapes: Shapes) -> Scored:
    """Scores options after their prompts, as `evaluation.rank_classification` does.

    Args:
      model: the model.
      rows: (ids of a prompt, of which the last one predicts the option's first; ids of an option
        with its end of text), at most the largest batch.
      shapes: what the batch is filled up to.

    Raises:
      RuntimeError: If a score is not finite.
    """
    # The last id of an option is predicted, never read.
    inputs, lengths = _inputs([[*prompt, *option[:-1]] for prompt, option in rows], shapes)
    width = shapes.targets
    while width < max(len(option) for _, option in rows):
        width *= 2
    targets = np.full((len(lengths), width), PAD_ID, np.int32)
    places = np.zeros((len(lengths), width), np.int32)
    mask = np.zeros((len(lengths), width), bool)
    for number, (prompt, option) in enumerate(rows):
        targets[number, : len(option)] = option
        places[number, : len(option)] = len(prompt) - 1 + np.arange(len(option))
        mask[number, : len(option)] = True
    result = model.score(inputs, lengths, targets, places, mask)
    log_likelihood = np.asarray(result["log_likelihood"], np.float64)[: len(rows)]
    if not np.isfinite(log_likelihood).all():
        raise RuntimeError("Log-likelihoods must be finite, got NaN or infinity from the model.")
    return Scored(
        log_likelihood,
        np.asarray([len(option) for _, option in rows]),
        result["routing"],
        _real_tokens(inputs, lengths, len(rows)),
    )


def read_rows(model: Model, rows: Sequence[list[int]], shapes: Shapes, observer: Observer) -> None:
    """Reads rows for what the observer makes of them."""
    inputs, lengths = _inputs(rows, shapes)
    result = model.prefill(inputs, lengths)
    observer.observe(result["routing"], _real_tokens(inputs, lengths, len(rows)))


def compile_shapes(model: Model, batch_size: int, length: int, num_targets: int) -> None:
    """Runs each program once on nothing, as `continue_rows` and `score_rows` would."""
    inputs = np.full((batch_size, length), PAD_ID, np.int32)
    lengths = np.ones(batch_size, np.int32)
    observer = SumsObserver()
    read = model.prefill(inputs, lengths)
    observer.observe(read["routing"], inputs > PAD_ID)
    is_running = np.ones(batch_size, bool)
    read = model.decode(read["cache"], np.zeros(batch_size, np.int32), lengths, is_running)
    observer.observe(read["routing"], is_running[:, None])
    targets = np.full((batch_size, num_targets), PAD_ID, np.int32)
    scored = model.score(inputs, lengths, targets, targets, targets > PAD_ID)
    # The sums of scored tokens have the shapes of those that were read.
    jax.block_until_ready((observer.sums, scored))
