"""The demo's report: one HTML file that asks no network for anything, and the same bars as a PNG.

write_report(out, results)      out: the demo's folder; results: what it writes to results.json
fill(path, blocks)              tables in their marked places of a document
provenance()                    what results were made with
"""

import base64
import contextlib
import html
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from data import InputError, write_text

LOSS = (
    "Loss of rows with GRPO or PolicyRollout: DAPO's, the mean over a step's tokens, clipped at 0.2 and 0.28, no KL, "
    "no dynamic sampling unless stated. 8 responses per query, for PolicyRollout 4 + 4 unless stated."
)
OURS = (
    "trimpi: CPT items in response form, CoT-SFT, PolicyRollout 4 + 4 whose policy-aware half the base samples. "
    "trimpi_paper: CPT items with the policy in front, CoT-SFT, PolicyRollout 4 + 4 sampled by the model itself."
)
PAPER = {  # accuracy % at N = 6, text policies, Qwen2.5-VL-7B (arXiv 2510.09474): another model, another size of policy
    "in_context": 13.15,
    "sft": 17.80,
    "cpt_sft": 22.75,
    "sft_grpo": 47.05,  # the paper's GRPO, with its own loss and KL
    "sft_dapo": 67.60,
    "cpt_sft_grpo": 55.90,
    "trimpi_paper": 65.85,  # PoRo-GRPO; its PoRo-DAPO has 77.80
}
GTA = {  # the same for GTAPolicy: mean of tool and argument scores
    "in_context": 21.51,
    "sft": 54.50,
    "cpt_sft": 65.47,
    "sft_dapo": 72.43,
    "cpt_sft_grpo": 79.33,
    "trimpi_paper": 81.06,
}
TITLES = {  # rows of the demo and of the study, in words
    "in_context": "policy in the prompt, untrained",
    "no_policy": "untrained, without the policy",
    "sft": "CoT-SFT",
    "sft_grpo": "SFT + GRPO",
    "sft_poro": "SFT + PolicyRollout",
    "sft_dapo": "SFT + GRPO, dynamic sampling",
    "sft_poro_dapo": "SFT + PolicyRollout, dynamic sampling",
    "cpt": "CPT",
    "cpt_sft": "CPT + SFT",
    "cpt_sft_grpo": "CPT + SFT + GRPO",
    "trimpi_paper": "TriMPI as in the paper",
    "cpt_response": "CPT in response form",
    "cpt_response_sft": "CPT in response form + SFT",
    "cpt_response_sft_grpo": "CPT in response form + SFT + GRPO",
    "trimpi": "TriMPI, our CPT and sampler",
    "poro 7+1": "SFT + PolicyRollout 7 + 1",
    "poro 6+2": "SFT + PolicyRollout 6 + 2",
    "poro 2+6": "SFT + PolicyRollout 2 + 6",
    "statistics apart": "group statistics of the halves apart",
    "standard half only": "gradients from the standard half only",
    "true sampler's ratio": "ratio against the true sampler, truncated",
    "right ones only": "right policy-aware responses only",
    "frozen sampler": "SFT + PolicyRollout, frozen sampler",
    "replay in RL": "SFT + PolicyRollout, replay of other policies",
    "frozen sampler, replay, long": "SFT + PolicyRollout, frozen sampler, replay, 180 steps",
    "trimpi, replay, long": "TriMPI, ours, replay, 180 steps",
    "cpt sections": "CPT on single sections",
    "cpt sections, sft": "CPT on single sections + SFT",
    "cpt sections, sft, poro": "CPT on single sections + SFT + PolicyRollout",
    "cpt documents": "CPT on documents",
    "cpt documents, sft": "CPT on documents + SFT",
    "cpt documents, sft, poro": "CPT on documents + SFT + PolicyRollout",
    "cpt all forms": "CPT on documents, response and paper's form",
    "cpt all forms, sft": "CPT on all three + SFT",
    "cpt all forms, sft, poro": "CPT on all three + SFT + PolicyRollout",
    "cpt half masked": "CPT, half of the picture tokens unmasked",
    "cpt half masked, sft": "CPT, half unmasked + SFT",
    "cpt unmasked": "CPT, all picture tokens unmasked",
    "cpt unmasked, sft": "CPT, all unmasked + SFT",
    "sft, as long as cpt and sft": "SFT, 100 steps",
    "sft, as long, poro": "SFT, 100 steps + PolicyRollout",
    "base, poro": "PolicyRollout from the base, no SFT, 120 steps",
    "cpt, poro": "CPT in response form + PolicyRollout, no SFT",
    "sft on all data": "SFT on chains of all 400 queries, 120 steps",
    "answers only": "SFT on answers only",
    "lora": "SFT with LoRA",
    "policy in the prompt": "SFT with P in the prompt, removed at test",
    "opcd": "OPCD, the sampled token's log-ratio",
    "opcd, all words": "OPCD, KL over all tokens",
    "recall reward": "SFT + GRPO with PA3's recall reward",
    "icpo": "ICPO 7 + 1: right ones only, shaped ratio, bonus",
    "grpo with its kl": "SFT + the paper's GRPO, KL 0.01",
    "poro with grpo's kl": "SFT + PolicyRollout, the paper's GRPO, KL 0.01",
    "full dapo": "SFT + DAPO, dynamic sampling, overlong penalty",
    "poro, full dapo": "SFT + PolicyRollout, DAPO, dynamic sampling, overlong penalty",
    "grpo, 4 updates": "SFT + GRPO, 4 updates per step",
    "poro, 4 updates": "SFT + PolicyRollout, 4 updates per step",
    "poro 0+8": "SFT + PolicyRollout 0 + 8",
    "negatives not pushed down": "wrong policy-aware responses not pushed down",
    "hdpo": "HDPO: policy-aware ones where all others fail",
    "pidistill": "pi-Distill: policy-aware ones learned given P, too",
    "skill0": "SKILL0: K falls to 0, helpful ones only",
    "which": "the fifth of a step's tokens with the highest entropy",
    "entropy": "true entropy bonus",
    "capo": "CAPO: wrong steps charged by the gold chain",
    "riskpo": "RiskPO, bundles of 4",
    "xrpo": "XRPO: unlikely right ones count more",
    "dual": "dual clip 3, 4 updates",
    "hapo": "HAPO: credit and clip by entropy, 4 updates",
    "lld": "LLDS guard, 4 updates",
    "dcpo": "DCPO: clip by probability, 4 updates",
    "dispo": "DISPO: own clip for wrong ones, 4 updates",
    "hints": "Scaf-GRPO's tiers, 2 + 6",
    "filtered": "right policy-aware responses of the start model, as SFT",
    "filtered, own samples": "the same, sampled by the model itself",
    "iwopd": "IW-OPD: OPCD, early tokens count more",
    "rlsd": "RLSD 8 + 0: tokens weighed by the model that reads P",
    "rlsd 4+4": "RLSD 4 + 4",
    "sdpg": "SDPG 8 + 0: KL to the model that reads P where A > 0",
    "sdpg 4+4": "SDPG 4 + 4",
    "sdpg 4+4, b 1": "SDPG 4 + 4, KL weighed 1",
    "srpo": "SRPO 8 + 0: right by reward, wrong by KL",
    "srpo 4+4": "SRPO 4 + 4",
    "sdpo": "SDPO 8 + 0: taught by a right sibling",
    "sdpo 4+4": "SDPO 4 + 4",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 62rem }
body { color: #1c2430; background: #fff }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
svg { width: 100%; height: auto; display: block } .bars { max-width: 40rem }
svg text { font: 13px system-ui, sans-serif; fill: #1c2430 }
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
    describe = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
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
    aside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        figure.savefig(aside, dpi=dpi, format=Path(path).suffix[1:])
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
        plotting().close(figure)


def lines_of(path):
    """The rows of a JSONL file; what a kill left of one, or a bad disk made of it, is no row."""
    rows = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def markdown_table(head, lines):
    """A table: a heading, then a list of cells for each line."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def fill(path, blocks):
    """Write each {name: text} between <!-- name --> and <!-- /name --> of a document, made if it is missing."""
    path = Path(path)
    text = path.read_text() if path.exists() else "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in blocks)
    for name, block in blocks.items():
        first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise InputError(f"{path}: found no place for table {name!r}, expected one {first.strip()} ... {last}")
        text = text[: text.index(first) + len(first)] + f"\n{block}\n\n" + text[text.index(last) :]
    write_text(path, text)


def demo_table(results):
    """README's table of the demo."""
    lines = []
    for row in results["rows"]:
        low, high = (round(100 * bound) for bound in row["interval"])
        sides = [row[side]["accuracy"] for side in ("seen", "unseen")]
        shares = ["–" if share is None else f"{100 * share:.0f}" for share in (*sides, row["exact_chain"])]
        title = f"{TITLES[row['name']]} (`{row['name']}`)"
        lines.append([title, f"{100 * row['accuracy']:.1f} ({low}–{high})", *shares, PAPER.get(row["name"], "–")])
    head = ["", f"accuracy % (95 %), n = {results['rows'][0]['n']}", "paths SFT showed", "never shown"]
    return markdown_table([*head, "exact chains", "paper, 7B, N = 6"], lines) + f"\n\n{LOSS}"


def bars(rows, paper):
    """Accuracy with its interval as SVG: all paths, and beneath them the paths with sections that SFT never showed."""
    left, right, step = 18, 432, 54
    x, high = lambda share: left + share * (right - left), step * len(rows)
    out = [f'<svg class="bars" viewBox="0 0 480 {high + 28}" role="img" aria-label="accuracy of every row">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="4" y2="{high + 4}" stroke="#e6eaf0"/>')
        out.append(f'<text x="{x(tick)}" y="{high + 20}" text-anchor="middle">{tick:.2f}</text>')
    for k, row in enumerate(rows):
        y, ends, accuracy = k * step + 18, [x(end) for end in row["interval"]], row["accuracy"]
        bar = lambda top, share, height, fill: (
            f'<rect x="{left}" y="{top}" width="{x(share) - left}" height="{height}" fill="{fill}"/>'
        )
        out.append(f'<text x="{left}" y="{y - 4}">{TITLES[row["name"]]}</text>{bar(y, accuracy, 18, BLUE)}')
        out.append(f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{y + 9}" y2="{y + 9}" stroke="{INK}" stroke-width="1.5"/>')
        unseen = (row.get("unseen") or {}).get("accuracy")
        out.append("" if unseen is None else bar(y + 19, unseen, 8, PALE))
        if row["name"] in paper:
            at = f'cx="{x(paper[row["name"]] / 100)}" cy="{y + 9}"'
            out.append(f'<circle {at} r="4.5" fill="#fff" stroke="{RED}" stroke-width="2.5"/>')
        out.append(f'<text x="{right + 8}" y="{y + 14}">{accuracy:.2f}</text>')
    return "\n".join([*out, "</svg>"])


def curve(title, rows):
    """Share of right responses over the steps of one RL run, standard and policy-aware halves, as SVG."""
    width, height = 270, 120
    out = [
        f'<svg viewBox="0 0 300 162" role="img" aria-label="{title}: right responses over training">',
        f'<text x="18" y="14">{title}</text>',
        f'<rect x="18" y="20" width="{width}" height="{height}" fill="none" stroke="#dde3ea"/>',
        f'<text x="12" y="30" text-anchor="end">1</text><text x="12" y="{20 + height}" text-anchor="end">0</text>',
        f'<text x="{18 + width}" y="{36 + height}" text-anchor="end">step {len(rows)}</text>',
    ]
    for key, color in (("accuracy", BLUE), ("accuracy_aware", RED)):
        values = [row.get(key, 0) for row in rows]
        if any(values):
            means = [np.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            across = width / max(1, len(means) - 1)
            points = " ".join(f"{18 + across * i:.1f},{20 + height * (1 - v):.1f}" for i, v in enumerate(means))
            out.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    return "".join([*out, "</svg>"])


def cases(out, results, count=4):
    """Some test queries with every row's response and the chain that it should have had, unseen sections first."""
    items = {item["id"]: item for item in lines_of(out / "data" / "test.jsonl")}
    names = [row["name"] for row in results["rows"]]
    answers = {name: {r["id"]: r for r in lines_of(out / "eval" / f"{name}.jsonl")} for name in names}
    first, code = next(iter(answers.values())), lambda text: f"<br><code>{html.escape(text)}</code>"
    order = sorted(first, key=lambda key: (bool(first[key].get("seen", True)), key))
    parts = []
    for key in dict.fromkeys(order[: count // 2] + order[-(count - count // 2) :]):
        item = items[key]
        encoded = [base64.b64encode((out / "data" / name).read_bytes()).decode() for name in item["images"]]
        kind = "a section that SFT never showed" if not first[key].get("seen", True) else "sections that SFT showed"
        said = [f"{turn['role']}: {turn['content']}" for turn in item.get("messages", [])]  # the dialogue so far
        lines = ["<div>", *[code(turn) for turn in said], "<br>" * bool(said)]
        lines.append(f"<b>{html.escape(item['answer'])}</b> <small>{kind}</small>{code(item['cot'])}")
        for name, responses in answers.items():
            text, mark = responses[key]["response"], "right" if responses[key]["correct"] else "wrong"
            text = text if len(text) < 400 else text[:380] + " …"
            lines.append(f'<p><small>{TITLES[name]}: <span class="{mark}">{mark}</span></small>{code(text)}</p>')
        shown = "".join(f'<img alt="test picture" src="data:image/png;base64,{picture}">' for picture in encoded)
        parts.append(f'<section class="case">{shown}{"".join(lines)}</div></section>')
    return "\n".join(parts)


def table(rows, figures):
    heads = ("", "accuracy", "95 % interval", "paths SFT showed", "never shown", "exact chains", "n", "paper")
    share, lines = lambda x: "–" if x is None else f"{x:.3f}", []
    for row in rows:
        sides = [share((row.get(side) or {}).get("accuracy")) for side in ("seen", "unseen")]
        interval, paper = " – ".join(map(share, row["interval"])), figures.get(row["name"])
        cells = [TITLES[row["name"]], share(row["accuracy"]), interval, *sides, f"{row['exact_chain']:.2f}", row["n"]]
        lines.append([*cells, share(paper and paper / 100)])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{body}</table></div>'


def write_report(out, results):
    """Write report.html and, where matplotlib is installed, report.png into the demo's folder."""
    out, rows = Path(out), results["rows"]
    rl = {TITLES[row["name"]]: lines_of(out / row["name"] / "metrics.jsonl") for row in rows}
    rl = {title: metrics for title, metrics in rl.items() if metrics and "reward" in metrics[0]}
    names = ("seed", "policy", "seconds", "hardware", "torch", "commit", "text")
    safe = {name: html.escape(str(results[name])) for name in names}
    size = f"{results['tools']} tools" if "tools" in results else f"{results['depth']} layers"
    unseen = "turns of dialogues" if "tools" in results else "pictures"
    paper, theirs = (GTA, "GTAPolicy") if "tools" in results else (PAPER, "its own policies of six layers")
    left_out = html.escape(", ".join(map(str, results["left_out"]))) or "(none)"
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>TriMPI on a tiny base</title><style>{STYLE}</style></head><body>
<h1>TriMPI on a tiny base: one policy, without it in the prompt</h1>
<p>Seed {safe["seed"]}: policy {safe["policy"]} of {size}, {rows[0]["n"]} unseen {unseen}, greedy
answers, {safe["seconds"]} seconds on {safe["hardware"]}, torch {safe["torch"]}, commit {safe["commit"]}. No SFT item
meets the sections {left_out}.</p>
<p><code>{safe["text"]}</code></p>
<h2>Accuracy</h2>{bars(rows, paper)}
<p><small>Bar: all paths, with a 95 % interval. Pale bar: paths with a section that no SFT item met. Circle: the
paper's figure with its own GRPO, for Qwen2.5-VL-7B on {theirs}: not the same task.</small></p>
<p><small>{html.escape(LOSS)}</small></p>
{table(rows, paper)}<p><small>{html.escape(OURS)}</small></p>
<h2>Share of right responses while RL runs</h2>
<div class="curves">{"".join(curve(*run) for run in rl.items())}</div>
<p><small>Blue: responses to the query alone. Red: responses with the policy in the prompt (PolicyRollout's other half).
Mean of five steps.</small></p>
<h2>Queries, the chains they call for, and what each stage said</h2>{cases(out, results)}
</body></html>"""
    write_text(out / "report.html", page)
    draw_demo(rows, out / "report.png", paper, theirs)


def draw_demo(rows, path, paper=PAPER, theirs="six layers"):
    """The demo's rows as bars, as a PNG."""
    if not (pyplot := plotting()):
        return
    figure, axis = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 1))
    place, accuracy = np.arange(len(rows)), np.array([row["accuracy"] for row in rows])
    low, high = np.array([row["interval"] for row in rows]).T
    errors = np.stack([accuracy - low, high - accuracy]).clip(0)
    axis.barh(place, accuracy, 0.5, xerr=errors, color=BLUE, ecolor=INK, label="all paths")
    unseen = [(row.get("unseen") or {}).get("accuracy") or 0 for row in rows]
    axis.barh(place + 0.36, unseen, 0.2, color=PALE, label="paths with a section that SFT never showed")
    theirs_at = [(paper[row["name"]] / 100, k) for k, row in enumerate(rows) if row["name"] in paper]
    axis.plot(*zip(*theirs_at), "o", mfc="white", mec=RED, label=f"the paper, 7B, {theirs}, GRPO")
    axis.set_yticks(place, [TITLES[row["name"]] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("accuracy without the policy in the prompt (first row: with it)")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncol=3, frameon=False)
    keep(figure, path, dpi=150)


def draw_halves(rows, path):
    """What the halves of a group earned while RL ran, mean over the study's runs, a panel for each world, as a PNG.

    rows: of tiny.study, with "curve_accuracy" and, of PolicyRollout, "curve_accuracy_aware": means of ten steps each.
    """
    names = {"sft_grpo": GREY, "sft_poro": BLUE, "frozen sampler": RED, "trimpi": GREEN}
    worlds = sorted({row["world"] for row in rows if row["name"] in names})
    if not worlds or not (pyplot := plotting()):
        return
    high = -(-len(worlds) // 3)
    figure, axes = pyplot.subplots(high, 3, figsize=(11, 2.6 * high + 0.6), squeeze=False, sharey=True)
    for axis in axes.flat[len(worlds) :]:
        axis.axis("off")
    for axis, world in zip(axes.flat, worlds):
        for name, color in names.items():
            found = [row for row in rows if (row["world"], row["name"]) == (world, name)]
            for key, style in (("curve_accuracy", "-"), ("curve_accuracy_aware", "--")):
                curves = [row[key] for row in found if any(row.get(key, ()))]
                if curves:
                    mean = np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)
                    label = f"{TITLES[name]}{', with P' if style == '--' else ''}"
                    axis.plot(10 * np.arange(len(mean)) + 5, mean, style, color=color, label=label)
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
    size = {"figsize": (8, sum(heights) + 0.5), "height_ratios": heights}
    figure, axes = pyplot.subplots(len(worlds), squeeze=False, sharex=True, **size)
    for axis, (world, rows) in zip(axes[:, 0], worlds.items()):
        names = [f"{TITLES[row['name']]} ({row['runs']})" for row in rows]
        place, accuracy = range(len(rows)), [row["accuracy"] for row in rows]
        errors = [row["half_interval"] or 0 if row["runs"] > 3 else 0 for row in rows]
        axis.barh(place, accuracy, 0.65, xerr=errors, color=BLUE, ecolor=INK)
        for k, row in enumerate(rows):
            if 1 < row["runs"] < 4:
                axis.plot(row["each"], [k] * row["runs"], "o", ms=3, mfc="white", mec=INK)
        axis.set_yticks(place, names)
        axis.set_title(world, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    axes[-1, 0].set_xlim(0, 1.02)
    label = "accuracy without P: mean (number of runs), 95 % interval of the mean, or each of two or three runs"
    axes[-1, 0].set_xlabel(label, fontsize=8)
    keep(figure, path)


def draw_depths(worlds, path):
    """The main rows of tiny.study side by side, for each of the worlds {label: rows}, as a PNG: means with their
    intervals, or each of two or three runs."""
    colors = {"sft": "#dfe5ec", "sft_grpo": "#8d9aab", "sft_poro": BLUE}
    colors |= {"cpt_sft_grpo": "#e3b7ae", "trimpi_paper": "#8cc4a3", "trimpi": GREEN}
    worlds = {label: {row["name"]: row for row in rows} for label, rows in worlds.items()}
    worlds = {label: rows for label, rows in worlds.items() if "sft_poro" in rows}
    if not worlds or not (pyplot := plotting()):
        return
    figure, axis = pyplot.subplots(figsize=(11, 4))
    width = 0.8 / len(colors)
    for place, rows in enumerate(worlds.values()):
        for k, (name, color) in enumerate(colors.items()):
            if row := rows.get(name):
                x, few = place + (k - (len(colors) - 1) / 2) * width, row["runs"] < 4
                how = {"color": color, "ecolor": INK, "error_kw": {"elinewidth": 1}, "label": TITLES[name]}
                axis.bar(x, row["accuracy"], width * 0.94, yerr=0 if few else row["half_interval"], **how)
                if few and row["runs"] > 1:
                    axis.plot([x] * row["runs"], row["each"], "o", ms=3, mfc="white", mec=INK)
        if row := rows.get("in_context"):
            label = {"linestyles": "dotted", "label": TITLES["in_context"]}
            axis.hlines(row["accuracy"], place - 0.42, place + 0.42, colors=INK, **label)
    entries = {label: entry for entry, label in zip(*axis.get_legend_handles_labels())}
    below = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    axis.legend(entries.values(), entries.keys(), ncol=4, fontsize=8, frameon=False, **below)
    axis.set_xticks(range(len(worlds)), worlds)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accuracy without the policy in the prompt", fontsize=9)
    keep(figure, path)


def draw_field(worlds, names, path):
    """The methods `names`, a line each, side by side in the worlds {label: rows}, as a PNG: a dot a run, their mean."""
    worlds = {label: {row["name"]: row for row in rows} for label, rows in worlds.items()}
    names = [name for name in names if any(name in rows for rows in worlds.values())]
    if not names or not (pyplot := plotting()):
        return
    size = {"figsize": (4 + 3 * len(worlds), 0.21 * len(names) + 1.2), "sharex": True, "sharey": True}
    figure, axes = pyplot.subplots(1, len(worlds), squeeze=False, **size)
    for axis, (label, rows) in zip(axes[0], worlds.items()):
        for place, name in enumerate(names):
            if row := rows.get(name):
                axis.plot(row["each"], [place] * row["runs"], "o", ms=4, mfc="none", mec=BLUE)
                axis.plot(row["accuracy"], place, "|", ms=11, mew=2, color=INK)
        if row := rows.get("in_context"):
            axis.axvline(row["accuracy"], ls="dotted", color=INK)
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_yticks(range(len(names)), [TITLES[name] for name in names])
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", lw=0.3)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_xlim(-0.02, 1.02)
    axes[0, 0].set_xlabel("accuracy without P: runs, mean; dotted: P in the prompt, untrained", fontsize=8)
    keep(figure, path)


def draw_readers(readers, names, path):
    """How much a method brings into the weights of bases that read policies more or less well, as a PNG.

    readers: the rows of each base's world; names: the methods, a curve each, over the base's accuracy with P.
    """
    readers = [{row["name"]: row for row in rows} for rows in readers]
    readers = sorted(
        (rows for rows in readers if "in_context" in rows), key=lambda rows: rows["in_context"]["accuracy"]
    )
    if len(readers) < 2 or not (pyplot := plotting()):
        return
    figure, axis = pyplot.subplots(figsize=(6, 4.4))
    axis.set_prop_cycle(color=pyplot.get_cmap("tab10").colors)
    for name in names:
        found = [(rows["in_context"]["accuracy"], rows[name]) for rows in readers if name in rows]
        if found:
            (line,) = axis.plot([x for x, _ in found], [row["accuracy"] for _, row in found], label=TITLES[name])
            for x, row in found:
                axis.plot([x] * row["runs"], row["each"], "o", ms=3, mfc="none", mec=line.get_color())
    axis.plot([0, 1], [0, 1], ls="dotted", color=INK, label=TITLES["in_context"])
    axis.set_xlabel("accuracy of the base with the policy in its prompt", fontsize=9)
    axis.set_ylabel("accuracy without it, after training", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    keep(figure, path)
