"""Parses gin files and bindings; turns gin's errors into one sentence with the nearest name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util  # gin uses it without importing it
import inspect
import logging
import os
import re
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin

import uncurl_jax
from uncurl_jax.errors import InputError

_PARSE_ERRORS = (
    AttributeError,
    ImportError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
)
# Where dataclasses and small functions check what gin files bind.
_CONFIGURATION_FILES = tuple(
    Path(uncurl_jax.__file__).parent / name for name in ("config.py", "experiments/study.py")
)


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
    _search_in(str(files_root()))
    for binding in bindings:
        name, separator, value = binding.partition("=")
        if not (name.strip() and separator and value.strip()):
            raise InputError(f"A gin binding must be --gin.NAME=VALUE, got --gin.{binding}.")
    texts = read_with_includes(files)
    imports = _imports(texts, modules) if bindings else []
    lines = [
        "from __gin__ import dynamic_registration",
        *imports,
        *(f"include '{file}'" for file in files),
        *bindings,
    ]
    try:
        with _without_search_messages():
            gin.parse_config("\n".join(lines) + "\n")
        gin.finalize()
    except _PARSE_ERRORS as error:
        raise InputError(_parse_problem(error, bindings, imports)) from None
    _check_macros(bindings)


@contextlib.contextmanager
def _without_search_messages() -> Iterator[None]:
    """Keeps gin from logging, as an error, each place where an included file is not."""

    def is_shown(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Path not found: ")

    logger = logging.getLogger()
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


@functools.cache
def _search_in(directory: str) -> None:
    """Lets include statements find the package's files; gin keeps what it was told before."""
    gin.add_config_file_search_path(directory)


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with its gin bindings, if the configuration names it."""
    try:
        return gin.get_configurable(function)
    except ValueError:
        return function


def bound(function: Callable[..., Any]) -> set[str]:
    """Returns the names of the parameters of `function` that the configuration binds."""
    try:
        return set(gin.get_bindings(function, resolve_references=False))
    except ValueError:
        return set()


def bound_value(function: Callable[..., Any], parameter: str) -> Any:
    """Returns what the configuration binds a parameter to, references followed; None if nothing."""
    return gin.get_bindings(function).get(parameter) if parameter in bound(function) else None


def system_refused(reason: object) -> str:
    """Returns the sentence for an error of the operating system, such as a full disk."""
    return (
        f"The system must let files be read and written, got {reason}: make room, or choose "
        "another place."
    )


def explain(error: Exception) -> str | None:
    """Returns the sentence for a missing or mistyped value, None if the error is another one.

    Tensorstore raises ValueError for what the operating system refuses; that gets its sentence too.
    """
    lines = str(error).splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    if not lines or not frames:
        return None
    refused = re.search(r"os_error_code='(\d+)'", lines[0])
    if refused:
        files = re.findall(r'"([^"]*/[^"]*)"', lines[0])
        return system_refused(
            f"{os.strerror(int(refused[1]))} at {files[-1] if files else 'a file'}"
        )
    missing = re.match(r"(\w+).* missing \d+ required .*?arguments?: (.+)", lines[0])
    place = Path(frames[-1].filename)
    if missing and place.parent in (Path(__file__).parent, Path(gin.__file__).parent):
        names = re.findall(r"'(\w+)'", missing[2])
        remedy = " and ".join(f"--{name}" for name in names)
        if "config" in names:
            files = ", ".join(_shipped_files("runs"))
            remedy = f"--gin_file FILE, one that binds it such as those of the package: {files}"
        return f"{missing[1]} needs {', '.join(names)}, got no value: give {remedy}."
    called = re.search(r"In call to configurable '(\w+)'", "\n".join(lines))
    if called and place in _CONFIGURATION_FILES:
        return (
            f"{called[1]} needs values of the right types, got {lines[0].rstrip('.')}: correct "
            "its gin bindings."
        )
    return None


def _find_file(file: str) -> Path | None:
    found = [path for path in (Path(file), files_root() / file) if path.is_file()]
    return found[0] if found else None


def read_with_includes(files: Sequence[str]) -> list[str]:
    """Returns the texts of gin files and of those that they include.

    Raises:
      InputError: If one does not exist.
    """
    texts, seen = [], set()
    waiting = [(file, "") for file in files]
    while waiting:
        file, where = waiting.pop()
        path = _find_file(file)
        if path is None:
            raise InputError(
                f"A gin file must exist, got {file}{where}: give a path from here, or one that "
                f"the package has, {_nearest(file, _shipped_files())}."
            )
        if path not in seen:
            seen.add(path)
            texts.append(path.read_text(encoding="utf-8"))
            for number, line in enumerate(texts[-1].splitlines(), start=1):
                included = re.match(r"include ['\"](.+)['\"]", line)
                if included:
                    waiting.append((included[1], f" at {file}:{number}"))
    return texts


def _imports(texts: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Returns import lines: of the modules, and what the gin files import."""
    lines = {}
    for module in modules:
        package, _, name = module.rpartition(".")
        lines[name] = f"from {package} import {name}"
    for text in texts:
        for line in re.findall(r"^from [\w.]+ import \w+$", text, re.MULTILINE):
            if "__gin__" not in line:
                lines.setdefault(line.split()[-1], line)
    return list(lines.values())


def _shipped_files(folder: str = "*") -> list[str]:
    root = files_root()
    paths = (root / "gin").glob(f"{folder}/*.gin")
    return sorted(path.relative_to(root).as_posix() for path in paths)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest {', '.join(near)}" if near else f"known {', '.join(sorted(known))}"


def _parse_problem(error: Exception, bindings: Sequence[str], imports: Sequence[str]) -> str:
    text = str(error)
    where = _where(text) or (f" in {', '.join(bindings)}" if bindings else "")
    parameter = re.search(r"Configurable '([\w./]+)' doesn't have a parameter named '(\w+)'", text)
    if parameter:
        names = _parameters(parameter[1])
        return (
            f"A gin binding must name a parameter, got {parameter[1]}.{parameter[2]}{where}: "
            f"{_nearest(parameter[2], names)}."
        )
    selector = re.search(r"Couldn't resolve selector ([\w./]+); <module '([\w.]+)'", text)
    if selector:
        wanted = selector[1].rpartition(".")[2]
        return (
            f"A gin binding must name something of {selector[2]}, got {selector[1]}{where}: "
            f"{_nearest(wanted, _own_names(selector[2]))}."
        )
    symbol = re.match(r"'(\w+)' was not provided by an import statement", text)
    if symbol:
        known = sorted(line.split()[-1] for line in imports)
        remedy = f": {_nearest(symbol[1], known)}" if known else ": add the import to the file"
        return (
            f"A gin binding must begin with an imported module, got {symbol[1]}{where}{remedy}, "
            "as module.name.parameter=value."
        )
    required = re.search(r"([\w./]+?)(?:/macro\.value)? set to `%gin\.REQUIRED`", text)
    if required:
        return (
            f"{required[1]} must be set, got nothing: add --gin.{required[1]}=VALUE (text in "
            f"quotes within quotes, as --gin.{required[1]}=\"'text'\"), or bind it in a gin file."
        )
    macro = re.search(r"No bindings specified for '([\w/]+)/gin\.macro'", text)
    if macro:
        return f"A gin macro must have a value, got %{macro[1]} without one: set {macro[1]}."
    if "malformed node or string" in text:
        return (
            f"A gin value must be a Python literal, %MACRO or @reference, got another{where}: put "
            "text in quotes within quotes, as --gin.NAME=\"'text'\"."
        )
    if "No configurable matching" in text:
        return (
            f"A gin file must import the modules that it binds, got {text.splitlines()[0]}{where}: "
            "begin it with 'from __gin__ import dynamic_registration' and the import."
        )
    first = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return f"A gin configuration must parse, got {first}{where}: correct it."


def _own_names(module: str) -> list[str]:
    """Names of the package's own functions and classes in a module."""
    return [
        name
        for name, value in vars(importlib.import_module(module)).items()
        if not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith(uncurl_jax.__name__)
    ]


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
