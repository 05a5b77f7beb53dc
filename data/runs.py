"""A run or an evaluation as one HTML page: curves with what they mean, groups of responses side by side.

    python -m data.inspect runs/rl                       a finished run, or one that is under way
    python -m data.inspect runs/rl runs/grpo             two runs in the same curves
    python -m data.inspect runs/eval                     an evaluation: results.json and its responses
    python -m data.inspect runs/rl --live                the same while it runs, on this machine alone

The page (run_page.html with the data in it) is one file and asks no network for anything; `serve` answers on loopback
only.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data import InputError, open_text
from data.rewards import accuracy

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "run_page.html")
LOOPBACK = "127.0.0.1"


def read_lines(path):
    """The objects of a JSONL file that a run may be writing: a torn last line, and what is none, are left out."""
    rows = []
    if os.path.exists(path):
        with open_text(path, errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                rows += [row] if isinstance(row, dict) else []
    return rows


def is_run(folder):
    """Has `folder` what a run or an evaluation writes? A data folder has not."""
    names = ("metrics.jsonl", "results.json")
    return any(os.path.exists(os.path.join(folder, name)) for name in names) and not os.path.exists(
        os.path.join(folder, "policies.json")
    )


def read_run(folder):
    """What the page shows of a folder: {"name", "state", "series" {key: [[step, value]]}, "rows", "groups"}."""
    at = lambda name: os.path.join(folder, name)
    series, steps = {}, 0
    for name, renamed in (
        ("metrics.jsonl", {}),
        ("validation.jsonl", {"accuracy": "validation", "loss": "validation_loss"}),
    ):
        for row in read_lines(at(name)):
            step = row.get("step")
            if not isinstance(step, (int, float)):
                continue
            steps = max(steps, step + 1)
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    series.setdefault(renamed.get(key, key), []).append([step, value])
    rows, groups = evaluation(folder)
    groups = [group(sample) for sample in read_lines(at("samples.jsonl"))] + groups
    ended = any(os.path.isdir(at(name)) for name in ("model", "adapter"))
    state = f"{steps:.0f} steps, {'ended' if ended else 'not ended yet'}" if series else "an evaluation"
    if not (series or rows or groups):
        raise InputError(f"{folder}: found no metrics.jsonl and no results.json with anything in it, expected a run")
    name = os.path.basename(os.path.abspath(folder))
    return {"name": name, "state": state, "series": series, "rows": rows, "groups": [g for g in groups if g]}


def evaluation(folder):
    """Rows of results.json as texts, and the responses of each as groups of one."""
    try:
        with open_text(os.path.join(folder, "results.json")) as file:
            found = json.load(file)["rows"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], []
    rows, groups = [], {}
    for row in found if isinstance(found, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("accuracy"), (int, float)):
            continue
        low, high = row.get("interval") or (0, 1)
        name = str(row.get("name", ""))
        rows.append([name, f"{100 * row['accuracy']:.1f}", f"{100 * low:.0f}-{100 * high:.0f}", str(row.get("n", ""))])
        for record in read_lines(os.path.join(folder, f"{os.path.basename(name)}.jsonl")):
            text, right = str(record.get("response", "")), bool(record.get("correct", 0) == 1)
            said = {"text": text, "right": right, "aware": name == "in_context", "finished": record.get("finished")}
            said |= {"turns": record["turns"]} if isinstance(record.get("turns"), list) else {}
            shown = groups.setdefault(str(record.get("id")), {"responses": [], "split": "", "answer": ""})
            shown |= {
                "id": str(record.get("id")),
                "policy": record.get("policy", ""),
                "answer": str(record.get("answer")),
            }
            shown["responses"].append(said)
    return rows, list(groups.values())


def group(sample):
    """A line of samples.jsonl for the page; None where it is none."""
    responses = sample.get("responses")
    if not isinstance(responses, list) or not all(isinstance(r, dict) and "text" in r for r in responses):
        return None
    item = {"answer": str(sample.get("answer", "")), "boxed": sample.get("boxed", True)}
    for r in responses:
        r.setdefault("right", accuracy(None, str(r["text"]), item) == 1)
    return sample


def as_json(data):
    """JSON that can stand in a page: no NaN, and nothing that looks like a tag."""
    text = json.dumps(finite(data), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value):
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def page(folders):
    """The whole page of one or two runs as HTML; raises InputError for a folder that is none."""
    with open(PAGE, encoding="utf-8") as file:
        return file.read().replace("/*DATA*/", as_json([read_run(folder) for folder in folders]))


def serve(folders, port=0):
    """A server of the page on loopback -> the server, bound; serve_forever() runs it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hosts = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
            what = {
                "/": ("text/html", page),
                "/data.json": ("application/json", lambda f: as_json([read_run(each) for each in f])),
            }
            if self.headers.get("Host") not in hosts or self.path not in what:  # the first: no other site may read it
                return self.send_error(404)
            kind, build = what[self.path]
            try:
                body = build(folders).encode()
            except InputError as error:
                return self.send_error(503, str(error)[:200])
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer((LOOPBACK, port), Handler)
