"""GGUF files as models: unpacked once to an ordinary checkpoint folder in the cache, which all the rest reads.

transformers reads them; it undoes what llama.cpp's converter does to weights (the order of attention's rows, Gemma's norms).
The folder holds the dequantised weights as float32, the type in which llama.cpp dequantises too: nothing is rounded further,
and a patch's fingerprints are of what the file says. It has four bytes a weight.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mosectl.errors import ModelError, Notice, OutputError
from mosectl.storage.atomic import ours, output_errors, write_bytes
from mosectl.storage.cache import FIX, cache_dir
from mosectl.storage.folders import new_folder
from mosectl.storage.gguf_header import SUFFIX, Header, is_gguf, read_header
from mosectl.storage.inputs import read_json
from mosectl.storage.places import check_room
from mosectl.storage.quiet import quiet

INSIDE, NOTE = "checkpoint", "gguf.json"  # in a file's folder in the cache
_OTHER_FIX = "update transformers and gguf, or give the model in Hugging Face layout"
_UNREAD = {"rope_freqs.weight": "its scaling of positions for long contexts"}  # tensors that transformers passes over


@dataclass(frozen=True)
class Gguf:
    """The file a checkpoint was unpacked from."""

    file: Path
    architecture: str  # llama.cpp's name
    kinds: tuple[str, ...]  # ggml's types of its tensors, the most frequent first
    unread: tuple[str, ...] = ()  # what transformers does not read of it

    @property
    def quantised(self) -> bool:
        """Does it hold weights that were rounded to few bits?"""
        return not set(self.kinds) <= {"F32", "F16", "BF16", "F64"}

    def notes(self) -> list[str]:
        """What a user should know of a model that was read from it."""
        out = [f"read from {self.file.name} ({', '.join(self.kinds)}), whose weights are taken as float32"]
        if self.quantised:
            out[0] += ": they were rounded when it was made, and an edit is made for the rounded ones"
        out += [
            f"transformers does not read {what}: answers may differ a little from llama.cpp's" for what in self.unread
        ]
        return out


def chosen(model: str | Path) -> Path | None:
    """The GGUF file that ``model`` names: itself, or the only one in a folder without other weights; None: it names none.

    Raises:
        ModelError: several are in the folder, or the parts of one.
    """
    path = Path(model)
    if not path.is_dir():
        return path if is_gguf(path) else None
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == SUFFIX and p.is_file())
    if not files or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    if len(files) > 1:
        files = [f for f in files if read_header(f).is_model] or files
    if len(files) > 1:
        for file in files:
            _check_whole(file, read_header(file))
        names = ", ".join(f.name for f in files[:4]) + (", …" if len(files) > 4 else "")
        raise ModelError(
            f"holds {len(files)} GGUF files: {names}", where=str(path), fix=f"name one: --model {files[0]}"
        )
    return files[0]


def unpacked(file: Path) -> Path:
    """The checkpoint folder of a GGUF file, in the cache; made where the file has not been met before, which is told.

    Raises:
        ModelError: it is damaged, a part, no language model, or transformers does not read it. UsageError: the package
        gguf is missing. OutputError: no room, no writing there, or another process is unpacking it.
    """
    file = file.absolute()
    home = _home(file)
    if (home / NOTE).is_file():
        _check_owner(home)
        return home / INSIDE
    header = read_header(file)
    _check_whole(file, header)
    size = 4 * header.elements
    with _cache_errors(), output_errors(home):
        home.parent.mkdir(parents=True, exist_ok=True)
    with _cache_errors(), new_folder(home) as folder:
        check_room(folder, size, home)
        what = (
            f"{file.name} is unpacked to float32 once ({size / 1e9:.2f} GB), which takes a while; it is kept in {home}"
        )
        warnings.warn(what, Notice, stacklevel=2)
        _convert(file, header, folder / INSIDE)
        kinds = [kind for kind, _ in Counter(header.kinds.values()).most_common()]
        unread = [what for name, what in _UNREAD.items() if name in header.kinds]
        note = {"file": str(file), "architecture": header.architecture, "kinds": kinds, "unread": unread}
        write_bytes(folder / NOTE, json.dumps(note).encode())
    for other in home.parent.glob(f"{home.name.rsplit('-', 1)[0]}-*"):  # of what the file was before
        if other != home:
            shutil.rmtree(other, ignore_errors=True)
    return home / INSIDE


def origin(folder: Path) -> Gguf | None:
    """The GGUF file that a checkpoint folder in the cache was unpacked from; None for any other folder."""
    note = folder.parent / NOTE
    if folder.name != INSIDE or folder.parent.parent != _root() or not note.is_file():
        return None
    found = read_json(note, ModelError, f"delete {folder.parent}")
    return Gguf(Path(found["file"]), found["architecture"], tuple(found["kinds"]), tuple(found["unread"]))


def _root() -> Path:
    return cache_dir().absolute() / "gguf"


def _home(file: Path) -> Path:
    """Where a file is unpacked to: told by its place, and by its size and time, which change with its content."""
    place, status = hashlib.sha256(str(file).encode("utf-8", "surrogateescape")).hexdigest(), file.stat()
    state = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._") else "_" for c in file.stem)[:80]
    return _root() / f"{stem}-{place[:12]}-{state[:8]}"


def _check_owner(home: Path) -> None:
    status = home.stat()
    if status.st_uid != 0 and not ours(status):  # in a folder open to others, anyone may have prepared it
        raise OutputError("belongs to another user", where=str(home), fix=FIX)


@contextmanager
def _cache_errors() -> Iterator[None]:
    """An output error in the cache says how to have it elsewhere."""
    try:
        yield
    except OutputError as e:
        fix = e.fix if "process" in e.what else FIX
        raise OutputError(e.what, where=e.where, fix=fix) from e


def _check_whole(file: Path, header: Header) -> None:
    if (parts := header.fields.get("split.count", 1)) and parts != 1:
        fix = f"put them together: llama-gguf-split --merge FIRST-PART {file.stem.split('-0')[0]}.gguf"
        raise ModelError(f"is one of {parts} parts of a model", where=str(file), fix=fix)
    if not header.is_model:
        kind = header.fields.get("general.type", header.architecture)
        raise ModelError(f"is no language model but of type '{kind}'", where=str(file), fix="give the model's own file")
    claims = {key: header.count(key) for key in ("block_count", "expert_count")}
    if wrong := next((key for key, n in claims.items() if n > len(header.kinds) + 1024), ""):
        what = f"{wrong} is {claims[wrong]:,}, with {len(header.kinds):,} tensors"
        raise ModelError(what, where=str(file), fix="fetch the file again")


def _convert(file: Path, header: Header, out: Path) -> None:
    """Write the checkpoint folder of a GGUF file, through transformers. Raises ModelError."""
    with tempfile.TemporaryDirectory() as place, quiet(stderr=True):
        alone = Path(place, "model.gguf")  # transformers reads other files of a folder too, and wants the suffix
        try:
            alone.symlink_to(file)
        except OSError:  # a system without links
            shutil.copyfile(file, alone)
        try:
            _write(Path(place), header, out)
        except (ModelError, OutputError, MemoryError):
            raise
        except Exception as e:  # what it does not know of a file fails in many places
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            what = f"transformers cannot read this GGUF file (architecture '{header.architecture}'): {first}"
            raise ModelError(what, where=str(file), fix=_OTHER_FIX) from e


def _write(place: Path, header: Header, out: Path) -> None:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    how: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(place, **how)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    weights = sum(p.numel() for p in plain.parameters())
    if weights > 2 * header.elements + 2**20:  # experts may share what is one tensor here, nothing more
        raise ValueError(f"its metadata claims {weights:,} weights, it holds {header.elements:,}")
    if whole := getattr(transformers, "GgufConfig", None):  # newer ones would leave the weights packed
        how["quantization_config"] = whole(dequantize=True)
    load: Any = AutoModelForCausalLM.from_pretrained
    how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    read, told = load(place, dtype=torch.float32, **how)
    if other := sorted(told["mismatched_keys"]):
        name, found, wanted = other[0]
        raise ValueError(f"{name} is {list(found)}, by its metadata {list(wanted)}")
    if missing := sorted(told["missing_keys"]):  # transformers makes them up
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:3])}")
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(place, gguf_file="model.gguf", trust_remote_code=False).save_pretrained(out)
