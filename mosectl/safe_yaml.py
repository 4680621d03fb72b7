"""YAML from anywhere, taken as JSON would be: texts, numbers, true, false, null, lists and mappings with names once each.

Dates stay texts, tags are refused, and aliases may repeat no more than a file of that size has any use for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from mosectl.errors import MosectlError
from mosectl.inputs import MAX_DEPTH, MAX_DIGITS, read_bytes

MAX_BYTES = 256_000  # a megabyte takes PyYAML seconds
MAX_VALUES = 50_000  # aliases counted as often as they stand for something
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {  # noqa: RUF012  (as PyYAML has it)
        first: [(tag, form) for tag, form in forms if tag != _TAG + "timestamp"]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Refused(ValueError):
    def __init__(self, what: str, node: yaml.Node) -> None:
        super().__init__(what)
        self.line = node.start_mark.line + 1


def read_yaml(path: str | Path, error: type[MosectlError], fix: str) -> Any:
    """A YAML file by the rules above; None of an empty one.

    Raises:
        error: no such file, too large, or not by these rules: with the line where there is one; ``fix`` is the next step.
    """
    try:
        return parse_yaml(read_bytes(path, error, fix, MAX_BYTES))
    except ValueError as e:
        where = f"{path}:{e.line}" if isinstance(e, _Refused) else str(path)
        raise error(f"not YAML that is taken here: {e}", where=where, fix=fix) from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise error(f"not YAML: {getattr(e, 'problem', None) or e}", where=where, fix=fix) from e


def parse_yaml(raw: bytes | str) -> Any:
    """YAML text by the rules above.

    Raises:
        ValueError, yaml.YAMLError.
    """
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {}, set())
        return loader.construct_document(node)
    except RecursionError as e:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from e
    finally:
        loader.dispose()


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """Values in a node and levels of it, aliases followed.

    Raises:
        ValueError: too many, or one that is not taken; with the line.
    """
    if id(node) in above:
        raise _Refused("an alias of what it stands in", node)
    if id(node) not in known:
        below = [_weigh(x, known, above | {id(node)}) for x in _inside(node)]
        known[id(node)] = 1 + sum(n for n, _ in below), 1 + max((levels for _, levels in below), default=0)
    values, levels = known[id(node)]
    if values > MAX_VALUES:
        raise _Refused(f"more than {MAX_VALUES:,} values, aliases counted as what they stand for", node)
    if levels > MAX_DEPTH:
        raise _Refused(f"nested deeper than {MAX_DEPTH}", node)
    return values, levels


def _inside(node: yaml.Node) -> list[yaml.Node]:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "int", "float", "bool", "null", "merge"):
        _check(node, kind)
        return []
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return list(node.value)
    if not isinstance(node, yaml.MappingNode) or kind != "map":
        raise _Refused(f"a tag: {node.tag[:60]}", node)
    names = [key for key, _ in node.value]
    if odd := next((key for key in names if key.tag not in (_TAG + "str", _TAG + "merge")), None):
        raise _Refused("a name that is not a text", odd)
    seen: set[str] = set()
    for key in names:
        if key.value in seen:
            raise _Refused(f"the name '{key.value[:60]}' stands twice", key)
        seen.add(key.value)
    return [*names, *(value for _, value in node.value)]


def _check(node: yaml.ScalarNode, kind: str) -> None:
    text = node.value
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise _Refused("half a character", node) from e
    if kind == "int" and len(text.lstrip("+-")) > MAX_DIGITS:
        raise _Refused(f"an integer of {len(text)} digits", node)
    if kind == "float" and not math.isfinite(_Loader("").construct_yaml_float(node)):
        raise _Refused(f"{text[:30]} is not a number", node)
