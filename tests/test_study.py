"""The study's bookkeeping: what it averages, what it compares, and that it does nothing twice."""

import importlib
import json
import time

import pytest

from data import InputError
from support.config import parse
from tiny import demo, study


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
    named = {name for _, names, *_ in study.PLAN for name in names}
    assert named <= set(study.RUNS) and {world for world, *_ in study.PLAN} == set(study.WORLDS)
    assert {before for _, before, _ in study.RUNS.values() if before} <= set(study.RUNS)


def test_every_run_s_flags_are_accepted_by_its_script():
    """A flag that went, or a value that is no longer a choice, would end a study hours after it began."""
    for script, _, flags in [*study.RUNS.values(), *demo.RUNS.values()]:
        Config = importlib.import_module(script).Config
        options = parse(Config, "", ["--model", "M", "--data", "D", "--out", "O", *demo.COMMON, *flags])
        assert options.max_prompt == 2000
        assert script != "train_rl" or options.algorithm == "dapo"


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


def test_runs_of_another_base_are_not_taken_up(tmp_path):
    """Their rows would be averaged with those of this one."""
    (tmp_path / "base.sha1").write_text("of another")
    with pytest.raises(InputError, match="another base"):
        study.main(["--out", str(tmp_path), "--results", str(tmp_path / "results"), "--hours", "1e-6"])


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
    study.write(ROWS + curves + plain, tmp_path, made)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("study", "study_depths", "study_halves"))
    text, kept = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "study.json").read_text())
    assert f"{study.LESS}: +50.0 (40, 50, 60), 3 pairs." in text
    assert "| SFT + PolicyRollout (`sft_poro`) | 100.0 | 1 | 200 |" in text and "commit abc" in text
    assert text.count(study.LOSS) == 3  # once for each table
    assert kept["correlations"] == {"runs": 4, "aware_half": pytest.approx(1), "gap": pytest.approx(1)}
    assert len(kept["rows"]) == len(ROWS) + 5 and kept["worlds"]["T4"][0]["name"] == "sft_grpo"  # in the order of RUNS
    study.main(["--results", str(tmp_path), "--tables"])  # the same from what was kept, with its provenance
    assert (tmp_path / "README.md").read_text() == text and json.loads((tmp_path / "study.json").read_text()) == kept
