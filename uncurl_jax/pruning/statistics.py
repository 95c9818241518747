"""Additive router statistics: what one pass over a task leaves behind, per MoE layer.

Axes: batch, length, token (batch and length merged), expert (Z), topk. Every field is a sum over
tokens, so statistics of disjoint sets of tokens add up to those of their union: over batches, over
devices (a sharded sum under `jax.jit`), over hosts and over files (`merge_statistics`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import uncurl_jax
from uncurl_jax import artifacts
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.array_file import check_hash, read_arrays, write_arrays

FORMAT = "uncurl_jax router statistics"
FORMAT_VERSION = 2
# Optional groups of statistics: what `collect` may name, and the fields that each fills.
COLLECTIONS = {
    "outputs": ("output_norm", "gated_output_norm", "output_sum"),
    "all_outputs": ("all_output_sum",),
}
_ADDITIVE_KEYS = ("tokens", "batches", "shards")
_REQUIRED_KEYS = (
    "checkpoint_hash",
    "num_experts",
    "num_selected_experts",
    "task",
    "split",
    "vocabulary_hash",
    "seed",
    "versions",
)


class LayerStatistics(NamedTuple):
    """Sums over the real (non-padding) tokens that one MoE layer saw.

    float32 jax arrays where a model computes them, float64 numpy arrays once accumulated. With
    h = router logits [expert] and p = softmax(h) of a token:

    Attributes:
      tokens: [] number of tokens.
      gram: [expert, expert] sum of h h^T.
      logit_sum: [expert] sum of h.
      selected: [expert] how often the expert was among the top-k, before capacity drops.
      kept: [expert] the same after capacity drops.
      gate_mass: [expert] sum of the gates of the tokens that selected the expert, before drops.
      prob_mass: [expert] sum of p.
      coactivation: [expert, expert] tokens that selected both; its diagonal is `selected`.
      routed_prob: [expert, expert] row i is the sum of p over the tokens that selected expert i;
        gate compensation predicts the gates after a merge from it.
      output_norm: [expert] sum of |E_i(x)| over the tokens that selected expert i (before drops);
        this and the next two are None unless "outputs" were collected.
      gated_output_norm: [expert] the same sum of gate * |E_i(x)|.
      output_sum: [expert, embed] sum of E_i(x) over the tokens that selected expert i.
      all_output_sum: [expert, embed] sum of E_i(x) over all tokens; None unless "all_outputs" were
        collected, which runs every expert on every token.
    """

    tokens: Any
    gram: Any
    logit_sum: Any
    selected: Any
    kept: Any
    gate_mass: Any
    prob_mass: Any
    coactivation: Any
    routed_prob: Any
    output_norm: Any = None
    gated_output_norm: Any = None
    output_sum: Any = None
    all_output_sum: Any = None


_AXES: dict[str, tuple[str, ...]] = {
    "tokens": (),
    "gram": ("expert", "expert"),
    "coactivation": ("expert", "expert"),
    "routed_prob": ("expert", "expert"),
    "output_sum": ("expert", "embed"),
    "all_output_sum": ("expert", "embed"),
}
_OPTIONAL = tuple(name for fields in COLLECTIONS.values() for name in fields)


def to_host(statistics: LayerStatistics) -> LayerStatistics:
    """Returns float64 numpy arrays; what was not collected stays None."""
    return jax.tree.map(lambda field: np.asarray(field, np.float64), statistics)


def collected(statistics: LayerStatistics) -> tuple[str, ...]:
    """Names the optional groups that the statistics hold."""
    return tuple(
        group
        for group, fields in COLLECTIONS.items()
        if all(getattr(statistics, name) is not None for name in fields)
    )


def layer_statistics(
    logits: jax.Array,
    expert_index: jax.Array,
    gate: jax.Array,
    is_kept: jax.Array,
    mask: jax.Array,
    outputs: jax.Array | None = None,
    all_output_sum: jax.Array | None = None,
) -> LayerStatistics:
    """Reduces one batch's routing to sums; works under `jax.jit` and on sharded arrays.

    Matrix products run at the highest precision, since TPUs and GPUs otherwise round the inputs
    to bfloat16 or TF32. Counts are exact up to 2**24 tokens a batch.

    Args:
      logits: [batch, length, expert] router logits without jitter.
      expert_index: [batch, length, topk] int, selected experts, before capacity drops.
      gate: [batch, length, topk] gates of the selected experts, before capacity drops.
      is_kept: [batch, length, topk] bool, False where the capacity dropped the assignment.
      mask: [batch, length] bool, True on real tokens; others add nothing, even when not finite.
      outputs: [batch, length, topk, embed] outputs of the selected experts before the gate, also of
        assignments that were dropped; None if not observed.
      all_output_sum: [expert, embed] outputs of every expert summed over the real tokens; None if
        not observed.

    Returns:
      LayerStatistics of float32 arrays.
    """
    num_experts, num_selected = logits.shape[-1], expert_index.shape[-1]
    is_token = mask.reshape(-1).astype(bool)  # [token]
    h = jnp.where(is_token[:, None], logits.reshape(-1, num_experts).astype(jnp.float32), 0.0)
    p = jnp.where(is_token[:, None], jax.nn.softmax(h, axis=-1), 0.0)
    # [token, topk, expert]
    choice = jax.nn.one_hot(expert_index.reshape(-1, num_selected), num_experts, dtype=jnp.float32)
    choice = choice * is_token[:, None, None]
    gates = jnp.where(is_token[:, None], gate.reshape(-1, num_selected).astype(jnp.float32), 0.0)
    kept = is_kept.reshape(-1, num_selected).astype(jnp.float32)
    is_selected = choice.sum(axis=1)  # [token, expert]

    def outer(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum("ti,tj->ij", left, right, precision=jax.lax.Precision.HIGHEST)

    optional: dict[str, jax.Array] = {}
    if outputs is not None:
        flat = outputs.reshape(-1, num_selected, outputs.shape[-1]).astype(jnp.float32)
        flat = jnp.where(is_token[:, None, None], flat, 0.0)
        norm = jnp.linalg.norm(flat, axis=-1)  # [token, topk]
        optional["output_norm"] = (choice * norm[:, :, None]).sum(axis=(0, 1))
        optional["gated_output_norm"] = (choice * (norm * gates)[:, :, None]).sum(axis=(0, 1))
        optional["output_sum"] = jnp.einsum(
            "tke,tkd->ed", choice, flat, precision=jax.lax.Precision.HIGHEST
        )
    if all_output_sum is not None:
        optional["all_output_sum"] = all_output_sum.astype(jnp.float32)
    return LayerStatistics(
        tokens=is_token.sum(dtype=jnp.float32),
        gram=outer(h, h),
        logit_sum=h.sum(axis=0),
        selected=is_selected.sum(axis=0),
        kept=(choice * kept[:, :, None]).sum(axis=(0, 1)),
        gate_mass=(choice * gates[:, :, None]).sum(axis=(0, 1)),
        prob_mass=p.sum(axis=0),
        coactivation=outer(is_selected, is_selected),
        routed_prob=outer(is_selected, p),
        **optional,
    )


def add_layers(
    left: Mapping[int, LayerStatistics], right: Mapping[int, LayerStatistics]
) -> dict[int, LayerStatistics]:
    """Adds two passes' statistics layer by layer, in float64."""
    return {
        layer: jax.tree.map(lambda a, b: np.add(a, b, dtype=np.float64), left[layer], right[layer])
        for layer in sorted(left)
    }


def zero_layers(num_experts: Iterable[int]) -> dict[int, LayerStatistics]:
    """Returns all-zero float64 statistics for the layers with experts, optional ones left out."""
    return {
        layer: LayerStatistics(
            **{
                name: np.zeros((count,) * len(_AXES.get(name, ("expert",))))
                for name in LayerStatistics._fields
                if name not in _OPTIONAL
            }
        )
        for layer, count in enumerate(num_experts)
        if count
    }


def make_manifest(
    *,
    checkpoint_hash: str,
    num_experts: Iterable[int],
    num_selected_experts: int,
    task: str,
    split: str,
    vocabulary_hash: str,
    seed: int,
    **more: Any,
) -> dict[str, Any]:
    """Says where statistics come from: the manifest that `calibrate` takes.

    Args:
      checkpoint_hash: fingerprint of the checkpoint that was observed.
      num_experts: experts of every layer, 0 for a dense one (`ModelConfig.num_experts`).
      num_selected_experts: top-k.
      task: name of the task.
      split: its split, "train" for UNCURL.
      vocabulary_hash: hash of the vocabulary that tokenised it.
      seed: seed of the order of the batches.
      **more: further JSON values to record; they too must agree when statistics are added.

    Returns:
      A JSON-compatible dict, with the versions of the packages that compute the sums.
    """
    return {
        "checkpoint_hash": checkpoint_hash,
        "num_experts": [int(count) for count in num_experts],
        "num_selected_experts": int(num_selected_experts),
        "task": task,
        "split": split,
        "vocabulary_hash": vocabulary_hash,
        "seed": int(seed),
        "versions": {
            "uncurl_jax": uncurl_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
        },
        **more,
    }


@dataclasses.dataclass(frozen=True, eq=False)
class RouterStatistics:
    """The statistics of every MoE layer and where they come from.

    Attributes:
      layers: layer index -> LayerStatistics of float64 numpy arrays, MoE layers only.
      manifest: JSON-compatible dict: `make_manifest`'s keys and "tokens", "batches" (so far) and
        "is_complete" (False in the partial file of an interrupted calibration).
    """

    layers: dict[int, LayerStatistics]
    manifest: dict[str, Any]

    def __post_init__(self):
        require_manifest(self.manifest)
        manifest = json.loads(json.dumps(self.manifest))
        layers = {int(layer): to_host(fields) for layer, fields in sorted(self.layers.items())}
        check_layers(layers, manifest["num_experts"])
        if layers and not any(float(fields.tokens) for fields in layers.values()):
            raise InputError(
                f"Statistics must hold at least one token, got 0 on task {manifest['task']!r}: "
                "give calibration batches with real tokens."
            )
        manifest["tokens"] = max((int(fields.tokens) for fields in layers.values()), default=0)
        manifest.setdefault("batches", 0)
        manifest.setdefault("is_complete", True)
        manifest["collected"] = list(collected(next(iter(layers.values())))) if layers else []
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "manifest", manifest)

    @property
    def tokens(self) -> int:
        """Tokens seen, padding excluded, by the layer that saw most."""
        return self.manifest["tokens"]

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest and of every array's bytes."""
        return artifacts.sha256_of_json(
            {
                "manifest": self.manifest,
                "arrays": {
                    name: artifacts.sha256_of_bytes(np.ascontiguousarray(array, "<f8").tobytes())
                    for name, array in self._arrays().items()
                },
            }
        )

    def __add__(self, other: RouterStatistics) -> RouterStatistics:
        """Adds statistics of other tokens under the same model and task.

        Raises:
          InputError: If the manifests disagree in anything but tokens, batches, shards and
            is_complete, or both hold the same shard.
        """
        require_same_source(self.manifest, other.manifest)
        shards = [*self.manifest.get("shards", ()), *other.manifest.get("shards", ())]
        if len(set(shards)) < len(shards):
            double = next(shard for shard in shards if shards.count(shard) > 1)
            raise InputError(
                f"Statistics that are added must be of different tokens, got shard {double} twice: "
                "give each shard's file once."
            )
        manifest = {
            **self.manifest,
            **({"shards": sorted(shards)} if shards else {}),
            "batches": self.manifest["batches"] + other.manifest["batches"],
            "is_complete": self.manifest["is_complete"] and other.manifest["is_complete"],
        }
        return RouterStatistics(add_layers(self.layers, other.layers), manifest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file atomically; the same statistics give the same bytes."""
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hash": self.hash,
            "manifest": self.manifest,
        }
        write_arrays(path, self._arrays(), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouterStatistics:
        """Reads what `save` wrote.

        Raises:
          InputError: If the file is missing, not router statistics, of another format version,
            damaged, not finite (naming layer and expert) or without tokens.
        """
        path = Path(path)
        header, arrays = read_arrays(
            path, file_format=FORMAT, version=FORMAT_VERSION, name="router statistics"
        )
        layers: dict[int, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            layer, _, field = name.removeprefix("layers_").partition("/")
            layers.setdefault(int(layer), {})[field] = array
        try:
            built = {layer: LayerStatistics(**fields) for layer, fields in layers.items()}
        except TypeError as error:
            raise InputError(
                f"{path} must hold every statistic, got {error}: it is damaged."
            ) from None
        try:
            statistics = cls(built, header["manifest"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        check_hash(path, header, statistics.hash)
        return statistics

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            f"layers_{layer}/{name}": array
            for layer, fields in self.layers.items()
            for name, array in _present(fields).items()
        }


def merge_statistics(paths: Sequence[str | os.PathLike[str]]) -> RouterStatistics:
    """Adds the statistics in several files, of different tokens under one model and task.

    Raises:
      InputError: If a file is given twice, is not valid, or is of another source; or if shards of
        a division are missing.
    """
    resolved = [Path(path).resolve() for path in paths]
    if not resolved or len(set(resolved)) < len(resolved):
        raise InputError(
            f"Statistics to merge must be different files, got {[str(path) for path in paths]}: "
            "give each once."
        )
    total = RouterStatistics.load(paths[0])
    hashes = {total.hash}
    for path in paths[1:]:
        more = RouterStatistics.load(path)
        if more.hash in hashes:
            raise InputError(
                f"{path}: Statistics to merge must differ, got a copy of another file."
            )
        hashes.add(more.hash)
        for statistics in (total, more):
            # Made from a token cache, and the manifests must agree: these are the same tokens.
            if "cache_hash" in statistics.manifest and "shards" not in statistics.manifest:
                raise InputError(
                    f"{path}: Statistics of one token cache that are merged must be its shards, "
                    "got a whole calibration, whose tokens would count twice: use it as it is."
                )
        try:
            total = total + more
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    shards = total.manifest.get("shards", [])
    if shards:
        count = int(shards[0].partition("/")[2])
        whole = {f"{index}/{count}" for index in range(count)}
        if whole != set(shards):
            raise InputError(
                f"All shards of one calibration must be merged, got {', '.join(shards)} where "
                f"{', '.join(sorted(whole))} are its shards: give their files and no others."
            )
    return total


def require_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises InputError if a manifest lacks one of `make_manifest`'s keys."""
    missing = [key for key in _REQUIRED_KEYS if key not in manifest]
    if missing:
        raise InputError(
            f"A statistics manifest must hold {', '.join(_REQUIRED_KEYS)}, got none of "
            f"{', '.join(missing)}: build it with make_manifest."
        )


def require_same_source(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Raises InputError unless two manifests describe the same model, task and versions."""
    ignored = {*_ADDITIVE_KEYS, "is_complete"}
    keys = sorted((set(left) | set(right)) - ignored)
    differing = [key for key in keys if left.get(key) != right.get(key)]
    if differing:
        key = differing[0]
        raise InputError(
            f"Statistics can be combined only if their manifests agree, got {key} "
            f"{left.get(key)!r} and {right.get(key)!r} (all that differ: {', '.join(differing)}): "
            "calibrate both with the same checkpoint, task and versions."
        )


def check_layers(
    layers: Mapping[int, LayerStatistics], num_experts: Iterable[int], where: str = ""
) -> None:
    """Checks layers, shapes and finiteness of host statistics.

    Args:
      layers: layer index -> LayerStatistics of numpy arrays.
      num_experts: experts of every layer, 0 for a dense one.
      where: appended to the message, for instance " in batch 3".

    Raises:
      InputError: If the layers are not exactly the MoE layers, a shape does not fit or a value is
        not finite (naming layer and expert).
    """
    expected = {layer: count for layer, count in enumerate(num_experts) if count}
    if set(layers) != set(expected):
        raise InputError(
            f"Statistics must cover the MoE layers {sorted(expected)}, got layers "
            f"{sorted(layers)}{where}: observe the model that the manifest describes."
        )
    for layer, fields in layers.items():
        if any(
            0 < sum(getattr(fields, name) is not None for name in group) < len(group)
            for group in COLLECTIONS.values()
        ):
            raise InputError(
                f"Statistics of layer {layer} must hold a group of optional sums whole or not at "
                f"all{where}: calibrate again."
            )
        for name, array in _present(fields).items():
            axes = _AXES.get(name, ("expert",))
            shape = tuple(expected[layer] if axis == "expert" else array.shape[-1] for axis in axes)
            if array.shape != shape:
                raise InputError(
                    f"Statistic {name} of layer {layer} must have shape {shape}, got "
                    f"{array.shape}{where}: observe the model that the manifest describes."
                )
        _check_finite(layer, fields, where)


def _present(fields: LayerStatistics) -> dict[str, np.ndarray]:
    return {name: array for name, array in fields._asdict().items() if array is not None}


def _check_finite(layer: int, fields: LayerStatistics, where: str) -> None:
    for name, array in _present(fields).items():
        is_bad = ~np.isfinite(array)
        if is_bad.any():
            # A bad expert spoils its whole row, and only one entry of every other row.
            expert = (
                int(is_bad.reshape(len(fields.selected), -1).sum(axis=1).argmax())
                if is_bad.ndim
                else 0
            )
            raise InputError(
                f"Router statistics must be finite, got NaN or infinity in {name} of layer "
                f"{layer}, expert {expert}{where}: check the checkpoint's router and activations."
            )
