"""The parts of a pruning plan: what becomes of one layer, and what the plan was made from."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from typing import Any, NoReturn

import numpy as np

from uncurl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What becomes of one MoE layer's Z experts.

    Attributes:
      layer: index of the layer in the model.
      method: how its experts were grouped.
      num_experts: Z, experts before.
      labels: [Z] cluster of each expert, -1 if dropped; clusters are the experts after.
      reference: [D] expert that the cluster's others are aligned to.
      weights: [Z] float32 shares of the merge, summing to 1 inside each cluster, 0 if dropped.
      selected: [Z] how often the task's tokens selected each expert, before capacity drops.
      cluster_sizes: [D] members of each cluster.
      gate_factors: [D] float32 factors of wo and wo_bias, or None without gate compensation.
      fitted_router: base64 of the [embed, D] little-endian float32 kernel that router "fit" found,
        None for other treatments.
      expected_drop_fraction: assignments expected to overflow at the plan's capacity factor.
      diagnostics: numbers about the grouping and the merge; see `diagnostics`.
      verdict: one sentence that sums them up.
      warnings: sentences for people.
    """

    layer: int
    method: str
    num_experts: int
    labels: tuple[int, ...]
    reference: tuple[int, ...]
    weights: tuple[float, ...]
    selected: tuple[float, ...]
    cluster_sizes: tuple[int, ...]
    gate_factors: tuple[float, ...] | None
    fitted_router: str | None
    expected_drop_fraction: float
    diagnostics: dict[str, Any]
    verdict: str
    warnings: tuple[str, ...]

    def __post_init__(self):
        for name, kind in (
            ("labels", np.int64),
            ("reference", np.int64),
            ("weights", np.float32),
            ("selected", np.float64),
            ("cluster_sizes", np.int64),
            ("gate_factors", np.float32),
        ):
            value = getattr(self, name)
            if value is not None or name != "gate_factors":
                object.__setattr__(self, name, self._numbers(name, value, kind))
        object.__setattr__(self, "warnings", tuple(self.warnings))
        self._check_clusters()
        self._check_numbers()
        if self.fitted_router is not None:
            self.fitted_kernel()

    @property
    def num_clusters(self) -> int:
        """D, experts after."""
        return len(self.reference)

    def fitted_kernel(self) -> np.ndarray:
        """Returns the [embed, D] float32 kernel of router "fit"; InputError if there is none."""
        try:
            data = base64.b64decode(self.fitted_router or "", validate=True)
        except (TypeError, ValueError, binascii.Error):
            data = b""
        if not data or len(data) % (4 * self.num_clusters):
            self._fail("fitted_router must be base64 of float32 [embed, D]", f"{len(data)} bytes")
        kernel = np.frombuffer(data, "<f4").reshape(-1, self.num_clusters).astype(np.float32)
        if not np.isfinite(kernel).all():
            self._fail("fitted_router must be finite", "NaN or infinity")
        return kernel

    def _fail(self, rule: str, got: Any) -> NoReturn:
        raise InputError(f"In a plan's layer {self.layer}, {rule}, got {got}: make the plan again.")

    def _numbers(self, name: str, value: Any, kind: Any) -> tuple[Any, ...]:
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        if array.ndim != 1 or not np.isfinite(array).all():
            self._fail(f"{name} must be a list of finite numbers", value)
        if kind is np.int64 and (array != np.round(array)).any():
            self._fail(f"{name} must be whole numbers", value)
        return tuple(array.astype(kind).tolist())

    def _check_clusters(self) -> None:
        clusters = range(self.num_clusters)
        if len(self.labels) != self.num_experts:
            self._fail(f"labels must have {self.num_experts} entries", len(self.labels))
        if not clusters or set(self.labels) - {-1} != set(clusters):
            self._fail(f"labels must cover 0..{self.num_clusters - 1}", sorted(set(self.labels)))
        for cluster, expert in enumerate(self.reference):
            if not 0 <= expert < self.num_experts or self.labels[expert] != cluster:
                self._fail("a reference must be a member of its cluster", f"{expert} in {cluster}")
        sizes = tuple(self.labels.count(cluster) for cluster in clusters)
        if self.cluster_sizes != sizes:
            self._fail(f"cluster_sizes must be {sizes}", self.cluster_sizes)

    def _check_numbers(self) -> None:
        labels, weights = np.array(self.labels), np.array(self.weights)
        for name in ("weights", "selected"):
            values = np.array(getattr(self, name))
            if len(values) != self.num_experts or (values < 0).any():
                self._fail(f"{name} must be {self.num_experts} numbers >= 0", values.tolist())
        if weights[labels < 0].any():
            self._fail("a dropped expert's weight must be 0", weights[labels < 0].tolist())
        for cluster in range(self.num_clusters):
            total = float(weights[labels == cluster].sum())
            if abs(total - 1.0) > 1e-4:
                self._fail("weights must sum to 1 in every cluster", f"{total} in {cluster}")
        factors = self.gate_factors
        if factors is not None and (len(factors) != self.num_clusters or min(factors) <= 0):
            self._fail(f"gate_factors must be {self.num_clusters} numbers > 0", factors)
        if not 0 <= self.expected_drop_fraction <= 1:
            self._fail("expected_drop_fraction must lie in [0, 1]", self.expected_drop_fraction)


@dataclasses.dataclass(frozen=True)
class PlanSource:
    """What a plan was made from.

    Attributes:
      checkpoint_hash: fingerprint of the checkpoint whose router was observed.
      statistics_hash: hash of the router statistics.
      task: task that was observed.
      split: its split.
      tokens: tokens observed.
      num_experts: experts of every layer before, 0 for a dense one.
      num_selected_experts: top-k.
    """

    checkpoint_hash: str
    statistics_hash: str
    task: str
    split: str
    tokens: int
    num_experts: tuple[int, ...]
    num_selected_experts: int

    def __post_init__(self):
        object.__setattr__(self, "num_experts", tuple(int(count) for count in self.num_experts))


def encode_kernel(kernel: np.ndarray) -> str:
    """Returns the base64 text that `LayerPlan.fitted_router` holds."""
    return base64.b64encode(np.ascontiguousarray(kernel, "<f4").tobytes()).decode()


def check_num_experts(num_clusters: int, layer: int, source: PlanSource) -> None:
    """Raises InputError unless top-k <= D <= Z in one layer."""
    before, top_k = source.num_experts[layer], source.num_selected_experts
    if num_clusters < 1 or num_clusters > before:
        raise InputError(
            f"num_experts after pruning must lie in [1, {before}] in layer {layer}, got "
            f"{num_clusters}: choose no more experts than the layer has."
        )
    if num_clusters < top_k:
        raise InputError(
            f"num_experts[{layer}]={num_clusters} is below num_selected_experts={top_k} after "
            f"pruning: choose at least {top_k} experts or lower top-k."
        )


def build_strict(kind: Any, values: Any) -> Any:
    """Builds a dataclass from a dict with exactly its fields, or raises InputError."""
    names = {field.name for field in dataclasses.fields(kind)}
    got = set(values) if isinstance(values, dict) else set()
    if got != names:
        raise InputError(
            f"A plan's {kind.__name__} must have the fields of this version, got unknown "
            f"{sorted(got - names)} and missing {sorted(names - got)}: make the plan again."
        )
    try:
        return kind(**values)
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"A plan's {kind.__name__} must have fields of the right types, got {error}: make the "
            "plan again."
        ) from None
