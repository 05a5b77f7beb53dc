"""Promises about the whole house: what may be imported, what the README names, what no file may do."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = sorted(
    [
        *ROOT.glob("*.py"),
        *ROOT.glob("data/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("support/*.py"),
        *ROOT.glob("tiny/*.py"),
    ]
)
PACKAGES = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "einops", "triton", "tqdm", "huggingface_hub"}
HOUSE = {path.stem for path in ROOT.glob("*.py")} | {"data", "kernels", "support", "tiny"}
# Only where they are installed and asked for: figures, live metrics, the official benchmark files, a learned similarity.
OPTIONAL = {"matplotlib", "tensorboard", "wandb", "pyarrow", "bert_score"}


def modules_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(ROOT)))
def test_runtime_code_imports_only_what_pyproject_promises(path):
    """transformers and peft are oracles of the tests; a user who installs the project must not need them."""
    import sys

    unknown = set(modules_imported(path)) - set(sys.stdlib_module_names) - PACKAGES - HOUSE - OPTIONAL
    assert not unknown


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_code_from_data(path):
    """eval, exec, pickle and an unguarded torch.load turn a data file or checkpoint into a program."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {"eval", "exec", "pickle.load", "pickle.loads", "os.system"} & {ast.unparse(call.func) for call in calls}
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert all("weights_only=True" in ast.unparse(call) for call in loads)


def test_only_the_kernel_takes_a_log_softmax_over_the_vocabulary():
    """One operation serves the losses of all three stages; sampling has its own, and nothing else does."""
    found = {path.name for path in RUNTIME if re.search(r"log_softmax|cross_entropy\(", path.read_text())}
    assert found <= {"logprob.py", "rollout.py", "pretrain.py"}  # pretrain: dense labels of patches, not words


def definitions(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_place_that_the_readme_names_exists():
    """The map from paper to code to test is worth nothing when it points at yesterday's names."""
    text = (ROOT / "README.md").read_text()
    places = re.findall(r"`([\w./]+\.py):(\w+)`", text)
    assert len(places) > 20
    wrong = [
        f"{file}:{name}" for file, name in places if not (ROOT / file).exists() or name not in definitions(ROOT / file)
    ]
    assert not wrong
    files = re.findall(r"\]\(([\w./-]+)\)", text)
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_flag_that_the_readme_names_is_known_to_its_command():
    """A command copied from the README must not end in `unknown flag`."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    wrong = []
    for script, rest in re.findall(
        r"(?:python|torchrun[^\n`]*?) (train_\w+\.py|evaluate\.py|model\.py)([^\n`]*)", text
    ):
        source = (ROOT / script).read_text() + (ROOT / "support/config.py").read_text()
        for flag in re.findall(r"--([\w-]+)", rest):
            if not re.search(rf"\b{flag.replace('-', '_')}\b|--{flag}\b", source):
                wrong.append(f"{script} --{flag}")
    assert not wrong
