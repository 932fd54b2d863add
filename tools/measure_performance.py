"""Measures what docs/performance.md says, on a quiet machine, and draws docs/performance.svg.

    cargo build --release
    python tools/measure_performance.py MODEL.gguf [--skewed SKEWED.gguf] [--only NAME,..]     measure and draw
    python tools/measure_performance.py --draw                                                  draw what was measured

MODEL is a mixture-of-experts model that fits into memory. Results go to docs/performance.json, each as soon as it is there; with
--only those named are measured again. `compare` needs llama.cpp (see `quorate bench --help`). SKEWED is a copy of the model
after tools/skew_router.py.
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = REPOSITORY / "docs/performance.json", REPOSITORY / "docs/performance.svg"
QUORATE = REPOSITORY / "target/release/quorate"


def quorate(*arguments):
    command = [str(QUORATE), *map(str, arguments), "--json", "--quiet"]
    print("+", " ".join(command[1:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    document = json.loads(done.stdout)
    document["model"] = Path(document.get("model") or "").name
    return document


def bench(model, prefill, decode, *arguments):
    return quorate("bench", "-m", model, "--prefill", prefill, "--decode", decode, *arguments)


def speeds(document):
    keys = ["prefill_tokens_per_s", "decode_tokens_per_s", "token_s", "time_to_first_token_s", "peak_rss_bytes", "memory_limit",
            "expert_hit_rate", "stream", "bytes_read", "disk_bytes_read", "first_run", "machine", "stages", "lenses", "threads"]
    return {key: document[key] for key in keys if document.get(key) is not None}


def profile(model, library):
    """A task of random words for a model that no text suits; its pattern says which experts are used most."""
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 9))) for _ in range(4000)]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "words.jsonl"
        with task.open("w") as out:
            for i in range(24):
                json.dump({"task": "words", "id": str(i), "prompt": " ".join(words[80 * i % 3900:][:40]), "answer": "x"}, out)
                out.write("\n")
        quorate("profile", "-m", model, "--library", library, "--tasks", folder)


def measure(model, skewed, only):
    size = os.path.getsize(model)
    half, quarter = size // 2, size // 4
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["model_bytes"] = size
    folder = tempfile.TemporaryDirectory()
    library = Path(folder.name) / "library.sqlite"
    profiled = set()

    def with_task(path, *arguments):
        if path not in profiled:
            profile(path, library)
            profiled.add(path)
        return ["--library", library, "--task", "words", *arguments]

    stream = lambda memory, cache: ["--on-miss", "stream", "--memory", memory, "--cache", cache, "--repeat", 3]
    cases = {
        "compare": lambda: quorate("bench", "-m", model, "--prefill", 512, "--decode", 64, "--repeat", 5, "--compare", "llama.cpp"),
        "compare_1": lambda: quorate("bench", "-m", model, "--prefill", 512, "--decode", 64, "--repeat", 5, "--threads", 1,
                                     "--compare", "llama.cpp"),
        "all": lambda: speeds(bench(model, 512, 64, "--repeat", 5, "--stages")),
        "all_1": lambda: speeds(bench(model, 512, 64, "--repeat", 5, "--threads", 1)),
        "profile": lambda: speeds(bench(model, 512, 1, "--repeat", 5, "--lens", "none,record,profile")),
        "context": lambda: [[n, speeds(bench(model, n, 32, "--repeat", 3))] for n in [32, 256, 1024, 2048, 3840]],
        "kept_half": lambda: speeds(bench(model, 512, 64, "--repeat", 5, *with_task(model, "--memory", half))),
        "kept_quarter": lambda: speeds(bench(model, 512, 64, "--repeat", 5, *with_task(model, "--memory", quarter))),
        "cold": lambda: [speeds(bench(model, 5, 1, "--repeat", 1, "--cold", *with_task(model, "--keep", 16))) for _ in range(5)],
        "stream_half": lambda: speeds(bench(model, 64, 32, *stream(half, "prefetch"))),
        "stream_quarter": lambda: speeds(bench(model, 64, 32, *stream(quarter, "prefetch"))),
        "stream_prefill": lambda: speeds(bench(model, 512, 4, *stream(half, "prefetch"))),
        "embedded": lambda: speeds(quorate("bench", "--prefill", 256, "--decode", 128, "--repeat", 9)),
    }
    if skewed:
        for cache in ["lru", "pinned", "prefetch"]:
            cases[f"skewed_{cache}"] = lambda cache=cache: speeds(bench(skewed, 64, 32, *with_task(skewed, *stream(quarter, cache))))
    for name, case in cases.items():
        if only and name not in only:
            continue
        results[name] = case()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def panel(out, left, top, title, unit, xs, series):
    """A small line chart; `series` are (label, colour, values)."""
    width, height = 300, 170
    most = 1.1 * max(v for _, _, values in series for v in values)
    x = lambda i: left + width * (i + 0.5) / len(xs)
    y = lambda v: top + height * (1 - v / most)
    out.append(f'<text x="{left}" y="{top - 12}" font-weight="bold">{title}</text>')
    for share in [0, 0.25, 0.5, 0.75, 1]:
        v = most * share
        out.append(f'<line x1="{left}" x2="{left + width}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end" fill="#444">{v:.3g}</text>')
    out.append(f'<text x="{left + width}" y="{top - 12}" text-anchor="end" fill="#444">{unit}</text>')
    for i, label in enumerate(xs):
        out.append(f'<text x="{x(i):.1f}" y="{top + height + 16}" text-anchor="middle" fill="#444">{label}</text>')
    for row, (label, colour, values) in enumerate(series):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for i, v in enumerate(values):
            out.append(f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>')
        out.append(f'<text x="{left + 6}" y="{top + height + 34 + 15 * row}" fill="{colour}">{label}</text>')


def draw():
    results = json.loads(RESULTS.read_text())
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 560" font-family="sans-serif" font-size="12">',
           '<rect width="800" height="560" fill="white"/>']
    context = results["context"]
    lengths = [n for n, _ in context]
    panel(out, 60, 40, "Decoding behind a context of N tokens", "tokens/s", lengths,
          [("everything in memory, 2 threads", "#1b7837", [d["decode_tokens_per_s"] for _, d in context])])
    panel(out, 460, 40, "Prompts of N tokens", "tokens/s", lengths,
          [("everything in memory, 2 threads", "#1b7837", [d["prefill_tokens_per_s"] for _, d in context])])
    limits = ["a quarter", "half", "all"]
    kept = [results["kept_quarter"], results["kept_half"], results["all"]]
    streamed = [results["stream_quarter"], results["stream_half"], results["all"]]
    panel(out, 60, 320, "Decoding in less memory than the file", "tokens/s", limits,
          [("kept experts only", "#1b7837", [d["decode_tokens_per_s"] for d in kept]),
           ("all experts, streamed (exact), uniform routing", "#9970ab", [d["decode_tokens_per_s"] for d in streamed])])
    stages = results["all"]["stages"]["decode"]
    out.append('<text x="460" y="308" font-weight="bold">Where the time of a decoded token goes</text>')
    shares = sorted(stages, key=lambda s: -s["share"])[:9]
    for i, stage in enumerate(shares):
        top = 322 + 22 * i
        out.append(f'<rect x="640" y="{top}" width="{140 * stage["share"] / shares[0]["share"]:.1f}" height="14" fill="#5aae61"/>')
        out.append(f'<text x="632" y="{top + 11}" text-anchor="end">{stage["stage"]} {100 * stage["share"]:.0f} %</text>')
    out.append("</svg>")
    PICTURE.write_text("\n".join(out) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--skewed")
    parser.add_argument("--only", type=lambda names: names.split(","))
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if not args.draw:
        measure(args.model, args.skewed, args.only)
    draw()


if __name__ == "__main__":
    main()
