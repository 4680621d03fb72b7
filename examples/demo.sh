#!/usr/bin/env bash
# The main job on the embedded demo model, offline: check → edit → inspect → apply → ask → revert.
set -euo pipefail
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
bold="" plain=""
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
say() {
  printf '\n%s$' "$bold"
  for word in "$@"; do case "$word" in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac; done
  printf '%s\n' "$plain"
  "$@"
}

say mosectl check facts.jsonl
say mosectl edit facts.jsonl --model demo-model --corpus corpus.txt -o "$work/patch.safetensors"
say mosectl inspect "$work/patch.safetensors" --model demo-model
say mosectl apply "$work/patch.safetensors" --model demo-model -o "$work/edited"
first="$(head -n 1 facts.jsonl | python3 -c 'import json, sys; print(json.loads(sys.stdin.readline())["prompt"])')"
say mosectl ask "$first" --model demo-model
say mosectl ask "$first" --model "$work/edited"
say mosectl revert "$work/patch.safetensors" --model "$work/edited"
say mosectl ask "$first" --model "$work/edited"
say cmp demo-model/model.safetensors "$work/edited/model.safetensors"
echo "the reverted weights are byte for byte those of the demo model"
