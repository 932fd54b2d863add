"""Checks `quorate prune --as hf` against Hugging Face transformers.

    pip install torch transformers safetensors
    python tools/check_hf.py target/release/quorate [MODEL_FOLDER [TASK]]

Prunes a model, opens the folder with transformers, and compares its logits, in float32, with those that Quorate computes
(a) from the pruned folder and (b) by masking the full model with the same plan. Also compares the full model with
transformers, and 32 greedy tokens. Exits 1 if a difference exceeds 1e-3 or a token differs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "<|user|>78+95=<|assistant|>",
    "<|user|>What is the capital of Oman?<|assistant|>",
    "<|user|>Lily has 4 bags with 6 marbles each and loses 3 of them. How many marbles are left? /think<|assistant|>",
    "<s>It is a truth universally acknowledged, that a single man in possession of a good fortune",
]


def main():
    quorate = sys.argv[1]
    model = ["-m", sys.argv[2]] if len(sys.argv) > 2 else []
    task = sys.argv[3] if len(sys.argv) > 3 else "arithmetic"

    def run(*args):
        out = subprocess.run([quorate, *args, *model, "--json", "-q"], capture_output=True, text=True)
        if out.returncode != 0:
            sys.exit(f"quorate {' '.join(args)}: {out.stderr}")
        return json.loads(out.stdout)

    def logits(*args):
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            subprocess.run(
                [quorate, "record", "--sites", "logits", "-o", file.name, "-q", "--json", *args],
                check=True, capture_output=True,
            )
            return load_file(file.name)["logits"]

    worst = {}
    with tempfile.TemporaryDirectory() as folder:
        pruned, plan = str(Path(folder) / "pruned"), str(Path(folder) / "plan.toml")
        kept = run("prune", "--task", task, "--as", "hf", "-o", pruned)["kept_per_layer"]
        run("prune", "--task", task, "--as", "plan", "--scope", "local", "--mode", "mask", "-o", plan)
        source = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "embedded" / "model"
        references = {
            "full": (source, [[*model]]),
            "pruned": (pruned, [["-m", pruned], [*model, "--plan", plan]]),
        }
        for name, (path, ways) in references.items():
            tokenizer = AutoTokenizer.from_pretrained(path)
            reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                with torch.no_grad():
                    wanted = reference(ids).logits[0]
                    greedy = reference.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1]:].tolist()
                tokens = ",".join(map(str, ids[0].tolist()))
                for way, args in enumerate(ways):
                    got = logits("--tokens", tokens, *args)
                    key = (name, ["folder", "plan"][way])
                    worst[key] = max(worst.get(key, 0.0), (got - wanted).abs().max().item())
                chosen = ["--task", "none", *ways[0]] if name == "full" else ["--task", "none", "-m", pruned]
                answer = json.loads(subprocess.run(
                    [quorate, "run", prompt, "--raw", "--max-tokens", "32", "--json", "-q", *chosen],
                    check=True, capture_output=True, text=True,
                ).stdout)["tokens"]
                eos = reference.generation_config.eos_token_id
                ends = set(eos if isinstance(eos, list) else [eos])
                greedy = greedy[: next((i for i, t in enumerate(greedy) if t in ends), len(greedy))]
                if answer != greedy:
                    print(f"{name}: greedy tokens differ for {prompt!r}: {answer} {greedy}")
                    worst[(name, "greedy")] = float("inf")
    print(f"kept per layer: {kept}")
    for (name, way), error in worst.items():
        print(f"{name:7} {way:7} max |logit difference| {error:.2e}")
    sys.exit(1 if max(worst.values()) > 1e-3 else 0)


if __name__ == "__main__":
    main()
