"""Does a test notice? Each line of MUTATIONS makes one of SOURCES wrong in one small way; a test must then fail.

    python tests/mutations.py [--only TEXT]

Takes a quarter of an hour: every mutation runs the tests of the files that MUTATIONS names in a process of its own, up
to the first that fails (they must pass without any). Which test caught what: benchmarks/results/mutations.md.
"""

import argparse
import importlib.util
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOW = (
    "not compile and not describe and not streams and not peak and not hub_id and not command"  # processes, compilers
)

# Per test file, the one that is tried first: {what is wrong: (what stands in one of SOURCES, what takes its place)}.
SOURCES = {
    name: (ROOT / f"{name.replace('.', '/')}.py").read_text()
    for name in (
        "support.files",
        "support.pictures",
        "support.template",
        "support.layouts",
        "model",
        "data.tools",
        "support.engine",
        "support.dialogue",
        "tiny.tools",
    )
}  # in the order of their imports
MUTATIONS = {}
MUTATIONS["model"] = {
    # config
    "tied heads read at the top level only": (
        "default=False) for section in (raw, nested)]",
        "default=False) for section in (raw,)]",
    ),
    "rope_theta is not read from rope_parameters": (
        'for name in ("mrope_section", "rope_theta") if rope',
        'for name in ("mrope_section",) if rope',
    ),
    # vision tower
    "tanh GELU in the merger": ("nn.GELU()", 'nn.GELU(approximate="tanh")'),
    "vision eps 1e-5": ("(RMSNorm(config.hidden_size, eps=1e-6) for", "(RMSNorm(config.hidden_size, eps=1e-5) for"),
    "merger eps 1e-5": (
        "self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)",
        "self.ln_q = RMSNorm(config.hidden_size, eps=1e-5)",
    ),
    "windows of 8 merged tokens": ("config.patch_size // merge  #", "config.patch_size  #"),
    "windows cut where rows are short": ("x : x + side].ravel()", "x : x + side - 1].ravel()"),
    "full-attention blocks use windows": ("if i in self.config.fullatt_block_indexes:", "if False:"),
    "every block has full attention": ("if i in self.config.fullatt_block_indexes:", "if True:"),
    "full attention across pictures": ("frames.append(frame.ravel())", "frames = [np.arange(start)]"),
    "full attention across frames": (
        "for frame in tokens:\n            frames.append(frame.ravel())",
        "frames.append(tokens.ravel())\n        for frame in tokens:",
    ),
    "merged tokens left in window order": (
        "return self.merger(x).index_select(0, to_pictures)",
        "return self.merger(x)",
    ),
    "window order instead of its inverse": ("back[:: merge**2] // merge**2", "windows.order[:: merge**2] // merge**2"),
    "rows and columns swapped in vision rope": ("np.indices((h, w))", "np.indices((h, w))[::-1].copy()"),
    "vision rope theta 1e6": ("1.0 / 10000.0 **", "1.0 / 1e6 **"),
    "vision rope in bf16": (
        "rotate(qkv[:, :2].float(), cos[:, None, None]",
        "rotate(qkv[:, :2].bfloat16(), cos[:, None, None]",
    ),
    "vision rope positions in picture order": ("angles[order].cos()", "angles.cos()"),
    "heads before q, k, v": ("u (three h c) -> u three h c", "u (h three c) -> u three h c"),
    "layout kept from inference mode": ("with torch.inference_mode(False):", "if True:"),
    # text model
    "rope turns backwards": ("a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
    "gate and up swapped": (
        "F.silu(self.gate_proj(x)) * self.up_proj(x)",
        "F.silu(self.up_proj(x)) * self.gate_proj(x)",
    ),
    "text eps 1e-5": (
        "self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)",
        "self.input_layernorm = RMSNorm(config.hidden_size, 1e-5)",
    ),
    "M-RoPE axes in another order": ("position_ids[i % 3,", "position_ids[(i + 1) % 3,"),
    "M-RoPE sections interleaved": (
        "torch.cat(turning, -1)",
        "position_ids[torch.arange(half) % 3].permute(1, 2, 0)[:, None]",
    ),
    "M-RoPE sections of one size": (
        "enumerate(self.config.mrope_section)",
        "enumerate([half // 3, half // 3, half - 2 * (half // 3)])",
    ),
    "text rope theta fixed": ("self.config.rope_theta**exponent", "1e6**exponent"),
    "text rope in the activation type": (
        "torch.cat(turning, -1).float() * frequency",
        "torch.cat(turning, -1).to(dtype) * frequency.to(dtype)",
    ),
    "kv heads interleaved in decoding": (
        'q = rearrange(q, "b (j r) 1 c -> b j r c", j=J)',
        'q = rearrange(q, "b (r j) 1 c -> b j r c", j=J)',
    ),
    "new tokens see from the start": (".tril(S - T)", ".tril()"),
    "untied head ignored": ("if self.config.tie_word_embeddings else self.lm_head.weight", "if True else None"),
    # positions and masks
    "padding counts in positions": ("advance = (read & ~image).long()", "advance = (~image).long()"),
    "a picture moves on by its height": ("max(h, w) for _, h, w in grids", "h for _, h, w in grids"),
    "a picture moves on by its tokens": ("max(h, w) for _, h, w in grids", "h * w for _, h, w in grids"),
    "positions count patches, not merged tokens": ("grids = [(t, h // merge, w // merge)", "grids = [(t, h, w)"),
    "delta counts padding": ("advance.sum(1) - read.sum(1)", "advance.sum(1) - input_ids.shape[1]"),
    "positions start again after the cache": ("position_ids = position_ids + cache.position", "pass"),
    "left padding is seen": (
        "return causal & read[:, None, None] | itself",
        "return (causal | itself).expand(len(read), 1, -1, -1)",
    ),
    "left padding taken for right": ("read[:, 1:] <= read[:, :-1]", "read[:, 1:] >= read[:, :-1]"),
    "right padding always masked": ("if bool(read.all()) or held == 0 and", "if False and"),
    "padding sees nothing": ("read[:, None, None] | itself", "read[:, None, None]"),
}
MUTATIONS["processor"] = {
    "banker's rounding gone": ("round(height / factor) * factor", "math.floor(height / factor + 0.5) * factor"),
    "shrunk sides rounded up": ("math.floor(side / shrink / factor)", "math.ceil(side / shrink / factor)"),
    "bilinear resize": ("Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR"),
    "patches row by row": ('"(h a p) (w b q) c -> (h w a b) c (p q)"', '"(h a p) (w b q) c -> (h a w b) c (p q)"'),
    "frames before channels": (
        "np.repeat(pixels[:, :, None], self.temporal_patch_size, axis=2)",
        "np.repeat(pixels[:, None], self.temporal_patch_size, axis=1)",
    ),
    "levels over 256": (".astype(np.float32) / 255", ".astype(np.float32) / 256"),
    "transparency on black": ('Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")'),
    "16 bits clipped to 8": (".clip(0, 65535) // 257", ".clip(0, 255)"),
    "EXIF rotation ignored": ("to_rgb(ImageOps.exif_transpose(image))", "to_rgb(image)"),
    "no newline after a turn": ("{said}<|im_end|>\\n", "{said}<|im_end|>"),
    "pictures after the text": (
        "else PICTURE for part in parts)",
        'else PICTURE for part in sorted(parts, key=lambda part: part["type"] == "image"))',
    ),
    "special tokens decoded": ("skip_special_tokens=True", "skip_special_tokens=False"),
}
MUTATIONS["loading"] = {
    "unexpected tensors pass": (
        'faults += [f"unexpected {shown(name)}" for name in found if name not in expected]',
        "pass",
    ),
    "in-library vision names unknown": ('r"^model\\.visual\\.", "visual.", re', 'r"^model\\.vision\\.", "visual.", re'),
    "stale shards stay": ("for name in stale:  #", "for name in []:  #"),
}
MUTATIONS["layouts"] = {
    "nulls hide what stands beside them": (
        "{key: outer if own is None else own}",
        "{key: own if key in inner else outer}",
    ),
    "a default of another class": ('"depth": (int, 32)', '"depth": (int, 24)'),
    "sections may disagree": ("if None not in (outer, own) and outer != own:", "if False:"),
    "eps of the top level where transformers has another": (
        "if nested and key in TEXT and key not in inner",
        "if False",
    ),
    "an index before a single file": (
        'if single := find_file(folder, "model.safetensors"):',
        'if (single := find_file(folder, "model.safetensors")) and not find_file(folder, INDEX):',
    ),
    "a stale type stays": ('own = ("dtype", "torch_dtype", ', 'own = ("torch_dtype", '),
    "links lead anywhere": ("if target.parent not in (home, blobs.resolve()):", "if False:"),
    "a tensor may be there twice": ("if known != (file, name):", "if False:"),
    "the older picture processor wins": ("    if not options:\n", "    if True:\n"),
    "limits in a size are not read": ("given |= {key: value for", "given = {key: value for"),
    "truncation stays on": ("tokenizer.no_truncation()", "pass"),
    "padding stays on": ("tokenizer.no_padding()", "pass"),
    "rows that pad the vocabulary are drawn": (" + sorted(set(range(rows)) - known)", ""),
}
MUTATIONS["template"] = {
    "control tokens in a text are control tokens": ('rf"{START}\\g<0>{END}"', 'r"\\g<0>"'),
    "halves of a control token join": ("return body + END + text[len(body) :] if cut else text", "return text"),
    "the newer template file first": (
        '"processor_config.json", "chat_template.json", "chat_template.jinja"',
        '"processor_config.json", "chat_template.jinja", "chat_template.json"',
    ),
    "every template is taken for the official one": ("if text.strip() == OFFICIAL.strip():", "if True:"),
}
MUTATIONS["dialogue"] = {
    "a call inside a thought is made": ('said = text.rpartition("</think>")[2]', "said = text"),
    "text may follow a call": ("if OPEN in body or not closed or rest.strip():", "if OPEN in body or not closed:"),
    "a call that failed and was mended counts twice": ("if not (wrong and call is not None and call == then)]", "]"),
    "True is a number": ('and (kind == "boolean" or not isinstance(value, bool))', ""),
    "results are learned from": ("mask[place : place + len(read.input_ids)] = False", "pass"),
    "a result moves positions on by its tokens": ("row.position + int(delta[b])", "row.position"),
    "one turn more than the limit": (
        'len(self.turns) // 2 >= getattr(self.environment, "turns", TURNS)',
        'len(self.turns) // 2 > getattr(self.environment, "turns", TURNS)',
    ),
    "a cut dialogue has answered": ("self.answered = False  # unless", "self.answered = True  # unless"),
    "results longer than the room": ("if len(read.input_ids) > room:", "if False:"),
}
MUTATIONS["tools"] = {
    "at the threshold it is still below": (
        "if number < edge:\n                return",
        "if number <= edge:\n                return",
    ),
    "accounts the other way round": ('rule["yes" if held else "no"]', 'rule["no" if held else "yes"]'),
    "what failed is not made again": ('if last[3] == "error":', "if False:"),
    "any picture was described": ("any((g, i) == (f, image) for", "any(g == f for"),
    "arguments of another tool run": ("or not expected_keys(f, given):", "or False:"),
    "picture 0 is the last": ('or given["image"] < 1:', "or False:"),
}
MUTATIONS["lora"] = {
    "an option of tomorrow passes": ("if key not in PLAIN:", "if False:"),
    "an adapter on the head is taken": ('if name in chosen and name != "lm_head"}', "if name in chosen}"),
    "rslora scale as plain": ("(math.sqrt(self.rank) if self.rslora else self.rank)", "self.rank"),
    "alpha of the file ignored": ("layer.alpha, layer.rslora = alpha, rslora", "layer.rslora = rslora"),
    "merging forgets the scale": (
        "self.weight.float() + self.scale * self.lora_B",
        "self.weight.float() + self.lora_B",
    ),
    "unmerging subtracts": (
        "self.weight.data = self.original\n",
        "self.weight.data = (self.weight.float() - self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)\n",
    ),
    "adapter_off forgets merged adapters": (
        'if self.state == "merged":\n',
        'if self.state == "merged" and state != "off":\n',
    ),
}


class FirstFailure:
    """A pytest plugin that keeps the name of the first test that fails."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.name is None:
            self.name = report.nodeid.rpartition("/")[2]

    def pytest_collectreport(self, report):
        if report.failed and self.name is None:
            self.name = f"collecting {report.nodeid.rpartition('/')[2]}"


def first_failure(sources, first):
    """The first test that fails with these sources, or None; in a fork, so that imports are paid once."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (300, 300))  # some mutations could run for ever
        with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory() as folder:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            watch = FirstFailure()
            try:
                for name, source in sources.items():
                    path = Path(folder, f"{name}.py")
                    path.write_text(source)
                    spec = importlib.util.spec_from_file_location(name, path)
                    sys.modules[name] = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(sys.modules[name])
                    if "." in name:  # tests patch it by its path
                        package, _, leaf = name.rpartition(".")
                        setattr(sys.modules[package], leaf, sys.modules[name])
                options = ["-x", "-k", SLOW, "-p", "no:cacheprovider", "--basetemp", str(Path(folder, "tests"))]
                for name in sorted(MUTATIONS, key=lambda name: name != first):
                    if watch.name is None:
                        pytest.main([*options, str(ROOT / "tests" / f"test_{name}.py")], plugins=[watch])
            except Exception as error:
                watch.name = f"importing {path.name}: {error}"
            os.write(writer, (watch.name or "").encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        name = answer.read()
    _, status = os.waitpid(child, 0)
    return name or (None if status == 0 else f"killed by signal {status}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose name contains this (default: all)")
    args = parser.parse_args()
    chosen = [
        (file, name, *edit) for file, edits in MUTATIONS.items() for name, edit in edits.items() if args.only in name
    ]
    for _, name, old, new in chosen:
        places = sum(source.count(old) for source in SOURCES.values())
        assert places == 1, f"{name}: found {places} places in {', '.join(SOURCES)} that say {old!r}, expected 1"
        for source in SOURCES.values():
            compile(source.replace(old, new), name, "exec")  # a test has to notice it, not the parser

    rows, table = [], ROOT / "benchmarks" / "results" / "mutations.md"
    for file, name, old, new in chosen:
        start = time.time()
        test = first_failure({name: source.replace(old, new) for name, source in SOURCES.items()}, file)
        rows.append((name, test))
        print(
            f"{time.time() - start:5.0f} s  {'caught' if test else 'SURVIVED':<9} {name:<45} {test or ''}", flush=True
        )
        if not args.only:  # after every line: the whole takes long
            caught = sum(test is not None for _, test in rows)
            head = "# Mutations of model.py, of the files that it reads with, and of dialogues with tools\n\n"
            head += f"{caught} of {len(rows)} caught; by `python tests/mutations.py`.\n\n"
            head += "| what is wrong | first test that fails |\n|---|---|\n"
            table.write_text(
                head + "".join(f"| {name} | {f'`{test}`' if test else '**none**'} |\n" for name, test in rows)
            )
    survived = [name for name, test in rows if test is None]
    print(f"{len(rows) - len(survived)} of {len(rows)} mutations caught")
    sys.exit(bool(survived))


def warm_up():
    """Import and run once what every fork would have to."""
    import peft  # noqa: F401
    from helpers import batch, oracle, oracle_inputs, question, tiny_checkpoint

    from model import Processor

    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoint(folder)
        inputs = batch(Processor.from_pretrained(folder), [question("?")])
        oracle(folder).generate(**oracle_inputs(inputs), max_new_tokens=1)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import pytest
    import torch

    torch.set_num_threads(1)
    warm_up()
    for name in (*SOURCES, "helpers"):  # each fork imports its own
        sys.modules.pop(name, None)
    main()
