"""The results in words: the tables of performance.md and what is missing."""

import re

import pictures

# What stands before the tables when there is no performance.md yet.
OPENING = "# Performance\n\nMeasured by `benches/peers/compare.py`.\n"


def write(out, result):
    """Puts tables and pictures into `out`; the prose around the tables stays as it is."""
    images = out / "images"
    images.mkdir(exist_ok=True)
    page = out / "performance.md"
    text = page.read_text() if page.exists() else OPENING
    if "rows" in result:
        pictures.ratios(result, images / "performance.png")
        body = [run_of(result), "", *table(result["rows"]), "", "![Ratios](images/performance.png)", ""]
        body += [*missed(result["rows"]), "", *memory_table(result["rows"]), "", *shares(result["rows"])]
        text = between(text, "table", "\n".join(body))
    else:
        pictures.growth(result, images / "performance-growth.png")
        body = [run_of(result), "", "![Growth](images/performance-growth.png)"]
        text = between(text, "curves", "\n".join(body))
    page.write_text(text)


def between(text, name, body):
    """`text` with `body` between the marks of that name, which are added at the end if it has none."""
    begin, end = f"<!-- compare.py: {name} -->", f"<!-- compare.py: end of {name} -->"
    block = f"{begin}\n{body}\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL)


def run_of(result):
    """The machine, the versions and the command."""
    machine = result["machine"]
    versions = {}
    for about in result["workers"].values():
        versions |= about
    names = ("torch", "bitsandbytes", "peft", "transformers")
    peers = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    return (
        f"`{result['command']}`: {machine['processor']} ({', '.join(machine['instructions'])}), "
        f"{machine['threads']} threads on {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; "
        f"burn-peft {versions.get('burn-peft', '')} ({machine['commit']}, features: {machine['features']}), Burn "
        f"{machine['burn']}, {machine['rustc']}; {peers}, Python {machine['python']}. "
        f"Rounds: {result['rounds']}."
    )


def table(rows):
    lines = [
        "| case | ours, ms | against | ms | times as fast | target | |",
        "|---|---:|---|---:|---|---:|---|",
    ]
    for row in rows:
        ours = row["ours"]
        title, time = row["title"], number(ours["ms"]) if "ms" in ours else f"missing: {ours['error']}"
        for peer in row["peers"]:
            lines.append(f"| {title} | {time} | {' | '.join(peer_cells(peer))} |")
            title = time = ""
    return lines


def peer_cells(peer):
    target = f"≥ {peer['target']:g}" if peer["target"] else ""
    name = peer["name"]
    if len(peer.get("ways_ms", {})) > 1:
        name += f" ({peer['case'].split('/')[0]})"
    if "error" in peer:
        return [name, f"missing: {peer['error']}", "", target, ""]
    if "ratio" not in peer:
        return [name, number(peer["ms"]), "", target, ""]
    ratio = f"{peer['ratio']:.2f} ({peer['ratio_min']:.2f}–{peer['ratio_max']:.2f})"
    return [name, number(peer["ms"]), ratio, target, met(peer)]


def met(peer):
    if not peer["target"]:
        return ""
    return "met" if peer["ratio"] >= peer["target"] else "**missed**"


def missed(rows):
    """Every target that is not reached, and every peer that is faster though no target says so."""
    lines = []
    for row in rows:
        for peer in row["peers"]:
            ratio = peer.get("ratio")
            if ratio is not None and ratio < (peer["target"] or 1.0):
                target = f", target {peer['target']:g}" if peer["target"] else ", no target"
                lines.append(f"* {row['title']}, against {peer['name']}: {ratio:.2f}{target}")
    return ["Where a target is missed or a peer is faster:", "", *(lines or ["* nowhere"])]


def shares(rows):
    """Where a train step of the peers spends its time."""
    for row in rows:
        for peer in row["peers"]:
            share = peer.get("outside_products")
            if isinstance(share, float):
                where = f"{row['title']}, {peer['name']}"
                yield f"* {where}: {share:.0%} of the time outside matrix products (torch's profiler)"


def memory_table(rows):
    lines = [
        "Peak resident memory of running, less what was resident before the model was built (in brackets: the peak of",
        "building it); each case in a process of its own. Live bytes by a counting allocator.",
        "",
        "| case | ours, MB | live, MB | against | MB | ours / theirs | target | |",
        "|---|---:|---:|---|---:|---:|---:|---|",
    ]
    for row in rows:
        ours = row["ours"]
        if "memory" not in ours and "memory_error" not in ours:
            continue
        title, mine, live = row["title"], memory(ours), ""
        if "memory" in ours:
            live = megabytes(ours["memory"]["live"])
        if limit := ours["memory_limit"]:
            within = "memory" in ours and ours["memory"]["peak"] <= limit
            cells = ["a limit", megabytes(limit), "", "", "met" if within else "**missed**"]
            lines.append(f"| {title} | {mine} | {live} | {' | '.join(cells)} |")
            title = mine = live = ""
        for peer in row["peers"]:
            if "memory" in peer or "memory_error" in peer:
                lines.append(f"| {title} | {mine} | {live} | {' | '.join(memory_cells(ours, peer))} |")
                title = mine = live = ""
    return lines


def memory_cells(ours, peer):
    target = peer["memory_target"]
    cells = [peer["name"], memory(peer), "", f"≤ {target:g}" if target else "", ""]
    if "memory" in ours and "memory" in peer:
        share = ours["memory"]["peak"] / peer["memory"]["peak"]
        cells[2] = f"{share:.2f}"
        if target:
            cells[4] = "met" if share <= target else "**missed**"
    return cells


def memory(outcome):
    if "memory" not in outcome:
        return f"missing: {outcome.get('memory_error', outcome.get('error'))}"
    measured = outcome["memory"]
    return f"{megabytes(measured['peak'])} ({megabytes(measured['build'])})"


def megabytes(count):
    return f"{count / 1e6:.0f}"


def number(milliseconds):
    """Three significant digits."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def row_lines(row):
    """A row on the terminal."""
    ours = row["ours"]
    yield f"ours {number(ours['ms'])} ms" if "ms" in ours else f"ours missing: {ours['error']}"
    for peer in row["peers"]:
        yield "  ".join(cell for cell in peer_cells(peer) if cell)


def missing(result):
    """What should be there and is not, with the reason."""
    found = []
    for row in result.get("rows", ()):
        for outcome in (row["ours"], *row["peers"]):
            found += [f"{row['title']}: {case}: {error}" for case, error in outcome.get("ways_errors", {}).items()]
            for key in ("error", "memory_error"):
                if key in outcome:
                    found.append(f"{row['title']}: {outcome.get('name', 'ours')}: {outcome[key]}")
    for curve in result.get("curves", ()):
        for line in curve["lines"]:
            for point in line["points"]:
                if "error" in point:
                    found.append(f"{curve['title']}: {line['name']} at {point['value']}: {point['error']}")
    return found
