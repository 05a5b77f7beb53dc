"""data/OWN.md, from a policy in Markdown to an answer: every command is run, and what the page shows is what comes."""

import contextlib
import io
import json
import re
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import tiny_checkpoint
from small import ROOT

import data.check
import data.inspect
import data.own
import data.shop
import evaluate
import model
import support.chat
import train_cpt
import train_rl
import train_sft
from data.dataset import load_items, load_policies

PAGE = (ROOT / "data" / "OWN.md").read_text()
TRAIN = "--steps 2 --batch-size 4 --micro-batch 4 --device cpu"
EXTRA = {  # a throw-away run in place of a real one
    "train_cpt": TRAIN,
    "train_sft": TRAIN + " --overwrite",
    "train_rl": "--steps 1 --batch-size 2 --device cpu --group-size 2 --policy-rollouts 1 --max-response 12 --check 2",
    "evaluate": "--device cpu --max-response 12 --limit 2",
}
load = model.Processor.from_pretrained
MAIN = {
    "data.shop": data.shop.main,
    "data.own": lambda argv: data.own.main(argv, load),
    "data.check": lambda argv: data.check.main(argv, load),
    "data.inspect": data.inspect.main,
    "train_cpt": train_cpt.main,
    "train_sft": train_sft.main,
    "train_rl": train_rl.main,
    "evaluate": evaluate.main,
}


def commands():
    """[(what it reads from standard input, module, argv)] of the page's bash blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            told, _, line = line.rpartition("| ") if line.startswith("echo") else ("", "", line)
            words = shlex.split(line, comments=True)
            name = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
            found.append((" ".join(shlex.split(told)[1:]), name, words[3 if words[1] == "-m" else 2 :]))
    return found


@pytest.fixture(scope="module")
def judge():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"choices": [{"message": {"content": '{"score": 0.5}'}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture(scope="module")
def said(tmp_path_factory, judge):
    """What each command of the page printed, run one after another in a folder of their own: [(module, argv, text)]."""
    folder, out = tmp_path_factory.mktemp("shop"), []
    tiny_checkpoint(folder / "M")
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else pytest.MonkeyPatch.context() as patch:
        if patch:
            patch.chdir(folder)
        for told, name, argv in commands():
            argv = [judge if word == "http://127.0.0.1:8000/v1" else word for word in argv]
            argv += EXTRA.get(name, "").split()
            with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()):
                if name == "model":
                    answer(told, argv)
                else:
                    MAIN[name](argv)
            out.append((name, argv, text.getvalue()))
    return folder, out


def answer(told, argv):
    before = sys.stdin, sys.argv
    sys.stdin, sys.argv = io.StringIO(told + "\n"), ["model.py", *argv]
    try:
        support.chat.main(model)
    finally:
        sys.stdin, sys.argv = before


def test_every_command_of_the_page_works(said):
    folder, out = said
    assert [name for name, *_ in out].count("train_rl") == 2 and len(out) == 13
    rows = {row["name"]: row for row in json.loads((folder / "runs" / "eval" / "results.json").read_text())["rows"]}
    assert "reward/token_f1" in rows["no_policy"] and rows["in_context"]["n"] == 2
    assert (folder / "runs" / "judged" / "judge.cache").exists()
    assert (folder / "runs" / "sft" / "checkpoints" / "best" / "state.json").exists()


def test_the_table_on_the_page_is_what_is_printed(said):
    shown = re.search(r"<!-- table -->\n```\n(.*?)```", PAGE, re.DOTALL).group(1)
    text = next(text for name, _, text in said[1] if name == "data.own")
    assert text.startswith(f"data_returns:\n{shown}")


def test_the_folder_on_the_page_is_the_one_that_is_there(said):
    tree = re.search(r"```\ndata_returns/\n(.*?)```", PAGE, re.DOTALL).group(1)
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    there = {path.name for path in (said[0] / "data_returns").iterdir()}
    assert there - {"inspect.html", ".made"} == named - {"dropped.txt"} and len(tree.splitlines()) <= 10
    policies = load_policies(said[0] / "data_returns")
    assert {"name", "text", "images", "sections"} <= policies["returns"].keys()
    for split, keys in (("sft", {"id", "policy", "images", "question", "answer", "cot"}), ("rl", {"boxed"})):
        assert keys <= load_items(said[0] / "data_returns", f"{split}.jsonl", policies)[0].keys()


def test_the_lines_of_the_page_are_lines_of_the_tools():
    """A line that nothing prints helps nobody."""
    section = PAGE.partition("## When it does not work")[2].partition("\nLosses")[0]
    lines = re.findall(r"^\| `(.+?)` \|", section, re.M)
    files = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "support").glob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in files))
    assert len(lines) == 6
    assert not [part for line in lines for part in line.split(" ... ") if part not in source]


def test_the_shop_is_drawn_by_its_rules(tmp_path):
    assert data.shop.rule("sealed", 14, "mug") == (1, "refund") and data.shop.rule("sealed", 15, "mug") == (
        2,
        "voucher",
    )
    assert data.shop.rule("opened", 14, "mug") == (3, "voucher") and data.shop.rule("opened", 15, "mug") == (4, "keep")
    assert data.shop.rule("broken", 30, "mug") == (5, "repair") and data.shop.rule("broken", 31, "mug") == (6, "keep")
    assert data.shop.rule("sealed", 1, "gift card") == (7, "keep")
    for name in "ab":
        data.shop.main(["--out", str(tmp_path / name), "--queries", "6"])
    assert (tmp_path / "a" / "chats.jsonl").read_bytes() == (tmp_path / "b" / "chats.jsonl").read_bytes()
