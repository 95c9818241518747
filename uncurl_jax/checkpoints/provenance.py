"""The chain of checkpoints that one was made from, as its provenance tells it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from uncurl_jax.checkpoints import layout


class Link(NamedTuple):
    """One checkpoint of a chain of provenances, the newest first.

    Attributes:
      path: where it was when the next one was made.
      fingerprint: what it was then; None for the checkpoint that was given.
      provenance: what made it; None where that was not recorded.
    """

    path: str
    fingerprint: str | None
    provenance: Mapping[str, Any] | None

    @property
    def created_by(self) -> str | None:
        """What made it, "prune" for one; None where that was not recorded."""
        return None if self.provenance is None else self.provenance.get("created_by")

    @property
    def plan_hash(self) -> str | None:
        """Hash of the plan of a prune, None for others."""
        return None if self.provenance is None else self.provenance.get("plan_hash")


def provenance_chain(checkpoint: layout.CheckpointPath) -> list[Link]:
    """Returns the checkpoint and all that it was made from, the newest first."""
    has_file = (checkpoint.directory / layout.PROVENANCE_FILE).exists()
    links = [Link(str(checkpoint), None, checkpoint.provenance() if has_file else None)]
    while links[-1].provenance is not None:
        source = links[-1].provenance.get("source")
        if not isinstance(source, dict) or "path" not in source:
            break
        links.append(Link(source["path"], source.get("fingerprint"), source.get("provenance")))
    return links
