"""A checkpoint's MoE weights for planning: routers and experts, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from uncurl_jax.checkpoints import layout
from uncurl_jax.errors import InputError
from uncurl_jax.pruning.alignment import Experts
from uncurl_jax.pruning.diagnostics import LayerSettings, measure_plan
from uncurl_jax.pruning.plan import PruningPlan
from uncurl_jax.pruning.router_inputs import RouterInputs


class CheckpointWeights:
    """Reads the weights that planning looks at; see `pruning.plan.LayerWeights`.

    Attributes:
      reader: of the checkpoint.
      fingerprint: of its parameters.
    """

    def __init__(
        self,
        checkpoint: layout.PathLike | layout.CheckpointPath,
        base_checkpoint: layout.PathLike | None = None,
    ):
        """Opens a checkpoint, and an earlier one of the same model if router changes are wanted.

        Raises:
          InputError: If one does not resolve, or the routers of the two differ in shape.
        """
        self.reader = layout.open_reader(checkpoint)
        self.config = self.reader.checkpoint.model_config()
        layout.check_architecture(self.reader, self.config)
        self.fingerprint = layout.fingerprint(self.reader)
        self._base = None if base_checkpoint is None else layout.open_reader(base_checkpoint)
        if self._base is not None:
            for layer in self.config.moe_layers:
                name = self._name(layer, "router/kernel")
                found = [r.metadata[name].shape if name in r.metadata else None for r in self._both]
                if found[0] != found[1]:
                    raise InputError(
                        f"An earlier checkpoint must be of the same model, got a router of shape "
                        f"{found[1]} in layer {layer} of {self._base.checkpoint} and {found[0]} in "
                        f"{self.reader.checkpoint}: give another --base_checkpoint."
                    )

    @property
    def _both(self) -> list[layout.ArrayReader]:
        return [self.reader, *([self._base] if self._base is not None else [])]

    @staticmethod
    def _name(layer: int, name: str) -> str:
        return f"{layout.TARGET}/layers_{layer}/moe/{name}"

    def router(self, layer: int) -> np.ndarray:
        """Returns the [embed, expert] kernel of a layer's router."""
        return self.reader.read(self._name(layer, "router/kernel"))

    def base_router(self, layer: int) -> np.ndarray | None:
        """Returns the same of the earlier checkpoint, None without one."""
        return None if self._base is None else self._base.read(self._name(layer, "router/kernel"))

    def experts(self, layer: int) -> Experts:
        """Returns a layer's arrays with a leading [expert] axis, in their stored dtype."""
        prefix = self._name(layer, "experts/")
        names = [name for name in self.reader.metadata if name.startswith(prefix)]
        arrays = self.reader.stream((name, None) for name in names)
        return {name.removeprefix(prefix): array for name, array in zip(names, arrays, strict=True)}

    def check_source(self, checkpoint_hash: str) -> None:
        """Raises InputError unless this is the checkpoint that the statistics were taken on."""
        if checkpoint_hash != self.fingerprint:
            raise InputError(
                f"A plan needs the checkpoint of its statistics, got {self.reader.checkpoint} with "
                f"fingerprint {self.fingerprint} and statistics of {checkpoint_hash}: give the "
                "checkpoint (and step) that was calibrated, or calibrate this one."
            )

    def measure(
        self,
        plan: PruningPlan,
        router_inputs: RouterInputs | None = None,
        *,
        workers: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PruningPlan:
        """Adds the diagnostics that need weights to a plan; see `diagnostics.measure_plan`.

        Raises:
          InputError: If the plan or the inputs are of another checkpoint.
        """
        self.check_source(plan.source.checkpoint_hash)
        if router_inputs is not None:
            router_inputs.check_source(self.fingerprint, [p.layer for p in plan.layers])
        config = self.config
        settings = LayerSettings(
            config.num_selected_experts,
            config.normalize_gates,
            config.activation,
            config.init_stddev,
        )
        return measure_plan(
            plan,
            self.router,
            self.experts,
            settings,
            inputs=None if router_inputs is None else router_inputs.layers,
            workers=workers,
            progress=progress,
        )
