"""Comparisons: their drafts and labels, the flags of studies, the columns they add, mixed tasks."""

import json
import re
from dataclasses import replace

import pytest
import torch

import data
import models
import settings as settings_module
from cells import check_cell, draft_plan, prepare_cell
from extras import ablations, analysis
from extras.ablations import COMPARISONS, MixedMethod, parse_arguments
from settings import METHODS, Method
from speculative import Stats, speculative_generate
from tests.extras.toy import TOY_PAIR

CPU = torch.device("cpu")
SHORT = (
    "--pairs tiny --limit 16 --batch 8 --epochs 1,1,1 --max-length 160 --eval-prompts 2 "
    "--timed-prompts 1 --max-new-tokens 8"
).split()


def rows_of(out):
    return json.loads((out / "results.json").read_text())["rows"]


def stages_of(cell):
    """stage.json of every stage, by the name of its folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in cell.glob("*/stage.json")}


# The comparisons


def test_all_comparisons_are_there_and_their_drafts_differ():
    counts = {name: len(methods) for name, methods in COMPARISONS.items()}
    assert counts == {
        "selection": 3, "k": 10, "divergence": 8, "fine-tuning": 5, "reference": 5, "epochs": 10,
        "match": 4, "adaptive": 5, "data": 10, "best": 23, "mixed": 6, "grid": 7, "controls": 9,
        "rows": 3, "passes": 9, "long-passes": 4, "rates": 16, "losses": 12, "paper-mbpp": 4,
        "paper-gsm8k": 3, "seconds": 9,
    }  # fmt: skip
    for name, methods in COMPARISONS.items():
        assert len({method.label for method in methods}) == len(methods), name


def test_labels_are_those_of_recorded_results():
    labels = {name: [method.label for method in COMPARISONS[name]] for name in COMPARISONS}
    assert labels["selection"] == ["AdaSPEC", "AdaSPEC select=bottom", "AdaSPEC select=random"]
    assert labels["k"][:4] == ["AdaSPEC k=0.1", "AdaSPEC k=0.2", "AdaSPEC k=0.3", "AdaSPEC"]
    assert labels["reference"] == [f"AdaSPEC reference_epochs={n}" for n in range(1, 6)]
    assert labels["grid"] == [
        "DistillSpec", "AdaSPEC", "AdaSPEC match=epochs", "AdaSPEC match=tokens",
        "DistillSpec epochs=6", "best", "best epochs=9",
    ]  # fmt: skip
    assert labels["match"] == labels["grid"][:4]
    assert labels["passes"][2:4] == ["DistillSpec epochs=6", "AdaSPEC epochs=6 reference_epochs=6"]
    assert {
        "AdaSPEC lr=0.004",
        "AdaSPEC batch=4 decay=linear",
        "AdaSPEC divergence=tvd gap=tvd decay=linear",
        "AdaSPEC divergence=tvd k_end=1.0 gap=tvd batch=4 decay=linear",
        "DistillSpec decay=linear epochs=6",
        "DistillSpec divergence=lk_hybrid batch=8 decay=linear epochs=6",
        "DistillSpec divergence=tvd lr=0.004 decay=linear epochs=6",
        "DistillSpec divergence=tvd batch=4 decay=linear epochs=9",
        "DistillSpec divergence=tvd data=target batch=4 decay=linear epochs=6",
    } <= set(labels["best"])
    assert labels["divergence"][5:] == [
        "AdaSPEC divergence=rkl gap=rkl",
        "AdaSPEC divergence=tvd gap=tvd",
        "AdaSPEC divergence=jsd gap=jsd",
    ]
    assert labels["fine-tuning"] == [
        "DistillSpec divergence=ce",
        "DistillSpec",
        "AdaSPEC divergence=ce gap=ce reference=ce",
        "AdaSPEC reference=ce",
        "AdaSPEC",
    ]
    assert labels["adaptive"][1:] == [
        "AdaSPEC k=0.1 k_end=0.7",
        "AdaSPEC k=0.7 k_end=0.1",
        "AdaSPEC k_end=1.0",
        "AdaSPEC k=1.0 k_end=0.4",
    ]
    assert labels["data"][4:] == [
        "AdaSPEC", "AdaSPEC data=target", "AdaSPEC data=on-policy", "AdaSPEC data=mixed",
        "best", "best data=target",
    ]  # fmt: skip
    assert labels["mixed"] == [
        "DistillSpec rows=first", "AdaSPEC rows=first", "DistillSpec rows=in-turn",
        "AdaSPEC rows=in-turn", "DistillSpec", "AdaSPEC",
    ]  # fmt: skip
    assert (
        labels["epochs"][3] == "DistillSpec epochs=6" and labels["epochs"][5] == "AdaSPEC epochs=1"
    )


def test_every_comparison_has_a_stage_of_its_own_for_each_draft(toy_pair, tmp_path, monkeypatch):
    """All of them pass the checks before training, and no two drafts share a folder."""
    monkeypatch.setattr("cells.written_by_target", lambda cell, target, draft, examples: examples)
    settings, _ = parse_arguments(["k", *SHORT, "--out", str(tmp_path)])
    settings = replace(settings, dtype="float32")
    cell = prepare_cell("tiny", "arithmetic", 0, settings, CPU)
    for name, methods in COMPARISONS.items():
        if name == "mixed":
            continue
        check_cell(cell, methods)
        plans = [draft_plan(cell, method, None, None) for method in methods]
        assert len({plan.name for plan in plans}) == len(plans)


# Flags


def test_flags_of_a_comparison():
    settings, methods = parse_arguments(["K"])
    assert settings.comparison == "k" and methods == COMPARISONS["k"]
    assert settings.split == "validation" and settings.target_seed is None
    assert settings.timed_gammas is None and settings.eval_batch == 20
    flags = "grid --preset tiny --split test --target-seed 0 --timed-gammas 1,3,8 --eval-batch 7"
    settings, _ = parse_arguments(flags.split())
    assert settings.tasks == ("arithmetic",) and settings.limit == 2000
    assert (settings.split, settings.target_seed, settings.eval_batch) == ("test", 0, 7)
    assert settings.timed_gammas == (1, 3, 8)
    settings, methods = parse_arguments(["mixed", "--tasks", "gsm8k+MBPP,alpaca+xsum"])
    assert settings.tasks == ("gsm8k+mbpp", "alpaca+xsum") and methods == COMPARISONS["mixed"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("seletcion", "unknown name 'seletcion', did you mean 'selection'?"),
        ("k --methods best", "unrecognized arguments: --methods best"),
        ("k --data target", "unrecognized arguments: --data target"),
        ("k --split train", "unknown name 'train', expected one of validation, test"),
        ("k --timed-gammas 1,0", "argument --timed-gammas: must be at least 1, got '1,0'"),
        ("k --target-seed -1", "argument --target-seed: must be a whole number of at least 0"),
        ("k --eval-batch 0", "must be a whole number of at least 1"),
        ("k --tasks gsm8k+mbpp", "--tasks gsm8k+mbpp is for the comparison mixed"),
        ("mixed --tasks gsm8k", "mixed compares on tasks such as gsm8k+mbpp, and gsm8k is none"),
        ("mixed --tasks gsm8k+mpbb", "unknown name 'mpbb', expected one of gsm8k"),
        ("mixed --tasks gsm8k+gsm8k", "'gsm8k' is there twice"),
        ("mixed --tasks gsm8k+mbpp,gsm8k+mbpp", "'gsm8k+mbpp' is there twice"),
    ],
)
def test_flags_that_cannot_be_right(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(flags.split())
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1


# Runs


@pytest.mark.slow
def test_matchings_share_what_they_say(toy_pair, tmp_path, capsys):
    """Against DistillSpec: steps and passes; passes and tokens a step; loss-bearing tokens."""
    flags = [*SHORT, "--tasks", "arithmetic", "--limit", "60", "--epochs", "1,2,2"]
    ablations.main(["match", *flags, "--batch", "4", "--out", str(tmp_path)])
    rows = {row["draft"]: row for row in rows_of(tmp_path)}
    assert {row["split"] for row in rows.values()} == {"validation"}
    assert rows.keys() == {"base", *(method.label for method in COMPARISONS["match"])}
    uniform = rows["DistillSpec"]
    steps, epochs, tokens = (
        rows[f"AdaSPEC{match}"] for match in ("", " match=epochs", " match=tokens")
    )
    # the reference is DistillSpec's draft: what it took is in both
    assert uniform["epochs"] == 2 and uniform["steps"] == 2 * 15
    assert steps["steps"] == 2 * uniform["steps"] and steps["epochs"] == 4
    own_tokens = steps["loss_tokens"] - uniform["loss_tokens"]
    assert own_tokens == pytest.approx(0.4 * uniform["loss_tokens"], rel=0.01)
    assert epochs["epochs"] == 4 and epochs["steps"] == uniform["steps"] + 2 * 6
    own_tokens = epochs["loss_tokens"] - uniform["loss_tokens"]
    assert own_tokens == pytest.approx(0.4 * uniform["loss_tokens"], rel=0.01)
    own_tokens = tokens["loss_tokens"] - uniform["loss_tokens"]
    assert own_tokens == pytest.approx(uniform["loss_tokens"], rel=0.03)
    assert {row["target_forwards"] for row in (uniform, steps, epochs, tokens)} == {60}
    printed = re.sub("does not pay|may pay", "pays", capsys.readouterr().out)
    assert "AdaSPEC match=tokens pays on" in printed
    page = (tmp_path / "results.md").read_text()
    lines = page.count("| AdaSPEC match=tokens |")
    assert lines == 1 + 2 * (2 + 1 + 1), "what it took; by temperature, two lines of positions"


@pytest.mark.slow
def test_reference_and_timed_gammas_add_columns_that_stay(toy_pair, tmp_path, monkeypatch, capsys):
    """Gap correlations and speed-ups by gamma are in results.json, and are not measured again."""
    monkeypatch.setitem(COMPARISONS, "reference", COMPARISONS["reference"][:2])
    monkeypatch.setitem(COMPARISONS, "selection", [Method("adaspec", reference_epochs=2)])
    flags = [*SHORT, "--tasks", "arithmetic", "--out", str(tmp_path)]
    ablations.main(["selection", *flags])
    assert not any("gap_correlation" in row for row in rows_of(tmp_path))
    timed, timings = [], ablations.timings

    def spy(target, drafts, prompts, gamma, *inputs):
        timed.append((gamma, inputs[0]["temperature"]))
        return timings(target, drafts, prompts, gamma, *inputs)

    monkeypatch.setattr(ablations, "timings", spy)
    for repeat in range(2):
        ablations.main(["reference", *flags, "--timed-gammas", "3,1,5"])
        rows = rows_of(tmp_path)
        assert [row["draft"] for row in rows].count("AdaSPEC reference_epochs=2") == 2
        for row in rows:
            assert list(row["speedup_by_gamma"]) == ["1", "3", "5"]
            assert row["speedup_by_gamma"]["5"] == row["speedup"]
            assert min(row["speedup_by_gamma"].values()) > 0
            adaspec = row["draft"].startswith("AdaSPEC")
            assert ("gap_correlation" in row) == ("loss_correlation" in row) == adaspec
        assert sorted(timed) == [(1, 0.0), (1, 1.0), (3, 0.0), (3, 1.0)]
        assert ("last loss" in capsys.readouterr().out) == (repeat == 0)
    by_draft = {row["draft"]: row["gap_correlation"] for row in rows if "gap_correlation" in row}
    cell = tmp_path / "tiny" / "arithmetic" / "seed0"
    finished = analysis.FinishedCell(cell)
    tokenizer = models.load_tokenizer(str(cell / "target"))
    examples = finished.held_out(tokenizer, "validation", 2, max_length=160)
    for folder, values in analysis.cell_correlations(finished, examples, len(tokenizer)).items():
        epochs = folder.name.removeprefix("adaspec-reference_epochs-")
        expected = values["gap_correlation"]
        assert by_draft[f"AdaSPEC reference_epochs={epochs}"] == pytest.approx(expected, abs=1e-6)
    commands = json.loads((tmp_path / "results.json").read_text())["commands"]
    assert commands, "those that have measured the rows"


# Mixed tasks


def write_rows(folder, task, first):
    """40 rows of arithmetic, from number `first` on, as the rows of another task."""
    for split, count in (("train", 40), ("test", 4)):
        (folder / task).mkdir(parents=True, exist_ok=True)
        rows = data.load_rows("arithmetic", split)[first : first + count]
        if task == "custom":
            rows = [{"prompt": row["question"], "response": row["answer"]} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / task / f"{split}.jsonl").write_text(text)


def mixed_flags(folder):
    """The flags of a run of the comparison, on rows that are written into the folder."""
    for number, task in enumerate(("gsm8k", "custom")):
        write_rows(folder, task, 40 * number)
    where = ["--data-dir", str(folder), "--out", str(folder / "runs")]
    return ["mixed", *SHORT, "--tasks", "gsm8k+custom", "--split", "test", *where]


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    """A folder with a finished run of the comparison, and its flags."""
    folder = tmp_path_factory.mktemp("mixed")
    flags = mixed_flags(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(settings_module.PAIRS, "tiny", TOY_PAIR)
        ablations.main(flags)
    return folder, flags


@pytest.mark.slow
def test_mixed_tasks_together_and_in_turn(mixed_run, toy_pair, capsys):
    """Each of the tasks is evaluated; in turn means that the second task's draft starts from the
    first's."""
    folder, flags = mixed_run
    rows = rows_of(folder / "runs")
    assert {row["task"] for row in rows} == {"gsm8k of gsm8k+custom", "custom of gsm8k+custom"}
    assert len(rows) == 2 * 2 * 7 and {row["prompts"] for row in rows} == {2}
    cell = folder / "runs" / "tiny" / "gsm8k+custom" / "seed0"
    records = stages_of(cell)
    settings = {name: record["settings"] for name, record in records.items()}
    uniform = records["distilled-1-epochs-gsm8k"]["fingerprint"]
    selective = records["adaspec-gsm8k"]["fingerprint"]
    base = records["base-draft"]["fingerprint"]
    assert settings["distilled-1-epochs-gsm8k"]["init"] == settings["adaspec-gsm8k"]["init"] == base
    assert settings["adaspec-gsm8k"]["reference"] == uniform
    assert settings[f"distilled-1-epochs-custom-after-{uniform}"]["init"] == uniform
    last = f"adaspec-custom-after-{selective}"
    assert settings[last]["init"] == selective
    reference = f"distilled-1-epochs-custom-after-{selective}"
    assert settings[reference]["init"] == selective
    assert settings[last]["reference"] == records[reference]["fingerprint"]
    assert settings["distilled-1-epochs"]["init"] == settings["adaspec"]["init"] == base
    trained = {name: record["summary"]["rows"] for name, record in records.items()}
    assert trained["distilled-1-epochs-gsm8k"] == trained[last] == 16
    assert trained["distilled-1-epochs"] == trained["target"] == 32
    assert len(records) == 10 and not (cell / "cache").exists()
    costs = {row["draft"]: row for row in rows}
    in_turn = costs["AdaSPEC rows=in-turn"]
    assert in_turn["rows"] == 64 and in_turn["epochs"] == 2 and in_turn["target_forwards"] == 32
    assert costs["AdaSPEC rows=first"]["target_forwards"] == 16
    assert costs["DistillSpec rows=in-turn"]["rows"] == 32
    capsys.readouterr()
    ablations.main(flags)
    assert "last loss" not in capsys.readouterr().out and rows_of(folder / "runs") == rows


@pytest.mark.slow
def test_rows_of_a_mixed_task_are_of_the_draft_and_the_task(mixed_run):
    """alpha at temperature 0, counted again."""
    folder, _ = mixed_run
    cell = folder / "runs" / "tiny" / "gsm8k+custom" / "seed0"
    tokenizer = models.load_tokenizer(str(cell / "target"))
    names = {"base": "base-draft", "DistillSpec rows=first": "distilled-1-epochs-gsm8k"}
    names["AdaSPEC"] = "adaspec"
    target = models.load_model(str(cell / "target"), torch.float32, CPU)
    alphas = set()
    for row in rows_of(folder / "runs"):
        if row["draft"] not in names or row["temperature"] > 0:
            continue
        task = row["task"].split(" of ")[0]
        examples, _ = data.encode(task, data.load_rows(task, "test", folder, 2), tokenizer, 160)
        draft = models.load_model(str(cell / names[row["draft"]]), torch.float32, CPU)
        sampling = {"max_new_tokens": 8, "eos_token_id": tokenizer.eos_token_id}
        sampling["vocab_size"] = len(tokenizer)
        stats = Stats()
        for example in examples:
            prompt = data.prompt_ids(example)[None]
            stats += speculative_generate(target, draft, prompt, gamma=5, **sampling).stats
        assert row["alpha"] == stats.alpha and row["counts"]["generated"] == stats.generated
        alphas.add(row["alpha"])
    assert len(alphas) > 1


def test_a_mixed_cell_is_its_parts_with_one_tokenizer(toy_pair, tmp_path):
    settings, _ = parse_arguments(mixed_flags(tmp_path))
    settings = replace(settings, dtype="float32")
    cell = ablations.prepare_mixed("tiny", "gsm8k+custom", 3, settings, CPU)
    first, second = cell.parts.values()
    assert cell.examples == [*first.examples, *second.examples] and len(cell.examples) == 32
    assert cell.test == [*first.test, *second.test] and cell.folder.name == "seed3"
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    rows = [data.load_rows(task, "train", tmp_path, 16) for task in ("gsm8k", "custom")]
    texts = [
        data.TASKS[task].prompt(row) + data.TASKS[task].response(row)
        for task, own_rows in zip(("gsm8k", "custom"), rows, strict=True)
        for row in own_rows
    ]
    expected = data.train_tokenizer(texts, 512).get_vocab()
    assert cell.tokenizer.get_vocab() == expected
    assert cell.recipe == first.recipe and cell.task == "gsm8k+custom"


def test_methods_on_mixed_rows():
    method = MixedMethod("adaspec", rows="in-turn")
    assert method.changed() == {"rows": "in-turn"} and method.label == "AdaSPEC rows=in-turn"
    assert MixedMethod("adaspec", k=0.2).label == "AdaSPEC k=0.2"
    assert METHODS["adaspec"].label == MixedMethod("adaspec").label
