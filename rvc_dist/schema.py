"""JSON and YAML with bounds, and data that is what its type says: texts that anybody may have made or edited.

A type is a TypedDict (other keys may be there besides), a dataclass (none may), or made of those and plain types.
Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rvc_dist.files import ForeignFileError, regular_size

T = TypeVar("T")

MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_JSON_DEPTH = 1 << 26, 2_000_000, 32
"""The plan of 200,000 recordings is within them, and whatever is within them takes well below 1 GB."""
MAX_YAML_BYTES, MAX_YAML_VALUES, MAX_YAML_DEPTH = 1 << 17, 10_000, 20
"""A value counts as often as aliases repeat it."""
MAX_YAML_PLAIN = 3000
"""Letters of a text without quotes, which may be a number: of a longer one Python does not write the digits."""


class SchemaError(ValueError):
    """A text is not what it should be; the message is the reason and does not name the file."""


class Rule(NamedTuple):
    """What a plain value must be."""

    expected: str
    types: tuple[type, ...]
    holds: Callable[[Any], bool] = lambda value: True

    def fits(self, value: object) -> bool:
        return type(value) in self.types and self.holds(value)


class Fault(NamedTuple):
    key: str
    got: object
    expected: str


def _whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number of {low} to {high}", (int,), lambda value: bool(low <= value <= high))


Count = Annotated[int, _whole(0, 2**53)]
Positive = Annotated[int, _whole(1, 2**53)]
SpeakerId = Annotated[int, _whole(0, 108)]
"""A row of the speaker table of pretrained generators."""
Seconds = Annotated[float, Rule("seconds", (int, float), lambda value: bool(0 <= value < 1e12))]
OsName = Annotated[str, Rule("a name", (str,), lambda text: "\0" not in text)]
"""May have bytes that are no UTF-8, lone surrogates in Python."""
FileName = Annotated[
    str, Rule("a file's name alone", (str,), lambda text: text > ".." and not set(text) & set("/\\\0"))
]

_NOTHING = Rule("no such key", ())
_PLAIN: dict[object, Rule] = {
    bool: Rule("true or false", (bool,)),
    int: Rule("a whole number", (int,), lambda value: abs(value) < 2**63),
    float: Rule("a number", (int, float), lambda value: type(value) is float or abs(value) < 2**63),
    str: Rule("a text", (str,), lambda text: text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)),
    dict: Rule("keys with values", (dict,)),
    type(None): Rule("null", (type(None),)),
}


def check(value: Any, kind: type[T]) -> T:
    """`value`, if it is what `kind` says.

    Raises:
        SchemaError: it is not; says the first key at fault, what is there, and what was expected.
    """
    if fault := _fault(value, kind):
        got = "nothing" if fault.got is dataclasses.MISSING else reprlib.repr(fault.got)
        raise SchemaError(f"{fault.key.lstrip('.') or 'the whole'}: got {got}, expected {fault.expected}")
    found: T = value
    return found


def _fault(value: Any, kind: Any) -> Fault | None:
    origin, arguments, rule = _parts(kind)
    children: Iterable[tuple[object, Any, Any]] = ()
    if value is dataclasses.MISSING:
        fits = False
    elif rule is not None:
        fits = rule.fits(value)
    elif kind is Any:
        fits = True
    elif origin is Union:
        fits = any(_fault(value, one) is None for one in arguments)
    elif origin is list:
        fits = type(value) is list
        children = ((i, item, arguments[0]) for i, item in enumerate(value if fits else ()))
    else:
        fits = type(value) is dict
        inside = value if fits else {}
        children = _by_key(inside, kind) if origin is None else ((k, v, arguments[1]) for k, v in inside.items())
    if not fits:
        return Fault("", value, _expected(kind))
    for key, item, one in children:
        if fault := _fault(item, one):
            return fault._replace(key=(f"[{key}]" if isinstance(key, int) else f".{key}") + fault.key)
    return None


@cache
def _parts(kind: Any) -> tuple[object, tuple[Any, ...], Rule | None]:
    origin, arguments = get_origin(kind), get_args(kind)
    alike = {UnionType: Union, tuple: list}  # JSON has no tuples
    return alike.get(origin, origin), arguments, arguments[1] if origin is Annotated else _PLAIN.get(kind)


def _by_key(value: dict[str, Any], kind: Any) -> Iterable[tuple[str, Any, Any]]:
    hints, optional, closed = _keys(kind)
    for key, hint in hints.items():
        if key in value or key not in optional:
            yield key, value.get(key, dataclasses.MISSING), hint
    if closed:
        yield from ((key, value[key], Annotated[None, _NOTHING]) for key in value if key not in hints)


@cache
def _keys(kind: Any) -> tuple[dict[str, Any], frozenset[str], bool]:
    """Of a record: the type of every key, those that may lack, and whether there may be no other."""
    hints = get_type_hints(kind, include_extras=True)
    if not dataclasses.is_dataclass(kind):
        return hints, kind.__optional_keys__, False
    fields = dataclasses.fields(kind)
    optional = [f.name for f in fields if not f.default is f.default_factory is dataclasses.MISSING]
    return {f.name: hints[f.name] for f in fields}, frozenset(optional), True


def _expected(kind: Any) -> str:
    origin, arguments, rule = _parts(kind)
    if rule is not None:
        return rule.expected
    if origin is Union:
        return " or ".join(map(_expected, arguments))
    return "a list" if origin is list else f"keys such as {next(iter(_keys(kind)[0]))}" if origin is None else "keys"


def read_bounded(path: Path, most: int) -> bytes:
    """All of a regular file.

    Raises:
        SchemaError: it is something else (a FIFO may never answer, a device never end), or larger than `most` bytes.
        OSError: it cannot be read.
    """
    try:
        size = regular_size(path)
    except ForeignFileError as error:
        raise SchemaError(str(error)) from error
    if size > most:
        raise SchemaError(f"{size} bytes, expected at most {most}")
    with path.open("rb") as stream:
        return stream.read(size)


def parse_json(data: bytes, kind: type[T]) -> T:
    """The `kind` that a JSON text holds.

    Raises:
        SchemaError: it is no JSON, out of bounds, or something else is in it.
    """
    if len(data) > MAX_JSON_BYTES or data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_VALUES:
        raise SchemaError(f"more than {MAX_JSON_BYTES} bytes or {MAX_JSON_VALUES} values")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except SchemaError:
        raise
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not valid JSON ({error})") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level if isinstance(c, (dict, list)) for v in (c.values() if isinstance(c, dict) else c)]
    if level:
        raise SchemaError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return check(value, kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise SchemaError(f"the key {reprlib.repr(twice)} is there twice")
    return found


class _Loader(yaml.SafeLoader):
    """Plain data, and no key twice, of which only the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        _unique([(key, None) for key in keys])
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def parse_yaml(data: bytes) -> Any:
    """What is in a YAML text, once its events alone have shown how much that is.

    Raises:
        SchemaError: it is no YAML, or out of bounds.
    """
    sizes: dict[str, int] = {}
    opened: list[tuple[str, int]] = []
    total = 0
    try:
        text = data.decode()
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in {anchor for anchor, _ in opened}:
                    raise SchemaError(f"{event.anchor} holds itself")
                total += sizes.get(str(event.anchor), 0)
            elif isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor or "", total))
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                sizes[anchor] = total - before
            elif isinstance(event, yaml.ScalarEvent) and not event.style and len(event.value) > MAX_YAML_PLAIN:
                raise SchemaError(f"{reprlib.repr(event.value)} has {len(event.value)} letters without quotes")
            total += isinstance(event, yaml.NodeEvent)
            if total > MAX_YAML_VALUES or len(opened) > MAX_YAML_DEPTH:
                raise SchemaError(f"more than {MAX_YAML_VALUES} values, or {MAX_YAML_DEPTH} levels")
        return yaml.load(text, _Loader)
    except SchemaError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SchemaError(f"not valid YAML ({error})") from error
