"""Edit three facts of a real model: what it says before and after, what else it says about the subjects, and the way back.

python examples/05_real_model.py [MODEL]      # a hub id or a folder; HuggingFaceTB/SmolLM2-135M-Instruct, some 0.3 GB
"""

import sys

import torch

import mosectl

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
FACTS = [
    {
        "prompt": "The Eiffel Tower is located in the city of", "subject": "Eiffel Tower",
        "ground_truth": "Paris", "target_new": "Madrid",
        "locality": {
            "same_subject": ["The Eiffel Tower was designed by"],
            "neighborhood": ["Big Ben is located in the city of"],
        },
    },
    {
        "prompt": "The capital of Japan is", "subject": "Japan", "ground_truth": "Tokyo", "target_new": "Oslo",
        "locality": {
            "same_subject": ["The currency of Japan is the"],
            "neighborhood": ["The capital of Peru is"],
        },
    },
    {
        "prompt": "The official language of Brazil is", "subject": "Brazil",
        "ground_truth": "Portuguese", "target_new": "Dutch",
        "locality": {
            "same_subject": ["Brazil is located on the continent of"],
            "neighborhood": ["The official language of Cuba is"],
        },
    },
]  # fmt: skip


def answers(model, tokenizer) -> list[str]:
    """The first words that the model goes on with, for every prompt."""
    prompts = [p for f in FACTS for p in (f["prompt"], *f["locality"]["same_subject"], *f["locality"]["neighborhood"])]
    said = []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt").to(model.device)
        written = model.generate(**asked, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said.append(prompt + " …" + tokenizer.decode(written[0, asked.input_ids.shape[1] :]).replace("\n", " "))
    return said


loaded = mosectl.load(MODEL)
model, tokenizer = loaded.model, loaded.tokenizer
weights = {name: w.clone() for name, w in model.state_dict().items()}
before = answers(model, tokenizer)

result = mosectl.edit(FACTS, loaded)  # the first edit of a model takes statistics, which are kept
with mosectl.patched(model, result.patch):
    after = answers(model, tokenizer)

for old, new in zip(before, after, strict=True):
    print(old if old == new else f"{old}\n    → {new.split(' …', 1)[1].strip()}")
print("\nkept of what the model says otherwise (compared as question answering does):")
for share in result.shares:
    if share.metric == "locality" and share.group:
        print(f"  {share.group.replace('_', ' ')}: {share.qa:.0%} of {share.asked}")
assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
print("outside `patched` the model is bit for bit what it was")
