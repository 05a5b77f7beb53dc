"""The study's bookkeeping: what it averages, what it compares, and that it does nothing twice."""

import json
import time

import pytest

from data import InputError
from tiny import study


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
    mean, half, pairs = study.differences(ROWS)["T4"]
    assert (mean, pairs) == (pytest.approx(0.5), 3) and half == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert "T2 a third left out" not in study.differences(ROWS)


def test_every_run_of_the_plan_is_known_and_starts_from_one_that_is():
    named = {name for _, names, *_ in study.PLAN for name in names}
    assert named <= set(study.RUNS) and {world for world, *_ in study.PLAN} == set(study.WORLDS)
    assert {before for _, before, _ in study.RUNS.values() if before} <= set(study.RUNS)


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
        row(
            "T4",
            p,
            0,
            "frozen sampler",
            0.5 + p / 10,
            curve_accuracy=[0.2, 0.3],
            curve_accuracy_aware=[0.5 + p / 10, 0.8],
        )
        for p in range(4)
    ]
    plain = [row("T4", 4, 0, "sft_grpo", 0.9, curve_accuracy=[0.9], curve_accuracy_aware=[0.0])]  # has no such half
    study.write(ROWS + curves + plain, tmp_path)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("study", "study_depths", "study_halves"))
    text, kept = (tmp_path / "study.md").read_text(), json.loads((tmp_path / "study.json").read_text())
    assert "| T4 | +0.500 | 0.248 | 3 |" in text and "| sft_poro | 1.000 | – |" in text
    assert (
        kept["correlations"] == {"runs": 4, "aware_half": pytest.approx(1), "gap": pytest.approx(1)}
        and len(kept["rows"]) == len(ROWS) + 5
    )
    assert kept["worlds"]["T4"][0]["name"] == "sft_grpo"  # in the order of RUNS
