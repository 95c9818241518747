"""Settings of the server."""

from __future__ import annotations

import dataclasses
import math

from uncurl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """How the server batches, what it refuses and what it watches.

    Attributes:
      batch_sizes: rows that programs are compiled for, ascending; a batch is filled up to the next
        and never larger than the last.
      lengths: tokens that prompts are filled up to, ascending; None doubles from 32 to the
        artifact's max_length. Every pair of a batch size and a length is compiled at the start.
      max_wait_ms: how long a request waits for others to share its batch.
      max_queue: requests that may wait; more are refused with 429.
      max_body_bytes: of a request; larger ones are refused with 413.
      max_new_tokens: most that a completion may ask for.
      request_timeout_seconds: for the body of a request to arrive, and again for its answer.
      drain_seconds: after SIGTERM, time for what was accepted.
      shadow: model that also reads a part of the traffic of the others, for its statistics alone.
      shadow_fraction: which part, in [0, 1].
      shadow_queue: rows that wait for idle time; what comes on top is not shadowed, and counted.
      drift_half_life: requests after which a request counts half in the drift; None for never.
      drift_alpha: probability that a stream without drift is reported at one look.
      drift_floor_bits: smaller distances are not reported, however certain they are. 0.01 bits
        mean that at most 12 % of the selections have moved (Pinsker's inequality).
      seed: of the choice of shadowed requests.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16)
    lengths: tuple[int, ...] | None = None
    max_wait_ms: float = 5.0
    max_queue: int = 64
    max_body_bytes: int = 1 << 20
    max_new_tokens: int = 256
    request_timeout_seconds: float = 60.0
    drain_seconds: float = 30.0
    shadow: str | None = None
    shadow_fraction: float = 0.0
    shadow_queue: int = 256
    drift_half_life: float | None = 1000.0
    drift_alpha: float = 0.01
    drift_floor_bits: float = 0.01
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_sizes", "lengths"):
            value = getattr(self, name)
            if value is not None:
                values = tuple(value)
                if not values or values[0] < 1 or list(values) != sorted(set(values)):
                    raise InputError(
                        f"{name} must be positive and ascending, got {values}: as 1,4,16."
                    )
                object.__setattr__(self, name, values)
        for name in ("max_queue", "max_body_bytes", "max_new_tokens", "shadow_queue"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("max_wait_ms", "drain_seconds", "drift_floor_bits", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0 < self.request_timeout_seconds < math.inf:
            raise InputError(
                f"request_timeout_seconds must be positive, got {self.request_timeout_seconds}."
            )
        if self.drift_half_life is not None and not self.drift_half_life >= 1:
            raise InputError(
                f"drift_half_life must be at least 1 request, or None, got {self.drift_half_life}."
            )
        if not 0 < self.drift_alpha < 1:
            raise InputError(f"drift_alpha must lie in (0, 1), got {self.drift_alpha}.")
        if not 0 <= self.shadow_fraction <= 1:
            raise InputError(f"shadow_fraction must lie in [0, 1], got {self.shadow_fraction}.")
        if (self.shadow is None) != (self.shadow_fraction == 0):
            raise InputError(
                "shadow and shadow_fraction go together, got "
                f"{self.shadow} and {self.shadow_fraction}: give both or neither."
            )

    @property
    def max_batch(self) -> int:
        """Most rows of a batch."""
        return self.batch_sizes[-1]

    def length_buckets(self, max_length: int) -> tuple[int, ...]:
        """Returns the lengths that prompts are filled up to, the last one max_length."""
        if self.lengths is not None:
            return (*(length for length in self.lengths if length < max_length), max_length)
        lengths = [32]
        while lengths[-1] < max_length:
            lengths.append(2 * lengths[-1])
        return (*lengths[:-1], max_length)


def bucket(size: int, buckets: tuple[int, ...]) -> int:
    """Returns the smallest bucket that holds `size`."""
    return next(each for each in buckets if each >= size)
