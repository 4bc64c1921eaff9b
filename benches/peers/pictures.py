"""The results as pictures: bars of ratios, and curves of time."""

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402

# Ours and the peers' colours, apart for every kind of colour vision.
OURS, PEER, TARGET = "#0072b2", "#d55e00", "black"


def ratios(result, path):
    """One bar for each peer that has a target: how many times as fast we are, its spread, and the target."""
    bars = [
        (f"{row['title']} · {peer['name']}", peer)
        for row in result["rows"]
        for peer in row["peers"]
        if peer["target"] and "ratio" in peer
    ]
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.24 * len(bars)))
    for place, (_, peer) in enumerate(bars):
        ratio = peer["ratio"]
        spread = [[ratio - peer["ratio_min"]], [peer["ratio_max"] - ratio]]
        axes.barh(place, ratio, xerr=spread, color=OURS if ratio >= peer["target"] else PEER, ecolor="grey")
        axes.plot([peer["target"]] * 2, [place - 0.4, place + 0.4], color=TARGET, linewidth=2)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times as fast as the peer (bar; grey: lowest and highest round; black: target; orange: missed)")
    save(figure, path)


def growth(result, path):
    """Time against tokens, width, threads and rank."""
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8))
    for axes, curve in zip(panels.flat, result["curves"]):
        for line in curve["lines"]:
            points = [point for point in line["points"] if "ms" in point]
            values = [point["value"] for point in points]
            colour = PEER if line["name"].startswith("PEFT") else OURS
            style = "--" if "bf16" in line["name"] else "-"
            middle, lowest, highest = ([point[key] for point in points] for key in ("ms", "min", "max"))
            axes.plot(values, middle, style, marker="o", markersize=3, color=colour, label=line["name"])
            axes.fill_between(values, lowest, highest, color=colour, alpha=0.15)
        axes.set_title(curve["title"], fontsize=10)
        axes.set_xlabel(curve["axis"])
        axes.set_ylabel("forward and backward, ms")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    save(figure, path)


def save(figure, path):
    figure.tight_layout()
    # Without the date and version that would make every picture a new one.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
