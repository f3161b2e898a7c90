"""Config dataclasses to and from plain JSON values, with every key and type checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

C = TypeVar("C")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values: nested dataclasses become objects, tuples become lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def config_from_dict(cls: type[C], values: Any, where: str = "config") -> C:
    """Build the dataclass ``cls`` from JSON values, taking its defaults for absent keys.

    ``ValueError`` names the key for: unknown keys, values of another type than annotated (a bool is no int, a
    float is no int, an int is a float), non-finite floats, missing keys without default, and whatever the
    dataclass refuses in its ``__post_init__``.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object of settings, got {_short(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ValueError(f"{where}.{name}: unknown setting; {cls.__name__} has {', '.join(fields)}")
    for name, field in fields.items():
        if (
            name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{where}.{name}: missing")
    return cls(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _typed_union(arguments, value, where)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise ValueError(f"{where}: expected one of {list(arguments)}, got {_short(value)}")
        return value
    if origin is tuple:
        return _typed_tuple(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        return config_from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) in (int, float):
        number = float(value) if abs(value) < 1e300 else math.inf
        if not math.isfinite(number):
            raise ValueError(f"{where}: expected a finite number, got {_short(value)}")
        return number
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {_short(value)}")


def _typed_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    reasons = []
    for choice in arguments:
        if choice is not type(None):
            try:
                return _typed(choice, value, where)
            except ValueError as error:
                reasons.append(str(error))
    raise ValueError("; or ".join(reasons))


def _typed_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: expected a list, got {_short(value)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_typed(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ValueError(f"{where}: expected {len(arguments)} entries, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_typed(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(pairs))


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
