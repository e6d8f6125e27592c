"""A value on the command line for every field of a config, by its type."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing

# An object of accelerate, which has no text; transformers' own parser takes none either.
NO_TEXT = {"parallelism_config"}
UNIONS = (typing.Union, types.UnionType)
ONE_WORD = {"report_to", "optim_target_modules"}  # str or list: transformers' parser takes one word


def sample(kind, name):
    """(words on the command line, the value that they mean) of a field, by its type; not its default."""
    if name == "debug":
        return ["underflow_overflow"], ["underflow_overflow"]
    (found,) = [f for f in dataclasses.fields(kind) if f.name == name]
    hint = typing.get_type_hints(kind)[name]
    choices = found.metadata.get("choices")
    if choices is not None:
        return [list(choices)[-1]], list(choices)[-1]
    hints = set(typing.get_args(hint)) if typing.get_origin(hint) in UNIONS else {hint}
    for each in hints:
        if inspect.isclass(each) and issubclass(each, enum.Enum):
            last = list(each)[-1]
            return [str(last.value)], last.value
    if list[str] in hints and found.name not in ONE_WORD:
        return ["a", "b"], ["a", "b"]
    if list[float] in hints:
        return ["0.25", "4"], [0.25, 4.0]
    if bool in hints:
        value = found.default is not True
        return [str(value).lower()], value
    for type_, text in ((int, "7"), (float, "0.25")):
        if type_ in hints and str not in hints:
            return [text], type_(text)
    if str in hints:
        return ["text"], "text"
    raise AssertionError(f"{kind.__name__}.{name}: {hint} has no sample")


def plain(value):
    """Enumerations as their texts, also those in lists."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value
