"""The driver end to end on the CPU: stages and their reuse, what results.json holds, two ranks,
pretrained pairs from folders, who writes the responses."""

import json
import os
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import data
import run_all
import speculative
import tables
from arithmetic import arithmetic_rows
from cells import prepare_cell
from settings import METHODS, PAIRS, Method, Pair, Settings
from storage import Model, is_whole
from tests.launch import run_on_ranks

CPU = torch.device("cpu")
ROOT = Path(run_all.__file__).parent
STAGES = ["adaspec", "base-draft", "base-target", "distilled-3-epochs", "target"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOY = {"toy": Pair(SMALL | {"num_hidden_layers": 2}, SMALL, target_lr=1e-3, lr=2e-3)}


def toy_settings(out, changes):
    flags = {
        "tasks": ("arithmetic",), "pairs": ("toy",), "limit": 24, "max_length": 128, "batch": 8,
        "epochs": (1, 1, 1), "max_new_tokens": 8, "eval_prompts": 2, "timed_prompts": 1,
        "validation_rows": 2, "dtype": "float32",
    }  # fmt: skip
    return Settings(**flags | {"out": str(out)} | changes)


def run_grid(settings, methods, run=run_all.run_cell, prepare=prepare_cell):
    """As run_all.main, from settings."""
    rows = []
    for cell in run_all.checked_cells(settings, methods, prepare):
        rows += run(cell, methods)
    run_all.print_tables(rows, settings.out)
    return rows


def run_toy(out, *methods, **changes):
    """The rows of a run of a tiny pair on the offline task."""
    settings = toy_settings(out, changes)
    return run_grid(settings, methods, prepare=partial(prepare_cell, pairs=TOY))


def train_toy(out, *methods, seed=0, **changes):
    """What the drafts' training took, by their labels: a run without evaluation."""

    def costs_alone(cell, target, drafts, costs):
        return costs

    cell = prepare_cell("toy", "arithmetic", seed, toy_settings(out, changes), CPU, TOY)
    return run_all.run_cell(cell, methods, costs_alone)


def results_of(out):
    return json.loads((out / "results.json").read_text())


def labels_of(rows, key="draft"):
    """Each row's temperature and draft, or another of its values."""
    return [(row["temperature"], row[key]) for row in rows]


def settings_of(out):
    """What each stage was trained by, by its folder."""
    paths = out.rglob("stage.json")
    return {path.parent.name: json.loads(path.read_text())["settings"] for path in paths}


def times_of(paths):
    return {path: path.stat().st_mtime_ns for path in paths}


# One run of the tiny preset


def test_every_stage_and_every_row(finished_run):
    assert sorted(settings_of(finished_run)) == STAGES
    results = results_of(finished_run)
    assert is_whole(finished_run / "results.json")
    assert set(results) >= {"commands", "seconds", "git", "machine", "torch", "transformers"}
    assert len(results["commands"]) == 1
    rows = sorted(results["rows"], key=lambda row: row["temperature"])
    drafts = {"base", "DistillSpec", "AdaSPEC"}
    assert set(labels_of(rows)) == {(t, draft) for t in (0.0, 1.0) for draft in drafts}
    assert len(rows) == 6
    for row in rows:
        counts = row["counts"]
        assert row["alpha"] == counts["accepted"] / (counts["accepted"] + counts["rejected"])
        assert row["tau"] == counts["generated"] / counts["target_calls"]
        low, high = row["alpha_interval"]
        assert low <= row["alpha"] <= high and row["speedup"] > 0
        protocol = {"gamma": 5, "prompts": 6, "split": "test", "dtype": "float32", "seed": 0}
        protocol |= {"pair": "tiny", "task": "arithmetic", "train_rows": 48, "timed_prompts": 1}
        protocol |= {"ranks": 1, "device": "cpu", "max_length": 128, "max_new_tokens": 12}
        assert row.items() >= protocol.items()
        if row["temperature"] == 0:
            assert row["expected_acceptance"] == row["agreement"]
        assert ("steps" in row) == (row["draft"] != "base")
    costs = {row["draft"]: [row.get(key) for key in ("epochs", "steps")] for row in rows}
    assert costs == {"base": [None, None], "DistillSpec": [1.0, 3], "AdaSPEC": [2.0, 6]}


def test_stages_are_ordinary_hugging_face_folders(finished_run):
    for path in finished_run.rglob("stage.json"):
        model = AutoModelForCausalLM.from_pretrained(path.parent)
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert (path.parent / "model.safetensors").is_file()
    assert not [*finished_run.rglob("*.partial"), *finished_run.rglob("*.bin")], "the cache is gone"
    target = settings_of(finished_run)["target"]
    assert (target["lr"], target["batch_size"], target["epochs"]) == (1e-3, 16, 3)
    assert settings_of(finished_run)["adaspec"]["k"] == 0.4


def test_what_is_finished_is_used_again(run_copy, short_flags, capsys):
    before = times_of([*run_copy.rglob("*.safetensors"), *run_copy.rglob("evaluations/*")])
    rows = results_of(run_copy)["rows"]
    run_all.main([*short_flags, "--out", str(run_copy), "--methods", "distillspec,AdaSPEC"])
    assert times_of(before) == before
    assert results_of(run_copy)["rows"] == rows
    printed = capsys.readouterr().out
    assert all(f"  {stage}: done before\n" in printed for stage in STAGES)
    assert "last loss" not in printed
    ordered = [row for draft in ("base", "DistillSpec", "AdaSPEC") for row in rows
               if row["draft"] == draft]  # fmt: skip
    ordered.sort(key=lambda row: row["temperature"])
    assert f"\n{tables.terminal_text(ordered)}\n" in printed
    assert f"Results: {run_copy}/results.json and results.md" in printed
    assert "pay on this machine" in printed or "pays on this machine" in printed
    assert "docs/serving.md" not in printed, "nobody serves the tiny pair"
    page = tables.markdown_text(ordered, results_of(run_copy)["machine"])
    assert (run_copy / "results.md").read_text() == page


def test_a_changed_setting_trains_what_depends_on_it_beside(tmp_path, capsys):
    """Nothing trained or measured goes, and each run prints the rows of its own drafts."""
    run_toy(tmp_path, METHODS["adaspec"])
    weights = times_of(tmp_path.rglob("*.safetensors"))
    stages = set(settings_of(tmp_path))

    def run(method=METHODS["adaspec"], **changes):
        """What is printed, and the rows that are new."""
        before = results_of(tmp_path)["rows"]
        run_toy(tmp_path, method, **changes)
        assert times_of(weights) == weights
        after = results_of(tmp_path)["rows"]
        assert all(row in after for row in before)
        return capsys.readouterr().out, [row for row in after if row not in before]

    printed, more = run(Method("adaspec", k=0.2))
    assert "  adaspec-k-0.2: 3 steps" in printed and "other settings" not in printed
    assert labels_of(more) == [(0.0, "AdaSPEC k=0.2"), (1.0, "AdaSPEC k=0.2")]

    printed, more = run(batch=12)
    folders = set(settings_of(tmp_path)) - stages - {"adaspec-k-0.2"}
    beside = {name.rpartition("-")[0]: name for name in folders}
    assert set(beside) == {"target", "distilled-1-epochs", "adaspec"}
    for stage, folder in beside.items():
        assert f"  {stage}: other settings than in " in printed
        assert f"; goes to {folder}\n  " in printed
    assert sorted(labels_of(more, "folder")) == [
        (t, folder) for t in (0, 1) for folder in (beside["adaspec"], "base-draft")
    ]
    printed_rows = sorted(more, key=lambda row: (row["temperature"], row["draft"] != "base"))
    assert f"\n{tables.terminal_text(printed_rows)}\n" in printed, "and no others"
    page = (tmp_path / "results.md").read_text()
    assert "AdaSPEC (adaspec of target)" in page and f"AdaSPEC ({beside['adaspec']} of " in page

    printed, more = run(batch=12)
    assert f"  {beside['adaspec']}: done before\n" in printed and "other settings" not in printed
    assert more == []


def test_drafts_of_one_label_are_told_apart(tmp_path):
    """By their folder, rate and rows; also what was measured by another protocol stays."""
    for changes in ({}, {"eval_prompts": 3}, {"lr": 1e-2, "limit": 20}):
        run_toy(tmp_path, METHODS["distillspec"], max_steps=1, temperatures=(0.0,), **changes)
    rows = results_of(tmp_path)["rows"]
    keys = ("lr", "train_rows", "prompts")
    drafts = [row for row in rows if row["draft"] == "DistillSpec"]
    assert sorted(tuple(row[key] for key in keys) for row in drafts) == [
        (2e-3, 24, 2), (2e-3, 24, 3), (1e-2, 20, 2),
    ]  # fmt: skip
    folders = {row["lr"]: row["folder"] for row in drafts}
    assert folders[2e-3] == "distilled-1-epochs"
    assert {lr: settings_of(tmp_path)[folder]["lr"] for lr, folder in folders.items()} == {
        2e-3: 2e-3, 1e-2: 1e-2,
    }  # fmt: skip


def test_other_temperatures_are_evaluated_anew(tmp_path):
    for temperatures in ((0.0, 1.0), (0.0,)):
        run_toy(tmp_path, METHODS["distillspec"], max_steps=1, temperatures=temperatures)
        rows = results_of(tmp_path)["rows"]
        assert labels_of(rows) == [(t, row["draft"]) for row in rows[:: len(temperatures)]
                                   for t in temperatures]  # fmt: skip
        assert len(rows) == 2 * len(temperatures)


def test_other_prompts_are_evaluated_anew(tmp_path):
    """As many of them, under the same protocol: the file of a draft's rows is replaced."""
    write_rows(tmp_path, "gsm8k")
    runs = []
    for start in (0, 2, 2):
        lines = [json.dumps(row) for row in arithmetic_rows("test")[start : start + 2]]
        (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(lines))
        settings = {"tasks": ("gsm8k",), "data_dir": str(tmp_path), "max_steps": 1}
        settings["temperatures"] = (0.0,)
        run_toy(tmp_path / "out", METHODS["distillspec"], **settings)
        runs.append(results_of(tmp_path / "out")["rows"])
    first, second, third = runs
    assert len(first) == len(second) == 2
    assert all(row not in second for row in first) and second == third


def test_a_grid_is_checked_before_its_first_cell_is_run(tmp_path, capsys):
    cells = []

    def run(cell, methods):
        cells.append((cell.name, cell.task, cell.seed))
        return []

    write_rows(tmp_path, "gsm8k")
    flags = {"data_dir": str(tmp_path), "seeds": (0, 7), "limit": 20, "max_new_tokens": 8}
    flags |= {"eval_prompts": 2, "max_length": 128, "out": str(tmp_path / "out")}
    settings = Settings(tasks=("gsm8k", "arithmetic"), pairs=("tiny", "tiny-wide"), **flags)
    run_grid(settings, [METHODS["best"]], run=run)
    grid = [(pair, task) for pair in settings.pairs for task in settings.tasks]
    assert cells == [(*cell, seed) for cell in grid for seed in (0, 7)]
    plan = capsys.readouterr().out.splitlines()
    assert plan[0] == "Plan"
    for line, (pair, task) in zip(plan[1:5], grid, strict=True):
        assert line.startswith(f"{pair} / {task} / seed 0, 7: 20 train rows, 2 test prompts")
        assert line.endswith("epochs of target, reference, draft: 3, 3, 3")
    cells.clear()
    settings = replace(settings, tasks=("gsm8k", "mbpp"))
    with pytest.raises(FileNotFoundError, match=r"mbpp.train\.jsonl does not exist"):
        run_grid(settings, [METHODS["best"]], run=run)
    assert cells == []
    with pytest.raises(ValueError, match="start with torchrun"):
        run_grid(replace(settings, shard_target=True), [])


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_autocast_type_is_the_devices_unless_given(tmp_path, dtype, expected):
    def run(cell, methods):
        assert cell.dtype == expected
        return []

    settings = toy_settings(tmp_path, {"dtype": dtype})
    run_grid(settings, [], run=run, prepare=partial(prepare_cell, pairs=TOY))


def test_a_folder_of_the_users_named_cache_stays(tmp_path):
    """What a target taken as it is says was kept there, and removed at the end of a run."""
    cells = []

    def run(cell, methods):
        cell.cache_folder.mkdir(parents=True)
        cells.append(cell)
        return []

    (tmp_path / "cache").mkdir()
    settings = toy_settings(tmp_path, {"epochs": (0, 1, 1)})
    prepare = partial(prepare_cell, pairs=TOY)
    run_grid(settings, [METHODS["best"]], run=run, prepare=prepare)
    assert (tmp_path / "cache").is_dir() and not cells[0].cache_folder.exists()


def test_seeds_can_share_a_target(tmp_path):
    for seed in (1, 0):
        train_toy(tmp_path, METHODS["distillspec"], seed=seed, target_seed=0, max_steps=1)
    cell = tmp_path / "toy" / "arithmetic"
    stages = {path.parent.name for path in (cell / "seed1").glob("*/stage.json")}
    assert stages == {"base-draft", "distilled-1-epochs"}
    first, second = (settings_of(cell / f"seed{s}")["distilled-1-epochs"] for s in (0, 1))
    assert first["target"] == second["target"] and first["init"] != second["init"]


def test_matchings_share_what_they_say(tmp_path):
    """Issue 13.9, on 41 rows: against DistillSpec's steps, passes, and loss-bearing tokens."""
    methods = {match: Method("adaspec", match=match) for match in ("steps", "epochs", "tokens")}
    flags = {"limit": 41, "batch": 16, "epochs": (0, 1, 3)}
    costs = train_toy(tmp_path, METHODS["distillspec"], *methods.values(), **flags)
    uniform = costs["DistillSpec"]
    assert (uniform["epochs"], uniform["steps"], uniform["target_forwards"]) == (3, 9, 41)
    own, shares = {}, {}  # without the reference's one pass of three steps
    for match, method in methods.items():
        cost = costs[method.label]
        own[match] = (cost["epochs"] - 1, cost["steps"] - 3)
        shares[match] = cost["loss_tokens"] / uniform["loss_tokens"] - 1 / 3
        assert cost["target_forwards"] == 41
    assert own["steps"] == (3, 9) and own["epochs"] == (3, 2 * 3)
    assert shares["steps"] == pytest.approx(0.4, rel=0.03)
    assert shares["epochs"] == pytest.approx(0.4, rel=0.03)
    assert 0.97 <= shares["tokens"] <= 1.1


# Who writes the responses


def weights_of(out, *names):
    """All weights of the named stages, each as one vector."""
    (cell,) = out.glob("*/*/seed*")
    vectors = []
    for name in names:
        weights = load_file(cell / name / "model.safetensors")
        vectors.append(torch.cat([weights[key].flatten() for key in sorted(weights)]))
    return vectors


def test_who_writes_the_responses(tmp_path):
    """Each source is another training; rows written by the target are made once and shared."""
    sources = ("ground-truth", "target", "on-policy", "mixed")
    methods = [Method("distillspec", data=source) for source in sources]
    methods += [Method("distillspec", data="mixed", share=0.0), Method("adaspec", data="target")]
    costs = train_toy(tmp_path, *methods)
    assert {label: cost["target_forwards"] for label, cost in costs.items()} == {
        "DistillSpec": 24,
        "DistillSpec data=target": 24 + 24,
        "DistillSpec data=on-policy": 24,
        "DistillSpec data=mixed": 24,
        "DistillSpec data=mixed share=0.0": 24,
        "AdaSPEC data=target": 24 + 24,
    }
    names = [f"distilled-1-epochs{end}" for end in ("", "-data-target", "-data-on-policy",
             "-data-mixed", "-data-mixed-share-0.0")]  # fmt: skip
    *trained, untouched = weights_of(tmp_path, *names)
    for i, weights in enumerate(trained):
        assert not any(torch.equal(weights, other) for other in trained[:i])
    assert torch.equal(trained[0], untouched), "no row was to be written anew"

    (cell,) = tmp_path.glob("toy/arithmetic/seed0")
    (written,) = tmp_path.glob("written/*.tokens")
    examples, _ = data.read_examples(written)
    tokenizer = AutoTokenizer.from_pretrained(cell / "target")
    given, _ = data.encode("arithmetic", arithmetic_rows("train")[:24], tokenizer, 128)
    prompts = sorted(data.prompt_ids(example).tolist() for example in given)
    assert sorted(data.prompt_ids(example).tolist() for example in examples) == prompts
    lengths = [len(example.input_ids) - example.prompt_length for example in examples]
    assert min(lengths) >= 1 and max(lengths) <= 8

    train_toy(tmp_path, Method("distillspec", data="on-policy"), max_new_tokens=9)
    (beside,) = cell.glob(f"{names[2]}-????????")
    (again,) = weights_of(tmp_path, beside.name)
    assert not torch.equal(again, trained[2]), "longer responses are other responses"


def test_a_draft_is_what_it_is_alone(tmp_path):
    """Drafts of one command share target, reference and caches, and nothing that is not theirs."""
    method = Method("adaspec", gap="tvd")
    train_toy(tmp_path / "alone", method)
    train_toy(tmp_path / "together", METHODS["adaspec"], METHODS["distillspec"], method)
    (alone,) = weights_of(tmp_path / "alone", "adaspec-gap-tvd")
    together, usual = weights_of(tmp_path / "together", "adaspec-gap-tvd", "adaspec")
    assert torch.equal(alone, together) and not torch.equal(together, usual)


# Pretrained pairs


def save_models(folder, make_model, tokenizer, architectures, names, paddings=(48, 16), seed=0):
    """A target and a draft in random weights, their heads padded differently."""
    models = zip(architectures, names, paddings, strict=True)
    for number, (architecture, name, padding) in enumerate(models):
        model = make_model(architecture, seed + number, vocab_size=len(tokenizer) + padding)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return [folder / name for name in names]


def write_rows(folder, task):
    for split, n in (("train", 40), ("test", 4)):
        (folder / task).mkdir(parents=True, exist_ok=True)
        rows = arithmetic_rows(split)[:n]
        if task == "custom":
            rows = [{"prompt": row["question"], "response": row["answer"]} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / f"{split}.jsonl").write_text(text)


FEW = "--max-steps 2 --batch 4 --eval-prompts 2 --timed-prompts 1 --max-new-tokens 6".split()
FEW += ["--max-length", "128"]


def test_a_paper_pair_from_a_folder(tmp_path, tokenizer, make_model):
    """By the whole name and by its last part, heads padded differently, the target as it is."""
    pair = PAIRS["codegen"]
    names = [pair.target.split("/")[-1], pair.draft]
    save_models(tmp_path / "models", make_model, tokenizer, ("phi", "codegen"), names)
    write_rows(tmp_path / "rows", "gsm8k")
    folders = ["--models-dir", tmp_path / "models", "--data-dir", tmp_path / "rows"]
    flags = [*folders, "--out", tmp_path / "out", "--pairs", "CodeGen", "--tasks", "GSM8K"]
    run_all.main([*FEW, *map(str, flags), "--epochs", "0,1,2"])
    stages = settings_of(tmp_path / "out")
    assert set(stages) == {"distilled-1-epochs", "distilled-2-epochs", "adaspec"}
    settings = stages["adaspec"]
    assert (settings["lr"], settings["batch_size"], settings["k"]) == (3e-4, 4, 0.4)
    rows = results_of(tmp_path / "out")["rows"]
    assert len(rows) == 6 and {row["pair"] for row in rows} == {"codegen"}


def test_an_own_pair_is_what_its_models_hold(tmp_path, tokenizer, make_model, capsys, monkeypatch):
    """Issue 13.7: a path typed otherwise or a touched file retrained everything, edited weights
    were "done before", and two pairs whose folders have equal names shared a cell."""
    names = ("T", "D")
    pairs = [
        save_models(tmp_path / folder, make_model, tokenizer, ("neox", "neox"), names, seed=seed)
        for folder, seed in (("a", 0), ("b", 5))
    ]
    write_rows(tmp_path / "rows", "custom")
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)

    def run(target, draft):
        flags = ["--target", target, "--draft", draft, "--data-dir", tmp_path / "rows"]
        flags += ["--out", out, "--tasks", "custom"]
        run_all.main([*FEW, *map(str, flags), "--methods", "distillspec", "--max-steps", "1"])
        printed = capsys.readouterr().out
        assert "To serve the pair: docs/serving.md. To try it:" in printed
        assert printed.count("the target's repetition_penalty 1.3\n") == 1, "said once"
        return printed.count(": done before"), printed.count(": 1 steps")

    for target, _ in pairs:
        GenerationConfig(repetition_penalty=1.3).save_pretrained(target)
    target, draft = pairs[0]
    assert run(target, draft) == (0, 1)
    assert set(settings_of(out)) == {"distilled-3-epochs"}, "the target is taken as it is"
    os.utime(target / "config.json")
    os.utime(draft / "model.safetensors")
    assert run("a/T", "./a/D/") == (1, 0)
    assert run(*pairs[1]) == (0, 1)
    state = (draft / "model.safetensors").stat()
    weights = load_file(draft / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, draft / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    os.utime(draft / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (draft / "model.safetensors").stat().st_size == state.st_size
    assert run(target, draft) == (0, 1), "another pair, in a cell of its own"
    rows = results_of(out)["rows"]
    cells = {row["pair"] for row in rows}
    assert len(cells) == 3 and all(name.startswith("custom-T-D-") for name in cells)
    assert len(rows) == 3 * 4


def test_a_target_alone_and_a_number_of_layers_are_a_pair(tmp_path, tokenizer, make_model, capsys):
    (target,) = save_models(tmp_path, make_model, tokenizer, ("llama",), ("T",), paddings=(16,))
    write_rows(tmp_path / "rows", "custom")
    flags = ["--target", str(target), "--draft-layers", "1", "--data-dir", str(tmp_path / "rows")]
    flags += [*FEW, "--tasks", "custom", "--methods", "best", "--out", str(tmp_path / "out")]
    run_all.main([*flags, "--max-steps", "1"])
    stages = settings_of(tmp_path / "out")
    best = "best-6-epochs-divergence-lk_hybrid"
    assert set(stages) == {"base-draft", best}, "the target is taken as it is"
    (folder,) = tmp_path.glob("out/custom-T-1-layer-*/base-draft")
    record = json.loads((folder / "stage.json").read_text())
    assert stages[best]["init"] == record["fingerprint"]
    rows = results_of(tmp_path / "out")["rows"]
    assert {(row["draft"], row["folder"]) for row in rows} == {
        ("base", "base-draft"), ("best divergence=lk_hybrid", best),
    }  # fmt: skip
    capsys.readouterr()
    run_all.main([*flags, "--max-steps", "1"])
    printed = capsys.readouterr().out
    assert printed.count(": done before") == 2 and "last loss" not in printed


def test_a_draft_is_measured_as_it_is(tmp_path, tokenizer, make_model, capsys, monkeypatch):
    """--methods none: nothing is written or trained, and the verdict and the command to try it are
    those of the draft that was given. Both models' weights are packed."""
    models = []
    monkeypatch.setattr(run_all, "pack_weights", models.append)
    sizes = (("llama", "llama"), ("T", "D"))
    target, draft = save_models(tmp_path, make_model, tokenizer, *sizes, paddings=(16, 32))
    (tmp_path / "rows" / "custom").mkdir(parents=True)
    lines = [json.dumps({"prompt": f"What is {n} + 1?"}) for n in range(30)]
    (tmp_path / "rows" / "custom" / "train.jsonl").write_text("\n".join(lines))
    flags = ["--target", str(target), "--draft", str(draft), "--data-dir", str(tmp_path / "rows")]
    flags += ["--tasks", "custom", "--methods", "none", "--out", str(tmp_path / "out")]
    flags += "--eval-prompts 2 --timed-prompts 1 --max-new-tokens 6 --dtype bfloat16".split()
    run_all.main([*flags, "--temperatures", "0.5"])
    printed = capsys.readouterr().out
    assert not settings_of(tmp_path / "out") and "writes" not in printed
    rows = results_of(tmp_path / "out")["rows"]
    assert labels_of(rows) == [(0.5, "base")]
    assert (rows[0]["folder"], rows[0]["dtype"]) == ("D", "bfloat16")
    assert len(models) == 2
    assert re.search(r"^base (may pay|pays|does not pay) on this machine", printed, re.MULTILINE)
    assert f"--draft {draft} " in printed.rstrip().split("\n")[-1]


def test_chats_without_responses_end_in_a_draft_that_can_be_tried(
    tmp_path, tokenizer, make_model, capsys
):
    """The path of docs/own-draft: the target writes, once; a draft of one layer with a short head
    learns; the last line is a command that decodes with it."""
    (target,) = save_models(tmp_path, make_model, tokenizer, ("llama",), ("T",), paddings=(16,))
    saved = AutoTokenizer.from_pretrained(target)
    saved.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    saved.save_pretrained(target)
    prompts = [f"What is {n} + 1 of 'them'?" for n in range(30)]
    rows = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in prompts]
    (tmp_path / "rows" / "custom").mkdir(parents=True)
    (tmp_path / "rows" / "custom" / "train.jsonl").write_text("\n".join(rows))
    flags = ["--target", str(target), "--draft-layers", "1", "--draft-vocab", "40"]
    flags += ["--data-dir", str(tmp_path / "rows"), "--tasks", "custom", "--batch", "8"]
    flags += ["--write-temperature", "0,1", "--out", str(tmp_path / "out"), "--max-steps", "2"]
    flags += "--eval-prompts 2 --timed-prompts 1 --max-new-tokens 6 --dtype float32".split()
    run_all.main([*flags, "--methods", "distillspec,adaspec"])
    printed = capsys.readouterr().out
    assert "the target writes 24 responses" in printed
    rows = results_of(tmp_path / "out")["rows"]
    forwards = {row["target_forwards"] for row in rows if row["draft"] != "base"}
    assert forwards == {48}, "to write and to answer"
    assert re.search(r"short head: 40 of 400 tokens, with 0\.\d+ of the target's prob", printed)
    assert re.search(r"adaspec: 2 steps.* alpha 0\.\d+ on 3 validation rows", printed)
    written = map(data.read_examples, tmp_path.glob("out/written/*.tokens"))
    assert sorted(len(rows) for rows, _ in written) == [1, 2, 12, 12], "once for both methods"
    line = printed.rstrip().split("\n")[-1]
    program, script, *arguments = shlex.split(line)
    assert (program, script) == ("python", "speculative.py") and "--chat" in arguments
    assert arguments[-1] in prompts
    speculative.main([*arguments, "--max-new-tokens", "5"])
    assert "alpha" in capsys.readouterr().out
    run_all.main([*flags, "--methods", "distillspec,adaspec"])
    assert "writes" not in capsys.readouterr().out


def test_the_sample_is_a_prompt_as_it_is(tmp_path, tokenizer, make_model):
    """The shortest that is not dropped; a chat of several turns goes through a file; a target that
    was trained here is the one to decode with."""
    (target,) = save_models(tmp_path, make_model, tokenizer, ("llama",), ("T",), paddings=(16,))
    saved = AutoTokenizer.from_pretrained(target)
    saved.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    saved.save_pretrained(target)
    user = {"role": "user", "content": "What is 1 + 1?"}
    history = [{"role": "system", "content": "Add."}, user]
    rows = {"train": [{"messages": history}] * 4, "test": [{"messages": history}]}
    (tmp_path / "rows" / "custom").mkdir(parents=True)

    def sample_of(epochs, test):
        for split, lines in (rows | {"test": test}).items():
            text = "\n".join(map(json.dumps, lines))
            (tmp_path / "rows" / "custom" / f"{split}.jsonl").write_text(text)
        settings = Settings(out=str(tmp_path), target=str(target), draft_layers=1, epochs=epochs,
                            data_dir=str(tmp_path / "rows"), dtype="float32")  # fmt: skip
        cell = prepare_cell("custom", "custom", 0, settings, CPU)
        row = {"draft": "best", "folder": "best", "target": "target", "temperature": 0.0}
        speedup, command = run_all.sample_command(cell, [row])
        assert speedup == 0.0, "no costs are known"
        command = shlex.split(command)
        return command[3], command[command.index("0") + 1 :], cell

    name, arguments, cell = sample_of((0, 1, 1), [{"messages": history}])
    assert name == str(target) and arguments == ["--prompts", str(cell.folder / "sample.jsonl")]
    assert data.read_prompts(arguments[1]) == [history]
    name, arguments, cell = sample_of((1, 1, 1), [{"prompt": ""}, {"messages": [user]}])
    assert name == str(cell.folder / "target")
    assert arguments == ["--chat", "--prompt", "What is 1 + 1?"]


def test_the_draft_to_try_is_of_the_best_seed(monkeypatch, capsys):
    """It was the last seed's."""
    cells = [SimpleNamespace(name="custom-t-d", task="custom", seed=seed) for seed in (0, 1, 2)]
    speedups = (1.1, 1.5, 1.2)
    monkeypatch.setattr(run_all, "checked_cells", lambda *arguments: cells)
    monkeypatch.setattr(run_all, "run_cell", lambda cell, methods: [])
    monkeypatch.setattr(
        run_all, "sample_command", lambda cell, rows: (speedups[cell.seed], f"seed {cell.seed}")
    )
    run_all.main([])
    assert capsys.readouterr().out.endswith("To try it:\n\nseed 1\n")


@pytest.mark.parametrize(("flags", "message"), [
    (["--epochs", "1,1,1"], "have no responses to fine-tune the target on"),
    (["--draft-vocab", "1000"], "--draft-vocab 1000 is more than the 400 tokens"),
    (["--chat", "--tasks", "gsm8k"], "gsm8k, row 1: a chat, but the tokenizer has no chat temp"),
    (["--max-length", "4"], "custom: no rows are left within 4 tokens; raise --max-length"),
])  # fmt: skip
def test_what_cannot_be_of_an_own_pair_is_said_first(
    tmp_path, tokenizer, make_model, flags, message
):
    (target,) = save_models(tmp_path, make_model, tokenizer, ("llama",), ("T",), paddings=(16,))
    write_rows(tmp_path / "rows", "gsm8k")
    (tmp_path / "rows" / "custom").mkdir()
    text = "".join(json.dumps({"prompt": f"What is {n} + 1?"}) + "\n" for n in range(30))
    (tmp_path / "rows" / "custom" / "train.jsonl").write_text(text)
    common = ["--target", str(target), "--draft-layers", "1", "--data-dir", str(tmp_path / "rows")]
    common += ["--tasks", "custom", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        run_all.main([*common, *flags])
    assert (
        not list(tmp_path.rglob("*.safetensors.partial"))
        and not (tmp_path / "out" / "written").exists()
    )


# Ranks


def test_two_ranks_end_in_the_same_models(tmp_path, tokenizer, make_model):
    """Ranks of unequal token counts, a filter over both, prompts dealt to both, one voice."""
    target, draft = save_models(tmp_path, make_model, tokenizer, ("neox", "neox"), ("T", "D"))
    flags = "--epochs 3,3,3 --tasks arithmetic --limit 40 --max-steps 3 --eval-prompts 24".split()
    flags += "--timed-prompts 1 --max-new-tokens 6 --max-length 128 --dtype float32".split()
    flags += ["--target", str(target), "--draft", str(draft), "--out"]
    single, double = tmp_path / "single", tmp_path / "double"
    run_all.main([*flags, str(single)])
    printed = run_on_ranks("run_all.py", *flags, double)
    assert printed.count("\nAcceptance:\n") == 1, "only rank 0 may print"
    paths = list(single.rglob("model.safetensors"))
    assert len(paths) == 3
    for path in paths:
        both = [load_file(path), load_file(double / path.relative_to(single))]
        one, two = (torch.cat([part[name].flatten() for name in sorted(part)]) for part in both)
        # not weight by weight: Adam's first steps are +-lr for a gradient that is but rounding
        assert (one - two).norm() < 1e-5 * one.norm(), path.parent.name
    rows = [sorted(results_of(out)["rows"], key=lambda row: (row["draft"], row["temperature"]))
            for out in (single, double)]  # fmt: skip
    for one, two in zip(*rows, strict=True):
        assert two["ranks"] == 2 and two["speedup"] > 0
        assert one["expected_acceptance"] == pytest.approx(two["expected_acceptance"], abs=1e-3)
        assert one["counts"]["target_calls"] == pytest.approx(two["counts"]["target_calls"], abs=4)
        assert one.get("loss_tokens", 0) == pytest.approx(two.get("loss_tokens", 0), rel=0.01)


# Evaluations


def test_drafts_of_other_kinds_are_loaded_by_their_own_way(tmp_path, monkeypatch):
    """evaluate_drafts(load=...): extras/eagle.py brings its loader."""
    flags = {"limit": 8, "max_length": 128, "eval_prompts": 2, "dtype": "float32"}
    settings = Settings(out=str(tmp_path), **flags)
    cell = prepare_cell("toy", "arithmetic", 0, settings, CPU, TOY)
    loads = []

    def evaluate(target, drafts, examples, tokenizer, settings, seed, name, ends):
        loads.append((target, drafts))
        return [{"draft": label, "temperature": t, "x": 1} for t in (0, 1) for label in drafts]

    monkeypatch.setattr(run_all, "evaluate", evaluate)
    monkeypatch.setattr(run_all, "pack_weights", lambda model: None)  # the models here are names

    def load(path, dtype, device):
        assert dtype == torch.float32 and device == CPU
        return f"network of {path}"

    target = Model("T", "t")
    drafts = {"base": Model("D", "d"), "head": Model("H", "h")}
    costs = {"head": {"steps": 5}}
    rows = run_all.evaluate_drafts(cell, target, drafts, costs, load)
    assert labels_of(rows) == [(0, "base"), (0, "head"), (1, "base"), (1, "head")]
    assert [row.get("steps") for row in rows] == [None, 5, None, 5]
    expected = {"base": "network of D", "head": "network of H"}
    assert loads == [("network of T", expected)]
    # what is there is not measured again, and nothing of it loaded
    assert run_all.evaluate_drafts(cell, target, drafts, costs, load) == rows and len(loads) == 1
    drafts["head"] = Model("H2", "h2")
    again = run_all.evaluate_drafts(cell, target, drafts, costs, load)
    assert loads[1:] == [("network of T", {"head": "network of H2"})]
    assert labels_of(again, "folder") == [(0, "D"), (0, "H2"), (1, "D"), (1, "H2")]
    # other end tokens are other texts
    cell.ends = [*cell.ends, 7]
    run_all.evaluate_drafts(cell, target, drafts, costs, load)
    assert len(loads) == 3 and len(loads[2][1]) == 2
