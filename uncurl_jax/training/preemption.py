"""Stopping in good time when the machine is taken away: SIGTERM, and what a run makes of it.

A cloud sends SIGTERM, often to some hosts only, and kills half a minute later. Every process of a
run asks `Watch.is_due` after each step and gets the same answer at the same step:

* A process on its own takes the signal itself.
* Under `jax.distributed` JAX takes it (`jax.distributed.initialize` replaces the handler, below
  Python), tells the coordination service, and the service names a step that no process has passed.

Importing this module does not import JAX.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# 128 + SIGTERM, what a shell and Kubernetes report for a process that SIGTERM ended. Not 0: a
# Kubernetes Job or a loop in a shell would take the run for finished. Not 1 or 2: those mean that a
# repetition fails again, and xpk's pod failure policy restarts for 42 and 127 to 255 alone.
EXIT_STATUS = 128 + signal.SIGTERM

# Kept until a run stops for it: one that comes during a stage's last step stops the next stage.
_is_noticed = False
# JAX compares for equality with the largest number that a process has asked with, plus one, so the
# numbers rise one by one for as long as the process lives: they are not those of the steps, which
# begin anywhere in a resumed run, when a signal may already have come.
_questions = itertools.count(1)


class Preempted(SystemExit):
    """A run that stopped on SIGTERM with everything saved; the same call goes on with it.

    Where nobody catches it, the process exits with `EXIT_STATUS`. `except Exception` does not
    catch it, so that whatever called the run (a study, a quickstart) stops too.

    Attributes:
      out: directory of the run.
      step: last step, which is saved unless it is 0.
    """

    def __init__(self, out: str | os.PathLike[str], step: int):
        super().__init__(EXIT_STATUS)
        self.out = Path(out)
        self.step = step

    def __str__(self) -> str:
        """Says what is saved and how to go on, in one sentence."""
        done = f"after step {self.step}, which is saved" if self.step else "before its first step"
        return f"stopped on SIGTERM {done}, in {self.out}: the same command goes on from there"


class Watch:
    """Notices SIGTERM while it is open; a context manager around a run.

    Only the main thread of a process can take signals; in another one, and in several processes
    whose JAX has its preemption service switched off, SIGTERM does what it did before.
    """

    def __init__(self):
        self._previous: Any = None
        self._is_installed = False
        self._has_service = False

    def __enter__(self) -> Watch:
        """Takes SIGTERM, unless JAX has taken it already."""
        import jax

        is_distributed = jax.distributed.is_initialized()
        # An option that JAX defines when it runs, hence unknown to type checkers.
        has_service = jax.config.jax_enable_preemption_service  # pyright: ignore
        self._has_service = is_distributed and has_service
        if not is_distributed:
            self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives SIGTERM back to whoever had it."""
        global _is_noticed
        self._uninstall()
        if isinstance(error, Preempted):
            _is_noticed = False

    def is_due(self) -> bool:
        """Whether to save and stop here; every process has to ask equally often.

        Under `jax.distributed` the answer turns to yes within a second or two of the signal. From
        then on the first SIGTERM that this process gets does no harm to the save.
        """
        global _is_noticed
        if self._has_service and not _is_noticed:
            from jax.experimental import multihost_utils

            _is_noticed = multihost_utils.reached_preemption_sync_point(next(_questions))
            if _is_noticed:
                # JAX's own handler would swallow every further signal.
                self._install()
        return _is_noticed

    def _install(self) -> None:
        is_main_thread = threading.current_thread() is threading.main_thread()
        # None is a handler that was not made in Python and could not be put back.
        if is_main_thread and signal.getsignal(signal.SIGTERM) is not None:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
            self._is_installed = True

    def _uninstall(self) -> None:
        if self._is_installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._is_installed = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Takes one signal; the next one is for the handler before, which by default ends all."""
        global _is_noticed
        _is_noticed = True
        self._uninstall()
