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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    Path(uncurl_jax.__file__).parent / name
    for name in ("config.py", "experiments/study.py", "serving/settings.py")
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
    imports = _imports(texts.values(), modules)
    lines = [
        "from __gin__ import dynamic_registration",
        *(imports if bindings else ()),
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


def read_with_includes(files: Sequence[str]) -> dict[str, str]:
    """Returns {name: text} of gin files and of those that they include.

    Raises:
      InputError: If one does not exist.
    """
    texts: dict[str, str] = {}
    seen = set()
    waiting = [(file, "") for file in files]
    while waiting:
        file, where = waiting.pop()
        path = _find_file(file)
        if path is None:
            raise InputError(
                f"A gin file must exist, got {file}{where}: give a path from here, or one that "
                f"the package has, {nearest(file, _shipped_files())}."
            )
        if path not in seen:
            seen.add(path)
            texts[file] = path.read_text(encoding="utf-8")
            for number, line in enumerate(texts[file].splitlines(), start=1):
                included = re.match(r"include ['\"](.+)['\"]", line)
                if included:
                    waiting.append((included[1], f" at {file}:{number}"))
    return texts


def imported_modules(text: str) -> dict[str, str]:
    """Returns {name: module} of what a gin file imports, "from a import b" as {"b": "a.b"}."""
    found = re.findall(r"^(?:from ([\w.]+) )?import (\w+)$", text, re.MULTILINE)
    return {
        name: f"{package}.{name}" if package else name
        for package, name in found
        if package != "__gin__"
    }


def _imports(texts: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Returns import lines: of the modules, and what the gin files import."""
    found = {module.rpartition(".")[2]: module for module in modules}
    for text in texts:
        found = imported_modules(text) | found
    return [_import_line(module) for module in found.values()]


def _import_line(module: str) -> str:
    package, _, name = module.rpartition(".")
    return f"from {package} import {name}" if package else f"import {name}"


def _shipped_files(folder: str = "*") -> list[str]:
    root = files_root()
    paths = (root / "gin").glob(f"{folder}/*.gin")
    return sorted(path.relative_to(root).as_posix() for path in paths)


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns the part of a sentence that names the nearest of what is known."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest {', '.join(near)}" if near else f"known {', '.join(sorted(known))}"


def _parse_problem(error: Exception, bindings: Sequence[str], imports: Sequence[str]) -> str:
    text = str(error)
    where = _where(text) or (f" in {', '.join(bindings)}" if bindings else "")
    parameter = re.search(r"Configurable '([\w./]+)' doesn't have a parameter named '(\w+)'", text)
    if parameter:
        names = _parameters(parameter[1], imports)
        return wrong_parameter(parameter[1], parameter[2], where, names)
    selector = re.search(r"Couldn't resolve selector ([\w./]+); <module '([\w.]+)'", text)
    if selector:
        return wrong_selector(selector[2], selector[1], where, _own_names(selector[2]))
    symbol = re.match(r"'(\w+)' was not provided by an import statement", text)
    if symbol:
        return wrong_module(symbol[1], where, sorted(line.split()[-1] for line in imports))
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


def wrong_module(module: str, where: str, known: Sequence[str]) -> str:
    """Returns the sentence for a module that no gin file imports."""
    remedy = nearest(module, known) if known else "add the import to the file"
    return (
        f"A gin binding must begin with an imported module, got {module}{where}: {remedy}, "
        "as module.name.parameter=value."
    )


def wrong_parameter(selector: str, parameter: str, where: str, known: Sequence[str]) -> str:
    """Returns the sentence for a function or class that has no such parameter."""
    return (
        f"A gin binding must name a parameter, got {selector}.{parameter}{where}: "
        f"{nearest(parameter, known)}."
    )


def wrong_selector(module: str, selector: str, where: str, known: Sequence[str]) -> str:
    """Returns the sentence for a module that has no such function or class."""
    return (
        f"A gin binding must name something of {module}, got {selector}{where}: "
        f"{nearest(selector.rpartition('.')[2], known)}."
    )


def _own_names(module: str) -> list[str]:
    """Names of the functions and classes in a module that are of its own package."""
    package = module.partition(".")[0]
    return [
        name
        for name, value in vars(importlib.import_module(module)).items()
        if not name.startswith("_")
        and callable(value)
        and str(getattr(value, "__module__", "")).partition(".")[0] == package
    ]


def _where(text: str) -> str:
    place = re.search(r'In file "([^"]+)", line (\d+)', text)
    if place:
        return f" at {place[1]}:{place[2]}"
    line = re.search(r"In bindings string line \d+\n\s*(.+)", text)
    return f" in {line[1].strip()}" if line else ""


def _parameters(selector: str, imports: Sequence[str]) -> list[str]:
    """Names of the parameters of a configurable that gin knows, [] if it cannot be found."""
    module, _, name = selector.rpartition(".")
    imported = imported_modules("\n".join(imports)).get(module)
    named = [sys.modules[imported]] if imported in sys.modules else []
    for candidate in (
        *named,
        *_modules_ending("uncurl_jax.", module),
        *_modules_ending("", module),
    ):
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
                f"A gin macro must be used by a gin file, got {name}: {nearest(name, known)}."
                if known
                else f"A gin macro must be used by a gin file, got {name}: give --gin_file."
            )
