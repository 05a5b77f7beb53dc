"""How well has the policy been internalised? Accuracy on unseen items, without the policy in the prompt or with it.

    python evaluate.py --model runs/rl --data data/clevr --out runs/eval                        M(Q, I)
    python evaluate.py --model M --data data/clevr --out runs/eval --policy-in-context          M(Q, I, P)

Other data folders ask other things: data.override (a new policy under the old name), data.benchmarks (what was
forgotten), data.gta_policy (tool calls); --recite asks for the policies themselves, --contrast which sections are in
the weights. --model is a checkpoint, a run's folder or one of its checkpoints. Responses are greedy; with
--stock-generation they follow the checkpoint's generation_config.json, as in transformers and vLLM (the hub's has a
repetition_penalty of 1.05). <out>/results.json gets one row (its rows of other names stay), <out>/NAME.jsonl each
response with its verdict. The parser and the scores are those of training: data/rewards.py.
"""

import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import model as qwen
from data import InputError, command, gta_score, rewards
from data import judge as judges
from data.contrast import contrast, table
from data.dataset import load_items, load_policies
from data.referral import branching_error, referral
from data.sections import recitation, recitation_items
from rollout import PolicyRollout
from support import folder
from support.batching import lay_out, token_logprobs
from support.checkpoint import not_finite, to_json, write_json
from support.config import Judge, option, parse, redefault, refuse
from support.dialogue import as_judged
from support.files import read_json
from support.judging import Judging, complaint, load_environment, load_rewards
from support.runs import open_model
from support.stock import generate, read_generation


@dataclass
class Config(Judge):
    """options"""

    model: str = option(
        "", "a folder in the hub's layout, a hub id, a run's folder, or RUN/checkpoints/N", required=True
    )
    adapter: str = option("", "LoRA adapter on top of --model")
    data: str = option("", "folder of policies.json and the .jsonl files", required=True)
    out: str = option("", "folder for results.json and the responses", required=True)
    name: str = option("", "name of the row; empty: no_policy or in_context")
    split: str = option("test.jsonl", "file of the items, inside --data")
    policy_in_context: bool = option(False, "put each item's policy in front of its prompt")
    seen: str = option("", "a .jsonl file of training items: paths that keep to its sections are scored apart")
    recite: bool = option(False, "ask for the text of every section of every policy instead of the items")
    reward: str = option("", "rewards of train_rl.py to report, too; the first one tells right from wrong")
    reward_seconds: float = redefault(Judging, "reward_seconds", 5.0)
    environment: str = redefault(Judging, "environment", "")
    media: str = option("", "folder that pictures may be read from, too")
    contrast: int = option(0, "items per section on which it is held against altered ones; 0: none", least=0)
    limit: int = option(0, "evaluate only this many items from the start; 0: all", least=0)
    max_prompt: int = option(65536, "longest prompt in tokens; a longer one is an error, never cut", least=1)
    max_response: int = option(2048, "longest response in tokens; one that does not end by then is cut", least=1)
    min_pixels: int = option(0, "least area of a picture once it is resized; 0: the checkpoint's own", least=0)
    max_pixels: int = option(0, "largest area (28 x 28 pixels make a token); 0: the checkpoint's own", least=0)
    stock_generation: bool = option(False, "write as the checkpoint's generation_config.json says, not greedily")
    batch: int = option(256, "prompts that are read and answered together; lower it when memory runs out", least=1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto", "of the weights; auto: bfloat16 on GPUs, float32 on CPUs", choices=("auto", "float32", "bfloat16")
    )


VERDICTS = ("format", "exact_chain", "referral", "tool", "arguments", "call", "f1", "follows_old")


def wilson(successes, n, z=1.96):
    """95 % interval [low, high] of a share, after Wilson (1927): right at small n and near 0 and 1, too."""
    if n == 0:
        return [0.0, 1.0]
    share, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n * share * (1 - share) + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def score(records):
    """{"accuracy", "n", "interval"} of records that say whether they are correct."""
    right, n = sum(r["correct"] for r in records), len(records)
    return {"accuracy": right / n if n else None, "n": n, "interval": wilson(right, n)}


def group(records, key):
    groups = defaultdict(list)
    for record in records:
        groups[str(record[key])].append(record)
    return {name: score(members) for name, members in sorted(groups.items())}


def sections(items):
    """{(policy, section)} that the chains of these items go through, of a tree or of other rules."""
    used = lambda item: [step["node"] for step in item.get("path", [])] + item.get("rules", [])
    return {(item["policy"], section) for item in items for section in used(item)}


def respond(model, rollout, items, policy_in_context, stock=None):
    """Greedy responses, or by the settings `stock` -> [(text, its prompt, its own tokens, finished)].

    Of a dialogue, the text of its last turn, the tokens that it has written, and behind `finished` all of its turns.
    """
    if stock:
        policies = [rollout.policy(item)[0] if policy_in_context else None for item in items]
        prompts = [rollout.prompt(item, policy) for item, policy in zip(items, policies)]
        longest = rollout.sampling["max_tokens"]
        answers = [generate(qwen, model, rollout.processor, prompt, stock, longest) for prompt in prompts]
        return [
            (rollout.processor.decode(tokens), prompt, len(tokens), finished)
            for prompt, (tokens, finished) in zip(prompts, answers)
        ]
    found = []
    for prompt, response in rollout.greedy(model, items, policy_in_context):
        (text,), (item,) = as_judged(rollout.processor, [({}, response)])
        found.append((text, prompt, int(response.written.sum()), response.finished, *item.values()))
    return found


def judge(text, item, policy):
    """What a response is worth: {"parsed", "correct", "format"}, and more for the kind of item that it answers."""
    if item.get("kind") == "section":  # recited, without a box
        said = recitation(text, item)
        return {"parsed": text, "correct": said["exact"], "f1": said["f1"]}
    verdict = {
        "parsed": rewards.said(text, item),
        "correct": rewards.accuracy(None, text, item),
        "format": rewards.format(None, text, item),
    }
    if gta_score.read_call(item["answer"]):
        verdict |= gta_score.parts(text, item)
        verdict["correct"] = verdict["exact"]
    if item.get("path"):
        verdict["referral"] = referral(text, item, policy)["score"]
    if item.get("cot"):
        verdict["exact_chain"] = rewards.exact_chain(text, item, policy)
    if "old_answer" in item:  # another policy stands in the prompt under this name: whom does the model follow?
        same = gta_score.exact if "tool" in verdict else rewards.accuracy
        verdict["follows_old"] = same(None, text, {**item, "answer": item["old_answer"]}) * (1 - verdict["correct"])
    return verdict


def evaluate(
    model,
    processor,
    items,
    policies,
    *,
    policy_in_context=False,
    seen=None,
    max_prompt=65536,
    max_response=2048,
    batch=256,
    asked=(),
    progress=False,
    stock=None,
    environment=None,
):
    """Answer every item and judge it -> (row, records).

    seen: {(policy, section)} of the training items (see sections), to score paths inside and outside of it apart.
    asked: [(name, function, weight)] of data.rewards, whose means are reported; the first says what is correct.
    stock: settings of support/stock.py, one prompt at a time; None: greedy.
    environment: of data/tools.py, which makes responses dialogues.
    row: accuracy with its 95 % interval, the mean of every other verdict, the same by depth and by policy, seconds.
    """
    began, records, answered = time.perf_counter(), [], []
    limits = dict(max_prompt=max_prompt, max_tokens=max_response)
    rollout = PolicyRollout(processor, policies, 1, 0, environment=environment, **limits)
    order = sorted(range(len(items)), key=lambda i: items[i]["policy"])  # one policy's items share its prefix
    for start in tqdm(range(0, len(items), batch), desc="evaluate", disable=None if progress else True):
        part = [items[i] for i in order[start : start + batch]]
        answers = respond(model, rollout, part, policy_in_context, stock)
        part = [item | ({"dialogue": answer[4]} if answer[4:] else {}) for item, answer in zip(part, answers)]
        prompts = [processor.decode(prompt.input_ids.tolist()) for _, prompt, *_ in answers] if asked else []
        given = rewards.score(asked, prompts, [text for text, *_ in answers], part) if asked else []
        for k, (item, (text, prompt, length, finished)) in enumerate(zip(part, (answer[:4] for answer in answers))):
            record = {
                "id": item["id"],
                "policy": item["policy"],
                "depth": len(item.get("path", [])),
                "answer": item["answer"],
                **judge(text, item, policies.get(item["policy"])),
                "finished": finished,
                "prompt_tokens": len(prompt.input_ids),
                "tokens": length,
                "response": text,
            }
            if "dialogue" in item:
                record["turns"] = item["dialogue"]
            if asked:
                record["reward"] = {name: x for (name, *_), x in zip(asked, given[k])}
                record["correct"] = float(given[k][0] >= 1)
            if seen is not None:
                record["seen"] = sections([item]) <= seen
            records.append(record)
            answered.append(item)
    row = score(records)
    for key in (*VERDICTS, "finished", "prompt_tokens", "tokens"):
        values = [record[key] for record in records if key in record]
        if values:
            row[key] = sum(values) / len(values)
    for name, *_ in asked:
        values = [record["reward"][name] for record in records if not math.isnan(record["reward"][name])]
        row[f"reward/{name}"] = sum(values) / len(values) if values else None
    if all("cot" in item and item.get("path") for item in answered):
        row |= branching_error([record["response"] for record in records], answered, policies)
    if seen is not None:
        row["seen"], row["unseen"] = (score([r for r in records if r["seen"] is side]) for side in (True, False))
    row |= {"by_depth": group(records, "depth"), "by_policy": group(records, "policy")}
    row["seconds"] = round(time.perf_counter() - began, 2)
    return row, records


@torch.no_grad()
def likelihoods(model, rollout, item, texts):
    """log p of each text as the start of the response to an item, without its policy, [float]."""
    responses = [rollout.processor.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    prompt = rollout.prompt(item)
    batch = lay_out(model, [(prompt, tokens) for tokens in responses], rollout.processor.pad_id)
    logp, _ = token_logprobs(model, batch.to(model.head_weight.device))
    return [float(part.double().sum()) for part in logp.split([len(tokens) for tokens in responses])]


def load(path, adapter="", device="auto", dtype="auto", min_pixels=0, max_pixels=0):
    """-> (model, processor) ready to answer: adapters merged, no gradients."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = {"auto": torch.bfloat16 if device == "cuda" else torch.float32}.get(dtype) or getattr(torch, dtype)
    model, base = open_model(qwen, path, device, dtype, adapter)
    if wrong := not_finite(model):
        raise InputError(f"{path}: found NaN or infinity in {wrong}, expected numbers")
    return model, qwen.Processor.from_pretrained(base, min_pixels, max_pixels)


def earlier_rows(out):
    """The rows that <out>/results.json holds; [] without one."""
    path = Path(out) / "results.json"
    try:
        rows = read_json(path)["rows"] if path.exists() else []
        return [row for row in rows if row["name"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: found no rows, expected the results of earlier evaluations") from None


def check_out(config, name):
    """Raise InputError where --out is what is read, or a file there that no evaluation wrote would be replaced."""
    out = Path(config.out)
    if name != os.path.basename(name) or name.startswith(".") or not name.isprintable() or len(name) > 100:
        raise InputError(f"--name: found {name!r}, expected a plain name of a file")
    folder.keep_apart(out, {f"--{key}": getattr(config, key) for key in ("model", "adapter", "data")})
    rows = earlier_rows(out)  # better refused now than after an hour
    folder.refuse_foreign(out, is_ours=rows)
    if (out / f"{name}.jsonl").exists() and name not in [row["name"] for row in rows]:
        raise InputError(f"{out / name}.jsonl: found a file that no evaluation wrote, expected another --name or --out")


def save(out, row, records):
    """Put the row into <out>/results.json beside the rows of other names, and the records into <out>/NAME.jsonl."""
    out = Path(out)
    lock = folder.lock(out, wait=60)  # evaluations of other names may end at the same moment
    try:
        folder.delete(out, folder.matching(out, ["*.tmp"]))
        write_json(out / "results.json", {"rows": [r for r in earlier_rows(out) if r["name"] != row["name"]] + [row]})
        aside = out / f"{row['name']}.jsonl.{os.getpid()}.tmp"
        aside.write_text("".join(to_json(record) + "\n" for record in records))
        aside.replace(out / f"{row['name']}.jsonl")
    finally:
        folder.unlock(out, lock)


def main(argv=None):
    config = parse(Config, __doc__, argv)
    name = "recitation" if config.recite else "in_context" if config.policy_in_context else "no_policy"
    name = config.name or name
    check_out(config, name)
    refuse(config.environment and config.stock_generation, "--environment", "no --stock-generation beside it")
    policies = load_policies(config.data, config.media)
    asked = load_rewards(config.reward, config.reward_seconds, judges.of(config, policies)) if config.reward else []
    items = (
        recitation_items(policies) if config.recite else load_items(config.data, config.split, policies, config.media)
    )
    items = items[: config.limit or None]
    if not items:
        raise InputError(f"{config.data}: found no policy with sections, expected some to recite")
    path = Path(config.seen)
    seen = sections(load_items(path.parent, path.name, policies, config.media)) if config.seen else None
    limits = config.min_pixels, config.max_pixels
    model, processor = load(config.model, config.adapter, config.device, config.dtype, *limits)
    row, records = evaluate(
        model,
        processor,
        items,
        policies,
        policy_in_context=config.policy_in_context,
        seen=seen,
        max_prompt=config.max_prompt,
        max_response=config.max_response,
        batch=config.batch,
        asked=asked,
        progress=True,
        stock=read_generation(model.source) if config.stock_generation else None,
        environment=load_environment(config.environment, config.reward_seconds),
    )
    if config.contrast:
        rollout = PolicyRollout(processor, policies, 1, 0, max_prompt=config.max_prompt)
        found = contrast(items, policies, lambda *asked: likelihoods(model, rollout, *asked), config.contrast)
        row["sections"] = table(found, records, items, seen)
        print(*row["sections"], sep="\n")
    row = {"name": name, **row, "model": config.model}
    save(config.out, row, records)
    low, high = row["interval"]
    rest = "".join(f"  {key} {row[key]:.3f}" for key in VERDICTS if key in row)
    accuracy = f"accuracy {row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    print(f"{row['name']}: {accuracy}{rest}  n {row['n']}  {row['seconds']:.1f} s")
    if failures := complaint():
        print(f"{row['name']}: rewards that failed, and count as wrong: {failures}")
    return row


if __name__ == "__main__":
    command(main)
