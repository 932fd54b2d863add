"""Checks `quorate prune --as hf` against Hugging Face transformers.

    pip install torch transformers safetensors
    python tools/check_hf.py target/release/quorate [MODEL_FOLDER [TASK]]
    python tools/check_hf.py target/release/quorate --families FOLDER..

Prunes a model, opens the folder with transformers, and compares its logits, in float32, with those that Quorate computes
(a) from the pruned folder and (b) by masking the full model with the same plan. Also compares the full model with
transformers, and 32 greedy tokens. Exits 1 if a difference exceeds 1e-3 or a token differs.

With --families, each folder is a small checkpoint with reference.safetensors, as in tests/fixtures. Some experts of each
layer (equally many of each group that the router knows) are left out, and the logits of its prompts are compared in the
same two ways; exits 1 if a difference exceeds 1e-4.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "<|user|>78+95=<|assistant|>",
    "<|user|>What is the capital of Oman?<|assistant|>",
    "<|user|>Lily has 4 bags with 6 marbles each and loses 3 of them. How many marbles are left? /think<|assistant|>",
    "<s>It is a truth universally acknowledged, that a single man in possession of a good fortune",
]


COUNT_KEYS = ["n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts"]


def without_some(config):
    """Experts that stay, and the number of all."""
    text = config.get("text_config", config)
    experts = next(text[key] for key in COUNT_KEYS if isinstance(text.get(key), int))
    groups = text.get("n_group") or 1
    size = experts // groups
    return [e for e in range(experts) if e % size != (e // size + 1) % size], experts


def unpack_fp8(path):
    """Rewrites a folder in float32: transformers multiplies only whole blocks."""
    config = json.loads((path / "config.json").read_text())
    rows, cols = config.pop("quantization_config")["weight_block_size"]
    (path / "config.json").write_text(json.dumps(config))
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            scale = tensors.pop(name).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            weight = tensors[name.removesuffix("_scale_inv")].float()
            tensors[name.removesuffix("_scale_inv")] = weight * scale[: weight.shape[0], : weight.shape[1]]
        save_file(tensors, file, {"format": "pt"})


def transformers_model(path, config):
    """In float32, packed weights unpacked."""
    import transformers

    more = {}
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "mxfp4":
        more["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    if method == "fp8":
        unpack_fp8(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **more)
    return model.float().eval()


def check_family(quorate, folder):
    """Largest differences between transformers and (a) the pruned folder, (b) the plan."""
    config = json.loads((folder / "config.json").read_text())
    kept, experts = without_some(config)
    prompts = load_file(folder / "reference.safetensors")["input_ids"]
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)

        def run(*args):
            out = subprocess.run([quorate, *args, "-q", "--json"], capture_output=True, text=True)
            if out.returncode != 0:
                raise RuntimeError(f"quorate {' '.join(map(str, args))}: {out.stderr}")
            return json.loads(out.stdout)

        plan = 'version = 1\nrouting_mode = "mask"\n'
        for layer in moe_layers(folder):
            plan += f'[[keep]]\nlayer = {layer}\nexperts = "{",".join(map(str, kept))}"\n'
        (temporary / "plan.toml").write_text(plan)
        pruned = temporary / "pruned"
        run("prune", "-m", folder, "--list", temporary / "plan.toml", "--as", "hf", "-o", pruned)
        got = []
        for ids in prompts:
            tokens = ",".join(map(str, ids.tolist()))
            for args in [["-m", pruned], ["-m", folder, "--plan", temporary / "plan.toml"]]:
                run("record", "--sites", "logits", "-o", temporary / "x.safetensors", "--tokens", tokens, *args)
                got.append(load_file(temporary / "x.safetensors")["logits"])
        reference = transformers_model(pruned, config)
        with torch.no_grad():
            wanted = [reference(ids[None]).logits[0] for ids in prompts]
        off = [(a - wanted[i // 2]).abs().max().item() for i, a in enumerate(got)]
        worst = [max(off[::2]), max(off[1::2])]
    return len(kept), experts, worst


def moe_layers(folder):
    """Layers with a router, from the reference."""
    names = load_file(folder / "reference.safetensors").keys()
    return sorted(int(name.split(".")[1]) for name in names if name.startswith("router_logits."))


def families():
    failed = False
    print("| checkpoint | experts kept | pruned folder | plan |\n|---|---|---|---|")
    for folder in map(Path, sys.argv[3:]):
        try:
            kept, experts, worst = check_family(sys.argv[1], folder)
            print(f"| {folder.name} | {kept} of {experts} | {worst[0]:.1e} | {worst[1]:.1e} |", flush=True)
            failed |= max(worst) > 1e-4
        except Exception as error:
            print(f"| {folder.name} | {type(error).__name__}: {str(error)[-300:]!r} |  |  |", flush=True)
            failed = True
    sys.exit(1 if failed else 0)


def main():
    quorate = sys.argv[1]
    if sys.argv[2:3] == ["--families"]:
        return families()
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
