"""A serving engine that extras/engines.py compares with this sampler, in a process of its own.

    ENGINE_PYTHON extras/engine_worker.py vllm|openvino SETTINGS

runs under the python of the engine's environment, so it imports nothing but that engine. SETTINGS
is JSON: {"target": DIR, "draft": DIR or null, "gamma": 5, "max_new_tokens": 64, "ends": [0]}. It
decodes greedily in float32 (draft null: the target alone). Ready, it writes the line {"version"};
then it reads lines, each a list of prompts (token ids), and answers each with a line: for every
prompt {"tokens", "seconds"} and, with a draft, what the engine itself counted, "counts": [target
calls, drafted, accepted, accepted by draft position], and "drafting": [draft steps, seconds].
"""

import json
import os
import sys
import time


def vllm(target, draft, gamma, max_new_tokens, ends):
    # the engine in this process, where its drafting can be clocked
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as many threads as OMP_NUM_THREADS says
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    import vllm
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    drafting, propose = [0, 0.0], DraftModelProposer.propose

    def clocked(*args, **kwargs):
        start = time.perf_counter()
        output = propose(*args, **kwargs)
        drafting[0] += gamma
        drafting[1] += time.perf_counter() - start
        return output

    DraftModelProposer.propose = clocked
    options = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    if draft:
        options["speculative_config"] = {"model": draft, "num_speculative_tokens": gamma}
    llm = vllm.LLM(target, disable_log_stats=False, max_num_seqs=1, **options)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=max_new_tokens, stop_token_ids=ends, ignore_eos=True
    )

    def counters():
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        prefix = "vllm:spec_decode_num_"
        if f"{prefix}drafts" not in metrics:  # nothing drafted so far
            return [0] * (3 + gamma)
        names = ("drafts", "draft_tokens", "accepted_tokens")
        totals = [metrics[prefix + name].value for name in names]
        return totals + metrics[f"{prefix}accepted_tokens_per_pos"].values

    def serve(prompt):
        before = counters()
        drafting[:] = 0, 0.0
        start = time.perf_counter()
        output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        answer = {"tokens": list(output[0].outputs[0].token_ids), "seconds": seconds}
        if draft:
            rounds, *others = (b - a for a, b in zip(before, counters(), strict=True))
            # the target call that reads the prompt judges no drafts: one more than rounds
            answer["counts"] = [rounds + 1, *others]
            answer["drafting"] = list(drafting)
        return answer

    return vllm.__version__, serve


def openvino(target, draft, gamma, max_new_tokens, ends):
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GiB
    scheduler.enable_prefix_caching = False
    # left alone, a CPU keeps the cache in uint8 and may multiply in bfloat16
    exact = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}
    exact["INFERENCE_NUM_THREADS"] = int(os.environ["OMP_NUM_THREADS"])
    config = genai.GenerationConfig()
    config.max_new_tokens = max_new_tokens
    config.stop_token_ids = set(ends)
    speculation = {}
    if draft:
        speculation["draft_model"] = genai.draft_model(draft, "CPU", **exact)
        config.num_assistant_tokens = gamma
    pipeline = genai.LLMPipeline(target, "CPU", scheduler_config=scheduler, **speculation, **exact)

    def serve(prompt):
        ids = np.array([prompt])
        inputs = genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        output = pipeline.generate(inputs, config)
        answer = {"tokens": list(output.tokens[0]), "seconds": time.perf_counter() - start}
        if draft:
            metrics = output.extended_perf_metrics
            # tokens out of each target call; microseconds of each draft step
            written = metrics.main_model_metrics.raw_metrics.m_batch_sizes
            steps = metrics.draft_model_metrics.raw_metrics.m_durations
            accepted = metrics.get_num_accepted_tokens()
            by_position = [sum(tokens - 1 > i for tokens in written[1:-1]) for i in range(gamma)]
            drafted = metrics.get_num_draft_tokens()
            answer["counts"] = [len(written), drafted, accepted, *by_position]
            answer["drafting"] = [len(steps), sum(steps) / 1e6]
        return answer

    return genai.get_version(), serve


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else an engine prints goes to the log
    load = {"vllm": vllm, "openvino": openvino}[sys.argv[1]]
    version, serve = load(**json.loads(sys.argv[2]))
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        print(json.dumps([serve(prompt) for prompt in prompts]), file=answers, flush=True)
