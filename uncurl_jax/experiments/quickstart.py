"""The whole job on data that the package makes itself: nothing to download, minutes on a CPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from uncurl_jax.data import synthetic
from uncurl_jax.experiments import sweep
from uncurl_jax.experiments.reporting.report import write_report
from uncurl_jax.experiments.study import StudyConfig


def run_quickstart(
    config: StudyConfig,
    *,
    out: str | os.PathLike[str],
    num_train: int = 2000,
    num_validation: int = 200,
    num_documents: int = 2000,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes synthetic data, runs a study on it and writes its report; resumes if interrupted.

    Args:
      config: the study, on tasks of `uncurl_jax.data.synthetic`.
      out: directory of the study; the data goes to data/ in it.
      num_train: training rows per task.
      num_validation: validation rows per task.
      num_documents: documents of the pretraining corpus.
      quiet: no progress bars.

    Returns:
      The content of report.json.
    """
    sweep.check_choices(config)
    out = Path(out)
    data_dir = out / "data"
    if not data_dir.exists():
        partial = out / ".data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        synthetic.write_tasks(
            partial,
            num_train=num_train,
            num_validation=num_validation,
            num_documents=num_documents,
        )
        partial.rename(data_dir)
    sweep.run_sweep(config, out=out, data_dir=data_dir, quiet=quiet)
    return write_report(out)
