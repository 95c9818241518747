"""The registry of methods: statistics (and weights) -> Grouping, chosen by name.

A method of your own is a function from `GroupRequest` to `Grouping`. Put it in a module that calls
`register_method(Method("my_method", my_function, "what it does"))`, import that module in a gin
file, and name it wherever a method is named.
"""

from __future__ import annotations

from uncurl_jax.errors import InputError
from uncurl_jax.pruning import cluster_methods, keep_methods
from uncurl_jax.pruning.choices import require_choice
from uncurl_jax.pruning.grouping import (
    Grouping,
    GroupingOptions,
    GroupRequest,
    LayerParameters,
    Method,
    check_grouping,
    keep,
    merge,
    most_selected,
)
from uncurl_jax.pruning.statistics import collected

__all__ = [
    "COMPOSITE",
    "GroupRequest",
    "Grouping",
    "GroupingOptions",
    "LayerParameters",
    "Method",
    "get_method",
    "group_experts",
    "keep",
    "merge",
    "method_names",
    "most_selected",
    "register_method",
]

# Not a method by itself: a plan with another method in each layer (`make_plan.layer_methods`).
COMPOSITE = "composite"

_METHODS = {method.name: method for method in (*cluster_methods.METHODS, *keep_methods.METHODS)}


def register_method(method: Method) -> None:
    """Adds a method.

    Raises:
      InputError: If the name is taken.
    """
    if method.name in _METHODS or method.name == COMPOSITE:
        raise InputError(
            f"A method's name must be new, got {method.name!r}, which is taken: choose another."
        )
    _METHODS[method.name] = method


def method_names() -> tuple[str, ...]:
    """Returns the names of all methods, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> Method:
    """Returns a method by name.

    Raises:
      InputError: If it is unknown; the message holds the nearest names.
    """
    return _METHODS[require_choice("method", name, _METHODS)]


def group_experts(method: str, request: GroupRequest) -> Grouping:
    """Groups one layer's experts by a registered method.

    Raises:
      InputError: If the method is unknown, num_clusters is not in [1, Z], a cap cannot hold all
        experts, weights or statistics that the method needs are missing, or it returns something
        that is no grouping.
    """
    chosen = get_method(method)
    if not 1 <= request.num_clusters <= request.num_experts:
        raise InputError(
            f"num_experts after pruning must lie in [1, {request.num_experts}], got "
            f"{request.num_clusters}: choose no more experts than the layer has."
        )
    cap = request.options.max_cluster_size
    if cap is not None and cap * request.num_clusters < request.num_experts:
        raise InputError(
            f"max_cluster_size * clusters must hold all experts, got {cap} * "
            f"{request.num_clusters} for {request.num_experts}: raise the cap or keep more."
        )
    if (chosen.needs_router or chosen.needs_experts) and request.parameters is None:
        raise InputError(
            f"Method {method!r} needs the checkpoint's weights, got statistics alone: give "
            "--checkpoint too."
        )
    check_collected(chosen, request)
    return check_grouping(chosen.group(request), request, method)


def check_collected(method: Method, request: GroupRequest) -> None:
    """Raises InputError if statistics that a method needs were not collected."""
    missing = sorted(set(method.collect) - set(collected(request.statistics)))
    if missing:
        raise InputError(
            f"Method {method.name!r} needs the statistics {', '.join(missing)}, which were not "
            f"collected: calibrate again with {' '.join(f'--collect {name}' for name in missing)}."
        )
