"""YAML from strangers: plain values only, every key once, bounded in size, depth and what its aliases stand for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mosectl.errors import MosectlError
from mosectl.storage.inputs import MAX_DEPTH, read_bytes

MAX_YAML = 100_000  # bytes; the worst take PyYAML two seconds
MAX_NODES = 100_000  # values, each counted as often as its aliases repeat it
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_CORE = "tag:yaml.org,2002:"


def read_yaml(path: str | Path, error: type[MosectlError], fix: str) -> Any:
    """The one document of a YAML file: None, bool, int of 64 bits, finite float, str, list and dict; dates stay text.

    Args:
        error: raised for whatever is wrong, with ``fix`` as the next step.
    Raises:
        error: as :func:`mosectl.storage.inputs.read_bytes`; not YAML, or a tag other than those of these types (nothing is
            ever constructed or run), a key that stands twice, an alias of itself, too deep, too many values.
    """
    raw = read_bytes(path, error, fix, MAX_YAML)
    text, where = "", str(path)
    cause: Exception
    try:
        text = raw.decode("utf-8-sig")
        return yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as e:
        what, cause = f"not UTF-8 text (byte {e.start})", e
    except yaml.MarkedYAMLError as e:
        what, cause = f"{e.problem or e.context}", e
        what = what if isinstance(e, yaml.constructor.ConstructorError) else f"not YAML: {what}"
        where += f":{e.problem_mark.line + 1}" if e.problem_mark else ""
    except yaml.reader.ReaderError as e:
        what, cause = f"not YAML: the control character {e.character:#x}", e
        where += ":" + str(text.count("\n", 0, e.position) + 1)
    except (ValueError, OverflowError) as e:  # \U and a number beyond Unicode
        what, cause = "not YAML: an escape of a character that does not exist", e
    raise error(what, where=where, fix=fix) from cause


class _Loader(yaml.SafeLoader):
    """The safe loader without dates, sets and binary data, and with bounds that hold while it reads."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {}  # filled below
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(_CORE) in (*PLAIN, "merge")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        self.depth = self.nodes = 0
        self.sizes: dict[Any, int] = {}  # values that a finished node stands for
        super().__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        before, alias = self.nodes, self.check_event(yaml.AliasEvent)
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH:
            raise _bad(f"nested deeper than {MAX_DEPTH}", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias:
            if node not in self.sizes:
                raise _bad("an alias stands inside what it stands for", mark)
            self.nodes += self.sizes[node]
        if self.nodes > MAX_NODES:
            raise _bad(f"more than {MAX_NODES:,} values, counted as often as aliases repeat them", mark)
        if not alias:
            self.sizes[node] = self.nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()  # here: later, merged keys stand among the mapping's own
        for key, _ in node.value:
            name = self.construct_object(key) if isinstance(key, yaml.ScalarNode) and "merge" not in key.tag else key
            if name in seen:
                raise _bad(f"the key '{str(name)[:60]}' stands twice", key.start_mark)
            seen.add(name)
        return node

    def plain(self, node: Any) -> Any:
        """A scalar as the safe loader has it, its failures with their place."""
        made = yaml.SafeLoader.yaml_constructors[node.tag]
        try:
            if len(node.value) > 100 and not node.tag.endswith(":str"):
                raise ValueError
            value = made(self, node)
            if (isinstance(value, int) and abs(value) >= 2**64) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError
            str(value).encode()  # half a character
        except (ValueError, LookupError) as e:
            half = isinstance(e, UnicodeEncodeError)
            what = "holds half a character" if half else "is out of range, or not what its tag says"
            raise _bad(f"'{ascii(str(node.value)[:40])[1:-1]}' {what}", node.start_mark) from e
        return value

    def unknown(self, node: Any) -> Any:
        raise _bad(f"the tag {node.tag.replace(_CORE, '!!')[:60]} is refused", node.start_mark)


def _bad(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, mark)


for _kind in PLAIN:
    _whole = _kind in ("seq", "map")
    _Loader.add_constructor(
        _CORE + _kind, yaml.SafeLoader.yaml_constructors[_CORE + _kind] if _whole else _Loader.plain
    )
_Loader.add_constructor(None, _Loader.unknown)
