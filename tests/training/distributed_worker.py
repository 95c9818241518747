"""One process of a training run: `distributed_worker.py ARGUMENTS.pickle [INDEX COUNT PORT]`.

The pickle holds what `train` is called with. With an index it is one process of several, which
notices within ten seconds, not a hundred, that another one has died.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import jax

from uncurl_jax.training.preemption import Preempted
from uncurl_jax.training.trainer import train

HEARTBEAT_TIMEOUT_SECONDS = 10

if __name__ == "__main__":
    arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    if len(sys.argv) > 2:
        index, count, port = (int(text) for text in sys.argv[2:])
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    try:
        train(**arguments, quiet=True)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise
