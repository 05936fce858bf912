"""engines.py: the replay by hand, transformers for real; vLLM and OpenVINO behind a marker.

VLLM_PYTHON=vllm-env/bin/python OPENVINO_PYTHON=openvino-env/bin/python python -m pytest -m engines
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from costs import predicted_speedup
from extras import engines
from short_head import shorten_head
from speculative import autoregressive_generate, speculative_generate

ROOT = Path(engines.__file__).parents[1]
PYTHONS = {engine: os.environ.get(f"{engine.upper()}_PYTHON") for engine in ("vllm", "openvino")}

# Counts

# what a draft proposes after each number of tokens of the text 1 2 3 4 5 9 (9: the end token),
# which goes on with 6 7 8 6 7 8
TEXT = [1, 2, 3, 4, 5, 9, 6, 7, 8, 6, 7, 8]
DRAFTS = {0: [1, 2, 0], 1: [2, 9, 3], 3: [4, 5, 9], 4: [5, 9, 6], 5: [9, 6, 0]}


def replay(*rules, limit=20, text=TEXT, drafts=DRAFTS, new=6):
    return engines.replay(text, new, drafts.get, limit, 3, [9], rules)


def test_replay_by_hand():
    # ours: 1 2 accepted, 3 the target's; 4 5 9 accepted
    assert replay() == [2, 6, 5, 2, 2, 1]
    # the prompt alone gives 1; then 2 accepted, 3 the target's; 4 5 9 accepted
    assert replay("prompt") == [3, 6, 4, 2, 1, 1]
    assert replay("prompt", "stop") == [3, 5, 4, 2, 1, 1]  # 2 9 and no 3
    assert replay("prompt", "last") == [3, 3, 1, 1, 0, 0]
    one_call = {"drafts": {1: [2, 3, 4]}, "text": [1, 2, 3, 9, 1, 1, 1], "new": 4}
    assert replay("prompt", "last", **one_call) == [2, 0, 2, 0, 0, 0]
    assert replay("own") == [2, 6, 4, 2, 2, 0]
    # a draft beyond the end token, which is accepted too, as the target would go on so
    drafts = DRAFTS | {0: [1, 2, 3], 4: [5, 9, 6]}
    assert replay(drafts=drafts) == [2, 5, 5, 2, 2, 1]
    assert replay("end", drafts=drafts) == [2, 6, 6, 2, 2, 2]
    # cut at 5 tokens: two of the last three drafts are within reach for an engine that heeds the
    # limit, and one is accepted
    assert replay(limit=5, new=5) == [2, 4, 3, 2, 1, 0]
    assert replay("limit", limit=5, new=5) == [2, 5, 4, 2, 2, 0]
    assert replay("limit", "end", limit=5, new=5) == [2, 6, 5, 2, 2, 1]


def test_speed_divides_a_round_into_drafts_and_the_rest():
    alone = [(10.0, 0, 0), (30.0, 0, 0), (20.0, 0, 0)]  # 100 tokens: 0.2 s each
    # 40 calls of 0.4 s, three drafts each of 0.08 s or so
    turns = [(20.0, 120, 12.0), (10.0, 120, 6.0), (16.0, 120, 9.6)]
    result = engines.speed(alone, turns, 100, 40)
    assert result["speedup"]["rounds"] == [0.5, 3.0, 1.25]
    cost = result["cost_model"]
    assert (cost["tau"], cost["drafts"], cost["c"]) == pytest.approx((2.5, 3, 0.4))
    assert cost["v+o"] == pytest.approx(0.4 / 0.2 - 3 * 0.4)
    assert cost["break_even_c"] == pytest.approx((2.5 - 0.8) / 3)
    speedup = predicted_speedup(2.5, 3, cost["c"], cost["v+o"])
    assert speedup == pytest.approx(20 / 16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer):
    """Folders of a target whose texts end early, a draft that agrees at times and one that always
    does; unequal heads."""
    from transformers import GPTNeoXConfig

    folder = tmp_path_factory.mktemp("pair")

    def make(vocab_size):
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.2, bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config).float().eval()

    target = make(len(tokenizer) + 48)
    row = data.load_rows("arithmetic", "test", limit=1)[0]
    prompt = tokenizer(data.TASKS["arithmetic"].prompt(row), return_tensors="pt").input_ids
    text = autoregressive_generate(target, prompt, max_new_tokens=24, vocab_size=len(tokenizer))
    target.generation_config.eos_token_id = text[0, -1].item()
    near = make(len(tokenizer) + 16)
    with torch.no_grad():
        for name, weight in near.state_dict().items():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight.copy_(target.state_dict()[name][: len(weight)] + 0.02 * noise)
    for name, model in (("target", target), ("near", near), ("same", target)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def compare(folder, *more, rounds=1):
    size = ["--batch", "4", "--gamma", "3", "--max-new-tokens", "20", "--rounds", str(rounds)]
    drafts = ["--draft", str(folder / "near"), str(folder / "same")]
    models = ["--target", str(folder / "target"), *drafts]
    engines.main(["compare", *models, *size, *more, "--json", str(folder / "out.json")])


def check_result(folder, engine):
    """What the command saved about an engine, against counts that are taken here, afresh."""
    result = json.loads((folder / "out.json").read_text())
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    rows = data.load_rows("arithmetic", "test", limit=4)
    prompts = [data.TASKS["arithmetic"].prompt(row) for row in rows]
    for name in ("near", "same"):
        record = result["drafts"][name][engine]
        draft = AutoModelForCausalLM.from_pretrained(folder / name)
        options = {"max_new_tokens": 20, "gamma": 3, "vocab_size": len(tokenizer)}
        options["eos_token_id"] = target.generation_config.eos_token_id
        outputs = [
            speculative_generate(target, draft, torch.tensor([tokenizer(p).input_ids]), **options)
            for p in prompts
        ]
        stats = sum((output.stats for output in outputs), type(outputs[0].stats)())
        for key in engines.COUNTS:
            assert record["ours"][key] == getattr(stats, key)
            added = sum(more[key] for more in record["added_to_ours"].values())
            assert record["counts"][key] == record["ours"][key] + added
        assert record["ours"]["accepted_by_position"] == stats.per_position[0]
        assert len(record["speedup"]["rounds"]) == result["protocol"]["rounds"]
        assert record["speedup"]["low"] > 0 and record["cost_model"]["c"] > 0
        assert record["identical_prompts"] == 4
    return result


def test_transformers_counts_are_explained_to_the_token(pair, capsys):
    compare(pair, rounds=2)
    printed = capsys.readouterr().out
    result = check_result(pair, "transformers")
    lengths = result["protocol"]["new_tokens"]
    assert min(lengths) < 20 and max(lengths) == 20, "both ways to end are wanted here"
    stats = result["drafts"]["near"]["ours"]["ours"]
    assert 0 < stats["accepted"] < stats["drafted"]
    assert "same in transformers: the target's own tokens for 4 of 4 prompts" in printed
    assert " = ours " in printed and "speed-up" in printed
    own = engines.RULES["own"]
    added = result["drafts"]["same"]["transformers"]["added_to_ours"][own]
    assert added["accepted"] < 0, "a text that ends on an accepted draft is wanted here"
    assert result["command"].startswith("python -m extras.engines compare --target target --draft")
    assert str(pair) not in json.dumps(result)
    assert result["protocol"]["versions"].keys() == {"transformers"}


@pytest.mark.parametrize("rule", ["stop", "own"])
def test_unexplained_counts_are_an_error(pair, monkeypatch, rule):
    rules = [r for r in ("stop", "own") if r != rule]
    monkeypatch.setitem(engines.ENGINES, "transformers", rules)
    with pytest.raises(ValueError, match="and its rules give"):
        compare(pair)


def test_other_tokens_are_an_error(pair, monkeypatch):
    answer = engines.Comparison.answer

    def wrong(self, engine, name, prompt):
        record = answer(self, engine, name, prompt)
        if engine == "transformers" and name:
            record["tokens"][-1] += 1
        return record

    monkeypatch.setattr(engines.Comparison, "answer", wrong)
    with pytest.raises(ValueError, match=r"transformers, near: prompt 1 gives \["):
        compare(pair)


def test_what_cannot_be_compared_is_refused(pair, tmp_path, capsys):
    broken = tmp_path / "python"
    error = "ImportError: No module named vllm"
    broken.write_text(f"#!/bin/sh\necho '{error}' >&2\necho later >&2\nexit 1\n")
    broken.chmod(0o755)
    for more, words in (
        (["--vllm-python", str(tmp_path / "none")], "--vllm-python: no such file"),
        (["--vllm-python", str(broken)], f"vllm stopped: {error}$"),
        (["--draft", str(pair / "near"), str(pair / "near")], "two folders have one name"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(pair, *more)
    with pytest.raises(SystemExit):
        compare(pair, "--gamma", "0")
    assert "--gamma: must be a whole number of at least 1" in capsys.readouterr().err


# Commands


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_cut_vocabulary_is_lossless(architecture, tmp_path, make_model, tokenizer):
    """The same logits on the shared vocabulary, bit for bit, and nothing beyond it; biases and
    tied heads included."""
    model = make_model(architecture, vocab_size=len(tokenizer) + 112)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    out = engines.cut_vocabulary(str(tmp_path / "padded"), str(tmp_path / "cut"))
    cut = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(len(tokenizer), (3, 40))
    with torch.no_grad():
        logits = cut(ids).logits
        expected = model(ids).logits[..., : len(tokenizer)]
    assert cut.config.vocab_size == logits.shape[-1] == len(tokenizer)
    assert logits.equal(expected)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    assert cut.generation_config.eos_token_id == model.generation_config.eos_token_id


def print_commands(target, draft, out, capsys):
    """Engine -> its commands, as they are printed, and all that is printed."""
    folders = ["--target", str(target), "--draft", str(draft), "--out", str(out)]
    engines.main(["commands", *folders])
    printed = capsys.readouterr().out
    parts = ("\n" + printed.rstrip("\n")).split("\n# ")[1:]
    return dict(part.split("\n", 1) for part in parts if "\n" in part), printed


def run(command, cwd, **more):
    process = subprocess.run(
        ["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=300, **more
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def text_of(folder):
    """What the target alone writes after the prompt of the commands."""
    target = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(engines.PROMPT).input_ids])
    end = target.generation_config.eos_token_id
    text = autoregressive_generate(
        target, ids, max_new_tokens=64, eos_token_id=end, vocab_size=len(tokenizer)
    )
    return tokenizer.decode(text[0, ids.shape[1] :])


@pytest.mark.slow
def test_commands_cut_unequal_heads_and_serve_the_pair(pair, tmp_path, tokenizer, capsys):
    commands, _ = print_commands(pair / "target", pair / "near", tmp_path / "serve", capsys)
    assert list(commands) == ["transformers", "vllm", "openvino"]
    for role in ("target", "draft"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "serve" / role)
        assert model.config.vocab_size == len(tokenizer)
        assert all(str(tmp_path / "serve" / role) in command for command in commands.values())
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = run(commands["transformers"], tmp_path, env=os.environ | python)
    assert out == engines.PROMPT + text_of(pair / "target") + "\n"


def test_equal_heads_are_served_as_they_are(pair, tmp_path, capsys):
    commands, _ = print_commands(pair / "target", pair / "same", tmp_path / "serve", capsys)
    assert not (tmp_path / "serve").exists()
    assert all(str(pair / "same") in command for command in commands.values())


def test_commands_say_what_vllm_lacks(tmp_path, make_model, tokenizer, capsys):
    make_model("codegen").save_pretrained(tmp_path / "T")
    tokenizer.save_pretrained(tmp_path / "T")
    commands, printed = print_commands(tmp_path / "T", tmp_path / "T", tmp_path / "out", capsys)
    assert list(commands) == ["transformers", "openvino"]
    assert "# vllm: cannot serve it: vLLM has no CodeGen architecture\n" in printed


def test_a_short_head_is_for_our_own_sampler(pair, tmp_path, make_model, capsys):
    draft = tmp_path / "short"
    shorten_head(make_model(), torch.arange(8)).save_pretrained(draft)
    with pytest.raises(ValueError, match=r"short has a short output head .* only our own sampler"):
        print_commands(pair / "target", draft, tmp_path / "serve", capsys)


def test_the_page_has_the_printed_commands():
    page = ROOT / "docs" / "serving.md"
    if not page.is_file():
        pytest.skip("docs/ is not here")
    cell = "runs/tiny/arithmetic/seed0"
    for command in engines.serving_commands(f"{cell}/target", f"{cell}/adaspec", 5).values():
        assert f"```bash\n{command}\n```" in page.read_text()


# The engines themselves


@pytest.mark.engines
@pytest.mark.parametrize("engine", PYTHONS)
def test_engine_counts_are_explained_to_the_token(pair, engine):
    if not PYTHONS[engine]:
        pytest.skip(f"{engine.upper()}_PYTHON is not set")
    compare(pair, f"--{engine}-python", PYTHONS[engine])
    result = check_result(pair, engine)
    assert {"transformers", engine} == result["protocol"]["versions"].keys()
    assert sum(result["drafts"]["near"][engine]["counts"]["accepted_by_position"]) > 0


@pytest.mark.engines
@pytest.mark.parametrize("engine", PYTHONS)
def test_printed_commands_serve_the_pair(pair, tmp_path, engine, capsys):
    if not PYTHONS[engine]:
        pytest.skip(f"{engine.upper()}_PYTHON is not set")
    commands, _ = print_commands(pair / "target", pair / "near", tmp_path / "serve", capsys)
    (tmp_path / f"{engine}-env").symlink_to(Path(PYTHONS[engine]).parents[1])
    command = commands[engine]
    text = text_of(pair / "target")
    if engine == "openvino":
        assert run(command, tmp_path).strip().endswith(text.strip())
        return
    script = f"{command.replace(' &', ' >server.log 2>&1 &', 1)}; kill %1; wait %1"
    with subprocess.Popen(
        ["bash", "-mc", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True, process_group=0
    ) as shell:
        try:
            answer = json.loads(shell.communicate(timeout=240)[0])
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
    assert answer["choices"][0]["text"] == text
