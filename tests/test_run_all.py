"""The driver end to end on the CPU: stages, their reuse, two ranks, pretrained pairs from folders, the paper's recipes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import report
import run_all

ROOT = Path(run_all.__file__).parent
SHORT = "--preset tiny --limit 48 --max-steps 3 --eval-prompts 6 --eval-batch 2 --timed-prompts 1 --max-new-tokens 12".split()
STAGES = ["base-target", "base-draft", "target", "distilled-3-epochs", "adaspec"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    run_all.main([*SHORT, "--out", str(out)])
    return out


def notes(out):
    return {path.parent.name: json.loads(path.read_text()) for path in out.rglob("stage.json")}


def test_every_stage_and_the_table(finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    assert sorted(notes(finished)) == sorted(STAGES)
    assert [(r["temperature"], r["draft"]) for r in results["rows"]] == [
        (t, draft) for t in (0.0, 1.0) for draft in ("base", "DistillSpec", "AdaSPEC")
    ]
    for row in results["rows"]:
        counts = row["counts"]
        assert row["alpha"] == counts["accepted"] / (counts["accepted"] + counts["rejected"])
        assert row["tau"] == counts["generated"] / counts["target_calls"]
        low, high = row["alpha_interval"]
        assert low <= row["alpha"] <= high and row["speedup"] > 0
        assert (row["gamma"], row["prompts"], row["split"], row["dtype"]) == (
            5,
            6,
            "test",
            "float32",
        )
        if row["temperature"] == 0:
            assert row["expected_acceptance"] == row["agreement"]
    text = report.table(results["rows"])
    cells, protocol, _, took = text.split("\n\n")
    assert (
        "| arithmetic | tiny | 0 | DistillSpec | 1.0 | 3 |" in took
        and "| arithmetic | tiny | 0 | AdaSPEC | 2.0 | 6 |" in took
    )
    assert (
        len({line.count("|") for line in cells.splitlines()}) == 1 and cells.count("AdaSPEC") == 2
    )
    assert (
        "first 6 test prompts (speed-up: 1, one by one), gamma 5, max_new_tokens 12, float32, 1 x"
        in protocol
    )


def test_stages_are_ordinary_hugging_face_folders(finished):
    for path in finished.rglob("stage.json"):
        model, tokenizer = (
            cls.from_pretrained(path.parent) for cls in (AutoModelForCausalLM, AutoTokenizer)
        )
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert not list(path.parent.glob("*.bin"))
        assert (path.parent / "model.safetensors").is_file()
    assert not list(finished.rglob("*.partial"))


def test_complete_stages_are_not_run_again_and_a_changed_setting_reruns_what_depends_on_it(
    finished, capsys
):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    results = (finished / "results.json").read_text()
    run_all.main([*SHORT, "--out", str(finished)])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    assert (
        json.loads(results)["rows"] == json.loads((finished / "results.json").read_text())["rows"]
    )
    out = capsys.readouterr().out
    assert all(f"{stage}: done before" in out for stage in STAGES) and "last loss" not in out
    with pytest.raises(ValueError, match="torchrun"):
        run_all.main([*SHORT, "--out", str(finished), "--shard-target"])
    run_all.main([*SHORT, "--out", str(finished), "--k", "0.2"])
    assert "  adaspec-k-0.2: 3 steps" in capsys.readouterr().out
    run_all.main([*SHORT, "--out", str(finished), "--batch", "12"])
    rerun = {p.parent.name for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert rerun == {"target", "distilled-3-epochs", "adaspec"}
    before = {path: path.stat().st_mtime_ns for path in before}
    run_all.main([*SHORT, "--out", str(finished)])
    run_all.main([*SHORT, "--out", str(finished), "--target-lr", "1e-4"])
    rerun = {p.parent.name for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert rerun == {"target", "distilled-3-epochs", "adaspec"}


def test_two_ranks_end_in_the_same_models(finished, tmp_path):
    """Ranks of unequal token counts, a quantile over both, one voice: 3 steps a stage agree to float32 rounding."""
    single, double = tmp_path / "single", tmp_path / "double"
    run_all.main([*SHORT, "--out", str(single)])
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [*launcher, str(ROOT / "run_all.py"), *SHORT, "--out", str(double)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| AdaSPEC |") == 3, "only rank 0 may print"
    for path in single.rglob("model.safetensors"):
        both = (load_file(path), load_file(double / path.relative_to(single)))
        ours, theirs = (
            torch.cat([weights[name].flatten() for name in sorted(weights)]) for weights in both
        )
        # not element by element: Adam's first steps are +-lr for a gradient that is nothing but rounding
        assert (ours - theirs).norm() < 1e-5 * ours.norm(), path.parent.name
    rows = [json.loads((out / "results.json").read_text())["rows"] for out in (single, double)]
    for one, two in zip(*rows, strict=True):
        assert one["expected_acceptance"] == pytest.approx(two["expected_acceptance"], abs=1e-3)
        assert one["counts"]["target_calls"] == pytest.approx(two["counts"]["target_calls"], abs=3)


def save_pair(folder, tokenizer, make_model, pair="pythia", draft_tokenizer=None):
    """The pair's two models in small, random weights, heads padded differently: one by its whole name, one by the last part."""
    architectures = {"pythia": ("neox", "neox"), "codegen": ("phi", "codegen")}[pair]
    names = run_all.PAIRS[pair].target.split("/")[-1], run_all.PAIRS[pair].draft
    for name, architecture, padding in zip(names, architectures, (48, 16), strict=True):
        make_model(architecture, vocab_size=len(tokenizer) + padding).save_pretrained(folder / name)
        (draft_tokenizer if draft_tokenizer and padding == 16 else tokenizer).save_pretrained(
            folder / name
        )


def write_rows(folder, task):
    for split, n in (("train", 40), ("test", 4)):
        (folder / task).mkdir(parents=True, exist_ok=True)
        rows = data.arithmetic_rows(split)[:n]
        if task == "custom":
            rows = [{"prompt": row["question"], "response": row["answer"]} for row in rows]
        (folder / task / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


FEW = "--max-steps 2 --batch 4 --eval-prompts 4 --timed-prompts 1 --max-new-tokens 8 --max-length 128".split()


@pytest.mark.parametrize("pair", ["pythia", "codegen"])
def test_pretrained_pair_from_a_folder_with_heads_padded_differently(
    tmp_path, tokenizer, make_model, pair
):
    save_pair(tmp_path / "models", tokenizer, make_model, pair)
    write_rows(tmp_path / "rows", "gsm8k")
    where = [
        "--models-dir",
        str(tmp_path / "models"),
        "--data-dir",
        str(tmp_path / "rows"),
        "--out",
        str(tmp_path / "out"),
    ]
    run_all.main([*FEW, *where, "--pairs", pair, "--tasks", "gsm8k", "--epochs", "0,1,2"])
    assert set(notes(tmp_path / "out")) == {
        "distilled-1-epochs",
        "distilled-2-epochs",
        "adaspec",
    }, "target taken as it is"
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == 6
    settings = notes(tmp_path / "out")["adaspec"]["settings"]
    assert (settings["lr"], settings["batch_size"], settings["k"]) == (3e-4, 4, 0.4)


def test_own_pair_and_task(tmp_path, tokenizer, make_model):
    save_pair(tmp_path, tokenizer, make_model)
    write_rows(tmp_path / "rows", "custom")
    models = [
        "--target",
        str(tmp_path / "pythia-1.4b"),
        "--draft",
        str(tmp_path / "EleutherAI/pythia-31m"),
    ]
    where = ["--data-dir", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]
    run_all.main(
        [
            *FEW,
            *where,
            *models,
            "--pairs",
            "custom",
            "--tasks",
            "custom",
            "--methods",
            "distillspec",
        ]
    )
    assert set(notes(tmp_path / "out")) == {"target", "distilled-3-epochs"}


def test_tokenizers_that_differ_are_refused_by_the_first_token(tmp_path, tokenizer, make_model):
    other = data.train_tokenizer(["zebra zebra zebra"], len(tokenizer))
    save_pair(tmp_path / "models", tokenizer, make_model, draft_tokenizer=other)
    write_rows(tmp_path / "rows", "gsm8k")
    where = [
        "--models-dir",
        str(tmp_path / "models"),
        "--data-dir",
        str(tmp_path / "rows"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ValueError, match=r"tokenizers differ: token 257 is "):
        run_all.main([*FEW, *where, "--pairs", "pythia", "--tasks", "gsm8k"])


def test_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model EleutherAI/pythia-1\.4b is not in"):
        run_all.resolve("EleutherAI/pythia-1.4b", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "gsm9k"], "unknown name 'gsm9k'"),
        (["--pairs", "llama"], "unknown name 'llama'"),
        (["--methods", "eagle"], "unknown name 'eagle'"),
        (["--preset", "huge"], "unknown name 'huge'"),
        (["--regime", "best"], "unknown name 'best'"),
        (["--k", "0"], "--k must be in (0, 1]"),
        (["--k", "1.5"], "--k must be in (0, 1]"),
        (["--gamma", "0"], "--gamma must be at least 1"),
        (["--limit", "-3"], "--limit must be at least 1"),
        (["--epochs", "3,0,3"], "--epochs takes three numbers"),
        (["--epochs", "3"], "--epochs takes three numbers"),
        (["--pairs", "custom"], "needs --target and --draft"),
        (["--dtype", "fp8"], "unknown name 'fp8'"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_all.parse(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_seeds_can_share_a_target(tmp_path):
    few = "--preset tiny --limit 16 --eval-prompts 2 --timed-prompts 1 --max-new-tokens 8 --max-steps 2".split()
    run_all.main(
        [
            *few,
            "--seeds",
            "1,0",
            "--target-seed",
            "0",
            "--methods",
            "distillspec",
            "--out",
            str(tmp_path),
        ]
    )
    cell = tmp_path / "tiny" / "arithmetic"
    assert {path.parent.name for path in (cell / "seed1").glob("*/stage.json")} == {
        "base-draft",
        "distilled-3-epochs",
    }
    made = [
        json.loads((cell / f"seed{seed}/distilled-3-epochs/stage.json").read_text())["settings"]
        for seed in (0, 1)
    ]
    assert made[0]["target"] == made[1]["target"] and made[0]["init"] != made[1]["init"]


def test_errors_are_one_line(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "run_all.py"),
        "--tasks",
        "gsm8k",
        "--pairs",
        "tiny",
        "--data-dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("run_all.py: error: ")
        and "train.jsonl" in done.stderr
    )


def test_recipes_are_the_papers():
    def cell(task, pair, regime):
        plan = run_all.recipe(task, pair, run_all.parse(["--regime", regime]))
        return plan["batch_size"], plan["lr"], plan["epochs"]

    assert set(run_all.RECIPES) == {"gsm8k", "alpaca", "mbpp", "cnn_dailymail", "xsum"}
    assert cell("gsm8k", "pythia", "optimal") == (16, 3e-4, (6, 15, 30))
    assert cell("gsm8k", "codegen", "optimal") == (16, 3e-4, (3, 30, 30))
    assert cell("alpaca", "codegen", "optimal") == (16, 3e-4, (1, 20, 15))
    assert cell("mbpp", "pythia", "optimal") == (8, 1e-5, (1, 30, 6))
    assert cell("mbpp", "codegen", "3-epoch") == (8, 1e-4, (3, 3, 3))
    assert cell("cnn_dailymail", "pythia", "optimal") == (16, 1e-4, (1, 10, 10))
    assert cell("xsum", "pythia", "3-epoch") == (16, 3e-4, (3, 3, 3))
    assert cell("xsum", "codegen", "optimal") == (16, 1e-4, (1, 10, 10))


def test_methods_are_read_and_named():
    method = run_all.Method.parse("adaspec:k=0.2:select=bottom:gap=tvd:epochs=4")
    assert (method.k, method.select, method.gap, method.epochs, method.divergence) == (
        0.2,
        "bottom",
        "tvd",
        4,
        "fkl",
    )
    assert (
        str(method) == "AdaSPEC k=0.2 gap=tvd select=bottom epochs=4"
        and str(run_all.Method("distillspec")) == "DistillSpec"
    )
    args = run_all.parse(
        ["--methods", "distillspec,adaspec:k=0.4,adaspec:gap=rkl", "--gap", "tvd", "--k", "0.3"]
    )
    assert [str(m) for m in args.methods] == [
        "DistillSpec",
        "AdaSPEC gap=tvd",
        "AdaSPEC k=0.3 gap=rkl",
    ]
    assert [m.k for m in run_all.parse(["--ablation", "k", "--k", "0.3"]).methods] == [
        n / 10 for n in range(1, 11)
    ]
    for name in run_all.ABLATIONS:
        assert len(run_all.parse(["--ablation", name, "--tasks", "gsm8k+mbpp"]).methods) >= 3
    (best,) = run_all.parse(["--methods", "best", "--divergence", "rkl"]).methods
    assert str(best) == "best" and vars(best) == vars(run_all.Method("best")) | run_all.BEST
    assert str(run_all.Method.parse("best:epochs=9")) == "best epochs=9"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("adaspek", "did you mean 'adaspec'"),
        ("adaspec:kk=1", "expected one of"),
        ("adaspec:k=0", "k must be in"),
        ("adaspec:k=x", "could not convert"),
        ("adaspec:select=best", "none of top, bottom, random"),
        ("adaspec:divergence=kl", "none of ce, fkl"),
        ("distillspec:k=0.2", "distillspec has no k"),
        ("adaspec:epochs=0", "epochs must be at least 1"),
        ("adaspec:lr=inf", "lr must be above 0"),
        ("adaspec,adaspec", "is there twice"),
        ("adaspec:k_end=1.5", "k_end must be in"),
        ("adaspec:reference=kl", "none of ce, fkl"),
        ("distillspec:decay=cosine", "none of constant, linear"),
        ("distillspec:batch=0", "batch and epochs must be at least 1"),
        ("distillspec:k=0.4", "distillspec has no k"),
        ("best:k=0.2", "best has no k"),
        ("adaspec:rows=in-turn", "is for a mixed task"),
        ("adaspec:k=0.2:k=0.3", "k is there twice"),
    ],
)
def test_bad_methods(method, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run_all.parse(["--methods", method])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_matchings_share_what_they_say(tmp_path):
    """Against DistillSpec: steps and passes; passes and tokens a step; steps and loss-bearing tokens in all."""
    few = "--preset tiny --limit 80 --eval-prompts 2 --timed-prompts 1 --max-new-tokens 8 --epochs 1,2,2".split()
    run_all.main([*few, "--ablation", "match", "--split", "validation", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["split"] for row in rows} == {"validation"}
    found = {row["draft"]: row for row in rows}
    uniform, matched = (
        found["DistillSpec"],
        {m: found[f"AdaSPEC match={m}"] for m in ("epochs", "tokens")}
        | {"steps": found["AdaSPEC"]},
    )
    own = {
        m: {key: row[key] - uniform[key] for key in ("epochs", "steps", "loss_tokens")}
        for m, row in matched.items()
    }
    assert (
        own["steps"]["steps"] == uniform["steps"]
        and own["steps"]["epochs"] == uniform["epochs"] == 2
    )
    assert own["steps"]["loss_tokens"] == pytest.approx(0.4 * uniform["loss_tokens"], rel=0.01)
    assert (
        own["epochs"]["epochs"] == 2
        and own["epochs"]["steps"] == 2 * 2
        and uniform["steps"] == 2 * 5
    )
    assert own["epochs"]["loss_tokens"] == pytest.approx(0.4 * uniform["loss_tokens"], rel=0.01)
    assert own["tokens"]["steps"] == uniform["steps"]
    assert own["tokens"]["loss_tokens"] == pytest.approx(uniform["loss_tokens"], rel=0.05)
    assert {row["target_forwards"] for row in matched.values()} == {80}


def test_selection_takes_top_bottom_or_any(make_model, tmp_path, tokenizer):
    import train

    examples, _ = data.encode(
        "arithmetic", data.load_rows("arithmetic", "train", limit=8), tokenizer, 128
    )
    target, draft = train.Frozen(make_model(seed=1), 400), make_model(seed=2)
    batch = train.make_batch(examples, list(range(8)), torch.device("cpu"))
    hidden, head = train.hidden_states(draft, batch).detach(), train.Head(draft, 400)
    gap = head.per_token(hidden, run_all.target_logits(target, batch), run_all.DIVERGENCES["tvd"])

    def loss(select, **how):
        how = {"divergence": "fkl", "gap": "tvd"} | how
        objective = run_all.selective_distillation(
            target, lambda batch: torch.zeros(len(gap)), 0.25, select=select, **how
        )
        summed, count = objective(hidden, head, batch)
        return summed.item(), count

    kl = head.per_token(hidden, run_all.target_logits(target, batch), run_all.DIVERGENCES["fkl"])
    order = gap.argsort(descending=True)
    count = loss("top")[1]
    assert abs(count - len(gap) / 4) <= 1 and loss("bottom")[1] == loss("random")[1] == count
    assert loss("top")[0] == pytest.approx(kl[order[:count]].sum().item(), rel=1e-5)
    assert loss("bottom")[0] == pytest.approx(kl[order[-count:]].sum().item(), rel=1e-5)
    assert loss("top", divergence="tvd")[0] == pytest.approx(
        gap[order[:count]].sum().item(), rel=1e-5
    )
    torch.manual_seed(0)
    first = loss("random")
    assert first != loss("random")


def test_ablations_and_methods_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        run_all.parse(["--ablation", "k", "--methods", "best"])
    assert "leave --methods out" in capsys.readouterr().err


def test_a_methods_batch_that_does_not_feed_the_ranks_is_found_before_training(
    tmp_path, monkeypatch
):
    import train

    monkeypatch.setattr(train, "world_size", lambda: 8)
    few = "--preset tiny --limit 64 --eval-prompts 2 --timed-prompts 1 --methods".split()
    with pytest.raises(ValueError, match="batches of 4 rows do not feed 8 ranks"):
        run_all.main([*few, "best", "--out", str(tmp_path)])
    assert not [*tmp_path.rglob("stage.json")]


def test_the_fraction_kept_changes_as_training_goes_on(make_model, tokenizer):
    import train

    assert [run_all.fraction_kept(0.2, k_end, 0.25) for k_end in (None, 1.0)] == [
        0.2,
        pytest.approx(0.4),
    ]
    examples, _ = data.encode(
        "arithmetic", data.load_rows("arithmetic", "train", limit=8), tokenizer, 128
    )
    target, draft, kept = train.Frozen(make_model(seed=1), 400), make_model(seed=2), []
    objective = run_all.selective_distillation(
        target, lambda batch: torch.zeros(len(batch.index)), 0.1, 0.9
    )

    def watched(hidden, head, batch):
        loss, count = objective(hidden, head, batch)
        kept.append(count / len(hidden))
        return loss, count

    train.train(draft, examples, watched, vocab_size=400, lr=1e-3, epochs=4, batch_size=8)
    assert kept == pytest.approx([0.1, 0.3, 0.5, 0.7], abs=0.01)


def test_cross_entropy_as_gap_and_loss(make_model, tokenizer):
    """Fine-tuning instead of distillation: the gap and the loss of the data's own tokens, by log_softmax."""
    import train

    examples, _ = data.encode(
        "arithmetic", data.load_rows("arithmetic", "train", limit=8), tokenizer, 128
    )
    target, draft = train.Frozen(make_model(seed=1), 400), make_model(seed=2)
    batch = train.make_batch(examples, list(range(8)), torch.device("cpu"))
    hidden, head = train.hidden_states(draft, batch).detach(), train.Head(draft, 400)
    losses = -head(hidden).log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    loss, count = run_all.selective_distillation(
        target, lambda batch: torch.zeros(len(losses)), 0.25, divergence="ce", gap="ce"
    )(hidden, head, batch)
    assert loss.item() == pytest.approx(losses.topk(count).values.sum().item(), rel=1e-5)
    assert run_all.distillation(target, "ce")(hidden, head, batch)[0].item() == pytest.approx(
        losses.sum().item(), rel=1e-5
    )


def test_mixed_tasks_together_and_in_turn(tmp_path):
    """Each of the tasks is evaluated; in turn means that the second task's draft starts from the first's."""
    few = "--limit 16 --eval-prompts 2 --timed-prompts 1 --max-new-tokens 8 --max-length 160 --epochs 1,1,1 --batch 8".split()
    for task in ("gsm8k", "custom"):
        write_rows(tmp_path, task)
    few += [
        "--tasks",
        "gsm8k+custom",
        "--pairs",
        "tiny",
        "--data-dir",
        str(tmp_path),
        "--out",
        str(tmp_path / "runs"),
    ]
    run_all.main([*few, "--ablation", "mixed"])
    rows = json.loads((tmp_path / "runs" / "results.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"gsm8k of gsm8k+custom", "custom of gsm8k+custom"}
    cell = tmp_path / "runs" / "tiny" / "gsm8k+custom" / "seed0"
    made = {path.parent.name: json.loads(path.read_text()) for path in cell.glob("*/stage.json")}
    settings = {name: note["settings"] for name, note in made.items()}
    first, other = (
        made[name]["fingerprint"] for name in ("distilled-1-epochs-gsm8k", "adaspec-gsm8k")
    )
    assert (
        settings[f"distilled-1-epochs-custom-after-{first}"]["init"]
        == first
        != settings["distilled-1-epochs-gsm8k"]["init"]
    )
    ours = f"adaspec-custom-after-{other}"
    assert settings[ours]["init"] == other
    assert (
        settings[ours]["reference"]
        == made[f"distilled-1-epochs-custom-after-{other}"]["fingerprint"]
    )
    assert (
        made["distilled-1-epochs-gsm8k"]["summary"]["rows"] == 16
        and made["distilled-1-epochs"]["summary"]["rows"] == 32
    )
    took = {row["draft"]: row for row in rows}
    assert (
        took["AdaSPEC rows=in-turn"]["rows"] == 64
        and took["AdaSPEC rows=in-turn"]["target_forwards"] == 32
    )
    assert took["AdaSPEC rows=first"]["target_forwards"] == 16


def test_foresight_of_the_gap_is_a_rank_correlation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=1000)
    assert run_all.rank_correlation(a, np.exp(a)) == pytest.approx(1) and run_all.rank_correlation(
        a, -a
    ) == pytest.approx(-1)
    b = 0.6 * a + 0.8 * rng.normal(
        size=1000
    )  # Pearson's 0.6 is Spearman's 0.582; four standard errors are 0.1
    assert run_all.rank_correlation(a, b) == pytest.approx(0.582, abs=0.1)


def test_the_papers_numbers_are_beside_ours():
    row = {"task": "mbpp", "pair": "pythia", "draft": "AdaSPEC", "regime": "optimal"}
    assert report.paper_alpha(row) == "0.651"
    assert (
        report.paper_alpha(row | {"regime": "3-epoch", "pair": "codegen", "draft": "DistillSpec"})
        == "0.874"
    )
    assert not any(
        report.paper_alpha(row | other)
        for other in ({"pair": "tiny"}, {"draft": "base"}, {"task": "arithmetic"})
    )


def test_who_writes_the_responses(tmp_path):
    """Target-written rows are made once and cached; on-policy ones change with the draft and bypass the cache; all resume."""
    few = "--preset tiny --limit 24 --eval-prompts 2 --timed-prompts 1 --max-new-tokens 8 --epochs 1,1,1 --batch 8".split()
    methods = [f"distillspec:data={source}" for source in run_all.SOURCES] + [
        "distillspec:data=mixed:share=0",
        "adaspec:data=target",
    ]
    run_all.main([*few, "--methods", ",".join(methods), "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    found = {row["draft"]: row for row in rows}
    assert [
        found[f"DistillSpec{name}"]["target_forwards"]
        for name in ("", " data=target", " data=on-policy")
    ] == [24, 48, 24]
    assert found["AdaSPEC data=target"]["target_forwards"] == 48
    cell = tmp_path / "tiny" / "arithmetic" / "seed0"
    made = {path.parent.name: load_file(path) for path in cell.glob("*/model.safetensors")}
    key = "embed_out.weight" if "embed_out.weight" in made["target"] else "lm_head.weight"
    by_source = [
        made[f"distilled-1-epochs{name}"][key]
        for name in ("", "-data-target", "-data-on-policy", "-data-mixed")
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(by_source) for b in by_source[:i])
    assert torch.equal(by_source[0], made["distilled-1-epochs-data-mixed-share-0.0"][key]), (
        "no row was to be rewritten"
    )
    (written,) = cell.glob("target-written-*.tokens")
    run_all.main(
        [
            *few,
            "--methods",
            "distillspec:data=on-policy",
            "--max-new-tokens",
            "9",
            "--out",
            str(tmp_path),
        ]
    )
    again = load_file(cell / "distilled-1-epochs-data-on-policy" / "model.safetensors")
    assert not torch.equal(again[key], by_source[2]), "longer responses are other responses"
    examples, _ = data.read_examples(written)
    tokenizer = AutoTokenizer.from_pretrained(cell / "target")
    truth, _ = data.encode(
        "arithmetic", data.load_rows("arithmetic", "train", limit=24), tokenizer, 128
    )
    assert all(
        (a.input_ids[: a.prompt_length] == b.input_ids[: b.prompt_length]).all()
        for a, b in zip(examples, truth, strict=True)
    )
    assert all(a.prompt_length < len(a.input_ids) <= a.prompt_length + 8 for a in examples)


def test_means_over_seeds_are_paired_by_seed():
    """Against a hand computation: differences 0.01, 0.02, 0.03 have mean 0.02 and half width 4.303 x 0.01 / sqrt(3)."""
    cell = {"task": "gsm8k", "pair": "tiny", "temperature": 1.0}
    rows = []
    for seed, (uniform, ours) in enumerate([(0.50, 0.51), (0.60, 0.62), (0.70, 0.73)]):
        for draft, alpha in (("DistillSpec", uniform), ("AdaSPEC", ours)):
            rows.append(
                cell
                | {"seed": seed, "draft": draft, "alpha": alpha, "expected_acceptance": alpha / 2}
            )
    text = report.over_seeds(rows)
    assert "| gsm8k | tiny | 1.0 | DistillSpec | 0.600 (0.352 to 0.848) |  |" in text
    assert "| AdaSPEC | 0.620 (0.347 to 0.893) | +0.020 (-0.005 to +0.045) |" in text
    assert report.over_seeds(rows[:2]) == ""
