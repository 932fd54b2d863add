"""Makes a GGUF model use some experts of each layer far more often than others, as trained models do, by scaling the rows of
its routers in place.

    pip install gguf numpy
    python tools/skew_router.py MODEL.gguf [--exponent 0.7] [--top-k 8]

Meant for models with made-up weights, whose router logits are about normal: rows are scaled so that the expert of rank r (ranks
are drawn anew for each layer) is chosen in proportion to r^-exponent, as far as scaling can bring it about. Prints the usage
that it expects: the share of choices that goes to the most used quarter of the experts.
"""

import argparse

import gguf
import numpy as np


def usage(scales, top_k, logits):
    chosen = np.argpartition(-(logits * scales), top_k, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=len(scales)) / len(logits)


def scales_for(target, top_k, rng):
    logits = rng.standard_normal((20000, len(target)))
    scales = np.ones(len(target))
    for _ in range(200):
        scales *= (target / np.maximum(usage(scales, top_k, logits), 1e-4)) ** 0.2
        scales = np.clip(scales / np.median(scales), 0.2, 5)
    return scales, usage(scales, top_k, logits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--exponent", type=float, default=0.7)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    routers = [t for t in gguf.GGUFReader(args.model).tensors if t.name.endswith("ffn_gate_inp.weight")]
    shapes = [(t.name, t.data_offset, t.data.shape) for t in routers]
    assert shapes and all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in routers), "routers in F32"
    experts = shapes[0][2][0]
    weights = np.arange(1, experts + 1) ** -args.exponent
    # Half the tokens are the most that a row of any length is chosen by, since its logit is negative for the others.
    target = np.minimum(args.top_k * weights / weights.sum(), 0.5)
    scales, got = scales_for(target, args.top_k, rng)
    for name, offset, shape in shapes:
        rows = np.memmap(args.model, np.float32, "r+", offset, shape)
        rows *= scales[rng.permutation(experts)][:, None].astype(np.float32)
        rows.flush()
    got = np.sort(got)[::-1]
    print(f"{len(shapes)} routers; the most used quarter of {experts} experts gets {got[: experts // 4].sum() / got.sum():.0%} of the "
          f"choices (evenly: 25 %), the first {got[0] / got.sum():.1%}, the last {got[-1] / got.sum():.2%}")


if __name__ == "__main__":
    main()
