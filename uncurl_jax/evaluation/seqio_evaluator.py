"""Lets SeqIO's Evaluator compute the metrics of tasks that come from SeqIO.

The model runs once, over a token cache built from the task (`evaluator`); here SeqIO postprocesses
the outputs and applies the metric functions that the task was registered with. TensorFlow and
SeqIO are imported inside the function only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from uncurl_jax.errors import InputError


def check_seqio_task(name: str, *, is_generating: bool) -> None:
    """Checks that a registered task's metrics fit the way it is evaluated.

    Raises:
      InputError: If it has no metrics, or metrics of the other kind.
    """
    import seqio

    task = seqio.get_mixture_or_task(name)
    if not isinstance(task, seqio.Task) or not task.metric_fns:
        raise InputError(
            f"A SeqIO task to evaluate must have metric functions, got {name} without: register "
            "it with metric_fns, and evaluate a mixture's tasks one by one."
        )
    if task.predict_metric_fns and not is_generating:
        raise InputError(
            f"SeqIO task {name} has metrics on generated text: evaluate with --mode generate."
        )
    if task.score_metric_fns and is_generating:
        raise InputError(
            f"SeqIO task {name} has metrics on log-likelihoods: evaluate with --mode rank."
        )


def seqio_metrics(
    name: str,
    *,
    split: str,
    step: int,
    row_scores: Sequence[float] | None = None,
    generate: Callable[[int], Sequence[list[int]]] | None = None,
) -> dict[str, float]:
    """Applies a registered task's own metric functions to a model's outputs.

    Args:
      name: SeqIO task.
      split: the split that the outputs belong to.
      step: the checkpoint's step, which SeqIO logs.
      row_scores: log-likelihood of each row's target, in the order of the task's data set; needed
        by score metrics.
      generate: number of rows -> the generated token ids of each, in that order; needed by
        predict metrics.

    Returns:
      {metric: value}.

    Raises:
      InputError: If the task has no metrics, or needs outputs that were not given.
    """
    import seqio

    check_seqio_task(name, is_generating=generate is not None)
    task = seqio.get_mixture_or_task(name)
    has_inputs = "inputs" in task.output_features
    converter = (
        seqio.DecoderFeatureConverter(pack=False)
        if has_inputs
        else seqio.LMFeatureConverter(pack=False)
    )
    evaluator: Any = seqio.Evaluator(name, converter, eval_split=split)

    def places(dataset: Any) -> list[int]:
        return [int(place) for place, _ in dataset.as_numpy_iterator()]

    def score_fn(dataset: Any) -> list[tuple[int, float]]:
        assert row_scores is not None
        return [(place, float(row_scores[place])) for place in places(dataset)]

    def predict_fn(dataset: Any) -> list[tuple[int, list[int]]]:
        assert generate is not None
        order = places(dataset)
        outputs = generate(len(order))
        return [(place, outputs[place]) for place in order]

    try:
        future, _ = evaluator.evaluate(
            compute_metrics=True, step=step, score_fn=score_fn, predict_fn=predict_fn
        )
        values = future.result()[name]
    finally:
        evaluator.close()
    return {metric: float(value) for metric, value in values.items()}
