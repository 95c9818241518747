"""Modules that stand in for airio and jestimator, which T5X imports and no package index has.

T5X needs airio for data pipelines of airio's own and jestimator for one optimizer, Amos. Both are
imported whenever T5X is; of both it touches a handful of names then. Where a package is installed
it is used; where it is not, a module with just these names takes its place: classes that nothing
is an instance of, and functions that say what is missing when they are called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, NamedTuple, NoReturn


class _ScaleByAmosState(NamedTuple):
    """Has a place in T5X's table of optimizer states; no optimizer makes one."""


def _missing(package: str, name: str) -> Any:
    """Returns a function that refuses to be called."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise ImportError(
            f"{name} needs the package {package}, which is not installed: uncurl_jax stands in for "
            f"its names so that T5X can be imported. Install {package} from its repository."
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


class _StandIn(types.ModuleType):
    """A module whose other names are missing in words."""

    package: str

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self.__name__}.{name} is not there, because {self.package} is not installed and "
            f"uncurl_jax stands in only for what T5X imports: install {self.package} from its "
            "repository."
        )


def _module(name: str, **names: Any) -> _StandIn:
    module = _StandIn(name, f"Stands in for {name}; see {__name__}.")
    module.package = name.partition(".")[0]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in names.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


def _install_airio() -> None:
    """T5X asks whether a task, or an iterator, is one of airio's."""
    names = ("DatasetProviderBase", "Task", "Mixture", "AirIODatasetIterator")
    classes = {name: type(name, (), {"__module__": "airio.core"}) for name in names}
    providers = _module(
        "airio.core.dataset_providers",
        get_vocabularies=_missing("airio", "airio.core.dataset_providers.get_vocabularies"),
    )
    core = _module("airio.core", dataset_providers=providers, **classes)
    _module("airio", core=core, __path__=[])


def _install_jestimator() -> None:
    """T5X wraps Amos as an optimizer, and knows how its state is divided."""
    amos = _module(
        "jestimator.amos",
        amos=_missing("jestimator", "jestimator.amos.amos"),
        ScaleByAmosState=_ScaleByAmosState,
    )
    helper = _module(
        "jestimator.amos_helper",
        state_partition_rule=_missing("jestimator", "jestimator.amos_helper.state_partition_rule"),
    )
    _module("jestimator", amos=amos, amos_helper=helper, __path__=[])


def install() -> tuple[str, ...]:
    """Puts stand-ins into `sys.modules` for what is not installed; returns their packages."""
    installers = {"airio": _install_airio, "jestimator": _install_jestimator}
    missing = tuple(
        name
        for name in installers
        if name not in sys.modules and importlib.util.find_spec(name) is None
    )
    for name in missing:
        installers[name]()
    return missing
