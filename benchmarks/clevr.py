"""How fast scenes, pictures and queries are made, on one core: python -m benchmarks.clevr [--out FILE]

Times are CPU seconds of this process, so that neighbours on the machine count less.
"""

import argparse
import time

import numpy as np

from data import check_file, command, write_text
from data.clevr import SceneTable, render, sample_scene
from data.clevr_policy import build_policy, choose, make_items, route, sample_scenes
from data.prose import Prose

SIZES = ((112, 112), (224, 224), (320, 240), (480, 320))


def rate(work, seconds=2.0):
    """Calls of `work` a CPU second, warmed up."""
    work()
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        work()
        count += 1
    return count / (time.process_time() - start)


def cycle(scenes, size):
    rest = iter(scenes * 1000)
    return lambda: render(next(rest), size)


def queries(depth=6, policies=10, each=2000):
    """CPU seconds for the paper's training queries, pictures not counted: scenes, trees, routes, items."""
    start = time.process_time()
    scenes = sample_scenes(0, {"train": policies * each * 6 // 5, "test": 500})["train"]
    drawn = time.process_time() - start
    table, used, count = SceneTable(scenes), np.zeros(len(scenes), int), 0
    weigh = table.take(np.arange(4000))
    for p in range(policies):
        rng = np.random.default_rng([0, p])
        policy = build_policy(rng, depth, "T", weigh)
        answers, leaf = route(policy, table)
        rows = choose(leaf, len(policy["leaves"]), each, rng, used)
        used[rows] += 1
        count += len(make_items(policy, Prose(), table, rows, answers, rng, "train"))
    return count, drawn, time.process_time() - start


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clevr", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    if args.out:
        check_file(args.out, "pictures/s |")
    rng = np.random.default_rng(0)
    lines = ["| pixels | 1-3 objects, pictures/s | 3-10 objects, pictures/s |", "| --- | --- | --- |"]
    few, many = ([sample_scene(rng, objects) for _ in range(60)] for objects in ((1, 3), (3, 10)))
    for size in SIZES:
        lines.append(f"| {size[0]} x {size[1]} | {rate(cycle(few, size)):.0f} | {rate(cycle(many, size)):.0f} |")
    count, drawn, total = queries()
    lines += [
        "",
        f"{count} queries at N = 6: {total:.0f} s, of which {drawn:.0f} s for the scenes; pictures not counted.",
    ]
    print("\n".join(lines))
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    command(main)
