"""Promises about the whole house: what may be imported, how large files may grow, what the documents name."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data", "kernels", "support", "tiny", "variants", "variants/latent")
RUNTIME = sorted(path for folder in ("", *FOLDERS) for path in (ROOT / folder).glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
PACKAGES = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "einops", "triton", "tqdm", "huggingface_hub"}
HOUSE = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)
# Only where they are installed and asked for: figures, live metrics, official benchmark files, a learned similarity, a
# checkpoint's own chat template.
OPTIONAL = {"jinja2", "matplotlib", "tensorboard", "wandb", "pyarrow", "bert_score"}
NAMED = "README.md CONTRIBUTING.md SECURITY.md data/GTA.md data/OWN.md data/TOOLS.md".split()
FOLDERS_TOLD = ("data", "results", "benchmarks", "tiny/base", "tiny/tools_base", "variants/latent")
DOCUMENTS = [ROOT / name for name in [*NAMED, *(f"{folder}/README.md" for folder in FOLDERS_TOLD)]]
per_file = pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(ROOT)))

# A file may import what stands on its own level or below.
LEVELS = (
    ("data", "kernels", *(f"support.{name}" for name in ("files", "layouts", "pictures", "sandbox", "template"))),
    ("model",),
    ("support",),
    ("training",),
    ("rollout", "train_sft"),
    ("train_cpt", "train_rl", "evaluate"),
    ("variants", "tiny", "benchmarks"),
)


def imports(path):
    """Dotted names that a file imports, at its top and within functions; not what it runs as a command (__main__)."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def house_imports():
    """{file: files of ours that it imports}, as dotted names."""
    names = {name_of(path): path for path in [*RUNTIME, *BENCHMARKS]}
    return {name: (set(imports(path)) & set(names)) - {name} for name, path in names.items()}


def level(name):
    longest = max(
        (len(place), k) for k, places in enumerate(LEVELS) for place in places if f"{name}.".startswith(f"{place}.")
    )
    return longest[1]


@per_file
def test_runtime_code_imports_only_what_pyproject_promises(path):
    """transformers and peft are oracles of the tests; a user who installs the project must not need them."""
    found = {name.split(".")[0] for name in imports(path)}
    assert not found - set(sys.stdlib_module_names) - PACKAGES - HOUSE - OPTIONAL


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.py")), ids=lambda path: path.name)
def test_data_needs_no_torch(path):
    """Policies and scenes are made on machines without it; data.cot alone samples from a model, and says so."""
    found = {name.split(".")[0] for name in imports(path)}
    allowed = {"rollout", "evaluate", "support"} if path.name == "cot.py" else set()
    assert not (found & (PACKAGES | HOUSE)) - {"data", "numpy", "PIL", "tokenizers", "tqdm"} - allowed


def test_no_file_imports_itself_through_others():
    """Two files that need one another are one file, or hide a third."""
    graph, done = house_imports(), set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_at_most_two_imports_go_up():
    """A reader of the method meets no script in the files below it. Exceptions are few enough to know by heart."""
    up = [
        f"{name} -> {other}" for name, found in house_imports().items() for other in found if level(other) > level(name)
    ]
    assert len(up) <= 2, up


@per_file
def test_no_file_runs_code_from_data(path):
    """eval, exec, pickle and an unguarded torch.load turn a data file or checkpoint into a program."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {"eval", "exec", "pickle.load", "pickle.loads", "os.system"} & {ast.unparse(call.func) for call in calls}
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert all("weights_only=True" in ast.unparse(call) for call in loads)


def test_only_the_kernel_takes_a_log_softmax_over_the_vocabulary():
    """One operation serves the losses of all three stages; sampling has its own, and nothing else does."""
    found = {path.name for path in RUNTIME if re.search(r"log_softmax|cross_entropy\(", path.read_text())}
    assert found <= {
        "logprob.py",
        "engine.py",
        "entropy.py",
        "opcd.py",
        "pretrain.py",
    }  # pretrain: dense labels of patches, not tokens


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, most", [("train_rl.py", 320), ("rollout.py", 330), ("model.py", 930)])
def test_the_files_of_the_method_can_be_read_in_one_sitting(name, most):
    """Whoever adds a feature to them takes something else out."""
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_the_options_of_rl_fit_on_one_screen():
    """Its own, the common ones and the three of the judge; a rival's options belong to its file in variants/."""
    from train_rl import Config

    assert len(dataclasses.fields(Config)) <= 60


def test_the_formatter_is_switched_off_for_tables_only():
    """At most twenty of them in the whole tree, tests included."""
    files = [path for path in [*RUNTIME, *BENCHMARKS, *(ROOT / "tests").glob("*.py")] if path != Path(__file__)]
    found = [path.name for path in files for line in path.read_text().splitlines() if line.endswith("# fmt: skip")]
    assert len(found) <= 20, found


def test_the_readme_is_read_in_one_sitting():
    """What does not fit belongs to the README of its folder."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 2200 and len(text.splitlines()) <= 220


# -- documents ---------------------------------------------------------------------------------------------------------


def definitions(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def anchors(path):
    """GitHub's anchors of a document's headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_place_that_a_document_names_exists(document):
    """The map from paper to code to test is worth nothing when it points at yesterday's names."""
    text = document.read_text()
    places = re.findall(r"`([\w./]+\.py):(\w+)`", text)
    assert len(places) > 20 or document.parent != ROOT or document.name != "README.md"
    exists = lambda file, name: (ROOT / file).exists() and name in definitions(ROOT / file)
    assert not [f"{file}:{name}" for file, name in places if not exists(file, name)]
    for file, anchor in re.findall(r'(?:\]\(|src=")([\w./-]+)(?:#([\w-]+))?[)"]', text):
        assert (document.parent / file).exists(), file
        assert not anchor or anchor in anchors(document.parent / file), anchor


def test_every_file_of_the_tree_in_the_readme_exists():
    """And every script at the root stands in it."""
    tree = (ROOT / "README.md").read_text().partition("## Files")[2].partition("```")[2].partition("```")[0]
    named = re.findall(r"^(\w+(?:\.py|/))", tree, re.M)
    assert not [name for name in named if not (ROOT / name).exists()]
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)
    assert not [name for name in re.findall(r"\b(\w+\.py)\b", tree) if not [*ROOT.rglob(name)]]


def test_every_flag_that_the_readme_names_is_known_to_its_command():
    """A command copied from the README must not end in `unknown flag`."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    wrong = []
    for script, rest in re.findall(r"(?:python|torchrun[^\n`]*?) ((?:variants/)?\w+\.py)((?: [^\n`]*)?)", text):
        source = "".join(
            (ROOT / name).read_text() for name in (script, "support/config.py", "train_rl.py", "support/plan.py")
        )
        for flag in re.findall(r"--([\w-]+)", rest):
            if not re.search(rf"\b{flag.replace('-', '_')}\b|--{flag}\b", source):
                wrong.append(f"{script} --{flag}")
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_english_that_a_native_engineer_writes(document):
    """Calques that stood here once: `given x` was `behind x`, `one per position` was `one a position`."""
    calques = r"behind (?:x|a yes|a no|the policy)\b|a matter a|one a position|the first so many|stays one\b"
    calques += r"|\bbesides\b|\bshall\b|words (?:of|in) a response"
    assert not re.findall(calques, document.read_text(), re.I)
