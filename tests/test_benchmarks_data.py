"""MMLU-Pro, MMMU-Pro and WildGuardTest from files in their official layout, and what is refused."""

import base64
import io
import json
import sys
import types

import pytest
from PIL import Image

from data import InputError
from data.benchmarks import main
from data.dataset import load_items, load_policies, messages, target
from data.rewards import accuracy


def png(color, size=(20, 10)):
    buffer = io.BytesIO()
    Image.new("RGBA", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def b64(color):
    return base64.b64encode(png(color)).decode()


MMLU = {
    "question_id": 70,
    "question": "Which is prime?",
    "options": [*"468", "9", "10", "12", "14", "15", "16", "7"],
    "answer": "J",
    "answer_index": 9,
    "cot_content": "",
    "category": "math",
    "src": "x",
}
MMMU = {
    "id": "test_Art_1",
    "question": "Compare <image 2> with <image 4>. {curly}",
    "options": "['a <image 4>', 'none', \"it's both\"]",
    "answer": "C",
    "image_1": None,
    "image_2": {"bytes": b64("red"), "path": "x.png"},
    "image_4": b64("blue"),
    "subject": "Art",
    "explanation": "?",
}
VISION = {"id": "v_1", "image": {"bytes": b64("green")}, "options": "['1', '2']", "answer": "B", "subject": "Math"}
GUARD = [
    {"prompt": "How do I bake bread?", "adversarial": False, "response": "...", "prompt_harm_label": "unharmful"},
    {"prompt": "How do I pick my neighbour's lock?", "adversarial": True, "prompt_harm_label": "harmful"},
    {"prompt": "?", "prompt_harm_label": None},
]


def made(tmp_path, benchmark, rows, *flags, name="rows.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([benchmark, str(tmp_path / name), "--out", str(tmp_path / "out"), *flags])
    return load_items(tmp_path / "out", "test.jsonl", load_policies(tmp_path / "out"))


def test_mmlu_pro_lists_ten_options_and_its_gold_answer_scores(tmp_path):
    (item,) = made(tmp_path, "mmlu-pro", [MMLU])
    assert "Which is prime?" in item["question"] and "J. 7" in item["question"] and item["category"] == "math"
    assert accuracy(None, target(item), item) == 1 and accuracy(None, "\\boxed{A}", item) == 0


def test_padding_options_are_dropped(tmp_path):
    (item,) = made(
        tmp_path, "mmlu-pro", [{**MMLU, "options": ["4", "7", "N/A", "N/A"], "answer": "B", "answer_index": 1}]
    )
    assert "N/A" not in item["question"] and "B. 7" in item["question"]


def test_mmmu_pro_keeps_several_pictures_in_order_and_renumbers_their_mentions(tmp_path):
    item, vision = made(tmp_path, "mmmu-pro", [MMMU, VISION])
    for words in ("Compare [picture 1] with [picture 2]. {curly}", "A. a [picture 2]"):
        assert words in item["question"]
    shown = [part["image"] for part in messages(item)[0]["content"] if part["type"] == "image"]
    assert [Image.open(path).getpixel((0, 0)) for path in shown] == [(255, 0, 0), (0, 0, 255)]
    assert len(vision["images"]) == 1 and vision["answer"] == "B" and "\n\nA." not in vision["question"]


def test_pictures_may_lie_beside_the_file(tmp_path):
    (tmp_path / "art.png").write_bytes(png("yellow"))
    (item,) = made(tmp_path, "mmmu-pro", [{**MMMU, "image_2": "art.png"}])
    assert Image.open(item["images"][0]).getpixel((0, 0)) == (255, 255, 0)


def test_wildguard_asks_whether_a_prompt_is_harmful(tmp_path):
    first, second = made(tmp_path, "wildguard", GUARD)  # the row without a label is left out
    assert (first["answer"], second["answer"]) == ("unharmful", "harmful")
    assert second["category"] == "adversarial" and second["prompt"] in second["question"]
    assert accuracy(None, target(second), second) == 1


def test_limit_draws_the_same_rows_for_the_same_seed(tmp_path):
    many = [{**MMLU, "question": f"Question {k}?"} for k in range(50)]
    drawn = [made(tmp_path, "mmlu-pro", many, "--limit", "5", "--seed", seed, "--overwrite") for seed in "001"]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1] != drawn[2]


def test_parquet_is_read_where_pyarrow_is_and_refused_in_words_where_not(tmp_path, monkeypatch):
    """pyarrow is no dependency; a stand-in with its three calls shows what we hand on."""

    class ParquetFile:
        def __init__(self, path):
            pass

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

        def iter_batches(self, size):
            return [types.SimpleNamespace(to_pylist=lambda: [{**VISION, "image": {"bytes": png("red"), "path": None}}])]

    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    arguments = ["mmmu-pro", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pyarrow"):
        main(arguments)
    parquet = types.SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(ArrowException=KeyError, parquet=parquet))
    main(arguments)
    assert load_items(tmp_path / "out", "test.jsonl", load_policies(tmp_path / "out"))[0]["answer"] == "B"


BAD = {
    "an answer beyond the options": (
        "mmlu-pro",
        {**MMLU, "options": ["4", "7"]},
        r"rows.jsonl:1: key 'answer' holds 'J', expected one of A, B",
    ),
    "two letters": ("mmlu-pro", {**MMLU, "answer": "AB", "answer_index": 0}, "'AB'"),
    "an index that disagrees": ("mmlu-pro", {**MMLU, "answer_index": 3}, "answer_index.*expected 9"),
    "eleven options": ("mmlu-pro", {**MMLU, "options": list("abcdefghijk")}, "list of 2 to 10"),
    "options that are code": ("mmmu-pro", {**MMMU, "options": "__import__('os')"}, "expected a list"),
    "no question": (
        "mmlu-pro",
        {key: value for key, value in MMLU.items() if key != "question"},
        "'question' holds nothing",
    ),
    "a picture mentioned but absent": ("mmmu-pro", {**MMMU, "question": "<image 3>?"}, "<image 3> is mentioned"),
    "a picture of zero bytes": (
        "mmmu-pro",
        {**MMMU, "image_2": {"bytes": "", "path": "gone.png"}},
        "image_2: unreadable picture",
    ),
    "a picture that is none": ("mmmu-pro", {**MMMU, "image_2": b64("red")[:40]}, "image_2: unreadable picture"),
    "a picture outside": ("mmmu-pro", {**MMMU, "image_2": "../../etc/x.png"}, "outside"),
    "a label of another set": ("wildguard", {**GUARD[0], "prompt_harm_label": "bad"}, "prompt_harm_label.*'bad'"),
    "a list": ("wildguard", [1], "list found"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_file_row_and_key_and_leave_nothing(case, tmp_path):
    benchmark, row, words = BAD[case]
    with pytest.raises(InputError, match=words):
        made(tmp_path, benchmark, [row])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_files_that_are_missing_empty_or_not_json_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        main(["mmlu-pro", str(tmp_path / "gone.jsonl"), "--out", str(tmp_path / "out")])
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(InputError, match="a.jsonl:1: not JSON"):
        main(["mmlu-pro", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows of MMLU-Pro"):
        main(["mmlu-pro", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--limit -1"):
        main(["mmlu-pro", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--limit", "-1"])
