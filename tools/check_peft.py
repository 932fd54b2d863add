"""Checks adapters that Quorate writes against Hugging Face peft and transformers, and those that peft saves against Quorate.

    pip install torch transformers peft safetensors
    python tools/check_peft.py [MODEL_FOLDER]

Trains adapters on a few answers (`cargo run --example adapter`): one of attention and routers, one of all experts, too; loads
them with peft, and compares logits in float32, before and with the adapter, and again with the adapter as peft saves it. Then
makes an adapter of stacked experts with peft and compares it. Exits 1 if a difference exceeds 1e-3.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent


def example(*args):
    command = ["cargo", "run", "-q", "--release", "-p", "quorate-train", "--example", "adapter", "--", *args]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if out.returncode != 0:
        sys.exit(out.stderr)


def largest(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


def logits(model, ids):
    with torch.no_grad():
        return [model(prompt[None]).logits[0] for prompt in ids]


def ours_in(folder):
    """Prompts, and Quorate's logits before and with an adapter."""
    found = load_file(Path(folder) / "quorate_logits.safetensors")
    items = range(sum(name.startswith("ids.") for name in found))
    return [[found[f"{name}.{i}"] for i in items] for name in ["ids", "before", "after"]]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def check(path, what):
    """Largest differences of the logits: before, with the adapter, and with it as peft saves it and Quorate reads it."""
    worst = {}
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        example(path, ours, *what)
        ids, before, after = ours_in(ours)
        base = load(path)
        worst["before"] = largest(logits(base, ids), before)
        model = PeftModel.from_pretrained(base, ours).eval()
        worst["after"] = largest(logits(model, ids), after)
        model.save_pretrained(theirs)
        example(path, theirs, "apply")
        worst["read back"] = largest(ours_in(theirs)[2], after)
        worst["change"] = largest(before, after)
    return worst


def check_stacked(path):
    """The same of an adapter that peft makes, all experts of a layer in one pair of factors."""
    torch.manual_seed(0)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False
    )
    model = get_peft_model(load(path), config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        example(path, folder, "apply")
        ids, before, after = ours_in(folder)
    return {"after": largest(logits(model, ids), after), "change": largest(before, after)}


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "embedded" / "model")
    results = {
        "attention, routers": check(path, []),
        "attention, routers, experts": check(path, ["experts"]),
        "stacked experts by peft": check_stacked(path),
    }
    good = True
    for name, worst in results.items():
        print(name, {what: f"{value:.2e}" for what, value in worst.items()})
        good &= worst.pop("change") > 0.1 and max(worst.values()) < 1e-3
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
