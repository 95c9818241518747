"""Router statistics of live traffic, and how far it has drifted from the calibration.

A stream is the traffic that one model reads: its own requests (named as the model), or those of
another model that it shadows ("base@rte": model base reads what was asked of model rte). Its memory
does not grow with traffic.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from uncurl_jax.errors import InputError
from uncurl_jax.pruning.statistics import (
    LayerStatistics,
    RouterStatistics,
    add_layers,
    make_manifest,
    to_host,
    zero_layers,
)
from uncurl_jax.serving import drift
from uncurl_jax.serving.drift import Divergence, RequestSums
from uncurl_jax.serving.models import ServedArtifact, ServedModel
from uncurl_jax.serving.routing_sums import RoutingSums
from uncurl_jax.serving.settings import ServeConfig

SELECTIONS, PROBABILITIES = "selections", "probabilities"


class LayerDrift(NamedTuple):
    """One layer of a stream against its reference.

    Attributes:
      layer: number of the layer.
      live: [expert] shares of selections, recent requests weighing most.
      reference: [expert] the same of the calibration.
      selections: divergence of the two.
      probabilities: divergence of the mean router probabilities.
      is_drifting: whether one of the two exceeds its threshold and the floor.
    """

    layer: int
    live: np.ndarray
    reference: np.ndarray
    selections: Divergence
    probabilities: Divergence
    is_drifting: bool


class StreamDrift(NamedTuple):
    """A stream against its reference.

    Attributes:
      requests: how many requests of equal weight it rests on.
      layers: of the model with experts; empty without a reference.
    """

    requests: float
    layers: list[LayerDrift]

    @property
    def verdict(self) -> str:
        """In a word: "no reference", "too few requests", "drift" or "no drift"."""
        if not self.layers:
            return "no reference"
        if self.requests < drift.MIN_REQUESTS:
            return "too few requests"
        return "drift" if any(layer.is_drifting for layer in self.layers) else "no drift"


class Stream:
    """Traffic of one model. Used by the thread that runs batches and by those that answer.

    Attributes:
      name: of the stream.
      model: that reads.
      reference: statistics of the calibration, None if not given.
    """

    def __init__(
        self,
        name: str,
        model: ServedModel,
        manifest: Mapping[str, Any],
        reference: RouterStatistics | None,
        config: ServeConfig,
    ):
        """Has seen no traffic."""
        self.name, self.model, self.reference = name, model, reference
        self._manifest = dict(manifest)
        self._config = config
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        counts = self.model.config.num_experts
        self._layers: dict[int, LayerStatistics] = zero_layers(counts)
        self._batches = 0
        self._requests: dict[tuple[int, str], RequestSums] = {
            (layer, kind): drift.no_requests(counts[layer])
            for layer in self._layers
            for kind in (SELECTIONS, PROBABILITIES)
        }

    @property
    def tokens(self) -> int:
        """Tokens seen since the last reset."""
        return int(next(iter(self._layers.values())).tokens)

    def add(self, sums: RoutingSums) -> None:
        """Adds a batch; rows without tokens are not requests."""
        is_request = sums.tokens > 0
        if not is_request.any():
            return
        tokens = np.asarray(sums.tokens, np.float64)[is_request]
        topk = self.model.config.num_selected_experts
        half_life = self._config.drift_half_life
        new = {layer: to_host(found.statistics) for layer, found in sums.layers.items()}
        with self._lock:
            self._layers = add_layers(self._layers, new)
            self._batches += 1
            for layer, found in sums.layers.items():
                for kind, rows in (
                    (SELECTIONS, found.selected / topk),
                    (PROBABILITIES, found.probability),
                ):
                    self._requests[layer, kind] = drift.add_requests(
                        self._requests[layer, kind], tokens, rows[is_request], half_life
                    )

    def reset(self) -> None:
        """Forgets all traffic."""
        with self._lock:
            self._clear()

    def statistics(self, *, reset: bool = False) -> RouterStatistics:
        """Returns what `uncurl plan` reads.

        Args:
          reset: forget the traffic, so that the next statistics begin where these end.

        Raises:
          InputError: If there was no traffic.
        """
        with self._lock:
            if not self.tokens:
                raise InputError(
                    f"Statistics need traffic, got none on {self.name!r} so far: send requests "
                    "first."
                )
            found = RouterStatistics(self._layers, {**self._manifest, "batches": self._batches})
            if reset:
                self._clear()
        return found

    def drift(self) -> StreamDrift:
        """Compares the traffic with the reference."""
        with self._lock:
            requests = dict(self._requests)
        first = next(iter(requests.values()))
        count = drift.num_requests(first)
        if self.reference is None:
            return StreamDrift(count, [])
        # One look asks two questions of every layer (Bonferroni).
        alpha = self._config.drift_alpha / len(requests)
        floor = self._config.drift_floor_bits
        layers = []
        for layer, known in sorted(self.reference.layers.items()):
            kinds = {SELECTIONS: known.selected, PROBABILITIES: known.prob_mass}
            found = {
                kind: drift.divergence(
                    requests[layer, kind], sums, float(known.tokens), alpha=alpha
                )
                for kind, sums in kinds.items()
            }
            layers.append(
                LayerDrift(
                    layer,
                    drift.shares(requests[layer, SELECTIONS].x),
                    drift.shares(known.selected),
                    found[SELECTIONS],
                    found[PROBABILITIES],
                    any(
                        each.bits > each.threshold_bits and each.distance_bits >= floor
                        for each in found.values()
                    ),
                )
            )
        return StreamDrift(count, layers)


def stream_name(reader: str, asked: str) -> str:
    """Returns the name of the stream of requests to model `asked` that model `reader` reads."""
    return reader if reader == asked else f"{reader}@{asked}"


def make_streams(
    artifact: ServedArtifact, config: ServeConfig, references: Mapping[str, RouterStatistics]
) -> dict[str, Stream]:
    """Returns the streams of an artifact's models, by name.

    Args:
      artifact: what is served.
      config: says which model shadows the others.
      references: {stream: statistics of its model's calibration}.

    Raises:
      InputError: If the shadow or a reference's stream does not exist, or a reference was taken on
        another checkpoint.
    """
    models = artifact.models
    if config.shadow is not None:
        if config.shadow not in models:
            raise InputError(
                f"--shadow must be a model of the artifact, got {config.shadow!r}: it holds "
                f"{', '.join(models)}."
            )
        if not models[config.shadow].has_statistics:
            raise InputError(
                "A model that shadows others must have experts with a router column each, got "
                f"{config.shadow!r}: choose another."
            )
    streams = {}
    for asked in models:
        for reader in dict.fromkeys((asked, config.shadow or asked)):
            if models[reader].has_statistics:
                name = stream_name(reader, asked)
                manifest = _manifest(artifact, models[reader], models[asked])
                reference = references.get(name)
                streams[name] = Stream(name, models[reader], manifest, reference, config)
                if reference is not None:
                    _check_reference(name, models[reader], reference)
    unknown = sorted(set(references) - set(streams))
    if unknown:
        raise InputError(
            f"--statistics must name a stream with statistics, got {unknown[0]!r}: there are "
            f"{', '.join(streams) or 'none'}."
        )
    return streams


def _manifest(artifact: ServedArtifact, reader: ServedModel, asked: ServedModel) -> dict[str, Any]:
    return make_manifest(
        checkpoint_hash=reader.fingerprint,
        num_experts=reader.config.num_experts,
        num_selected_experts=reader.config.num_selected_experts,
        task=asked.task or asked.name,
        split="live",
        vocabulary_hash=artifact.vocabulary.hash,
        seed=0,
        eval_capacity_factor=None,
        served_dtype=artifact.dtype,
        served_quantization=artifact.quantization,
    )


def _check_reference(name: str, model: ServedModel, reference: RouterStatistics) -> None:
    found = reference.manifest["checkpoint_hash"]
    if found != model.fingerprint:
        raise InputError(
            f"The reference of {name} must be statistics of the checkpoint that {model.name} was "
            f"exported from ({model.checkpoint}, fingerprint {model.fingerprint[:12]}), got "
            f"statistics of {found[:12]}: calibrate that checkpoint."
        )
