"""JSON and YAML with bounds, and data that is what its type says: texts that anybody may have made or edited.

A type is a TypedDict (other keys may be there besides), a dataclass (none may), or made of those and plain types.
Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rvc_dist.files import ForeignFileError

try:  # a recipe is read many times, and Python's own takes 25 ms for it
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

T = TypeVar("T")

MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_JSON_DEPTH = 1 << 26, 2_300_000, 32
"""The work list of 200,000 recordings is within them, and whatever is within them takes well below 1 GB."""
MAX_YAML_BYTES, MAX_YAML_VALUES, MAX_YAML_DEPTH = 1 << 17, 10_000, 20
"""A value counts as often as aliases repeat it."""
MAX_YAML_PLAIN = 3000
"""Letters of a text without quotes, which may be a number: of a longer one Python does not write the digits."""


@dataclass(frozen=True, eq=False)
class Rule:
    """What a plain value must be."""

    expected: str | Collection[Any]
    """In words, or the choices: the keys of a table may grow."""
    types: tuple[type, ...]
    holds: Callable[[Any], bool] = lambda value: True
    kind: str = ""
    """What `types` are called, where `expected` does not say it."""

    def fits(self, value: object) -> bool:
        return type(value) in self.types and self.holds(value)

    def expects(self, value: object = None) -> str:
        """What `value` should have been."""
        if isinstance(self.expected, str):
            return f"{self.kind}, {self.expected}" if self.kind and type(value) not in self.types else self.expected
        near = nearest(value, self.expected) if isinstance(value, str) else ""
        return f"one of {', '.join(map(str, self.expected))}" + (f"; did you mean {near}?" if near else "")


class Fault(NamedTuple):
    """What is wrong with a value, under its full key."""

    key: str
    sentence: str
    is_bound: bool = False
    """The value has the right type and is out of bounds."""

    @classmethod
    def of(cls, key: str, value: object, wanted: str, is_bound: bool = False) -> Fault:
        if isinstance(value, tuple):
            value = list(value)
        got = "nothing" if value is dataclasses.MISSING else "null" if value is None else reprlib.repr(value)
        return cls(key, f"{key or 'the whole'}: got {got}, expected {wanted}", is_bound)


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of `words` that `word` resembles most, or an empty text."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(words), n=1)), "")


def one_of(choices: Collection[Any]) -> Rule:
    return Rule(choices, tuple({type(choice) for choice in choices}), choices.__contains__)


def _number(low: float, expected: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule for whole numbers if `low` is one, else for all numbers; NaN never holds."""
    if isinstance(low, int):
        return Rule(expected, (int,), holds, "a whole number")
    return Rule(expected, (int, float), holds, "a number")


def at_least(low: float) -> Rule:
    return _number(low, f"at least {low}", lambda value: bool(low <= value < math.inf))


def above(low: float) -> Rule:
    return _number(low, f"more than {low}", lambda value: bool(low < value < math.inf))


def within(low: float, high: float) -> Rule:
    return _number(low, f"{low} to {high}", lambda value: bool(low <= value <= high))


def multiple_of(base: int) -> Rule:
    return _number(base, f"a multiple of {base}", lambda value: value >= base and value % base == 0)


MAX_INT = 2**53
"""No count means anything above it, and JSON readers of others keep no larger one exactly."""
_MOST = Rule(f"at most {MAX_INT}", (int,), lambda value: bool(value <= MAX_INT))
Count = Annotated[int, at_least(0), _MOST]
Positive = Annotated[int, at_least(1), _MOST]
SpeakerId = Annotated[int, within(0, 9999)]
"""A row of a speaker table: below `config.MAX_SPEAKERS`."""
SpeakerName = Annotated[
    str,
    Rule(
        "a name of at most 255 printable letters and no |",  # which separates the columns of a filelist.txt
        (str,),
        lambda text: 0 < len(text) < 256 and text.isprintable() and text == text.strip() and "|" not in text,
    ),
]
Repeat = Annotated[int, within(1, 100)]
"""How often a clip counts in an epoch, as RVC-WebUI has it."""
Seconds = Annotated[float, Rule("seconds", (int, float), lambda value: bool(0 <= value < 1e12))]
UNCLEAN = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
"""What no name of a system holds: bytes that are no UTF-8 are other lone surrogates in Python."""
OsName = Annotated[str, Rule("a name", (str,), lambda text: not UNCLEAN.search(text))]
FileName = Annotated[
    OsName, Rule("a file's name alone", (str,), lambda text: text > ".." and not set(text) & set("/\\"))
]
Word = Annotated[str, Rule("a short text", (str,), lambda text: text.isprintable() and len(text) < 1000)]
"""For a sentence on the screen."""
Token = Annotated[str, Rule("letters and digits", (str,), lambda text: text.isascii() and text.isalnum())]

_PLAIN: dict[object, Rule] = {
    bool: Rule("true or false", (bool,)),
    int: Rule("a whole number", (int,), lambda value: abs(value) < 2**63),
    float: Rule("a number", (int, float), lambda value: type(value) is float or abs(value) < 2**63),
    str: Rule("a text", (str,), lambda text: text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)),
    dict: Rule("keys with values", (dict,)),
    type(None): Rule("null", (type(None),)),
}


def record(total: bool = True, /, **keys: Any) -> Any:
    """The type of what has these keys, or some of them, where no code needs a class for it."""
    make: Any = TypedDict
    return make("record", keys, total=total)


def check(value: Any, kind: type[T], key: str = "") -> T:
    """`value`, if it is what `kind` says; `key` is its own.

    Raises:
        ForeignFileError: it is not; says the first key at fault, what is there, and what was expected.
    """
    for fault in faults(value, kind, key):
        raise ForeignFileError(fault.sentence)
    found: T = value
    return found


def faults(value: Any, kind: Any, key: str = "") -> Iterator[Fault]:
    """All that is not as `kind` says in `value`, whose own key is `key`."""
    origin, arguments, rules = _parts(kind)
    for rule in rules:
        if not rule.fits(value):
            yield Fault.of(key, value, rule.expects(value), type(value) in rule.types)
            return
    if rules or kind is Any:
        return
    if origin is Union:
        yield from _faults_of_union(value, kind, key)
    elif type(value) not in ((list, tuple) if origin is list else (dict,)):
        yield Fault.of(key, value, expected(kind, value))
    elif origin is list:
        for i, item in enumerate(value):
            yield from faults(item, arguments[0], f"{key}[{i}]")
    else:
        yield from _faults_inside(value, kind, f"{key}." if key else "")


def _faults_of_union(value: Any, kind: Any, key: str) -> Iterator[Fault]:
    found: list[list[Fault]] = []
    for one in _parts(kind)[1]:  # in their order: what is frequent stands first
        found.append(list(faults(value, one, key)))
        if not found[-1]:
            return
    near = [some for some in found if any(fault.is_bound or fault.key != key for fault in some)]
    yield from near[0] if near else [Fault.of(key, value, expected(kind, value))]


def _faults_inside(value: dict[str, Any], kind: Any, prefix: str) -> Iterator[Fault]:
    origin, arguments, _ = _parts(kind)
    hints, optional = (dict.fromkeys(value, arguments[1]), frozenset()) if origin is dict else _keys(kind)
    for name, hint in hints.items():
        if name in value or name not in optional:
            yield from faults(value.get(name, dataclasses.MISSING), hint, f"{prefix}{name}")
    if dataclasses.is_dataclass(kind):
        for name in (name for name in value if name not in hints):
            near = nearest(str(name), hints)
            hint = f"did you mean {prefix}{near}?" if near else f"expected one of {', '.join(hints)}"
            yield Fault(f"{prefix}{name}", f"unknown key {prefix}{name}; {hint}")


@cache
def _parts(kind: Any) -> tuple[object, tuple[Any, ...], tuple[Rule, ...]]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return origin, arguments, arguments[1:]
    if origin is Literal:
        return origin, arguments, (one_of(arguments),)
    alike = {UnionType: Union, tuple: list}  # JSON has no tuples
    return alike.get(origin, origin), arguments, (_PLAIN[kind],) if kind in _PLAIN else ()


def _key(field: dataclasses.Field[Any]) -> str:
    """The field's name in a file, where the class has another: `field(metadata={"key": ...})`."""
    return str(field.metadata.get("key", field.name))


@cache
def _keys(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Of a record: the type of every key, and those that may lack."""
    hints = get_type_hints(kind, include_extras=True)
    if not dataclasses.is_dataclass(kind):
        return hints, kind.__optional_keys__
    optional = [_key(f) for f in dataclasses.fields(kind) if not f.default is f.default_factory is dataclasses.MISSING]
    return {_key(f): hints[f.name] for f in dataclasses.fields(kind)}, frozenset(optional)


def expected(kind: Any, value: object = None) -> str:
    """What `kind` would have in the place of `value`."""
    origin, arguments, rules = _parts(kind)
    if origin is Union:
        return " or ".join(expected(one, value) for one in arguments)
    if origin is None and not rules:
        return f"keys such as {next(iter(_keys(kind)[0]))}: ..."
    return rules[0].expects(value) if rules else "a list" if origin is list else "keys"


@cache
def types_of(kind: Any) -> frozenset[type]:
    """The types that plain values of `kind` have; none where it is a record."""
    origin, arguments, rules = _parts(kind)
    inside = [types_of(one) for one in arguments] if origin is Union else []
    return frozenset(t for rule in rules for t in rule.types).union(*inside)


def choices_of(kind: Any) -> list[str]:
    """The values of `kind` as YAML writes them, where they can be counted; else none."""
    origin, arguments, rules = _parts(kind)
    if kind is bool:
        return ["true", "false"]
    inside = [choice for one in arguments for choice in choices_of(one)] if origin is Union else []
    return inside + [str(choice) for rule in rules if not isinstance(rule.expected, str) for choice in rule.expected]


def parse_json(data: bytes, kind: type[T]) -> T:
    """The `kind` that a JSON text holds.

    Raises:
        ForeignFileError: it is no JSON, out of bounds, or something else is in it.
    """
    if len(data) > MAX_JSON_BYTES or data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_JSON_VALUES:
        raise ForeignFileError(f"more than {MAX_JSON_BYTES} bytes or {MAX_JSON_VALUES} values")
    try:
        text = data.decode()
        del data  # the caller's, mostly, is gone too
        if sys.getsizeof(text) > 2 * MAX_JSON_BYTES:  # one letter beyond U+FFFF makes four bytes of each
            raise ForeignFileError(f"more than {2 * MAX_JSON_BYTES} bytes in memory")
        value = json.loads(text, object_pairs_hook=_unique)
    except ForeignFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"not valid JSON ({error})") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level if isinstance(c, (dict, list)) for v in (c.values() if isinstance(c, dict) else c)]
    if level:
        raise ForeignFileError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return check(value, kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ForeignFileError(f"the key {reprlib.repr(twice)} is there twice")
    return found


class _Loader(SafeLoader):
    """Plain data; 1e-4 is a number and a date a text; no key twice, of which only the last would count."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        _unique([(key, None) for key in keys])
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that `_Loader` would take for something else."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def to_yaml(value: Any) -> str:
    """Plain data as a YAML text, which `parse_yaml` reads as the same."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


def parse_yaml(data: bytes) -> Any:
    """What is in a YAML text, once its events alone have shown how much that is.

    Raises:
        ForeignFileError: it is no YAML, or out of bounds.
    """
    sizes: dict[str, int] = {}
    opened: list[tuple[str, int]] = []
    total = 0
    try:
        text = data.decode()
        for event in yaml.parse(text, SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in {anchor for anchor, _ in opened}:
                    raise ForeignFileError(f"{event.anchor} holds itself")
                total += sizes.get(str(event.anchor), 0)
            elif isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor or "", total))
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                sizes[anchor] = total - before
            elif isinstance(event, yaml.ScalarEvent) and not event.style and len(event.value) > MAX_YAML_PLAIN:
                raise ForeignFileError(f"{reprlib.repr(event.value)} has {len(event.value)} letters without quotes")
            total += isinstance(event, yaml.NodeEvent)
            if total > MAX_YAML_VALUES or len(opened) > MAX_YAML_DEPTH:
                raise ForeignFileError(f"more than {MAX_YAML_VALUES} values, or {MAX_YAML_DEPTH} levels")
        return yaml.load(text, _Loader)
    except ForeignFileError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ForeignFileError(f"not valid YAML ({error})") from error
