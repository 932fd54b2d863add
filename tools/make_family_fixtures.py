"""Writes the fixtures gemma2, qwen3_5_moe, deepseek_moe and pangu_pro_moe: tiny checkpoints in the released form, and what they must give.

Gemma 2 and Qwen3.5-MoE are computed by Hugging Face transformers. DeepSeek-MoE 16B and Pangu-Pro-MoE were released with code of their
own, which no release of transformers holds: their attention, norms and RoPE are those of transformers' Llama, and their mixtures are
written below, in torch, from what was published about them. It shares nothing with the engine, but it is not the authors' code either;
the references' metadata says so.

Seeds are tried in turn until no choice of an expert or of a token is close, in the prompts and in the continuations, and no logit
depends much on how weights are rounded.

    pip install torch transformers safetensors numpy
    python tools/make_family_fixtures.py [NAME ...] [--llama-cpp FOLDER]

With `--llama-cpp`, the source folder of llama.cpp (for its convert_hf_to_gguf.py; its further needs: sentencepiece), the models
that have an architecture there are written as GGUF in F32 too.
"""

import argparse
import copy
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
# The fixture whose tokenizer is taken over.
TOKENIZER = FIXTURES / "qwen3_next"
VOCAB, SPECIAL, PROMPT, ANSWER = 272, 266, 24, 16
# No chosen expert is nearer to the next one than this (in logits), and no token to the second best.
SELECTION, GREEDY = 0.004, 0.01
# How far a logit may move if each weight moves by a unit in its last place.
ROUNDING = 4e-5
TOKENS = {"bos_token_id": 269, "eos_token_id": 268, "pad_token_id": 271}
COMMON = {**TOKENS, "attention_dropout": 0.0, "hidden_size": 32, "initializer_range": 0.02, "max_position_embeddings": 512,
          "num_attention_heads": 4, "torch_dtype": "float32", "use_cache": True, "vocab_size": VOCAB}


class Mlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Logits of the experts, and by `choose` the chosen ones with their weights, best first."""

    def __init__(self, hidden, experts, choose):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.choose = choose

    def forward(self, x):
        logits = x @ self.weight.T
        return logits, *self.choose(logits.softmax(-1))


class Mixture(nn.Module):
    """The chosen experts, each times its weight, and what all tokens share beside them."""

    def experts_and_shared(self, x, shared):
        rows = x.reshape(-1, x.shape[-1])
        _, weights, ids = self.gate(rows)
        y = torch.stack([
            sum(w * self.experts[e](row) for w, e in zip(weights[t], ids[t].tolist())) for t, row in enumerate(rows)
        ])
        return (y + shared(rows)).view_as(x)


class DeepseekMixture(Mixture):
    """DeepSeek-MoE: softmax over all experts, the k largest as they are, shared experts in one block that is n times as wide."""

    def __init__(self, config):
        super().__init__()
        d, width = config["hidden_size"], config["moe_intermediate_size"]
        self.experts = nn.ModuleList(Mlp(d, width) for _ in range(config["n_routed_experts"]))
        self.gate = Gate(d, config["n_routed_experts"], lambda p: torch.topk(p, config["num_experts_per_tok"]))
        self.shared_experts = Mlp(d, width * config["n_shared_experts"])

    def forward(self, x):
        return self.experts_and_shared(x, self.shared_experts)


class PanguMixture(Mixture):
    """Pangu-Pro-MoE: softmax over all experts, the largest of each group of neighbours, times a learned factor of that expert."""

    def __init__(self, config):
        super().__init__()
        d, n = config["hidden_size"], config["num_experts"]
        self.groups = config["num_experts_per_tok"]
        self.experts = nn.ModuleList(Mlp(d, config["moe_intermediate_size"]) for _ in range(n))
        self.gate = Gate(d, n, self.choose)
        self.router_scale = nn.Parameter(torch.ones(1, n))
        self.shared_expert = Mlp(d, config["shared_expert_intermediate_size"])

    def choose(self, p):
        size = p.shape[-1] // self.groups
        best, place = p.unflatten(-1, (self.groups, size)).max(-1)
        best, order = best.sort(descending=True)
        ids = (place + size * torch.arange(self.groups)).gather(-1, order)
        return best * self.router_scale[0, ids], ids

    def forward(self, x):
        return self.experts_and_shared(x, self.shared_expert)


def llama_with(mixture, dense):
    """transformers' Llama, its blocks replaced by a mixture where `dense` does not say otherwise."""

    def build(config):
        names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
                 "vocab_size", "max_position_embeddings", "tie_word_embeddings"]
        llama = transformers.LlamaConfig(
            **{name: config[name] for name in names}, attention_bias=mixture is PanguMixture,
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]}, attn_implementation="eager", **TOKENS)
        model = transformers.LlamaForCausalLM(llama)
        for i, layer in enumerate(model.model.layers):
            if not dense(config, i):
                layer.mlp = mixture(config)
        return model

    return build


def build_gemma2(config):
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config, attn_implementation="eager"))


def build_qwen3_5(config):
    text = transformers.Qwen3_5MoeTextConfig(**config["text_config"], attn_implementation="eager", experts_implementation="eager")
    return transformers.Qwen3_5MoeForCausalLM(text)


def own(what):
    """What the metadata says of a reference that is not the authors' code."""
    return f"transformers' Llama with {what} written for this project in torch from the published description; not the authors' code"


FAMILIES = {
    "gemma2": {
        "build": build_gemma2,
        "family": "Gemma2",
        "gguf": "Gemma2ForCausalLM",
        "patterns": True,
        "config": {
            **COMMON, "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 2.0,
            "cache_implementation": "hybrid", "final_logit_softcapping": 5.0, "head_dim": 24, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 64, "model_type": "gemma2", "num_hidden_layers": 4,
            "num_key_value_heads": 2, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 8,
        },
    },
    "qwen3_5_moe": {
        "build": build_qwen3_5,
        "family": "Qwen3_5MoeText",
        "gguf": "Qwen3_5MoeForConditionalGeneration",
        "prefix": "model.language_model.",
        # Parts of a released checkpoint that are no part of the language model.
        "beside": {"model.visual.patch_embed.proj.bias": [16], "mtp.fc.weight": [32, 64]},
        "config": {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 267, "model_type": "qwen3_5_moe",
            "text_config": {
                **{k: v for k, v in COMMON.items() if k != "torch_dtype"}, "attention_bias": False, "attn_output_gate": True,
                "dtype": "float32", "full_attention_interval": 4, "head_dim": 32, "hidden_act": "silu",
                "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 12,
                "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 16, "mamba_ssm_dtype": "float32",
                "mlp_only_layers": [], "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 16, "mtp_num_hidden_layers": 1,
                "num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
                "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25,
                                    "rope_theta": 10000000, "rope_type": "default"},
                "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 24, "tie_word_embeddings": False,
            },
            "tie_word_embeddings": False,
            "vision_config": {"depth": 1, "hidden_size": 16, "model_type": "qwen3_5_moe"},
        },
    },
    "deepseek_moe": {
        "build": llama_with(DeepseekMixture, lambda config, i: i < config["first_k_dense_replace"]),
        "family": "Deepseek",
        "reference": own("the mixture of DeepSeek-MoE"),
        "gguf": "DeepseekForCausalLM",
        "patterns": True,
        "config": {
            **COMMON, "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
            "hidden_act": "silu", "intermediate_size": 96, "model_type": "deepseek", "moe_intermediate_size": 16, "moe_layer_freq": 1,
            "n_routed_experts": 8, "n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 3, "num_hidden_layers": 3,
            "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0,
            "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        },
    },
    "pangu_pro_moe": {
        "build": llama_with(PanguMixture, lambda config, i: i in config["mlp_only_layers"]),
        "family": "PanguProMoE",
        "reference": own("the grouped mixture of Pangu-Pro-MoE"),
        "patterns": True,
        "groups": True,
        "config": {
            **COMMON, "architectures": ["PanguProMoEForCausalLM"], "hidden_act": "silu", "intermediate_size": 64, "mlp_only_layers": [0],
            "model_type": "PanguProMoE", "moe_intermediate_size": 16, "num_experts": 12, "num_experts_per_tok": 4, "num_hidden_layers": 3,
            "num_key_value_heads": 2, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 16000000.0,
            "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 24, "tie_word_embeddings": False,
        },
    },
}


def random_weights(model, generator):
    """Values at which every part matters, held exactly by bfloat16 and float16."""
    zero_centred = type(model).__name__.startswith(("Gemma", "Qwen"))
    scaled = type(model).__name__.startswith("Gemma")
    noise = lambda shape: torch.randn(shape, generator=generator)
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            value = torch.empty(p.shape).uniform_(0.2, 4.0, generator=generator).log()
        elif name.endswith("router_scale"):
            value = torch.empty(p.shape).uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("linear_attn.norm.weight"):
            value = 1 + 0.25 * noise(p.shape)
        elif "norm" in name:
            value = 0.25 * noise(p.shape) + (0 if zero_centred else 1)
        elif "conv1d" in name:
            value = noise(p.shape)
        elif p.ndim == 1:
            value = 0.3 * noise(p.shape)
        elif "embed_tokens" in name:
            value = (0.35 if scaled else 1.0) * noise(p.shape)
        else:
            gain = 2.0 if re.search(r"lm_head|gate\.weight$|[qk]_proj", name) else 1.2
            value = gain * noise(p.shape) / math.sqrt(p.shape[-1])
        value = value.bfloat16().float()
        p.data.copy_(torch.where(value.abs() < 2**-14, 0.0, value))


class Watch:
    """What passes through a model: inputs and outputs of its blocks."""

    def __init__(self, model):
        self.seen, self.handles = {}, []
        for i, layer in enumerate(model.model.layers):
            self.on(layer, f"layer.{i}", lambda m, args, out, i=i: {f"hidden_states.{i}": args[0], f"hidden_states.{i + 1}": first(out)})
            attn = getattr(layer, "linear_attn", None) or layer.self_attn
            self.on(attn, f"attn.{i}", lambda m, args, out, i=i: {
                f"attn_out.{i}": first(out), **({f"attn_pattern.{i}": out[1]} if isinstance(out, tuple) else {})})
            self.on(layer.mlp, f"mlp.{i}", lambda m, args, out, i=i: {f"mlp_out.{i}": first(out)})
            if hasattr(layer.mlp, "gate"):
                self.on(layer.mlp.gate, f"gate.{i}", lambda m, args, out, i=i: {
                    f"router_logits.{i}": out[0][None], f"topk_weights.{i}": out[1][None], f"topk_ids.{i}": out[2][None]})
        self.on(model.model.norm, "norm", lambda m, args, out: {"final_norm": out})

    def on(self, module, _, take):
        def hook(m, args, kwargs, out):
            args = args or tuple(kwargs[k] for k in ["hidden_states"] if k in kwargs)
            self.seen.update({k: v.detach().clone() for k, v in take(m, args, out).items()})

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def close(self):
        for handle in self.handles:
            handle.remove()


def first(out):
    return out[0] if isinstance(out, tuple) else out


def run(model, ids):
    watch = Watch(model)
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits
    finally:
        watch.close()
    return {**watch.seen, "logits": logits.detach().clone()}


def selection_margin(seen, groups):
    """The smallest distance of a chosen expert's logit from that of one that would have been next."""
    margin = math.inf
    for name, z in seen.items():
        if name.startswith("router_logits."):
            k = seen[name.replace("router_logits", "topk_ids")].shape[-1]
            if groups:
                best = z.unflatten(-1, (k, -1)).topk(2, -1).values
                margin = min(margin, (best[..., 0] - best[..., 1]).min().item())
            else:
                best = z.topk(k + 1, -1).values
                margin = min(margin, (best[..., k - 1] - best[..., k]).min().item())
    return margin


@torch.no_grad()
def compute(model, prompts, groups):
    """The reference of two prompts, with the margins of the choices on the way."""
    runs, answers, margins = [], [], [math.inf, math.inf]
    for prompt in prompts:
        runs.append(run(model, prompt))
        ids = prompt
        for _ in range(ANSWER):
            seen = run(model, ids)
            margins[0] = min(margins[0], selection_margin(seen, groups))
            best = seen["logits"][0, -1].topk(2)
            margins[1] = min(margins[1], (best.values[0] - best.values[1]).item())
            ids = torch.cat([ids, best.indices[:1]])
            if margins[0] < SELECTION or margins[1] < GREEDY:
                return None
        answers.append(ids[len(prompt):])
    reference = {name: torch.cat([r[name] for r in runs]).contiguous() for name in runs[0]}
    reference["input_ids"] = torch.stack(list(prompts))
    reference |= {f"greedy.{n}": answer for n, answer in enumerate(answers)}
    return reference, margins


@torch.no_grad()
def rounding(model, prompts, reference):
    """How far the logits move if weights move by a unit in their last place."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for p in other.parameters():
        p *= 1 + 2**-23 * torch.randint(-1, 2, p.shape, generator=generator)
    logits = torch.cat([other(input_ids=p[None], use_cache=False).logits for p in prompts])
    return (logits - reference["logits"]).abs().max().item()


@torch.no_grad()
def agrees_with_generate(model, prompts, reference):
    """Whether the library's own loop with its cache continues alike."""
    model.generation_config.eos_token_id = None
    for n, prompt in enumerate(prompts):
        mask = torch.ones(1, PROMPT, dtype=torch.long)
        answer = model.generate(prompt[None], attention_mask=mask, max_new_tokens=ANSWER, do_sample=False)
        if not torch.equal(answer[0, PROMPT:], reference[f"greedy.{n}"]):
            return False
    return True


def make(name):
    family = FAMILIES[name]
    config, groups = family["config"], family.get("groups", False)
    for seed in range(1, 10_000):
        generator = torch.Generator().manual_seed(seed)
        model = family["build"](config).float().eval()
        random_weights(model, generator)
        prompts = torch.randint(0, SPECIAL, (2, PROMPT), generator=generator)
        found = compute(model, prompts, groups)
        if found and rounding(model, prompts, found[0]) < ROUNDING:
            break
    reference, margins = found
    assert agrees_with_generate(model, prompts, reference), f"{name}: generate() continues otherwise"
    if not family.get("patterns"):
        reference = {k: v for k, v in reference.items() if not k.startswith("attn_pattern.")}
    rotary = model.model.rotary_emb
    reference["rope_inv_freq"] = rotary.inv_freq.detach().clone()
    reference["rope_attention_scaling"] = torch.tensor([float(rotary.attention_scaling)])

    folder = FIXTURES / name
    folder.mkdir(exist_ok=True)
    for file in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(TOKENIZER / file, folder / file)
    write = lambda file, value: (folder / file).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    write("config.json", {**config, "transformers_version": transformers.__version__})
    write("generation_config.json", {**TOKENS, "do_sample": False, "eos_token_id": [268, 266]})
    prefix = family.get("prefix", "model.")
    tied = model.config.tie_word_embeddings
    tensors = {re.sub(r"^model\.", prefix, k): v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    tensors |= {k: torch.full(shape, 0.5) for k, shape in family.get("beside", {}).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    off = reload(name, folder, prompts, reference)
    metadata = {
        "format": "pt", "fixture": name, "family": family["family"], "seed": str(seed), "dtype": "float32", "attention": "eager",
        "torch": torch.__version__.split("+")[0], "transformers": transformers.__version__,
        "reference": family.get("reference", "transformers"), "min_selection_margin": f"{min(margins[0], 9):.3g}",
        "min_greedy_margin": f"{margins[1]:.3g}", "reload_max_diff": f"{off:.3g}",
    }
    save_file({k: v.contiguous() for k, v in reference.items()}, folder / "reference.safetensors", metadata)
    print(f"{name}: seed {seed}, selection {margins[0]:.3g}, greedy {margins[1]:.3g}, reloaded {off:.3g}, logits up to "
          f"{reference['logits'].abs().max():.2f} and {reference['logits'].std():.2f} on average")


@torch.no_grad()
def reload(name, folder, prompts, reference):
    """How far the logits of the stored checkpoint are from those that were stored."""
    family = FAMILIES[name]
    if "reference" in family:
        model = family["build"](json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        kind = getattr(transformers, family["config"]["architectures"][0].replace("ForConditionalGeneration", "ForCausalLM"))
        config = transformers.AutoConfig.from_pretrained(folder)
        model, info = kind.from_pretrained(folder, config=getattr(config, "text_config", config), dtype=torch.float32,
                                           attn_implementation="eager", output_loading_info=True)
        assert not info["missing_keys"], info["missing_keys"]
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
    logits = torch.cat([model.float().eval()(input_ids=p[None], use_cache=False).logits for p in prompts])
    return (logits - reference["logits"]).abs().max().item()


def convert(name, llama_cpp):
    """The checkpoint as GGUF, by llama.cpp's converter. Its table of tokenizers does not know the one of the fixtures."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import ModelType, get_model_class
    from conversion.base import TextModel

    kind = get_model_class(FAMILIES[name]["gguf"])
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    kind.set_vocab = TextModel._set_vocab_gpt2
    if getattr(kind, "supports_mtp_export", False):
        kind.no_mtp = True
    assert kind.model_type == ModelType.TEXT
    out = FIXTURES / name / "gguf" / f"{name}-f32.gguf"
    out.parent.mkdir(exist_ok=True)
    with torch.inference_mode():
        kind(FIXTURES / name, gguf.LlamaFileType.ALL_F32, out).write()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}; all if none is named")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names or FAMILIES:
        make(name)
        if args.llama_cpp and "gguf" in FAMILIES[name]:
            convert(name, args.llama_cpp)


if __name__ == "__main__":
    main()
