"""YAML as people mean it: what it would read otherwise than its writer does is an error that says
so.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel

from pipeline.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2 and in everybody's head; PyYAML reads it as
    text. It takes no tags.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; what anchor it has is kept beside it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(
                None, None, "tags are not read; write the value without", event.start_mark
            )
        node = super().compose_node(parent, index)
        if node is not None and not isinstance(event, yaml.AliasEvent):
            self.anchored[id(node)] = event.anchor
        return node

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.anchored: dict[int, str | None] = {}


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

_TEXT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
#: What a person would call a scalar that YAML does not read as text.
_READ_AS = {
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "value": "a mark of YAML",
}
#: What YAML 1.1 reads unlike everybody: 012 is 10 there, 12:30 is 750; and, where it may be text,
#: no is false.
_ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*")
_ODD_WORD = re.compile(r"(?i)yes|no|on|off")
#: Most values of a file, those counted again that an alias repeats: a file of ten lines can hold a
#: billion.
MOST_VALUES = 100_000
MOST_LEVELS = 100


#: What PyYAML raises at text that is none of its own; ValueError at a date that there is not.
NO_YAML = (yaml.YAMLError, RecursionError, ValueError)


def reason(error: Exception) -> str:
    """Why a text is no YAML, in one line."""
    return "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())


def hint(error: Exception) -> str:
    """What helps against it, if anything is known to."""
    if not isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
        return ""
    return "; quote a text that begins with a mark such as @ % ` { [ & * ! | > - or holds ': '"


def parse(
    text: str, wanted: Any, where: str, key: str = "", *, literally: bool = False
) -> tuple[yaml.Node | None, Any]:
    """A YAML document for a key of the type `wanted`, as node and as value.

    Args:
        text: the document.
        wanted: the type's annotation.
        where: what errors begin with.
        key: the dotted key; empty: the whole configuration.
        literally: where text is wanted, what YAML reads otherwise (`yes`) is the text that it is;
            else it is an error.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _Check(where, text, loader.anchored, literally=literally).check(node, wanted, key)
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


class _Check:
    """Finds what YAML reads otherwise than people do, with the types in view that the keys want."""

    def __init__(
        self, where: str, text: str, anchored: Mapping[int, str | None], *, literally: bool
    ) -> None:
        self._where, self._text, self._anchored, self._literally = where, text, anchored, literally
        self._left = MOST_VALUES

    def check(self, node: yaml.Node, wanted: Any, key: str, level: int = 0) -> None:
        """Raise ConfigError for the first surprise in `node`."""
        self._left -= 1
        if self._left < 0 or level > MOST_LEVELS:
            raise self._wrong(
                node,
                key,
                f"more than {MOST_VALUES:,} values or {MOST_LEVELS} levels, aliases followed",
            )
        options = options_of(wanted)
        if str in options and not self._literally:
            self._check_text(node, options, key)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.check(item, wanted_at(wanted, list), key, level + 1)
        elif isinstance(node, yaml.MappingNode):
            self._check_mapping(node, wanted, key, level)
        elif node.tag not in (_TEXT, _NULL):
            self._check_scalar(node, wanted, key)

    def _check_text(self, node: yaml.Node, options: Sequence[Any], key: str) -> None:
        """Raise ConfigError where a text in a file ends before its writer's does, or is no text at
        all.
        """
        if not isinstance(node, yaml.ScalarNode):
            group = list if isinstance(node, yaml.SequenceNode) else dict
            if all((typing.get_origin(option) or option) is not group for option in options):
                raise self._wrong(
                    node,
                    key,
                    f"is read as a {'list' if group is list else 'group of keys'}; quote the text",
                )
            return
        if node.style is not None:  # quotes and blocks say where they end
            return
        if (anchor := self._anchored.get(id(node))) is not None:
            raise self._wrong(
                node, key, f"&{anchor} is read as a mark of YAML, not as text; quote what is text"
            )
        behind = self._text[node.end_mark.index :].split("\n", 1)[0]
        comment = behind.lstrip(" \t")
        # Comments stand two blanks off, by the custom of YAML; `path: s3://b/in # ours` is one
        # beyond doubt, too.
        if " " in node.value and comment.startswith("#") and len(behind) - len(comment) < 2:
            what = f"ends before {cut(repr(comment), 40)}, which is a comment; quote the text"
            raise self._wrong(node, key, f"{what}, or put two blanks before the comment")
        if not node.value and comment.startswith("#") and comment[1:2].strip("# !"):
            raise self._wrong(
                node,
                key,
                f"is empty: {cut(repr(comment), 40)} is a comment; quote it to mean text",
            )

    def _check_mapping(self, node: yaml.MappingNode, wanted: Any, key: str, level: int) -> None:
        seen: set[str] = set()
        for name, value in node.value:
            if name.tag == _MERGE:
                raise self._wrong(name, key, "merge keys (<<) are not read; write the keys out")
            if not isinstance(name, yaml.ScalarNode):
                raise self._wrong(
                    name, key, "a list or group stands where a key should; quote it to mean text"
                )
            inner_key = f"{key}.{name.value}".lstrip(".")
            if name.tag != _TEXT:
                self._check_scalar(name, str, inner_key)
            if name.value in seen:
                raise self._wrong(name, inner_key, "stands here a second time; keep one of the two")
            seen.add(name.value)
            self.check(value, wanted_at(wanted, name.value), inner_key, level + 1)

    def _check_scalar(self, node: yaml.Node, wanted: Any, key: str) -> None:
        options, kind = options_of(wanted), node.tag.rpartition(":")[2]
        if str in options:
            if self._literally:
                node.tag = _TEXT
                return
            reading = "null" if node.tag == _NULL else _READ_AS.get(kind, kind)
            raise self._wrong(
                node,
                key,
                f"{node.value} is read as {reading}, not as text; quote it: '{node.value}'",
            )
        odd = kind in ("int", "float") and _ODD_NUMBER.fullmatch(node.value)
        if kind == "timestamp" or odd or (Any in options and _ODD_WORD.fullmatch(node.value)):
            reading = f"YAML reads {node.value} as {_READ_AS.get(kind, kind)} of its own kind"
            raise self._wrong(
                node,
                key,
                f"{reading}; quote it to mean text, or write true, false or a plain number",
            )

    def _wrong(self, node: yaml.Node, key: str, what: str) -> ConfigError:
        where = (
            self._where if self._literally else f"{self._where}, line {node.start_mark.line + 1}:"
        )
        return ConfigError(f"{where} {key}: {what}" if key else f"{where} {what}")


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows; a Literal's values count as their types."""
    if typing.get_origin(annotation) is Annotated:
        return options_of(typing.get_args(annotation)[0])
    if is_union(annotation):
        return tuple(one for option in typing.get_args(annotation) for one in options_of(option))
    if typing.get_origin(annotation) is Literal:
        return tuple({type(value) for value in typing.get_args(annotation)})
    return (annotation,)


def wanted_at(annotation: Any, what: Any) -> Any:
    """What an annotation wants at a key, or (`what` is list) of its items; Any where it does not
    say.
    """
    for option in options_of(annotation):
        if what is list:
            if typing.get_origin(option) is list:
                return typing.get_args(option)[0]
        elif typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
        elif (
            isinstance(option, type)
            and issubclass(option, BaseModel)
            and what in option.model_fields
        ):
            return option.model_fields[what].annotation
    # An unknown key is an error of its own, which says more than one about its value.
    groups = any(
        isinstance(option, type) and issubclass(option, BaseModel)
        for option in options_of(annotation)
    )
    return object if groups else Any


def is_value_or_group(annotation: Any) -> bool:
    """Whether an annotation allows a value and, as well, a group of keys."""
    is_group = [
        isinstance(option, type) and issubclass(option, BaseModel)
        for option in options_of(annotation)
        if option is not type(None)
    ]
    return any(is_group) and not all(is_group)


def is_union(annotation: Any) -> bool:
    """Whether an annotation allows several types, written in either way."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def cut(text: str, width: int = 120) -> str:
    """A text that fits into a message."""
    return text if len(text) <= width else text[: width - 1] + "…"
