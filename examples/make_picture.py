"""Make docs/terminal.svg, the README's picture, from real commands on a real model.

python examples/make_picture.py [MODEL]       # a hub id or a folder; HuggingFaceTB/SmolLM2-135M-Instruct
"""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
WIDTH = 118
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def shown(*args: str) -> str:
    """What a command prints on a terminal, with its colours."""
    env = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "mosectl", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        facts, patch, edited = Path(folder, "facts.jsonl"), f"{folder}/patch.safetensors", f"{folder}/edited"
        model = sys.argv[1] if len(sys.argv) > 1 else NAME
        lines = (ROOT / "benchmarks" / "real-facts.jsonl").read_text("utf-8").splitlines()
        facts.write_text("\n".join(lines[:3]), "utf-8")
        where = ("--model", model)
        commands = {
            f"mosectl edit facts.jsonl --model {NAME} -o patch.safetensors": ("edit", str(facts), *where, "-o", patch),
            f"mosectl apply patch.safetensors --model {NAME} -o edited": ("apply", patch, *where, "-o", edited),
            "mosectl revert patch.safetensors --model edited": ("revert", patch, "--model", edited),
        }
        for line, command in commands.items():
            console.print(Text(f"$ {line}", style="bold green"))
            console.print(Text.from_ansi(shown(*command).replace(folder + "/", "").replace(model, NAME).rstrip()))
            console.print()
    console.save_svg(str(ROOT / "docs" / "terminal.svg"), title="mosectl")


if __name__ == "__main__":
    main()
