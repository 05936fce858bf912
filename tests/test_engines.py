"""engines.py and `bench.py engines`: the replay by hand, transformers for real; vLLM and OpenVINO behind the marker `engines`.

VLLM_PYTHON=vllm-env/bin/python OPENVINO_PYTHON=openvino-env/bin/python python -m pytest -q -m engines
"""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run_all import FEW, SHORT, save_pair, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import bench
import data
import engines
import run_all
from speculative import autoregressive_generate, speculative_generate

ROOT = Path(engines.__file__).parent
PYTHONS = {engine: os.environ.get(f"{engine.upper()}_PYTHON") for engine in ("vllm", "openvino")}
# what a draft proposes after each number of tokens of the text 1 2 3 4 5 9 (9: the end token), which goes on with 6 7 8 6 7 8
TEXT, DRAFTS = [1, 2, 3, 4, 5, 9, 6, 7, 8, 6, 7, 8], {0: [1, 2, 0], 1: [2, 9, 3], 3: [4, 5, 9], 4: [5, 9, 6], 5: [9, 6, 0]}


def replay(*rules, limit=20, text=TEXT, drafts=DRAFTS, new=6):
    return bench.replay(text, new, lambda start: torch.tensor(drafts[start]), limit, 3, [9], rules)


def test_replay_by_hand():
    # ours: 1 2 accepted, 3 the target's; 4 5 9 accepted
    assert replay() == [2, 6, 5, 2, 2, 1]
    # the prompt alone gives 1; then 2 accepted, 3 the target's; 4 5 9 accepted
    assert replay("prompt") == [3, 6, 4, 2, 1, 1]
    assert replay("prompt", "stop") == [3, 5, 4, 2, 1, 1]  # 2 9 and no 3
    assert replay("prompt", "last") == [3, 3, 1, 1, 0, 0]
    assert replay("prompt", "last", drafts={1: [2, 3, 4]}, text=[1, 2, 3, 9, 1, 1, 1], new=4) == [2, 0, 2, 0, 0, 0]  # but one
    assert replay("own") == [2, 6, 4, 2, 2, 0]
    # a draft beyond the end token, which is accepted too, as the target would go on so
    drafts = DRAFTS | {0: [1, 2, 3], 4: [5, 9, 6]}
    assert replay(drafts=drafts) == [2, 5, 5, 2, 2, 1]
    assert replay("end", drafts=drafts) == [2, 6, 6, 2, 2, 2]
    # cut at 5 tokens: two of the last three drafts are within reach for an engine that heeds the limit, one being kept
    assert replay(limit=5, new=5) == [2, 4, 3, 2, 1, 0]
    assert replay("limit", limit=5, new=5) == [2, 5, 4, 2, 2, 0]
    assert replay("limit", "end", limit=5, new=5) == [2, 6, 5, 2, 2, 1]


def test_break_even_is_where_the_predicted_speedup_is_one():
    c = bench.break_even(3.1, 5, 1.2, 0.3)
    assert bench.predicted_speedup(3.1, 5, c, 1.2, 0.3) == pytest.approx(1) and c == pytest.approx((3.1 - 1.5) / 5)


def test_speed_divides_a_round_into_drafts_and_the_rest():
    alone = [(10.0, 0, 0), (30.0, 0, 0), (20.0, 0, 0)]  # 100 tokens: 0.2 s each
    taken = [(20.0, 120, 12.0), (10.0, 120, 6.0), (16.0, 120, 9.6)]  # 40 calls of 0.4 s, three drafts each of 0.08 s or so
    found = bench.speed(alone, taken, 100, 40)
    assert found["speedup"]["rounds"] == [0.5, 3.0, 1.25]
    cost = found["cost_model"]
    assert (cost["tau"], cost["drafts"], cost["c"]) == pytest.approx((2.5, 3, 0.4))
    assert cost["v+o"] == pytest.approx(0.4 / 0.2 - 3 * 0.4) and cost["break_even_c"] == pytest.approx((2.5 - 0.8) / 3)
    assert bench.predicted_speedup(2.5, 3, cost["c"], cost["v+o"], 0) == pytest.approx(20 / 16)


@pytest.fixture
def pair(tmp_path, tokenizer, make_model):
    """Folders of a target whose texts end early, a draft that agrees at times and one that always does; unequal heads."""
    target = make_model("neox", vocab_size=len(tokenizer) + 48, initializer_range=0.2, hidden_size=64)
    prompt = tokenizer(data.TASKS["arithmetic"].prompt(data.load_rows("arithmetic", "test", limit=1)[0]), return_tensors="pt")
    text = autoregressive_generate(target, prompt.input_ids, max_new_tokens=24, vocab_size=len(tokenizer))
    target.generation_config.eos_token_id = text[0, -1].item()
    near = make_model("neox", vocab_size=len(tokenizer) + 16, initializer_range=0.2, hidden_size=64)
    with torch.no_grad():
        for name, weight in near.state_dict().items():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight.copy_(target.state_dict()[name][: len(weight)] + 0.02 * noise)
    for name, model in (("target", target), ("near", near), ("same", target)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def run_engines(folder, *more, rounds=1):
    drafts = [str(folder / "near"), str(folder / "same")]
    size = ["--batch", "4", "--gamma", "3", "--max-new-tokens", "20", "--rounds", str(rounds)]
    models = ["--target", str(folder / "target"), "--draft", *drafts]
    return bench.main(["engines", *models, *size, *more, "--json", str(folder / "out.json")])


def check_result(folder, engine, drafts=("near", "same")):
    """What the command saved about an engine, against counts that are taken here, afresh."""
    result = json.loads((folder / "out.json").read_text())
    target, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "target"),
        AutoTokenizer.from_pretrained(folder / "target"),
    )
    prompts = [data.TASKS["arithmetic"].prompt(row) for row in data.load_rows("arithmetic", "test", limit=4)]
    for name in drafts:
        found, draft = result["drafts"][name][engine], AutoModelForCausalLM.from_pretrained(folder / name)
        end = target.generation_config.eos_token_id
        common = {"max_new_tokens": 20, "gamma": 3, "eos_token_id": end, "vocab_size": len(tokenizer)}
        outs = [speculative_generate(target, draft, torch.tensor([tokenizer(p).input_ids]), **common) for p in prompts]
        stats = sum((out.stats for out in outs), type(outs[0].stats)())
        for key in bench.COUNTS:
            assert found["ours"][key] == getattr(stats, key)
            assert found["counts"][key] == found["ours"][key] + sum(more[key] for more in found["added_to_ours"].values())
        assert found["ours"]["accepted_by_position"] == stats.per_position[0]
        assert len(found["speedup"]["rounds"]) == result["protocol"]["rounds"] and found["speedup"]["low"] > 0
        assert found["cost_model"]["c"] > 0 and found["identical_prompts"] == 4
    return result


def test_transformers_counts_are_explained_to_the_token(pair, capsys):
    assert run_engines(pair, rounds=2) == 0
    printed = capsys.readouterr().out
    result = check_result(pair, "transformers")
    lengths = result["protocol"]["new_tokens"]
    assert min(lengths) < 20 and max(lengths) == 20, "both ways to end are wanted here"
    stats = result["drafts"]["near"]["ours"]["ours"]
    assert 0 < stats["accepted"] < stats["drafted"]
    assert "same in transformers: the target's own tokens for 4 of 4 prompts" in printed and " = ours " in printed
    added = result["drafts"]["same"]["transformers"]["added_to_ours"][bench.RULES["own"]]
    assert added["accepted"] < 0, "a text that ends on an accepted draft is wanted here"
    assert result["command"].startswith("python bench.py engines") and result["protocol"]["versions"].keys() == {"transformers"}


@pytest.mark.parametrize("rule", ["stop", "own"])
def test_unexplained_counts_are_an_error(pair, monkeypatch, capsys, rule):
    monkeypatch.setitem(bench.ENGINES, "transformers", [r for r in ("stop", "own") if r != rule])
    assert run_engines(pair) == 2
    assert "its rules give" in capsys.readouterr().err


def test_other_tokens_are_an_error(pair, monkeypatch, capsys):
    plain = bench.local_server

    def wrong(engine, target, draft, *rest):
        return plain(engine, copy.deepcopy(draft) if engine == "transformers" and draft else target, draft, *rest)

    monkeypatch.setattr(bench, "local_server", wrong)
    assert run_engines(pair) == 2
    assert "bench.py: error: transformers, near: prompt 1 gives [" in capsys.readouterr().err


def test_engines_refuses_in_one_line(pair, tmp_path, capsys):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: No module named vllm' >&2\necho later >&2\nexit 1\n")
    broken.chmod(0o755)
    for more, words in (
        (["--vllm-python", str(tmp_path / "none")], "--vllm-python: no such file"),
        (["--vllm-python", str(broken)], "vllm stopped: ImportError: No module named vllm"),
        (["--gamma", "0"], "--gamma must be at least 1"),
    ):
        assert run_engines(pair, *more) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_cut_vocabulary_is_lossless(architecture, tmp_path, make_model, tokenizer):
    """The same logits on the shared vocabulary, bit for bit, and nothing beyond it; biases and tied heads included."""
    model = make_model(architecture, vocab_size=len(tokenizer) + 112)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    out = engines.cut_vocabulary(str(tmp_path / "padded"), str(tmp_path / "cut"))
    cut, ids = AutoModelForCausalLM.from_pretrained(out), torch.randint(len(tokenizer), (3, 40))
    with torch.no_grad():
        logits, wanted = cut(ids).logits, model(ids).logits[..., : len(tokenizer)]
    assert cut.config.vocab_size == logits.shape[-1] == len(tokenizer) and logits.equal(wanted)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert cut.generation_config.eos_token_id == model.generation_config.eos_token_id


def run(command, cwd, **more):
    done = subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def text_of(target, tokenizer):
    """What the target alone writes after the prompt of the commands."""
    ids = torch.tensor([tokenizer(engines.PROMPT).input_ids])
    found = autoregressive_generate(target, ids, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def blocks(printed):
    """Engine -> its commands, as the driver printed them."""
    said = printed.split("To serve the last of them")[1].rstrip("\n")
    return dict(part.split("\n", 1) for part in said.split("\n# ")[1:])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A short tiny cell in runs/ of a folder: the folder, what the driver printed, and the text that is to be served."""
    folder = tmp_path_factory.mktemp("served")
    done = run(f"{sys.executable} {ROOT}/run_all.py {' '.join(SHORT)}", folder)
    cell = folder / "runs/tiny/arithmetic/seed0"
    target, tokenizer = AutoModelForCausalLM.from_pretrained(cell / "target"), AutoTokenizer.from_pretrained(cell / "target")
    return folder, done, text_of(target, tokenizer)


def test_driver_prints_commands_that_are_the_readmes(served):
    folder, printed, text = served
    commands = engines.commands("runs/tiny/arithmetic/seed0/target", "runs/tiny/arithmetic/seed0/adaspec", 5)
    readme = (ROOT / "README.md").read_text()
    for engine, command in commands.items():
        assert f"# {engine}\n{command}\n" in printed and f"```bash\n{command}\n```" in readme
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = run(blocks(printed)["transformers"], folder, env=os.environ | python)
    assert out.replace("<|endoftext|>", "") == engines.PROMPT + text + "\n"


def test_driver_cuts_unequal_heads_and_says_what_vllm_lacks(tmp_path, tokenizer, make_model, capsys):
    save_pair(tmp_path / "models", tokenizer, make_model, "codegen")
    write_rows(tmp_path / "rows", "gsm8k")
    where = ["--models-dir", str(tmp_path / "models"), "--data-dir", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]
    argv = [*FEW, *where, "--pairs", "codegen", "--tasks", "gsm8k", "--methods", "distillspec"]
    run_all.main(argv)
    printed, cut = capsys.readouterr().out, tmp_path / "out/codegen/gsm8k/seed0/serve"
    assert "# vllm: cannot serve it, vLLM has no CodeGen architecture\n" in printed
    models = [AutoModelForCausalLM.from_pretrained(cut / role) for role in ("target", "draft")]
    assert [model.config.vocab_size for model in models] == [len(tokenizer)] * 2
    assert f"{cut}/target {cut}/draft" in printed and f"--model {cut}/target" in printed
    before = (cut / "cut.json").stat().st_mtime_ns
    run_all.main(argv)
    assert (cut / "cut.json").stat().st_mtime_ns == before
    run_all.main([*argv, "--lr", "1e-3"])  # another draft
    assert (cut / "cut.json").stat().st_mtime_ns != before


@pytest.mark.engines
@pytest.mark.parametrize("engine", PYTHONS)
def test_engine_counts_are_explained_to_the_token(pair, engine):
    if not PYTHONS[engine]:
        pytest.skip(f"{engine.upper()}_PYTHON is not set")
    assert run_engines(pair, f"--{engine}-python", PYTHONS[engine]) == 0
    result = check_result(pair, engine)
    assert {"transformers", engine} == result["protocol"]["versions"].keys()
    assert sum(result["drafts"]["near"][engine]["counts"]["accepted_by_position"]) > 0


@pytest.mark.engines
@pytest.mark.parametrize("engine", PYTHONS)
def test_printed_commands_serve_the_cell(served, engine):
    if not PYTHONS[engine]:
        pytest.skip(f"{engine.upper()}_PYTHON is not set")
    folder, printed, text = served
    (folder / f"{engine}-env").symlink_to(Path(PYTHONS[engine]).parents[1])
    command = blocks(printed)[engine]
    if engine == "openvino":
        assert run(command, folder).strip().endswith(text.strip())
        return
    script = f"{command.replace(' &', ' >server.log 2>&1 &', 1)}; kill %1; wait %1"
    with subprocess.Popen(["bash", "-mc", script], cwd=folder, stdout=subprocess.PIPE, text=True, process_group=0) as shell:
        try:
            answer = json.loads(shell.communicate(timeout=240)[0])
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert answer["choices"][0]["text"] == text
