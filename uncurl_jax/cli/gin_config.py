"""Parses gin files and bindings; turns gin's errors into one sentence with the nearest name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gin

import uncurl_jax
from uncurl_jax.errors import InputError


def files_root() -> Path:
    """Returns the directory that holds gin/ and configs/: of the checkout, or in the wheel."""
    package = Path(uncurl_jax.__file__).parent
    installed = package / "_files"
    return installed if installed.is_dir() else package.parent


def parse(files: Sequence[str], bindings: Sequence[str], modules: Sequence[str]) -> None:
    """Parses gin files, then bindings, and locks the configuration.

    Args:
      files: paths, looked up here first, then beside the package (gin/...).
      bindings: "name=value" lines that override the files'.
      modules: modules that bindings may name without a file importing them, as "a.b".

    Raises:
      InputError: If a file is missing, or a name or value is unknown or malformed.
    """
    gin.clear_config()
    gin.add_config_file_search_path(str(files_root()))
    for file in files:
        if not Path(file).is_file() and not (files_root() / file).is_file():
            raise InputError(
                f"A gin file must exist, got {file}: give a path from here or one of "
                f"{', '.join(_shipped_files())}."
            )
    imports = [
        f"from {module.rpartition('.')[0]} import {module.rpartition('.')[2]}"
        for module in (modules if bindings else ())
    ]
    lines = [
        "from __gin__ import dynamic_registration",
        *imports,
        *(f"include '{file}'" for file in files),
        *bindings,
    ]
    try:
        gin.parse_config("\n".join(lines) + "\n")
        gin.finalize()
    except (ValueError, AttributeError, SyntaxError, tokenize.TokenError, ImportError, OSError) as e:
        raise InputError(_parse_problem(e, bindings)) from None
    _check_macros(bindings)


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with its gin bindings, if the configuration names it."""
    try:
        return gin.get_configurable(function)
    except ValueError:
        return function


def explain(error: Exception) -> str | None:
    """Returns the sentence for an unset required value, None if the error is another one."""
    text = str(error)
    required = re.search(r"([\w./]+) set to `%gin\.REQUIRED`", text)
    if required:
        return f"{required[1]} must be set, got nothing: bind it in a gin file or with --gin."
    missing = re.search(r"No values supplied by Gin or caller for arguments: \[(.+?)\]", text)
    called = re.search(r"(\w+)(?:\.__init__)?\(\) missing", text)
    if missing and called:
        return (
            f"{called[1]} needs {missing[1]}, got no value for it: bind it in a gin file or with "
            "--gin, or give its option."
        )
    return None


def _shipped_files() -> list[str]:
    root = files_root()
    return sorted(path.relative_to(root).as_posix() for path in (root / "gin").glob("runs/*.gin"))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest {', '.join(near)}" if near else f"known {', '.join(sorted(known))}"


def _parse_problem(error: Exception, bindings: Sequence[str]) -> str:
    text = str(error)
    where = _where(text)
    parameter = re.search(r"Configurable '([\w./]+)' doesn't have a parameter named '(\w+)'", text)
    if parameter:
        names = _parameters(parameter[1])
        return (
            f"A gin binding must name a parameter, got {parameter[1]}.{parameter[2]}{where}: "
            f"{_nearest(parameter[2], names)}."
        )
    selector = re.search(r"Couldn't resolve selector ([\w./]+); <module '([\w.]+)'", text)
    if selector:
        module = importlib.import_module(selector[2])
        names = [name for name in vars(module) if not name.startswith("_")]
        wanted = selector[1].rpartition(".")[2]
        return (
            f"A gin binding must name something of {selector[2]}, got {selector[1]}{where}: "
            f"{_nearest(wanted, names)}."
        )
    macro = re.search(r"No bindings specified for '([\w/]+)/gin\.macro'", text)
    if macro:
        return f"A gin macro must have a value, got %{macro[1]} without one: set {macro[1]}."
    first = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    given = f" in {', '.join(bindings)}" if bindings and not where else where
    return f"A gin configuration must parse, got {first}{given}: correct it."


def _where(text: str) -> str:
    place = re.search(r'In file "([^"]+)", line (\d+)', text)
    if place:
        return f" at {place[1]}:{place[2]}"
    line = re.search(r"In bindings string line \d+\n\s*(.+)", text)
    return f" in {line[1].strip()}" if line else ""


def _parameters(selector: str) -> list[str]:
    """Names of the parameters of a configurable that gin knows, [] if it cannot be found."""
    module, _, name = selector.rpartition(".")
    for prefix in ("uncurl_jax.", ""):
        for candidate in _modules_ending(prefix, module):
            target = getattr(candidate, name, None)
            if callable(target):
                return list(inspect.signature(target).parameters)
    return []


def _modules_ending(prefix: str, name: str) -> list[Any]:
    import sys

    return [
        module
        for key, module in list(sys.modules.items())
        if key.startswith(prefix) and (key == name or key.endswith(f".{name}"))
    ]


def _check_macros(bindings: Sequence[str]) -> None:
    """A macro that nothing refers to is a typo: gin itself would accept it silently."""
    text = gin.config_str(max_line_length=10_000)
    known = sorted(set(re.findall(r"%(\w+)", text)))
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if re.fullmatch(r"\w+", name) and name not in known:
            raise InputError(
                f"A gin macro must be used by a gin file, got {name}: {_nearest(name, known)}."
                if known
                else f"A gin macro must be used by a gin file, got {name}: give --gin_file."
            )
