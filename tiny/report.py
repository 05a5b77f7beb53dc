"""The demo's report: one HTML file that asks no network for anything, and the same bars as a PNG.

write_report(out, results)      out: the demo's folder; results: what it writes to results.json
provenance()                    what results were made with
"""

import base64
import html
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

PAPER = {  # accuracy % at N = 6, text policies, Qwen2.5-VL-7B (arXiv 2510.09474): another model, another size of policy
    "in_context": 13.15,
    "sft": 17.80,
    "cpt_sft": 22.75,
    "sft_grpo": 47.05,
    "cpt_sft_grpo": 55.90,
    "trimpi": 65.85,
}
TITLES = {
    "in_context": "policy in the prompt, untrained",
    "no_policy": "untrained, without the policy",
    "sft": "CoT-SFT",
    "cpt_sft": "CPT + SFT",
    "sft_grpo": "SFT + GRPO",
    "sft_poro": "SFT + PolicyRollout",
    "cpt_sft_grpo": "CPT + SFT + GRPO",
    "trimpi": "TriMPI (our CPT and sampler)",
    "trimpi_paper": "TriMPI (as in the paper)",
    "sft_dapo": "SFT + DAPO",
    "sft_poro_dapo": "SFT + PoRo-DAPO",
    "cpt": "CPT",
    "cpt_response": "CPT in response form",
    "cpt_response_sft": "CPT in response form + SFT",
    "cpt_response_sft_grpo": "CPT in response form + SFT + GRPO",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 62rem; color: #1c2430; background: #fff }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
svg { width: 100%; height: auto; display: block } .bars { max-width: 40rem } svg text { font: 13px system-ui, sans-serif; fill: #1c2430 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #dde3ea; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
.case { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1rem 0; border-top: 1px solid #dde3ea; padding-top: 1rem }
.case img { width: 168px; height: 168px; image-rendering: auto } .case div { flex: 1 1 18rem; min-width: 0 }
.right { color: #14713d } .wrong { color: #b3261e } small { color: #556273 }
"""
BLUE, PALE, GREY, RED, GREEN, INK = "#2a5bd7", "#9db7f2", "#c3cad4", "#c4462f", "#14713d", "#1c2430"


def cpu_name():
    """The processor's name; its architecture where the system does not tell."""
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def provenance():
    """{"hardware", "torch", "commit"} of results made here and now; "-dirty": with changes that are not committed."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "hardware": f"{os.cpu_count()} cores, {cpu_name()}",
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


def plotting():
    """matplotlib's pyplot for files, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def keep(figure, path, rect=(0, 0, 1, 1), dpi=130):
    """Write a figure, its axes laid out within rect, and let go of it."""
    figure.tight_layout(rect=rect)
    figure.savefig(path, dpi=dpi)
    plotting().close(figure)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def bars(rows):
    """Accuracy with its interval as SVG: all paths, and beneath them the paths with sections that SFT never showed."""
    left, right, step = 18, 432, 54
    x = lambda share: left + share * (right - left)
    out = [
        f'<svg class="bars" viewBox="0 0 480 {step * len(rows) + 28}" role="img" aria-label="accuracy of every row">'
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        out.append(
            f'<line x1="{x(tick)}" x2="{x(tick)}" y1="4" y2="{step * len(rows) + 4}" stroke="#e6eaf0"/>'
            f'<text x="{x(tick)}" y="{step * len(rows) + 20}" text-anchor="middle">{tick:.2f}</text>'
        )
    for k, row in enumerate(rows):
        y, (low, high) = k * step + 18, row["interval"]
        out.append(f'<text x="{left}" y="{y - 4}">{TITLES[row["name"]]}</text>')
        out.append(f'<rect x="{left}" y="{y}" width="{x(row["accuracy"]) - left}" height="18" fill="{BLUE}"/>')
        out.append(
            f'<line x1="{x(low)}" x2="{x(high)}" y1="{y + 9}" y2="{y + 9}" stroke="#1c2430" stroke-width="1.5"/>'
        )
        unseen = row.get("unseen") or {}
        if unseen.get("accuracy") is not None:
            out.append(
                f'<rect x="{left}" y="{y + 19}" width="{x(unseen["accuracy"]) - left}" height="8" fill="{PALE}"/>'
            )
        if row["name"] in PAPER:
            out.append(
                f'<circle cx="{x(PAPER[row["name"]] / 100)}" cy="{y + 9}" r="4.5" fill="#fff" stroke="{RED}" stroke-width="2.5"/>'
            )
        out.append(f'<text x="{right + 8}" y="{y + 14}">{row["accuracy"]:.2f}</text>')
    return "\n".join([*out, "</svg>"])


def curve(title, rows):
    """Share of right responses over the steps of one RL run, standard and policy-aware halves, as SVG."""
    width, height = 270, 120
    out = [
        f'<svg viewBox="0 0 300 162" role="img" aria-label="{title}: right responses over training">'
        f'<text x="18" y="14">{title}</text><rect x="18" y="20" width="{width}" height="{height}" fill="none" stroke="#dde3ea"/>'
        f'<text x="12" y="30" text-anchor="end">1</text><text x="12" y="{20 + height}" text-anchor="end">0</text>'
        f'<text x="{18 + width}" y="{36 + height}" text-anchor="end">step {len(rows)}</text>'
    ]
    for key, color in (("accuracy", BLUE), ("accuracy_aware", RED)):
        values = [row.get(key, 0) for row in rows]
        if any(values):
            values = [
                sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))
            ]
            points = " ".join(
                f"{18 + width * i / max(1, len(values) - 1):.1f},{20 + height * (1 - v):.1f}"
                for i, v in enumerate(values)
            )
            out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    return "".join([*out, "</svg>"])


def cases(out, results, count=4):
    """Some test pictures with every row's response and the path that it should have taken, unseen sections first."""
    items = {item["id"]: item for item in lines_of(out / "data" / "test.jsonl")}
    said = {
        row["name"]: {r["id"]: r for r in lines_of(out / "eval" / f"{row['name']}.jsonl")} for row in results["rows"]
    }
    first = next(iter(said.values()))
    order = sorted(first, key=lambda key: (bool(first[key].get("seen", True)), key))
    chosen = order[: count // 2] + order[-(count - count // 2) :]
    parts = []
    for key in dict.fromkeys(chosen):
        item = items[key]
        picture = base64.b64encode((out / "data" / item["images"][0]).read_bytes()).decode()
        kind = "a section that SFT never showed" if not first[key].get("seen", True) else "sections that SFT showed"
        lines = [
            f"<div><b>{html.escape(item['answer'])}</b> <small>{kind}</small><br><code>{html.escape(item['cot'])}</code>"
        ]
        for name, responses in said.items():
            response = responses[key]
            mark = "right" if response["correct"] else "wrong"
            text = response["response"] if len(response["response"]) < 400 else response["response"][:380] + " …"
            lines.append(
                f'<p><small>{TITLES[name]}: <span class="{mark}">{mark}</span></small><br><code>{html.escape(text)}</code></p>'
            )
        parts.append(
            f'<section class="case"><img alt="test picture" src="data:image/png;base64,{picture}">{"".join(lines)}</div></section>'
        )
    return "\n".join(parts)


def table(rows):
    share = lambda row, side: (
        "–" if not row.get(side) or row[side]["accuracy"] is None else f"{row[side]['accuracy']:.3f}"
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("", "accuracy", "95 % interval", "seen", "unseen", "exact chains", "n", "paper")
    )
    body = "".join(
        f"<tr><td>{TITLES[row['name']]}</td><td>{row['accuracy']:.3f}</td><td>{row['interval'][0]:.3f} – {row['interval'][1]:.3f}</td>"
        f"<td>{share(row, 'seen')}</td><td>{share(row, 'unseen')}</td><td>{row['exact_chain']:.2f}</td><td>{row['n']}</td>"
        f"<td>{format(PAPER[row['name']] / 100, '.3f') if row['name'] in PAPER else '–'}</td></tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def write_report(out, results):
    """Write report.html and, where matplotlib is installed, report.png into the demo's folder."""
    out, rows = Path(out), results["rows"]
    rl = {TITLES[row["name"]]: lines_of(out / row["name"] / "metrics.jsonl") for row in rows}
    rl = {title: metrics for title, metrics in rl.items() if metrics and "reward" in metrics[0]}
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>TriMPI on a tiny base</title><style>{STYLE}</style></head><body>
<h1>TriMPI on a tiny base: one policy, without it in the prompt</h1>
<p>Seed {results["seed"]}: policy {results["policy"]} of {results["depth"]} layers, {rows[0]["n"]} unseen pictures, greedy answers,
{results["seconds"]} seconds on {html.escape(results["hardware"])}, torch {results["torch"]}, commit {results["commit"]}. No SFT item meets the sections {", ".join(results["left_out"]) or "(none)"}.</p>
<p><code>{html.escape(results["text"])}</code></p>
<h2>Accuracy</h2>{bars(rows)}
<p><small>Bar: all paths, with a 95 % interval. Pale bar: paths with a section that no SFT item met. Circle: the paper's figure, for
Qwen2.5-VL-7B on its own policies of six layers; a reference, not the same task. GRPO has 8 responses a query, PolicyRollout 4 + 4.</small></p>
{table(rows)}<p><small>trimpi: {html.escape(results["trimpi"])}.</small></p>
<h2>Share of right responses while RL runs</h2>
<div class="curves">{"".join(curve(*run) for run in rl.items())}</div>
<p><small>Blue: responses to the query alone. Red: responses with the policy in the prompt (PolicyRollout's other half). Mean of five steps.</small></p>
<h2>Pictures, the paths they call for, and what each stage said</h2>{cases(out, results)}
</body></html>"""
    (out / "report.html").write_text(page, encoding="utf-8")
    if not (pyplot := plotting()):
        return
    figure, axis = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 1))
    place = range(len(rows))
    accuracy = [row["accuracy"] for row in rows]
    errors = [
        [max(0, a - row["interval"][0]) for a, row in zip(accuracy, rows)],
        [max(0, row["interval"][1] - a) for a, row in zip(accuracy, rows)],
    ]
    axis.barh(place, accuracy, 0.5, xerr=errors, color=BLUE, ecolor=INK, label="all paths")
    unseen = [(row.get("unseen") or {}).get("accuracy") or 0 for row in rows]
    axis.barh([p + 0.36 for p in place], unseen, 0.2, color=PALE, label="paths with a section that SFT never showed")
    axis.plot(
        [PAPER[r["name"]] / 100 for r in rows if r["name"] in PAPER],
        [k for k, r in enumerate(rows) if r["name"] in PAPER],
        "o",
        mfc="white",
        mec=RED,
        label="the paper, 7B, six layers",
    )
    axis.set_yticks(list(place), [TITLES[row["name"]] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("accuracy without the policy in the prompt (first row: with it)")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncol=3, frameon=False)
    keep(figure, out / "report.png", dpi=150)


def draw_halves(rows, path):
    """What the halves of a group earned while RL ran, mean over the study's runs, a panel for each world, as a PNG.

    rows: of tiny.study, with "curve_accuracy" and, of PolicyRollout, "curve_accuracy_aware": means of ten steps each.
    """
    names = {"sft_grpo": GREY, "sft_poro": BLUE, "frozen sampler": RED, "trimpi": GREEN}
    worlds = sorted({row["world"] for row in rows if row["name"] in names})
    if not worlds or not (pyplot := plotting()):
        return
    figure, axes = pyplot.subplots(
        -(-len(worlds) // 3), 3, figsize=(11, 2.6 * -(-len(worlds) // 3) + 0.6), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(worlds) :]:
        axis.axis("off")
    for axis, world in zip(axes.flat, worlds):
        for name, color in names.items():
            found = [row for row in rows if (row["world"], row["name"]) == (world, name)]
            for key, style in (("curve_accuracy", "-"), ("curve_accuracy_aware", "--")):
                curves = [row[key] for row in found if any(row.get(key, ()))]
                if curves:
                    mean = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
                    axis.plot(
                        10 * np.arange(len(mean)) + 5,
                        mean,
                        style,
                        color=color,
                        label=f"{TITLES.get(name, name)}{', with P' if style == '--' else ''}",
                    )
        axis.set_title(world, loc="left", fontsize=10)
        axis.set_ylim(0, 1.02)
        axis.tick_params(labelsize=8)
    lines = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), ncol=4, fontsize=8, frameon=False, loc="lower center")
    figure.supylabel("share of right responses", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("RL step", fontsize=8)
    keep(figure, path, rect=(0.01, 0.3 / figure.get_figheight() + 0.03, 1, 1))


def draw_study(worlds, path):
    """A panel for each world of tiny.study: mean accuracy of every row and the interval of that mean, as a PNG."""
    if not (pyplot := plotting()):
        return
    heights = [0.3 * len(rows) + 0.6 for rows in worlds.values()]
    figure, axes = pyplot.subplots(
        len(worlds), figsize=(8, sum(heights) + 0.5), height_ratios=heights, squeeze=False, sharex=True
    )
    for axis, (world, rows) in zip(axes[:, 0], worlds.items()):
        names = [f"{TITLES.get(row['name'], row['name'])} ({row['runs']})" for row in rows]
        errors = [row["half_interval"] or 0 for row in rows]
        axis.barh(names, [row["accuracy"] for row in rows], 0.65, xerr=errors, color=BLUE, ecolor=INK)
        axis.set_title(world, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    axes[-1, 0].set_xlim(0, 1.02)
    axes[-1, 0].set_xlabel(
        "accuracy without the policy in the prompt: mean (number of runs), 95 % interval of the mean", fontsize=8
    )
    keep(figure, path)


def draw_depths(worlds, path):
    """The main rows of tiny.study beside each other in each of the worlds {label: rows}, with the intervals of their means, as a PNG."""
    colors = {
        "sft": "#dfe5ec",
        "sft_grpo": "#8d9aab",
        "sft_poro": BLUE,
        "cpt_sft_grpo": "#e3b7ae",
        "trimpi_paper": "#8cc4a3",
        "trimpi": GREEN,
    }
    worlds = {
        label: found for label, rows in worlds.items() if "sft_poro" in (found := {row["name"]: row for row in rows})
    }
    if not worlds or not (pyplot := plotting()):
        return
    figure, axis = pyplot.subplots(figsize=(11, 4))
    width = 0.8 / len(colors)
    for place, rows in enumerate(worlds.values()):
        for k, (name, color) in enumerate(colors.items()):
            if row := rows.get(name):
                axis.bar(
                    place + (k - (len(colors) - 1) / 2) * width,
                    row["accuracy"],
                    width * 0.94,
                    yerr=row["half_interval"] or 0,
                    color=color,
                    ecolor=INK,
                    error_kw={"elinewidth": 1},
                    label=TITLES.get(name, name),
                )
        if row := rows.get("in_context"):
            axis.hlines(
                row["accuracy"], place - 0.42, place + 0.42, colors=INK, linestyles="dotted", label=TITLES["in_context"]
            )
    entries = {label: entry for entry, label in zip(*axis.get_legend_handles_labels())}
    axis.legend(
        entries.values(), entries.keys(), ncol=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    axis.set_xticks(range(len(worlds)), worlds)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accuracy without the policy in the prompt", fontsize=9)
    keep(figure, path)
