"""The shop of data/OWN.md trained in earnest, on three seeds: python tests/shop.py writes benchmarks/results/shop.md.

A byte-level model of random weights learns from 48 chats by SFT, then by RL with token F1 and, from the same start, by
a judge (a local server that compares with the reference). It answers 96 queries of another draw, without the policy.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import tiny_checkpoint  # noqa: E402

import evaluate  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from data import own, shop  # noqa: E402
from model import load_pretrained  # noqa: E402

PAGE = ROOT / "benchmarks" / "results" / "shop.md"
RUBRIC = "policy {policy} query {query} reference <{reference}> response <{response}>"
SFT = "--full --lr 3e-3 --warmup 10 --steps 120 --batch-size 16 --micro-batch 16"
# No policy-aware half: a model of random weights does not follow a policy that it reads, as train_rl.py warns.
RL = "--lr 1e-4 --steps 30 --batch-size 8 --micro-batch 16 --group-size 8 --policy-rollouts 0 --max-response 80"
QUERIES = 96


class Stub(BaseHTTPRequestHandler):
    """Gives 1 where the response is the reference."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        reference, _, response = asked.rpartition("reference <")[2].rstrip(">").partition("> response <")
        body = {"choices": [{"message": {"content": json.dumps({"score": float(reference == response)})}}]}
        body = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def one(folder, seed, url):
    """{name of a row: (accuracy, n)} of a seed."""
    f = Path(folder)
    shop.main(["--out", f"{f}/shop", "--seed", str(seed)])
    shop.make(f"{f}/other", QUERIES, reasoned=0, seed=1000 + seed)
    for log, out, test in (("shop", "data", 0.1), ("other", "held_out", 0)):
        files = [f"{f}/{log}/chats.jsonl"]
        own.convert(f"{f}/{out}", files, [(f"{f}/shop/POLICY.md", "returns", "user", [])], test=test)
    tiny_checkpoint(f / "M", seed=seed, scale=0.05)
    (f / "rubric.txt").write_text(RUBRIC)

    def accuracy(model, *flags):
        argv = f"--model {model} --data {f}/held_out --split rl.jsonl --out {f}/eval --max-response 80 --device cpu"
        row = evaluate.main([*argv.split(), "--name", "row", *flags])
        return row["accuracy"], row["n"]

    common = f"--model {f}/M --data {f}/data --device cpu --seed {seed}"
    rows = {"policy in the prompt, untrained": accuracy(f"{f}/M", "--policy-in-context")}
    train_sft.main(f"{common} --out {f}/sft {SFT}".split())
    rows["SFT"] = accuracy(f"{f}/sft")
    judge = f"judge=0.9,format=0.1 --judge-url {url} --judge-model stub --judge-rubric {f}/rubric.txt"
    for name, reward in (("token F1", "token_f1=0.9,format=0.1"), ("judge", judge)):
        out = f"{f}/{name.replace(' ', '_')}"
        train_rl.main(f"{common} --init {f}/sft --out {out} {RL} --reward {reward}".split())
        rows[f"SFT + GRPO, {name}"] = accuracy(out)
    return rows


def main():
    began, spent, seeds = time.perf_counter(), time.process_time(), (0, 1, 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = [one(f"{folder}/{seed}", seed, f"http://127.0.0.1:{server.server_port}/v1") for seed in seeds]
        size = sum(p.numel() for p in load_pretrained(f"{folder}/0/M").parameters())
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        server.shutdown()
    wall, cpu = time.perf_counter() - began, time.process_time() - spent
    lines = [
        "# The shop of data/OWN.md, three seeds",
        "",
        f"Accuracy in % on {QUERIES} queries of another draw, without the policy unless stated; {size:,} parameters,",
        f"from random weights; all rows of all seeds in {wall:.0f} s ({cpu:.0f} s of CPU time) on",
        f"{os.cpu_count()} cores. By `python tests/shop.py`.",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "| --- |" + " --- |" * len(seeds),
    ]
    for name in rows[0]:
        lines.append(f"| {name} | " + " | ".join(f"{100 * row[name][0]:.1f}" for row in rows) + " |")
    text = "\n".join([*lines, ""])
    PAGE.write_text(text, encoding="utf-8")
    print(text)
    before = "policy in the prompt, untrained"
    worse = [name for row in rows for name in list(row)[2:] if row[name][0] < row[before][0]]
    sys.exit(f"worse than before training: {', '.join(worse)}" if worse else 0)


if __name__ == "__main__":
    main()
