"""Studies recomputed by hand, what makes none, and docs/results.md held to results/."""

import json
import re
import shlex

import pytest

import tables
from cli import Parser, add_flags
from extras import ablations, eagle, report, studies
from settings import Method, Settings, parse_settings

CELL = {
    "pair": "tiny",
    "split": "test",
    "prompts": 100,
    "gamma": 5,
    "max_new_tokens": 64,
    "dtype": "float32",
    "regime": "3-epoch",
}
FIGURES = {
    "tau": 2.4,
    "expected_acceptance": 0.5,
    "counts": {"accepted": 60, "rejected": 40, "per_position": [[40, 20], [60, 40]]},
    "speedup": 1.2,
}
COSTS = {"epochs": 3.0, "rows": 6000, "steps": 375, "target_forwards": 2000, "seconds": 1.5}
# draft -> task -> alpha by seed: AdaSPEC gains 0.00, 0.01, 0.02 on gsm8k, 0.02, 0.03, 0.04 on mbpp
ALPHAS = {
    "DistillSpec": {"gsm8k": [0.50, 0.60, 0.70], "mbpp": [0.30, 0.30, 0.30]},
    "AdaSPEC": {"gsm8k": [0.50, 0.61, 0.72], "mbpp": [0.32, 0.33, 0.34]},
}
VERSIONS = {"git": "abc", "python": "3", "torch": "2", "transformers": "5"}


def make_rows(alphas=ALPHAS, temperatures=(0.0, 1.0)):
    """Rows as run_all.py writes them; at temperature 1 every alpha is 0.1 more."""
    rows = []
    for temperature in temperatures:
        for draft, by_task in alphas.items():
            for task, by_seed in by_task.items():
                for seed, alpha in enumerate(by_seed):
                    row = {"task": task, "seed": seed, "temperature": temperature, "draft": draft}
                    row["alpha"] = alpha + temperature / 10
                    costs = COSTS | {"loss_tokens": 1000 + 100 * seed}
                    rows.append(CELL | FIGURES | row | ({} if draft == "base" else costs))
    return rows


def make_study(rows, **keys):
    study = {
        "study": "made-up",
        "title": "A title",
        "note": "A note.",
        "commands": ["python run_all.py"],
        "machine": "1 x abacus",
    }
    return study | VERSIONS | keys | {"rows": rows}


# Tables


def test_a_studys_table_against_a_hand_computation():
    """Gains by seed, over tasks: 0.01, 0.02, 0.03, so 0.02 +- 4.303 x 0.01 / sqrt(3); alpha 0.45
    and 0.47."""
    text = "\n".join(report.summary_table(make_study(make_rows(), baseline="DistillSpec")))
    columns = "| draft | alpha, T = 0 | over DistillSpec | alpha, T = 1 | over DistillSpec |"
    assert text.startswith(f"{columns} passes | steps |")
    assert "| DistillSpec | 0.450 |  | 0.550 |  | 3.0 | 375 | 1,100 | 2,000 |" in text
    gain = "+0.020 (-0.005 to +0.045)"
    assert f"| AdaSPEC | 0.470 | {gain} | 0.570 | {gain} | 3.0 | 375 | 1,100 | 2,000 |" in text
    study = make_study(make_rows(), baseline="AdaSPEC,DistillSpec")
    text = "\n".join(report.summary_table(study))
    assert f"| AdaSPEC | 0.470 |  | {gain} | 0.570 |  | {gain} |" in text, "two baselines"
    text = "\n".join(report.summary_table(make_study(make_rows())))
    assert "| DistillSpec | 0.450 | -0.020 (-0.045 to +0.005) |" in text, "by default AdaSPEC"


def test_alpha_by_task():
    text = "\n".join(report.task_table(make_study(make_rows(), baseline="DistillSpec")))
    assert text.startswith("| draft | T | gsm8k | mbpp |")
    line = re.escape("| AdaSPEC | 1 | 0.710 +0.010 (-0.0") + r"\d+ to \+0.\d+\) \| 0.430 \+0.030 \("
    assert re.search(line, text) and "| DistillSpec | 1 | 0.700 | 0.400 |" in text


def test_one_seed_has_no_interval_and_pairs_have_lines_of_their_own():
    alphas = {"base": {"gsm8k": [0.2]}, "DistillSpec": {"gsm8k": [0.5]}}
    rows = make_rows(alphas, [1.0])
    other = [row | {"pair": "big", "alpha": row["alpha"] + 0.1} for row in rows]
    assert report.summary_table(make_study(rows + other))[2:] == [
        "| tiny: base | 0.300 | -0.300 |  |  |  |  |  |",
        "| tiny: DistillSpec | 0.600 |  | 3.0 | 375 | 1,000 | 2,000 | 2 |",
        "| big: base | 0.400 | -0.300 |  |  |  |  |  |",
        "| big: DistillSpec | 0.700 |  | 3.0 | 375 | 1,000 | 2,000 | 2 |",
    ]


def test_protocol_says_the_conditions():
    rows = make_rows()
    rows[0]["prompts"] = 90
    assert report.protocol(make_study(rows)) == (
        "tiny: gsm8k, mbpp; 90 to 100 test prompts a task; 2000 training rows; gamma 5; "
        "max_new_tokens 64; float32; seeds 0, 1, 2; 1 x abacus."
    )


@pytest.mark.parametrize(("prompts", "has_speeds"), [(10, True), (9, False)])
def test_eagle_table_gains_seed_by_seed(prompts, has_speeds):
    """Accuracies 0.60, 0.70 and 0.61, 0.72: gains 0.01 and 0.02, so 0.015 +- 12.706 x 0.005. Speeds
    are shown where enough prompts were timed."""
    rows = []
    for draft, accuracies in {"EAGLE": [0.60, 0.70], "EAGLE + AdaSPEC": [0.61, 0.72]}.items():
        for seed, accuracy in enumerate(accuracies):
            row = {"task": "gsm8k", "pair": "e", "temperature": 0.0, "draft": draft, "seed": seed}
            row |= {"accuracy": accuracy, "alpha": 0.5, "tau": 2.0, "speedup": 1.0}
            row["timed_prompts"] = prompts
            rows.append(row | {"tokens_per_second": 100.0, "seconds_per_response": 0.5})
    text = report.eagle_table(rows)
    assert "| gsm8k | e | 0.0 | over EAGLE | +0.015 (-0.049 to +0.079) | +0.000 (" in text
    assert "| gsm8k | e | 0.0 | EAGLE | 0.650 (" in text and "2 seeds" in text
    assert ("speed-up" in text) is has_speeds
    assert report.eagle_table([{"draft": "AdaSPEC"}]) == ""
    deeper = [row | {"draft": f"{row['draft']} match=tokens depth=2"} for row in rows[2:]]
    deeper += [row | {"draft": "EAGLE depth=2"} for row in rows[:2]]
    stateless = [row | {"draft": f"{row['draft']} state-weight=0"} for row in rows]
    text = report.eagle_table(rows[:2] + deeper + stateless)
    assert "over EAGLE state-weight=0 | +0.015 (" in text
    assert "over EAGLE depth=2 | +0.015 (" in text and "over EAGLE |" not in text


# docs/results.md


def test_the_page_is_what_the_studies_say():
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize(("prompts", "is_shown"), [(10, True), (9, False)])
def test_speeds_are_shown_of_studies_that_timed_enough_prompts(prompts, is_shown):
    rows = make_rows({"DistillSpec": {"gsm8k": [0.5]}}, [0.0])
    rows = [row | {"timed_prompts": prompts, "tokens_per_second": 40.0} for row in rows]
    text = report.study_text(report.Path("one.json"), make_study(rows))
    assert ("| gsm8k | tiny | 0 | 0 | DistillSpec | 1.20x | 25.0 |" in text) is is_shown


def test_recorded_commands_of_today_can_be_run(tmp_path, monkeypatch):
    """Every command of run_all.py, extras.ablations and extras.eagle in results/ parses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    parser = Parser(prog="run_all.py")
    add_flags(parser, Settings)
    add_flags(parser, Method)
    commands = {"extras.ablations": ablations, "extras.eagle": eagle}
    parsed = []
    for path in (report.ROOT / "results").glob("*.json"):
        for command in studies.today(studies.load_json(path)):
            words = shlex.split(command)
            if words[1] == "run_all.py":
                parsed.append(parse_settings(parser, words[2:]))
            elif words[2] in commands:
                parsed.append(commands[words[2]].parse_arguments(words[3:]))
            else:
                assert words[1] == "-m" and words[2].startswith("extras."), command
                assert (report.ROOT / f"{words[2].replace('.', '/')}.py").is_file(), command
    assert len(parsed) >= 8
    assert all(methods or settings.methods == ("none",) for settings, methods in parsed)


@pytest.fixture
def project(tmp_path):
    """A folder with no study yet, a benchmark, and a run's results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    run = {"rows": make_rows(), "machine": "1 x abacus", **VERSIONS}
    run["commands"] = ["python run_all.py --data-dir /home/me/data --out=/tmp/x"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    benchmark = {"command": "python bench.py train", "commands_today": ["python -m extras.x"]}
    (tmp_path / "results" / "train.json").write_text(json.dumps(benchmark))
    return tmp_path


def add(project, name="one", *more, results="run.json"):
    words = ["add", name, str(project / results), "--title", "Title", "--note", "N", *more]
    return report.main(words, project)


def test_from_a_run_to_the_page(project, capsys):
    assert report.main(["--check"], project) == 1, "no page yet"
    assert report.main([], project) == report.main(["--check"], project) == 0
    assert add(project) == add(project, "two", "--order", "1", "--baseline", "DistillSpec") == 0
    assert capsys.readouterr().out.count(".json: 24 rows, ") == 2
    assert report.main(["--check"], project) == 1
    assert "docs/results.md is not what results/ says" in capsys.readouterr().err
    assert report.main([], project) == report.main(["--check"], project) == 0
    page = (project / "docs" / "results.md").read_text()
    assert page.index("results/two.json") < page.index("results/one.json")
    assert "python run_all.py --data-dir data --out=x\n" in page
    assert "recorded at commit abc, Python 3, torch 2, transformers 5" in page
    assert page.index("python -m extras.x\n") < page.index("python bench.py train\n")
    lines = (project / "results" / "one.json").read_text().splitlines()
    rows = [json.loads(line.rstrip(",")) for line in lines if line.startswith("  {")]
    assert len(rows) == 24 and rows[2]["alpha"] == 0.7 and "/home" not in str(lines)


def test_the_tables_of_a_run_once_more(finished_run, tmp_path, capsys):
    """As run_all.py has printed them, but for the machine's name; of stored studies too."""
    for argument in (finished_run, finished_run / "results.json"):
        assert report.main(["show", str(argument)]) == 0
        run = json.loads((finished_run / "results.json").read_text())
        text = tables.terminal_text(tables.in_order(run["rows"]), run["machine"])
        assert capsys.readouterr().out == f"{text}\n"
    assert [line.split()[1] for line in text.splitlines() if line.startswith("0  ")][-3:] == [
        "base", "DistillSpec", "AdaSPEC",
    ]  # fmt: skip
    shown = 0
    for path in (report.ROOT / "results").glob("*.json"):
        if "rows" in studies.load_json(path):
            report.main(["show", str(path)])
            text = capsys.readouterr().out
            assert "Acceptance by draft position" in text
            assert max(map(len, text.splitlines())) <= 100
            shown += 1
    assert shown >= 6
    (tmp_path / "results.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="has no rows yet"):
        report.main(["show", str(tmp_path)])


def adaspec(run):
    """One of its rows."""
    return next(row for row in run["rows"] if row["draft"] == "AdaSPEC")


def change_all(run, **keys):
    for row in run["rows"]:
        row.update(keys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run.pop("machine"), "study one: it has no machine"),
        (lambda run: run.pop("git"), "it has no git"),
        (lambda run: run.update(torch=""), "it has no torch"),
        (lambda run: run.pop("commands"), "it has no commands"),
        (lambda run: run.pop("rows"), "has no rows: give the results.json of a run"),
        (lambda run: run["rows"].clear(), "study one: it has no rows"),
        (lambda run: adaspec(run).pop("dtype"), "a row of AdaSPEC has no dtype; run its cell"),
        (lambda run: adaspec(run).pop("counts"), "has no counts"),
        (lambda run: adaspec(run).pop("speedup"), "has no speedup"),
        (lambda run: adaspec(run).pop("loss_tokens"), "has no loss_tokens"),
        (lambda run: adaspec(run).update(gap_correlation=1), "some rows of AdaSPEC have a gap"),
        (lambda run: adaspec(run).update(gamma=7), "rows of gamma 5 and 7; it needs one gamma"),
        (lambda run: adaspec(run).update(accuracy=0.5), "it has EAGLE heads and other drafts"),
        (lambda run: run["rows"].pop(1), "DistillSpec of tiny has 0 rows for gsm8k, seed 1, temp"),
        (lambda run: run["rows"].append(run["rows"][0]), "DistillSpec of tiny has 2 rows for gsm8"),
        (lambda run: change_all(run, draft="other"), "no draft DistillSpec of tiny to compare"),
        (
            lambda run: run["rows"].extend(run["rows"][0] | {"seed": 3 + n} for n in range(9)),
            "12 seeds; intervals are made for 10",
        ),
        (
            lambda run: run.update(
                commands=["python run_all.py --methods distillspec,adaspec,best"]
            ),
            "it has 2 trained drafts, and its commands train 3",
        ),
        (
            lambda run: run.update(commands=["python -m extras.ablations match --pairs tiny"]),
            "it has 2 trained drafts, and its commands train 4",
        ),
    ],
)
def test_what_makes_no_study(project, change, words):
    run = json.loads((project / "run.json").read_text())
    change(run)
    (project / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        add(project)
    assert "\n" not in str(error.value)
    assert not (project / "results" / "one.json").exists()


def test_commands_are_recorded_as_they_were_typed(project):
    run = json.loads((project / "run.json").read_text())
    run["commands"] = ["python /home/me/extras/ablations.py k --data-dir /data --out abl"]
    run["rows"] = make_rows({f"AdaSPEC k={n}": ALPHAS["AdaSPEC"] for n in range(10)})
    (project / "run.json").write_text(json.dumps(run))
    add(project, "one", "--baseline", "AdaSPEC k=4")
    study = json.loads((project / "results" / "one.json").read_text())
    assert study["commands"] == ["python -m extras.ablations k --data-dir data --out abl"]


def test_rows_come_in_the_order_of_the_methods(project):
    run = json.loads((project / "run.json").read_text())
    run["rows"].reverse()
    run["rows"].append(run["rows"][0] | {"draft": "base"})
    order = [row["draft"] for row in sorted(run["rows"], key=report.table_order)]
    assert order == ["base"] + ["DistillSpec"] * 12 + ["AdaSPEC"] * 12


def test_methods_are_counted_once_and_what_is_left_out_is_said():
    commands = [
        "python -m extras.drop_layers --target a --out b",
        "python run_all.py --seeds 0,1",
        "python run_all.py --methods AdaSPEC,best",
        "python -m extras.eagle --pairs tiny-eagle",
    ]
    assert studies.count_methods(commands[:1]) == 0
    assert studies.count_methods(commands) == 3
    commands.append("python -m extras.eagle --methods adaspec --match tokens")
    assert studies.count_methods(commands) == 4
    k = "python -m extras.ablations k --tasks mbpp"
    assert studies.count_methods([k]) == studies.count_methods([k, k]) == 10
    study = make_study(
        make_rows(), commands=["python run_all.py --methods distillspec,adaspec,best"]
    )
    with pytest.raises(ValueError, match="2 trained drafts, and its commands train 3"):
        studies.check_study(study)
    study["left_out"] = {"best": "which is ours"}
    studies.check_study(study)


def test_private_folders_are_named(project):
    path = project / "results" / "train.json"
    path.write_text(json.dumps({"command": "python bench.py --json /root/w/faults.json"}))
    with pytest.raises(ValueError, match=r"folder of one machine: python bench\.py --json /root"):
        report.main([], project)
    study = make_study(make_rows(), commands=["python run_all.py --data-dir=/home/me"])
    with pytest.raises(ValueError, match="made-up: its command names a folder of one machine"):
        studies.check_study(study)


def test_bad_names_and_files(project):
    with pytest.raises(ValueError, match="a study's name is lower-case letters"):
        add(project, "../one")
    (project / "text.json").write_text("text")
    with pytest.raises(ValueError, match=r"cannot read .*text.json"):
        add(project, results="text.json")
    with pytest.raises(ValueError, match=r"cannot read .*none.json: .*No such file"):
        add(project, results="none.json")
