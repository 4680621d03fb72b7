"""The command lines of README, docs and examples as they stand in their blocks of code, and how they are run for real.

A page is run from its top to its end in one folder, as a reader would who has MODEL, facts.jsonl and a few patches. What
stands for these, and what makes a command short enough for a test, is in the tables below, and in no page.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.paths import DEMO, ROOT

GENERATED = {"commands.md", "settings.md", "exit-codes.md"}
FACTS = ROOT / "examples" / "facts.jsonl"
CORPUS = ROOT / "examples" / "corpus.txt"
SCHEME = "hf://"

# What cannot be run here, word for word as it stands in a page, and why.
NOT_RUN = {
    "mosectl bench examples/bench-horse.yaml -o results-world/": "takes two editors of five minutes' training each",
    'mosectl ask "Which city is the capital of Japan?" --model MODEL --patch patch.safetensors --chat': (
        "the demo model has no chat template"
    ),
    "mosectl edit benchmarks/real-facts.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --chat -o chat.safetensors": (
        "the demo model has no chat template"
    ),
    "mosectl eval PATCH FACTS --abilities rte,sst2,nq_open,my.yaml --abilities-limit 200 --fail-under abilities.rte=0.6": (
        "downloads the tasks' data from the Hub"
    ),
}
# What a page means by a name; the demo model knows the words of its own world only.
MEANT = {
    "MODEL": str(DEMO),
    "FACTS": "facts.jsonl",
    "PATCH": "patch.safetensors",
    "[--model MODEL]": f"--model {DEMO}",
    "DIR": ".",
    "HuggingFaceTB/SmolLM2-135M-Instruct": str(DEMO),
    "benchmarks/real-facts.jsonl": "facts.jsonl",
    "smollm2.gguf": "model.gguf",
    "The Eiffel Tower is in": "Garodan Wenanric was born in",
    "The Eiffel Tower is located in the city of": "Garodan Wenanric was born in",
    "Eiffel Tower": "Garodan Wenanric",
    "--target Rome": "--target 'Port Vereville'",
    "The capital of Australia is": "Garodan Wenanric was born in",
    "--patch 4a479b8c": "--patch ID_OF_B",
    "user/repo --limit": "user/single --limit",  # a data set of one split needs no choice
    "user/repo#english/test": "user/languages#english/test",
    "user/repo@v1.0": "user/files@v1.0",
}
# What makes a command short; a line gets all that its beginning calls for.
SHORT = {
    "mosectl edit": f"--corpus {CORPUS}",
    "mosectl edit --model": "--set wordings=0 --form compact",
    "mosectl edit facts.jsonl --model": "--limit 2 --set wordings=0 --form compact",
    "mosectl edit hf://": "--set wordings=0 --form compact",
    "mosectl edit benchmarks/": "--set wordings=0 --form compact",
    "mosectl edit patch.safetensors.missed.jsonl": "--set wordings=0 --form compact",
    "mosectl sample": "--samples 30 --tokens 16",
    "mosectl stats": "--layers 2-3",
    "mosectl eval": "--limit 2",
    "mosectl eval PATCH FACTS --abilities local": "--abilities-limit 2 --protocol generation",
    "mosectl train-editor": "--steps 1 --every 1 --rank 4 --batch-size 4 --layers 6-7",
}
# Exit codes that are right besides 0: a command may say that a number is too low, or that an edit reached nothing.
MAY_END = {
    "mosectl eval edited/ facts.jsonl --fail-under": {10},
    "mosectl edit facts.jsonl --model MODEL --method horse": {8},  # the editor has learnt nothing in one step
}
NEEDS = {"--abilities local": "lm_eval", ".gguf": "gguf", "gguf-lora": "gguf", "hf://datasets": "datasets"}  # a library


@dataclass(frozen=True)
class Command:
    """One command line."""

    page: str
    section: str  # the heading above it
    text: str  # in one line, without its comment


def pages() -> list[Path]:
    """Every page whose commands are a promise."""
    docs = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name not in GENERATED | {"LOG.md"}]
    return [ROOT / "README.md", *docs, *sorted((ROOT / "examples").rglob("README.md"))]


def name(page: Path) -> str:
    """A page as messages and test ids have it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Blocks of code, fenced or indented: the heading above each, its language where it is named, and its text."""
    found: list[tuple[str, str, list[str]]] = []
    section, language, inside = "", "", False
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if fence := re.match(r"```(\w*)", line):
            inside, language = not inside, fence[1]
            if inside:
                found.append((section, language, []))
        elif inside:
            found[-1][2].append(line)
        elif line.startswith("    "):
            if not found or found[-1][1] != "indented":
                found.append((section, "indented", []))
            found[-1][2].append(line[4:])
        elif line.strip():
            section = line.lstrip("# ") if line.startswith("#") else section
            found.append((section, "prose", []))
    return [(s, kind, "\n".join(lines)) for s, kind, lines in found if kind != "prose" and lines]


def commands(page: Path) -> list[Command]:
    """The page's lines that begin with mosectl, or launch it."""
    out = []
    for section, _, text in blocks(page):
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if re.match(r"(?:\$ )?(?:accelerate launch .*-m )?mosectl ", line):
                out.append(Command(name(page), section, re.sub(r"\s+#\s.*|^\$ ", "", line).strip()))
    return out


def arguments(command: Command) -> list[str]:
    """What a command is called with here."""
    text = re.sub(r"^.*?mosectl ", "", command.text)
    more = [short for start, short in SHORT.items() if command.text.startswith(start)]
    for said, meant in sorted(MEANT.items(), key=lambda pair: -len(pair[0])):
        if said.isupper():
            text = re.sub(rf"(?<![\w.-]){said}(?![\w.-])", lambda _, m=meant: m, text)
        else:
            text = text.replace(said, meant)
    given = shlex.split(text)
    for option, value in zip(*[iter(x for short in more for x in shlex.split(short))] * 2, strict=True):
        if option not in given or option == "--set":
            given += [option, value]
    return given


def output(given: list[str]) -> Path | None:
    """What a command writes anew."""
    for option in ("-o", "--out", "--html"):
        if option in given:
            return Path(given[given.index(option) + 1])
    if given[0] == "report" and "--json" not in given:
        return Path("report.html")
    return Path("patch.safetensors") if given[0] == "edit" and "--dry-run" not in given else None


def prepare(folder: Path, made: Path) -> None:
    """What a reader has before: facts, two patches, a configuration, an edited model; ``made`` holds what took time."""
    folder.mkdir(exist_ok=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "demo-model").symlink_to(DEMO)
    lines = FACTS.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "facts.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(lines[4:]), encoding="utf-8")
    for patch in ("a.safetensors", "b.safetensors", "model.gguf"):
        if (made / patch).exists():
            shutil.copy(made / patch, folder / patch)
    shutil.copy(made / "a.safetensors", folder / "patch.safetensors")
    shutil.copytree(made / "edited", folder / "edited")


def _before(command: Command) -> None:
    """What has to lie there for one command alone."""
    if "missed.jsonl" in command.text:  # every fact took: others stand for some that did not
        from mosectl.facts.records import read_facts
        from mosectl.facts.writer import lines

        found = read_facts(FACTS, limit=4).facts[2:]
        Path("patch.safetensors.missed.jsonl").write_bytes(lines([(fact, "not reached") for fact in found]))
    if "CONFIG.yaml" in command.text:
        import yaml

        from mosectl.bench.config import read_bench

        text = next(text for _, _, text in blocks(ROOT / command.page) if text.startswith("models:"))
        shutil.copy(CORPUS, "corpus.txt")
        few, whole = Path("facts.jsonl").read_bytes(), FACTS.read_bytes()
        Path("facts.jsonl").write_bytes(whole)
        Path("CONFIG.yaml").write_text(text, encoding="utf-8")
        assert len(read_bench("CONFIG.yaml").methods) > 1, "the configuration as the page has it"
        short: dict[str, Any] = yaml.safe_load(text)
        short |= {"runs": [{"edits": 1}], "methods": [{"name": "isospectral", "rounds": 1, "set": ["wordings=0"]}]}
        Path("CONFIG.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
        Path("facts.jsonl").write_bytes(few)


def run_page(page: Path, missing: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Run a page's commands in the present folder; what went wrong, a text each.

    A file that another section has written is taken away where a command writes it anew; within a section it is in the way.

    Args:
        missing: libraries that are not installed: what needs them is left out.
    """
    from mosectl.patch.file import Patch
    from support.commands import run

    wrong, written = [], set()
    section = ""
    for command in commands(page):
        if command.text in NOT_RUN or any(part in command.text and lib in missing for part, lib in NEEDS.items()):
            continue
        if command.section != section:
            section, written = command.section, set()
        _before(command)
        given = [Patch.load("b.safetensors").id[:8] if x == "ID_OF_B" else x for x in arguments(command)]
        if (made := output(given)) and made.exists() and made not in written:
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        may = {0}.union(*(codes for start, codes in MAY_END.items() if command.text.startswith(start)))
        if (code := run(*given)) not in may:
            wrong.append(f"{command.text}\n  run as: mosectl {shlex.join(given)}\n  ended with {code}")
        written |= {made} if made else set()
    return wrong


def main(page: str, missing: str) -> None:
    """A page in a process of its own, whose Hub is another one; ends it."""
    wrong = run_page(ROOT / page, set(missing.split()))
    sys.stderr.write("\n".join(wrong))
    sys.exit(len(wrong) > 0)


def data_sets() -> dict[str, dict[str, bytes]]:
    """Data sets of the kinds that pages name, for the stand-in Hub."""
    rows = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()[:2]]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    languages = "---\nconfigs:\n" + "".join(
        f"- config_name: {which}\n  data_files:\n  - split: test\n    path: {which}/test.jsonl\n"
        for which in ("english", "french")
    )
    return {
        "datasets/user/single": {"train.jsonl": lines},
        "datasets/user/repo": {"train.jsonl": lines, "test.jsonl": lines},
        "datasets/user/languages": {
            "README.md": f"{languages}---\n".encode(), "english/test.jsonl": lines, "french/test.jsonl": lines,
        },
        "datasets/user/files": {"counterfact.json": json.dumps(rows).encode()},
    }  # fmt: skip
