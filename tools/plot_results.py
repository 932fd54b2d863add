"""Draws docs/results.svg from docs/results.json, with nothing but Python's standard library.

    python tools/plot_results.py [docs/results.json docs/results.svg]
"""

import json
import sys

SERIES = [  # source, label, colour
    ("own", "own task's experts", "#1b7837"),
    ("auto", "experts found for each prompt", "#5aae61"),
    ("other", "another task's experts", "#9970ab"),
    ("generalist", "generalist", "#bf812d"),
    ("random", "random experts", "#8c8c8c"),
]
W, H, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 62, 230, 46, 56


def main():
    source = sys.argv[1] if len(sys.argv) > 1 else "docs/results.json"
    target = sys.argv[2] if len(sys.argv) > 2 else "docs/results.svg"
    cells = json.load(open(source))["cells"]
    first = next(c for c in cells if c["source"] == "all")
    cells = [c for c in cells if c["mode"] == first["mode"] and c["scope"] == first["scope"]]
    experts, metric = first["keep"], first["metric"]

    def mean(source, keep):
        wanted = "random" if source == "random" else metric
        values = [
            c["exact_match"] for c in cells
            if c["source"] == source and c["keep"] == keep and c["metric"] == wanted and c["exact_match"] is not None
        ]
        return sum(values) / len(values) if values else None

    keeps = sorted({c["keep"] for c in cells if c["source"] == "own"})
    full = mean("all", experts)
    x = lambda k: LEFT + (W - LEFT - RIGHT) * (k / experts)
    y = lambda v: TOP + (H - TOP - BOTTOM) * (1 - v / 100)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="13">',
        f'<rect width="{W}" height="{H}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">Exact match with few experts '
        f"(mean of 17 tasks, metric {metric})</text>",
    ]
    for v in range(0, 101, 20):
        out.append(f'<line x1="{LEFT}" x2="{W - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end" fill="#444">{v} %</text>')
    for k in [*keeps, experts]:
        out.append(f'<text x="{x(k):.1f}" y="{H - BOTTOM + 18}" text-anchor="middle" fill="#444">{k}</text>')
    middle = (LEFT + W - RIGHT) / 2
    out.append(f'<text x="{middle:.0f}" y="{H - 14}" text-anchor="middle">experts kept of {experts} in each layer</text>')
    out.append(
        f'<line x1="{LEFT}" x2="{W - RIGHT}" y1="{y(full):.1f}" y2="{y(full):.1f}" stroke="#222" stroke-dasharray="4 4"/>'
        f'<text x="{W - RIGHT + 8}" y="{y(full) - 6:.1f}">all experts: {full:.1f}</text>'
    )
    labels = []
    for source, label, colour in SERIES:
        points = [(k, mean(source, k)) for k in keeps]
        points = [(k, v) for k, v in points if v is not None]
        if not points:
            continue
        path = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in [*points, (experts, full)])
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        out.extend(f'<circle cx="{x(k):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour}"/>' for k, v in points)
        quarter = dict(points).get(experts // 4)
        shown = f" ({quarter:.1f} at {experts // 4})" if quarter is not None else ""
        labels.append((label + shown, colour))
    for i, (label, colour) in enumerate(labels):
        top = TOP + 44 + 24 * i
        out.append(f'<rect x="{W - RIGHT + 8}" y="{top - 10}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{W - RIGHT + 26}" y="{top}" font-size="12">{label}</text>')
    out.append("</svg>")
    open(target, "w").write("\n".join(out) + "\n")
    print(target)


main()
