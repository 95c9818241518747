"""Finds typos in gin bindings from source files alone, before slow modules are imported.

T5X with TensorFlow takes several seconds to import. What a binding names can be read from the
source of the module in a fraction of one: its functions, classes and their parameters. Whatever
cannot be told this way (star imports, inherited parameters) is left to gin.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from uncurl_jax.cli.gin_config import (
    imported_modules,
    nearest,
    wrong_module,
    wrong_parameter,
    wrong_selector,
)
from uncurl_jax.errors import InputError

_BINDING = re.compile(r"^(?:[\w./]+/)?(\w+)\.(\w+)\.(\w+)\s*=")
_REFERENCE = re.compile(r"@(?:[\w./]+/)?(\w+)\.(\w+)")
_MACRO = re.compile(r"^(\w+)\s*=")


class _Source(NamedTuple):
    """Names of a module: functions and classes with their parameters, None where unknown."""

    names: dict[str, list[str] | None]
    is_complete: bool


def check(texts: Mapping[str, str], bindings: Sequence[str], importable: Sequence[str]) -> None:
    """Checks what gin files and bindings name.

    Args:
      texts: file name to text, of all files with their includes.
      bindings: "name=value" lines.
      importable: modules that bindings may name without a file importing them, as "a.b".

    Raises:
      InputError: If a module, function, class, parameter or macro does not exist; names the
        nearest.
    """
    modules = {module.rpartition(".")[2]: module for module in importable}
    for text in texts.values():
        modules = imported_modules(text) | modules
    lines = [
        (line, f" at {name}:{number}")
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.startswith(("#", "from ", "import ", "include "))
    ]
    lines += [(binding, f" in {binding}") for binding in bindings]
    for line, where in lines:
        found = _BINDING.match(line)
        if found:
            module, name, parameter = found.groups()
            known = _check_name(modules, module, name, where)
            if known is not None and parameter not in known:
                raise InputError(wrong_parameter(f"{module}.{name}", parameter, where, known))
        for module, name in _REFERENCE.findall(line.partition("=")[2]):
            _check_name(modules, module, name, where)
    used = {name for text in texts.values() for name in re.findall(r"%(\w+)", text)}
    for binding in bindings:
        macro = _MACRO.match(binding)
        if macro and macro[1] not in used:
            raise InputError(
                f"A gin macro must be used by a gin file, got {macro[1]}: "
                f"{nearest(macro[1], sorted(used))}."
            )


def _check_name(modules: Mapping[str, str], module: str, name: str, where: str) -> list[str] | None:
    """Returns the parameters of a function or class, None if they cannot be told."""
    path = modules.get(module)
    if path is None:
        raise InputError(wrong_module(module, where, list(modules)))
    source = _read_source(path)
    if source is None:
        return None
    if name not in source.names and source.is_complete:
        names = [key for key, parameters in source.names.items() if parameters is not None]
        raise InputError(wrong_selector(path, f"{module}.{name}", where, names))
    return source.names.get(name)


@functools.cache
def _read_source(module: str) -> _Source | None:
    file = _source_file(module)
    if file is None:
        return None
    names: dict[str, list[str] | None] = {}
    is_complete = True
    for node in _statements(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef):
            names[node.name] = None if node.decorator_list else _parameters(node)
        elif isinstance(node, ast.ClassDef):
            names[node.name] = _class_parameters(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            aliases = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
            is_complete &= "*" not in aliases
            names |= dict.fromkeys(aliases)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: None for target in targets if isinstance(target, ast.Name)}
    return _Source(names, is_complete)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements of a module, those under an if, a try or a with among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _source_file(module: str) -> Path | None:
    """Finds a module's file without importing its packages."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(spec.submodule_search_locations[0]).joinpath(*inner)
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _parameters(function: ast.FunctionDef) -> list[str] | None:
    arguments = function.args
    if arguments.kwarg is not None:
        return None
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _class_parameters(node: ast.ClassDef) -> list[str] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            parameters = _parameters(item)
            return None if parameters is None else parameters[1:]
    if node.bases or not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return None
    return [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
