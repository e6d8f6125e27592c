"""Options as flags: what `HfArgumentParser`, and TRL's `TrlParser`, need beside the type of a field, and the text
that parsers leave in fields of several types."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from transformers.hf_argparser import string_to_bool

Config = TypeVar("Config", bound=type)


class Switch(argparse.Action):
    """`--name`, `--name false` and `--no_name` for a bool that may also be left open (None).

    For the metadata of a field, `{"action": Switch}`: to such a field the parsers give neither a bare flag nor
    a `--no_` flag of their own.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        self._opposites = (f"--no_{dest}", f"--no-{dest.replace('_', '-')}")
        flags = [*option_strings, *self._opposites]
        super().__init__(flags, dest, **{**options, "nargs": "?", "const": None})

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        opposite = option_string in self._opposites
        if opposite and values is not None:
            parser.error(f"argument {option_string}: takes no value, got {values}")
        setattr(namespace, self.dest, not opposite if values is None else values)


def documented(config: Config) -> Config:
    """Gives every field that a config class declares its text in `--help`: its entry under `Args:` in the
    class's docstring."""
    entries = dict(_entries(inspect.getdoc(config) or ""))
    for field in dataclasses.fields(config):
        if field.name in inspect.get_annotations(config) and field.name in entries:
            text = entries[field.name].replace("%", "%%")  # argparse formats it
            field.metadata = MappingProxyType({**field.metadata, "help": text})
    return config


def _entries(docstring: str) -> Iterator[tuple[str, str]]:
    """(name, text) of `Args:`, whose entries are `name, name: text` and their deeper continuations."""
    arguments = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE)
    for entry in re.split(r"\n(?=    \S)", arguments[1]) if arguments else ():
        names, _, text = entry.partition(":")
        for name in names.split(","):
            yield name.strip(), " ".join(text.split())


# The text that parsers leave; `name` is that of the config, for errors -----------------------------------


def bool_of(name: str, option: str, text: str) -> bool:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        raise ValueError(f"{name}: {option} must be True, False or None, got {text!r}") from None


def number_or_none(name: str, option: str, text: str) -> int | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name}: {option} must be None, 'auto' or positive, got {text!r}"
        ) from None


def check_json(name: str, option: str, value: object) -> None:
    """What begins as JSON must be JSON; other text is the path of a file, which the Trainer reads."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: {option} must be JSON, got {value!r}: {error}") from None
