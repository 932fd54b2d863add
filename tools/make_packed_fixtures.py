"""Writes tests/fixtures/packed: the fixture `olmoe` with its linear layers packed as GPTQ, AWQ and compressed-tensors have them.

The packing is written here from the formats' descriptions, in numpy, and shares nothing with the reader. What the checkpoints must give
is computed by Hugging Face transformers from the unpacked values, rounded to the type of the scales as the formats' own programs do.

    pip install numpy torch transformers safetensors
    python tools/make_packed_fixtures.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
SOURCE, TARGET = FIXTURES / "olmoe", FIXTURES / "packed"
GROUP = 32
SAMPLES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.3.gate_proj", "model.layers.1.mlp.experts.3.down_proj"]


def grid(w, symmetric, scale_type, groups):
    """Whole numbers 0..15, scale and zero point for each row and group of columns. w is [out, in], groups [in]."""
    n = groups.max() + 1
    scale, zero = np.zeros((w.shape[0], n), np.float32), np.full((w.shape[0], n), 8, np.int64)
    for g in range(n):
        part = w[:, groups == g]
        if symmetric:
            scale[:, g] = np.abs(part).max(1) / 7
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale[:, g] = (high - low) / 15
            zero[:, g] = np.clip(np.round(-low / scale[:, g]), 1, 15)
    scale = torch.tensor(scale).to(scale_type)
    s = scale.float().numpy()
    codes = np.clip(np.round(w / s[:, groups]) + zero[:, groups], 0, 15).astype(np.int64)
    values = (codes - zero[:, groups]) * s[:, groups]
    return codes, scale, zero, torch.tensor(values).float().to(scale_type).float()


def pack(numbers, axis, order=range(8), bits=4):
    """Eight numbers to an int32 along an axis; nibble i holds number order[i]."""
    numbers = np.moveaxis(numbers, axis, -1)
    numbers = numbers.reshape(*numbers.shape[:-1], -1, 8)
    word = np.zeros(numbers.shape[:-1], np.uint32)
    for i, of in enumerate(order):
        word |= (numbers[..., of].astype(np.uint32) & 15) << np.uint32(bits * i)
    return torch.tensor(np.ascontiguousarray(np.moveaxis(word, -1, axis)).view(np.int32))


def gptq(w, symmetric, shuffled, rng):
    groups = np.arange(w.shape[1]) // GROUP
    if shuffled:
        order = rng.permutation(w.shape[1])
        groups = groups[np.argsort(order)]
    codes, scale, zero, values = grid(w, symmetric, torch.float16, groups)
    # [in / 8, out]; zero points are stored less one, packed along the outputs.
    return {
        "qweight": pack(codes.T, 0), "qzeros": pack(zero.T - 1, 1), "scales": scale.T.contiguous(),
        "g_idx": torch.tensor(groups.astype(np.int32)),
    }, values


def awq(w, rng):
    codes, scale, zero, values = grid(w, False, torch.float16, np.arange(w.shape[1]) // GROUP)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": pack(codes.T, 1, order), "qzeros": pack(zero.T, 1, order), "scales": scale.T.contiguous()}, values


def compressed(w, symmetric, rng):
    codes, scale, zero, values = grid(w, symmetric, torch.bfloat16, np.arange(w.shape[1]) // GROUP)
    tensors = {"weight_packed": pack(codes, 1), "weight_scale": scale, "weight_shape": torch.tensor(w.shape)}
    if not symmetric:
        tensors["weight_zero_point"] = pack(zero, 0)
    return tensors, values


def channels(w, kind, rng):
    most = 127 if kind == torch.int8 else 448
    scale = (torch.tensor(w).abs().amax(1, keepdim=True) / most).to(torch.bfloat16)
    scaled = torch.tensor(w) / scale.float()
    stored = scaled.round().to(torch.int8) if kind == torch.int8 else scaled.to(kind)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale.float()


def weights(bits, kind, symmetric, strategy):
    of = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": GROUP if strategy == "group" else None}
    return {"group_0": {"targets": ["Linear"], "weights": of, "input_activations": None}}


def of_compressed(form, *of):
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": weights(*of), "ignore": ["lm_head", "re:.*mlp.gate$"]}


KINDS = {
    "gptq": (lambda w, r: gptq(w, True, False, r), {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "gptq_act_order": (lambda w, r: gptq(w, False, True, r), {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "compressed_int4": (lambda w, r: compressed(w, True, r), of_compressed("pack-quantized", 4, "int", True, "group")),
    "compressed_int4_zeros": (lambda w, r: compressed(w, False, r), of_compressed("pack-quantized", 4, "int", False, "group")),
    "compressed_int8": (lambda w, r: channels(w, torch.int8, r), of_compressed("int-quantized", 8, "int", True, "channel")),
    "compressed_fp8": (lambda w, r: channels(w, torch.float8_e4m3fn, r), of_compressed("float-quantized", 8, "float", True, "channel")),
}


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor([[(7 * i + 3) % 250 for i in range(24)]])
    with torch.no_grad():
        return tokens[0].to(torch.int32), model(tokens).logits[0]


def main():
    source = load_file(SOURCE / "model.safetensors")
    config = json.loads((SOURCE / "config.json").read_text())
    shutil.rmtree(TARGET, ignore_errors=True)
    for seed, (kind, (form, section)) in enumerate(KINDS.items()):
        rng = np.random.default_rng(seed)
        packed, plain, samples = {}, {}, {}
        for name, tensor in source.items():
            linear = "_proj.weight" in name
            if not linear:
                packed[name] = plain[name] = tensor
                continue
            base = name.removesuffix(".weight")
            parts, values = form(tensor.float().numpy(), rng)
            packed |= {f"{base}.{part}": value for part, value in parts.items()}
            plain[name] = values
            if base in SAMPLES:
                samples[base] = values
        folder = TARGET / kind
        folder.mkdir(parents=True)
        for name in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]:
            shutil.copy(SOURCE / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}, indent=1) + "\n")
        save_file(packed, folder / "model.safetensors", {"format": "pt"})
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "config.json").write_text(json.dumps(config))
            save_file(plain, Path(temporary) / "model.safetensors", {"format": "pt"})
            tokens, expected = logits(temporary)
        save_file(samples | {"tokens": tokens, "logits": expected.contiguous()}, folder / "expected.safetensors")
        print(kind, sum(t.nbytes for t in packed.values()), float((expected).abs().max()))


if __name__ == "__main__":
    main()
