"""A run as a page: what it wrote is shown, half-written too; no model's words run; it stays on this machine."""

import json
import random
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request

import pytest

from data import InputError
from data.inspect import main
from data.runs import page, read_run, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WORDS = "the goods were opened </script> so <b>they</b> stay \\boxed{Case 3}".split()


def a_run(folder, steps=30, groups=20, seed=0):
    """What train_rl.py writes, and a line that it has not finished yet."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "reward": s / steps, "accuracy": s / steps, "accuracy_aware": 0.9, "kl": 0.01 * s}
        for s in range(steps)
    ]
    rows[3]["kl"] = float("nan")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "rew')
    (folder / "validation.jsonl").write_text(
        '{"step": 0, "without_policy": 0.1, "with_policy": 0.9}\n{"step": 9, "accuracy": 0.5}\n'
    )
    samples = []
    for k in range(groups):
        tokens = [[f" {rng.choice(WORDS)}" for _ in range(30)] for _ in range(8)]
        responses = [
            {
                "text": "".join(words) + ("\\boxed{Case 3}" if (j > 3 if k % 4 == 0 else k % 4 == 1) else ""),
                "aware": j > 3,
                "reward": 0.5,
                "advantage": 0.0 if k % 4 == 1 else rng.gauss(0, 1),
                "finished": k % 5 != 2,
                "tokens": words,
                "moved": [rng.gauss(0, 0.3) for _ in words],
            }
            for j, words in enumerate([[w for w in part if "boxed" not in w] for part in tokens])
        ]
        samples.append({"step": k, "id": f"q{k}", "policy": "P", "answer": "Case 3", "responses": responses})
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def an_evaluation(folder):
    folder.mkdir()
    row = {"name": "no_policy", "accuracy": 0.5, "interval": [0.1, 0.9], "n": 2}
    (folder / "results.json").write_text(json.dumps({"rows": [row, row | {"name": "in_context", "accuracy": 1.0}]}))
    for name in ("no_policy", "in_context"):
        records = [
            {"id": f"t{k}", "policy": "P", "answer": "A", "response": f"\\boxed{{{k}}}", "correct": k} for k in range(2)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def data_in(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL).group(1))


def test_a_run_under_way_is_read_as_far_as_it_is_whole(tmp_path):
    run = read_run(a_run(tmp_path / "rl"))
    assert run["state"] == "30 steps, not ended yet" and len(run["series"]["reward"]) == 30
    assert run["series"]["validation"] == [[9, 0.5]] and run["series"]["with_policy"] == [[0, 0.9]]
    assert [[r["right"] for r in g["responses"]] for g in run["groups"][:2]] == [[False] * 4 + [True] * 4, [True] * 8]
    (tmp_path / "rl" / "model").mkdir()
    assert read_run(tmp_path / "rl")["state"] == "30 steps, ended"


def test_the_page_is_one_file_and_what_a_model_wrote_is_no_markup(tmp_path):
    html = page([a_run(tmp_path / "a"), a_run(tmp_path / "b", seed=1)])
    data = data_in(html)
    assert [run["name"] for run in data] == ["a", "b"] and data[0]["series"]["kl"][3] == [3, None]
    inside = html.partition('id="data">')[2].partition("</script>")[0]
    assert html.count("</script>") == 2 and "they" in inside and "<" not in inside
    assert not re.findall(r"(?:src|href)=|@import|https?://(?!www\.w3\.org)", html)


def test_an_evaluation_shows_its_rows_and_both_halves_of_each_query(tmp_path):
    run = read_run(an_evaluation(tmp_path / "eval"))
    assert run["rows"] == [["no_policy", "50.0", "10-90", "2"], ["in_context", "100.0", "10-90", "2"]]
    assert [(r["aware"], r["right"]) for r in run["groups"][1]["responses"]] == [(False, True), (True, True)]


def test_the_command_knows_a_run_from_a_data_folder(tmp_path, capsys):
    a_run(tmp_path / "rl")
    main([str(tmp_path / "rl")])
    assert "inspect.html" in capsys.readouterr().out and data_in((tmp_path / "rl" / "inspect.html").read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="found no metrics.jsonl and no results.json"):
        main([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="3 folders found"):
        main([str(tmp_path / "rl")] * 3)


def test_live_is_for_this_machine_and_shows_what_is_new(tmp_path):
    folder = a_run(tmp_path / "rl")
    with serve([folder]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        url = f"http://127.0.0.1:{server.server_port}/"
        ask = lambda path, **headers: (
            urllib.request.urlopen(urllib.request.Request(url + path, headers=headers)).read().decode()
        )
        assert data_in(ask(""))[0]["name"] == "rl"
        (folder / "metrics.jsonl").write_text('{"step": 99, "reward": 1}\n')
        assert json.loads(ask("data.json"))[0]["state"] == "100 steps, not ended yet"
        for path, headers in (("../../etc/passwd", {}), ("metrics.jsonl", {}), ("data.json", {"Host": "evil.example"})):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(path, **headers)
        server.shutdown()


PROBE = """<script>
const took = work => {  // the best of three: other processes may run beside
  const each = [...Array(3)].map(() => { const start = performance.now(); work(); return performance.now() - start })
  return Math.min(...each)
}
const plain = () => {  // what 2,000 of the simplest cards cost on this machine
  const box = document.body.appendChild(document.createElement("div")), make = name => document.createElement(name)
  for (let i = 0; i < 2000; i++) box.appendChild(make("details")).innerHTML = "<summary>a card</summary>"
  box.getBoundingClientRect()
  box.remove()
}
const unit = took(plain)
const listed = took(() => { list(); document.body.getBoundingClientRect() }) / unit
const card = document.querySelector(".group")
const filled = took(() => { card.replaceChildren(); fill(card); card.getBoundingClientRect() }) / unit
const show = name => { filter = name; list(); return document.querySelectorAll(".group").length }
document.body.dataset.probe = JSON.stringify({
  unit, listed, filled, counts: Object.keys(FILTERS).map(show),
  wide: document.documentElement.scrollWidth, curves: document.querySelectorAll(".curve").length,
  lines: document.querySelectorAll("polyline").length })
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 400])
def test_thousands_of_groups_are_shown_in_a_browser(tmp_path, width):
    """A list of thousands is there at once, a card is filled in a frame or two, nothing is wider than the window."""
    html = page([a_run(tmp_path / "a", 300, 1000), a_run(tmp_path / "b", 300, 1000, seed=1)])
    (tmp_path / "p.html").write_text(html.replace("</body>", PROBE + "</body>"))
    flags = f"--headless=new --no-sandbox --disable-gpu --window-size={width},900 --dump-dom file://{tmp_path}/p.html"
    dom = subprocess.run([CHROMIUM, *flags.split()], capture_output=True, text=True, timeout=400).stdout
    found = json.loads(re.search(r'data-probe="(.*?)"', dom).group(1).replace("&quot;", '"'))
    assert found["listed"] < 1 and found["filled"] < 1, found
    assert found["counts"] == [2000, 500, 400, 500, 1000, 0]  # all, dead, cut, aware right, all wrong, failed calls
    assert found["wide"] <= max(width, 500) and found["curves"] == 4 and found["lines"] >= 10
