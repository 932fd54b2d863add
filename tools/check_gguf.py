"""Checks the GGUF files that `quorate quantize` and `quorate prune --as gguf` write, against llama.cpp.

    pip install llama-cpp-python safetensors numpy
    python tools/check_gguf.py target/release/quorate families FOLDER..
    python tools/check_gguf.py target/release/quorate losses MODEL.gguf [TYPE..]

`families`: each folder is a small checkpoint with reference.safetensors, as in tests/fixtures. It is written as F32, whole and
with some experts of each layer left out (from safetensors, and again from the whole file); llama.cpp computes the logits of the
two prompts from each file, with a cache in f32, and Quorate from the same file and from the folder with a plan. Printed are the
largest differences; "-" is a model that cannot be written, and why.

`losses`: a real model in GGUF (F16, or any type of which less is wanted) is quantised by Quorate and by llama.cpp's own
llama_model_quantize. Printed are the types that differ, the error of all matrices relative to their size, and seconds.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

COUNT_KEYS = ["n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts"]


def run(quorate, *args):
    out = subprocess.run([quorate, *map(str, args), "-q", "--json"], capture_output=True, text=True)
    if out.returncode != 0:
        raise RuntimeError(out.stderr.strip())
    return json.loads(out.stdout)


def llama_logits(path, prompts):
    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )
    found = []
    for ids in prompts:
        model.reset()
        model.eval(list(map(int, ids)))
        found.append(np.array(model.scores[: len(ids)]))
    model.close()
    return found


def quorate_logits(quorate, prompts, *args):
    found = []
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        for ids in prompts:
            tokens = ",".join(map(str, ids))
            run(quorate, "record", "--sites", "logits", "-o", file.name, "--tokens", tokens, *args)
            found.append(load_file(file.name)["logits"])
    return found


def largest(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b))


def families(quorate, folders):
    print("| checkpoint | whole: Quorate | llama.cpp | pruned: Quorate | llama.cpp | pruned from the file: llama.cpp |")
    print("|---|---|---|---|---|---|")
    for folder in map(Path, folders):
        reference = load_file(folder / "reference.safetensors")
        prompts, cells = reference["input_ids"], []
        with tempfile.TemporaryDirectory() as temporary:
            # A name of its own: llama.cpp treats models by theirs.
            whole = Path(temporary) / "whole.gguf"
            try:
                run(quorate, "quantize", "-m", folder, "-o", whole, "--type", "F32")
                cells.append(f"{largest(quorate_logits(quorate, prompts, '-m', whole), reference['logits']):.1e}")
                cells.append(with_llama(whole, prompts, reference["logits"]))
                cells += pruned(quorate, folder, whole, prompts, reference, temporary)
            except RuntimeError as error:
                cells.append(f"- {str(error)[:160]}")
        print(f"| {folder.name} | {' | '.join(cells)} |", flush=True)


def with_llama(path, prompts, wanted):
    try:
        return f"{largest(llama_logits(path, prompts), wanted):.1e}"
    except ValueError:
        return "does not load"


def pruned(quorate, folder, whole, prompts, reference, temporary):
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    experts = next((text[key] for key in COUNT_KEYS if isinstance(text.get(key), int)), None)
    if experts is None:
        return []
    size = experts // (text.get("n_group") or 1)
    kept = ",".join(str(e) for e in range(experts) if e % size != (e // size + 1) % size)
    layers = sorted(int(name.split(".")[1]) for name in reference if name.startswith("router_logits."))
    plan = Path(temporary) / "plan.toml"
    keep = "".join(f'[[keep]]\nlayer = {layer}\nexperts = "{kept}"\n' for layer in layers)
    plan.write_text(f'version = 1\nrouting_mode = "mask"\n{keep}')
    masked = quorate_logits(quorate, prompts, "-m", folder, "--plan", plan)
    cells = []
    for i, source in enumerate([folder, whole]):
        out = Path(temporary) / f"pruned{i}.gguf"
        run(quorate, "prune", "-m", source, "--list", plan, "--as", "gguf", "-o", out)
        if i == 0:
            cells.append(f"{largest(quorate_logits(quorate, prompts, '-m', out), masked):.1e}")
        cells.append(with_llama(out, prompts, masked))
    return cells


def tensors(path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {t.name: (t.tensor_type.name, lambda t=t: dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}


def losses(quorate, source, types):
    exact = tensors(source)
    print("| type | Quorate: error | seconds | llama.cpp: error | seconds | types that differ |\n|---|---|---|---|---|---|")
    for name in types or ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K"]:
        with tempfile.TemporaryDirectory() as temporary:
            ours, theirs = Path(temporary) / "ours.gguf", Path(temporary) / "theirs.gguf"
            start = time.time()
            run(quorate, "quantize", "-m", source, "-o", ours, "--type", name)
            seconds = [time.time() - start]
            params = llama_cpp.llama_model_quantize_default_params()
            key = {"Q2_K": "Q2_K", "Q6_K": "Q6_K"}.get(name, name)
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{key}")
            params.allow_requantize = True
            start = time.time()
            failed = llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(params))
            seconds.append(time.time() - start)
            if failed:
                sys.exit("llama_model_quantize failed")
            found = [tensors(ours), tensors(theirs)]
            differ = [t for t in found[0] if found[0][t][0] != found[1][t][0]]
            errors = []
            for file in found:
                off = size = 0.0
                for t, (_, values) in exact.items():
                    if len(values().shape) < 2:
                        continue
                    want, got = values(), file[t][1]()
                    off += float(((want - got) ** 2).sum(dtype=np.float64))
                    size += float((want**2).sum(dtype=np.float64))
                errors.append((off / size) ** 0.5)
            print(
                f"| {name} | {errors[0]:.5f} | {seconds[0]:.1f} | {errors[1]:.5f} | {seconds[1]:.1f} | {len(differ)} |",
                flush=True,
            )


if __name__ == "__main__":
    quorate, what, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
    families(quorate, rest) if what == "families" else losses(quorate, rest[0], rest[1:])
