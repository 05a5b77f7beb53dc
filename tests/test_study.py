"""The study's bookkeeping: what it averages, what it compares, and that it does nothing twice."""

import hashlib
import importlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import train_rl
from data import InputError
from support.config import parse
from tiny import demo, study
from tiny.report import TITLES


def row(world, policy, seed, name, accuracy, **more):
    return {"world": world, "policy": policy, "seed": seed, "name": name, "accuracy": accuracy, "n": 200, **more}


ROWS = [
    row("T4", policy, 0, name, accuracy)
    for name, values in {"sft_grpo": (0.2, 0.3, 0.4), "sft_poro": (0.7, 0.9, 0.8)}.items()
    for policy, accuracy in enumerate(values)
] + [row("T4", 3, 0, "sft_poro", 0.6), row("T2 a third left out", 0, 0, "sft_poro", 1.0)]


def test_a_row_is_the_mean_of_its_runs_with_students_interval():
    """Three values one step of .1 apart: deviation .1, and t of two degrees of freedom is 4.30."""
    found = {r["name"]: r for r in study.summary(ROWS)["T4"]}
    assert found["sft_grpo"]["accuracy"] == pytest.approx(0.3)
    assert found["sft_grpo"]["half_interval"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert found["sft_poro"]["runs"] == 4 and found["sft_poro"]["n"] == 800
    assert study.summary(ROWS)["T2 a third left out"][0]["half_interval"] is None  # one run has no interval


def test_only_runs_of_one_policy_and_seed_are_compared():
    assert study.differences(ROWS) == {"T4": [pytest.approx(0.4), pytest.approx(0.5), pytest.approx(0.6)]}


def test_two_or_three_runs_are_printed_instead_of_an_interval_wider_than_the_scale():
    """The 95 % interval of two runs is 12.7 deviations wide: `65 ± 71 %` says less than the runs themselves."""
    assert study.spread([0.9, 0.95]) == "92.5 (90, 95)" and study.spread([0.34, 0.91, 0.62]) == "62.3 (34, 62, 91)"
    half = 3.18 * 12.91 / 2  # Student's t of three degrees of freedom, deviation of 10, 20, 30, 40
    assert study.spread([0.1, 0.2, 0.3, 0.4]) == f"25.0 ± {half:.1f}"
    assert study.spread([0.5]) == "50.0" and study.spread([]) == study.spread(None) == "–"


def test_every_run_of_the_plan_is_known_and_starts_from_one_that_is():
    plan = [part for plan in study.PLANS.values() for part in plan]
    named = {name for _, names, *_ in plan for name in names}
    assert named <= set(study.RUNS) <= set(TITLES) and {world for world, *_ in plan} == set(study.WORLDS)
    assert {before for _, before, _ in study.RUNS.values() if before} <= set(study.RUNS)
    assert not [world for world in study.WORLDS if "," in world]  # --worlds takes them by commas


def test_every_run_s_flags_are_accepted_by_its_script():
    """A flag that went, or a value that is no longer a choice, would end a study hours after it began."""
    for script, _, flags in [*study.RUNS.values(), *demo.RUNS.values()]:
        Config = getattr(importlib.import_module(script), "Config", train_rl.Config)
        options = parse(Config, "", ["--model", "M", "--data", "D", "--out", "O", *demo.COMMON, *flags])
        assert options.max_prompt == 2000
        told = "grpo" if "grpo" in flags else "dapo"  # two rows are about the paper's own loss
        assert script != "train_rl" or options.algorithm == told


def test_what_is_done_is_not_done_again_and_time_ends_it(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    ran = []
    monkeypatch.setattr(study.Study, "run", lambda self, *key: ran.append(key))
    study.column(tmp_path, "base", "T4", 0, 1, ["sft_grpo", "sft_poro"], time.time() + 60)
    assert ran == [("T4", 0, 1, "sft_grpo"), ("T4", 0, 1, "sft_poro")]
    study.column(tmp_path, "base", "T4", 0, 0, ["sft_grpo", "sft_poro"], time.time() + 60)
    assert ran[2:] == [("T4", 0, 0, "in_context"), ("T4", 0, 0, "no_policy")]
    study.column(tmp_path, "base", "T4", 4, 1, ["sft"], time.time() - 1)
    assert len(ran) == 4


def test_a_policy_that_a_plan_names_twice_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch):
    """Both would train the same runs in the same folders, and each row would count twice."""

    def run(self, world, policy, seed, name):
        time.sleep(0.2)
        with open(self.rows, "a") as file:
            file.write(json.dumps(row(world, policy, seed, name, 0.5)) + "\n")

    monkeypatch.setattr(study.Study, "run", run)
    asked = (tmp_path, "base", "T4", 0, 1, ["sft", "sft_grpo"], time.time() + 60)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: study.column(*asked), range(2)))
    assert [made["name"] for made in study.lines_of(tmp_path / "rows.jsonl")] == ["sft", "sft_grpo"]


def test_runs_of_another_base_are_not_taken_up(tmp_path):
    """Their rows would be averaged with those of this one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base.sha1").write_text("of another")
    with pytest.raises(InputError, match="another base"):
        study.main(["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--hours", "1e-6"])


def test_the_tables_and_figures_are_written(tmp_path):
    """Curves make the figure of the halves and the correlations; a row that lacks a figure shows a dash."""
    curves = [
        {
            **row("T4", p, 0, "frozen sampler", 0.5 + p / 10),
            "curve_accuracy": [0.2],
            "curve_accuracy_aware": [0.5 + p / 10],
        }
        for p in range(4)
    ]
    plain = [row("T4", 4, 0, "sft_grpo", 0.9, curve_accuracy=[0.9], curve_accuracy_aware=[0.0])]  # has no such half
    made = {"hardware": "2 cores", "torch": "2", "commit": "abc"}
    readers = [row(world, 0, 0, name, 0.5) for world in study.READERS for name in ("in_context", "sft")]
    wide = [row(study.WIDE, 0, 0, "rlsd", 0.5)]
    study.write(ROWS + curves + plain + readers + wide, tmp_path, made)
    figures = ("study", "study_depths", "study_halves", "field", "readers")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in figures)
    text, kept = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "study.json").read_text())
    assert f"{study.LESS}: +50.0 (40, 50, 60), 3 pairs." in text
    assert "| SFT + PolicyRollout (`sft_poro`) | 100.0 | 1 | 200 |" in text and "commit abc" in text
    assert text.count(study.LOSS) == 3  # once for each table
    assert kept["correlations"] == {"runs": 4, "aware_half": pytest.approx(1), "gap": pytest.approx(1)}
    assert len(kept["rows"]) == len(ROWS) + 12 and kept["worlds"]["T4"][0]["name"] == "sft_grpo"  # in the order of RUNS
    study.main(["--results", str(tmp_path), "--tables"])  # the same from what was kept, with its provenance
    assert (tmp_path / "README.md").read_text() == text and json.loads((tmp_path / "study.json").read_text()) == kept


def test_every_variant_has_a_row_of_its_name():
    """What a file of variants/ claims is held against what we saw; the older ones' rows have names of their own."""
    older = {"bapo", "gdpo", "halves", "noisy", "tis"}
    files = {path.stem for path in (study.ROOT / "variants").glob("*.py")} - {"__init__", *older}
    assert files <= set(study.RUNS) and all(study.RUNS[name][0] == f"variants.{name}" for name in files)


def test_a_stopped_study_says_what_is_missing(tmp_path, capsys):
    """By world, with hours from rows like them; rows of an earlier study stay until they are made again."""
    (tmp_path / "results").mkdir()
    (tmp_path / "out" / "readers").mkdir(parents=True)  # a folder that an earlier call made
    old = [row("T4", 0, 0, "sft", 0.1, seconds=36.0), row("T4", 0, 0, "sft_grpo", 0.1, seconds=72.0)]
    (tmp_path / "results" / "study.json").write_text(json.dumps({"poro_less_grpo": {}, "rows": old}))
    base = hashlib.sha1((study.BASES["clevr"] / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "out" / "base.sha1").write_text(base)
    again = row("T4", 0, 0, "sft", 0.9, seconds=36.0)
    (tmp_path / "out" / "rows.jsonl").write_text(json.dumps(again) + "\n")
    where = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--worlds", "T4", "--missing"]
    study.main([*where, "--policies", "1"])
    said = capsys.readouterr().out
    assert "missing in T4: 4 rows" in said and "in_context; no_policy; sft_grpo; sft_poro" in said
    hours = (72 + 3 * 48) / 7200  # of the row itself; of the others as the mean of its world
    assert f"missing: 4 rows, {hours:.1f} hours" in said
    assert study.merged(old, [again]) == [again, old[1]]


def test_the_readers_nearest_to_each_share_are_kept(tmp_path, monkeypatch):
    shares = {100: 0.05, 200: 0.22, 300: 0.46, 400: 0.52, 500: 0.84}
    for n in shares:
        (tmp_path / "weak" / f"base-{n}").mkdir(parents=True)
        (tmp_path / "weak" / f"base-{n}" / "config.json").write_text(str(n))
    one, asked = study.Study(tmp_path / "out", "base"), []
    monkeypatch.setattr(one, "data", lambda folder, *flags: folder)
    answer = lambda path, *_: asked.append(path.name) or {"accuracy": shares[int(path.name[5:])]}
    monkeypatch.setattr(one, "evaluate", answer)
    for _ in range(2):  # the second time all is there
        study.choose_readers(one, tmp_path / "weak")
    assert len(asked) == 5
    kept = {share: (one.out / "readers" / str(share) / "config.json").read_text() for share in (20, 50, 80)}
    assert kept == {20: "200", 50: "400", 80: "500"}
    other = study.Study(tmp_path / "other", "base")
    monkeypatch.setattr(other, "data", lambda folder, *flags: folder)
    monkeypatch.setattr(other, "evaluate", lambda *_: {"accuracy": 0.05})
    with pytest.raises(InputError, match="expected a base that answers 20 %"):
        study.choose_readers(other, tmp_path / "weak")


def test_a_wrong_picture_calls_for_another_answer(tmp_path):
    """Else a model that ignores the picture could not be told from one that looks."""
    items = [{"policy": "P", "answer": a, "images": [f"{i}.png"]} for i, a in enumerate("AABC")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    found = study.lines_of(tmp_path / study.wrong_pictures(tmp_path))
    shown = [items[int(item["images"][0][0])]["answer"] for item in found]
    assert [item["answer"] for item in found] == list("AABC") and all(a != b for a, b in zip("AABC", shown))


def test_sections_stored_are_counted_apart_where_sft_showed_nothing():
    rows = [
        {"section": s, "likelier": 1.0, "margin": 2.0, "shown": shown, "accuracy": 0.5, "stored": stored}
        for s, shown, stored in (("N1", True, True), ("N2", True, True), ("N3", False, True), ("N4", False, False))
    ]
    found = study.stored(rows)
    assert (found["stored"], found["stored_unseen"]) == (0.75, 0.5) and found["sections"][3][0] == "N4"
    assert study.stored(rows[:2])["stored_unseen"] is None
