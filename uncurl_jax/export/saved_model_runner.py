"""Runs a SavedModel artifact with TensorFlow and numpy; a copy of it is the artifact's run.py.

python run.py     # compares every model's signatures with its reference outputs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

SCORE = ("inputs", "lengths", "targets", "target_positions", "target_mask")


def check(directory: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Compares all models' signatures with the reference; ValueError if one differs.

    Returns:
      {model: {"difference", "same_rows", "tolerance"}}: the largest |a - b| / (1 + r) over rows
      with the same generated tokens, r the root mean square of a row, and their share.
    """
    directory = Path(directory)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    signatures = tf.saved_model.load(str(directory / manifest["saved_model"])).signatures
    results = {}
    for name, entry in manifest["models"].items():
        with np.load(directory / entry["reference"]) as archive:
            stored = dict(archive)
        inputs = {key: tf.constant(stored[f"in/{key}"]) for key in SCORE}
        prompt = {key: inputs[key] for key in SCORE[:2]}
        names = entry["signatures"]
        found = {
            "prefill_logits": signatures[names["next_token"]](**prompt)["logits"],
            "token_log_probabilities": signatures[names["score"]](**inputs)[
                "token_log_probabilities"
            ],
        }
        tokens = signatures[names["generate"]](**prompt)["tokens"].numpy()
        # Where two tokens are about equally likely, rounding may choose the other one.
        is_same = (tokens == stored["out/generated"]).all(axis=1)
        worst = 0.0
        for key, array in found.items():
            expected = stored[f"out/{key}"]
            size = np.sqrt(np.square(expected).mean(axis=-1, keepdims=True))
            difference = (np.abs(array.numpy() - expected) / (1 + size))[is_same]
            if difference.size:
                worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
        limits = manifest["tolerance"]["same_platform"]
        tolerance, same = limits["difference"], float(is_same.mean())
        results[name] = {"difference": worst, "same_rows": same, "tolerance": tolerance}
        if worst > tolerance or same < limits["same_rows"]:
            raise ValueError(
                f"Model {name} must reproduce its reference outputs to {tolerance:g}, got a "
                f"difference of {worst:g}, and the same tokens in {100 * same:g} % of the rows."
            )
    return results


def main() -> int:
    """Checks the artifact that this file lies in."""
    parser = argparse.ArgumentParser(description="Check a SavedModel artifact.")
    parser.add_argument("--dir", default=Path(__file__).parent, help="default: where this file is")
    try:
        print(json.dumps(check(parser.parse_args().dir)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
