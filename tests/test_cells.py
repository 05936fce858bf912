"""A cell: its rows, its name, what is checked before long work, and the plans of its stages."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cells
import stages
from cells import base_models, check_cell, draft_plan, prepare_cell, reference_method, target_plan
from data import all_tokens, digest, load_rows
from history import Validation
from models import model_identity
from settings import METHODS, Method, Pair, Recipe, Settings
from storage import Model
from train import make_schedule

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = {"toy": Pair(SMALL | {"num_hidden_layers": 2}, SMALL, target_lr=0.5, lr=0.25)}


@pytest.fixture(scope="module")
def toy_settings(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("cells") / "out")
    return Settings(limit=24, max_length=128, eval_prompts=3, dtype="float32", out=out)


@pytest.fixture(scope="module")
def toy_cell(toy_settings):
    return prepare_cell("toy", "arithmetic", 3, toy_settings, CPU, PAIRS)


@pytest.fixture
def save_pair(make_model, tokenizer, tmp_path):
    """save_pair(folder): a target T and a draft D in that folder; returns their paths."""

    def save(folder, seed=0):
        paths = [tmp_path / folder / name for name in ("T", "D")]
        for number, path in enumerate(paths):
            make_model(seed=seed + number, num_hidden_layers=1).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return paths

    return save


# Making a cell


def test_a_cell_of_a_pair_from_scratch(toy_cell, toy_settings):
    assert (len(toy_cell.examples), len(toy_cell.test), toy_cell.dropped) == (24, 3, (0, 0))
    assert toy_cell.folder == Path(toy_settings.out, "toy", "arithmetic", "seed3")
    assert toy_cell.recipe == Recipe(16, 0.25, (3, 3, 3)) and toy_cell.dtype == torch.float32
    assert toy_cell.model_names == ["toy's target", "toy's draft"]
    parameters = [p for model in toy_cell.models for p in model.parameters()]
    assert {p.device.type for p in parameters} == {"meta"}
    assert [model.config.num_hidden_layers for model in toy_cell.models] == [2, 1]
    assert {model.config.vocab_size for model in toy_cell.models} == {len(toy_cell.tokenizer)}
    assert toy_cell.header == "\ntoy / arithmetic / seed 3: " + (
        "24 train rows, 3 test prompts (0 and 0 rows dropped: no response within 128 tokens)"
    )


def test_a_cell_is_announced_for_all_seeds(toy_cell, toy_settings):
    lengths = [example.prompt_length for example in toy_cell.examples]
    dropped = sum(length >= max(lengths) for length in lengths)
    flags = {"seeds": (0, 7), "epochs": (0, 1, 5), "max_steps": 7, "max_length": max(lengths)}
    settings = replace(toy_settings, **flags)
    cell = prepare_cell("toy", "arithmetic", 0, settings, CPU, PAIRS)
    assert (
        cell.sizes.startswith(f"{24 - dropped} train rows, ") and f" ({dropped} and" in cell.sizes
    )
    assert cell.sizes.endswith(f"within {max(lengths)} tokens)")
    assert cell.announcement == (
        f"toy / arithmetic / seed 0, 7: {cell.sizes}; "
        "epochs of target, reference, draft: 0, 1, 5, at most 7 steps each"
    )


def test_rows_of_other_splits(toy_settings):
    settings = replace(toy_settings, split="validation")
    cell = prepare_cell("toy", "arithmetic", 0, settings, CPU, PAIRS)
    rows = load_rows("arithmetic", "validation", limit=3)
    prompts = [example.input_ids[: example.prompt_length] for example in cell.test]
    for row, prompt in zip(rows, prompts, strict=True):
        assert cell.tokenizer.decode(prompt).startswith(row["question"])


def test_validation_rows_are_neither_trained_nor_tested_on(toy_settings, capsys):
    settings = replace(toy_settings, validation_rows=5)
    cell = prepare_cell("toy", "arithmetic", 0, settings, CPU, PAIRS)
    texts = [cell.tokenizer.decode(example.input_ids) for example in cell.validation]
    questions = [row["question"] for row in load_rows("arithmetic", "validation", limit=5)]
    for text, question in zip(texts, questions, strict=True):
        assert text.startswith(question)
    others = [cell.tokenizer.decode(e.input_ids) for e in cell.examples + cell.test]
    assert not set(texts) & set(others) and not capsys.readouterr().out
    settings = replace(settings, validation_rows=0)
    assert prepare_cell("toy", "arithmetic", 0, settings, CPU, PAIRS).validation == []


def test_validation_rows_without_a_response_are_not_watched(toy_settings, tmp_path):
    (tmp_path / "custom").mkdir()
    for split, responses in {"train": [True] * 5, "validation": [False] * 3}.items():
        rows = [{"prompt": "1 + 1 ="} | ({"response": "2"} if there else {}) for there in responses]
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / "custom" / f"{split}.jsonl").write_text(text)
    settings = replace(toy_settings, data_dir=str(tmp_path), split="validation")
    cell = prepare_cell("toy", "custom", 0, settings, CPU, PAIRS)
    assert len(cell.test) == len(cell.validation) == 3
    assert Validation(cell.validation, 2).examples == []


def test_a_task_without_validation_rows_goes_without_alpha(toy_settings, tmp_path, capsys):
    (tmp_path / "custom").mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"prompt": f"{n} + 1 =", "response": str(n + 1)}) for n in range(5)]
        (tmp_path / "custom" / f"{split}.jsonl").write_text("\n".join(rows))
    settings = replace(toy_settings, data_dir=str(tmp_path))
    cell = prepare_cell("toy", "custom", 0, settings, CPU, PAIRS)
    assert len(cell.examples) == 5 and cell.validation == []
    said = "  alpha is not watched in training: custom has no validation rows, and 5 train rows are"
    assert capsys.readouterr().out.startswith(said)


def test_a_row_bound_that_leaves_none_is_said(toy_settings):
    with pytest.raises(ValueError, match="no rows are left within 4 tokens; raise --max-length"):
        prepare_cell("toy", "arithmetic", 0, replace(toy_settings, max_length=4), CPU, PAIRS)


def test_ranks_tokenise_after_rank_0(toy_cell, toy_settings, monkeypatch):
    """Rank 0 tokenises and then lets the others go on, which read its file."""
    calls = []
    monkeypatch.setattr(cells, "from_rank_0", lambda value=None: calls.append("barrier"))

    def encode_once(*arguments):
        calls.append("encode")
        return toy_cell.examples, 0

    monkeypatch.setattr(cells, "encode_once", encode_once)
    cells.encode_rows("arithmetic", [], toy_cell.tokenizer, toy_settings)
    assert calls == ["encode", "barrier"]
    calls.clear()
    monkeypatch.setattr(cells, "rank", lambda: 1)
    cells.encode_rows("arithmetic", [], toy_cell.tokenizer, toy_settings)
    assert calls == ["barrier", "encode"]


# What a model is (issue 13.7)


def custom_cell(toy_settings, target, draft):
    settings = replace(toy_settings, target=str(target), draft=str(draft))
    return prepare_cell("custom", "arithmetic", 0, settings, CPU)


def edit(path):
    """Change the weights of a model (a second time: back), with the size and the times of the file
    left as they are."""
    file = path / "model.safetensors"
    state = file.stat()
    weights = load_file(file)
    weights[sorted(weights)[0]].neg_()
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size and file.stat().st_mtime_ns == state.st_mtime_ns


def test_an_own_pair_is_named_by_what_its_models_are(toy_settings, save_pair, monkeypatch):
    target, draft = save_pair("a")
    name = custom_cell(toy_settings, target, draft).name
    assert name.startswith("custom-T-D-") and len(name) == len("custom-T-D-") + 8
    # typed otherwise, touched: the same
    monkeypatch.chdir(target.parent)
    for path in ("T", "./T/", f"../a/{target.name}", f"{target.parent.parent}/./a/T"):
        assert custom_cell(toy_settings, path, draft).name == name, path
    os.utime(target / "config.json")
    os.utime(target / "model.safetensors")
    (target / "generation_config.json").unlink()
    assert custom_cell(toy_settings, target, draft).name == name
    # folders of the same names with other models: another
    assert custom_cell(toy_settings, *save_pair("b", seed=5)).name != name
    assert custom_cell(toy_settings, *save_pair("c")).name == name, "the same models, copied"
    # swapped, edited: another
    assert custom_cell(toy_settings, draft, target).name != name.replace("T-D", "D-T")
    edit(draft)
    assert custom_cell(toy_settings, target, draft).name != name
    edit(draft)
    assert custom_cell(toy_settings, target, draft).name == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("org/draft", "org-draft"),
        ("{}/llama/draft", "llama-draft"),
        ("{}/llama/Target/", "llama-Target"),
        ("{}/llama", "llama"),
        ("{}/llama/../qwen/model", "qwen-model"),
    ],
)
def test_a_folder_called_by_its_role_is_named_with_the_one_above(name, expected, tmp_path):
    for folder in ("llama/draft", "llama/Target", "qwen/model"):
        (tmp_path / folder).mkdir(parents=True)
    assert cells.short_name(name.format(tmp_path)) == expected


def test_a_draft_of_the_targets_layers_is_made_once(toy_settings, save_pair, make_model, capsys):
    """After the checks, for all tasks and seeds; again where it is damaged."""
    target, _ = save_pair("a")
    make_model("llama", num_hidden_layers=3).save_pretrained(target)
    settings = replace(toy_settings, target=str(target), draft_layers=2)

    def prepare(seed=0):
        return prepare_cell("custom", "arithmetic", seed, settings, CPU)

    cell = prepare()
    assert cell.name.startswith("custom-T-2-layer-")
    assert [model.config.num_hidden_layers for model in cell.models] == [3, 2]
    check_cell(cell, [METHODS["best"]])
    folder = cell.folder.parents[1] / "base-draft"
    assert not folder.exists(), "what is checked is not yet made"
    base_target, draft = base_models(cell)
    assert base_target.path == str(target) and draft.path == str(folder)
    made = load_file(folder / "model.safetensors")
    weights = load_file(target / "model.safetensors")
    assert 0 < len(made) < len(weights)
    assert all(tensor.equal(weights[name]) for name, tensor in made.items())
    assert capsys.readouterr().out.count("base-draft: made of the target's first layers, 2") == 1
    assert base_models(prepare(seed=1)) == (base_target, draft)
    assert capsys.readouterr().out == "  base-draft: done before\n"
    (folder / "model.safetensors").write_bytes(b"")
    assert base_models(cell) == (base_target, draft)
    assert load_file(folder / "model.safetensors").keys() == made.keys()
    edit(target)
    assert prepare().name != cell.name
    settings = replace(settings, draft_layers=4)
    with pytest.raises(ValueError, match="cannot keep 4 of the model's 3 layers"):
        prepare()


def test_base_models_of_a_pretrained_pair_are_known_by_their_content(toy_settings, save_pair):
    target, draft = save_pair("a")
    cell = custom_cell(toy_settings, target, draft)
    out = Path(toy_settings.out)
    assert base_models(cell) == (
        Model(str(target), model_identity(str(target), out)),
        Model(str(draft), model_identity(str(draft), out)),
    )
    before = base_models(cell)
    edit(target)
    after = base_models(cell)
    assert after[0].fingerprint != before[0].fingerprint and after[1] == before[1]


def test_models_in_training_have_float32_weights_whatever_is_computed_in(toy_cell, save_pair):
    cell = replace(toy_cell, settings=replace(toy_cell.settings, dtype="bfloat16"))
    for init in (Model(str(save_pair("a")[0]), "t"), SMALL):
        plan = replace(target_plan(cell, Model("base", "b")), init=init)
        model = stages.initial_model(cell, plan)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_base_models_from_scratch_learn_whole_rows(toy_cell, monkeypatch):
    plans = []

    def fit(cell, plan, step):
        plans.append((plan, step))
        return Model(plan.name, "fingerprint")

    monkeypatch.setattr(cells, "fit", fit)
    cell = replace(toy_cell, settings=replace(toy_cell.settings, target_seed=5))
    target, draft = base_models(cell)
    assert (target.path, draft.path) == ("base-target", "base-draft")
    for plan, step in plans:
        assert step is cells.fine_tuning_step
        assert digest(plan.examples) == digest(all_tokens(cell.examples))
        assert (plan.lr, plan.epochs, plan.batch_size) == (2e-3, 2, 16)
    assert [plan.seed for plan, _ in plans] == [5, 3], "seeds can share the target, not the draft"
    assert [plan.init for plan, _ in plans] == PAIRS["toy"].models
    headless = replace(cell, pair=replace(cell.pair, draft=None))
    assert base_models(headless)[1] is None


# Checks before long work


def test_a_right_cell_passes(toy_cell):
    check_cell(toy_cell, list(METHODS.values()))


def test_contexts_must_hold_rows_and_decoding(toy_cell):
    def check(**changes):
        check_cell(replace(toy_cell, settings=replace(toy_cell.settings, **changes)), [])

    longest = max(example.prompt_length for example in toy_cell.test)
    check(max_length=1024)
    check(max_new_tokens=1024 - longest)
    with pytest.raises(ValueError, match=r"toy's target has a context of 1024.* is 1025"):
        check(max_length=1025)
    with pytest.raises(ValueError, match=r"--max-new-tokens \d+ takes 1025"):
        check(max_new_tokens=1025 - longest)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_logits_that_are_changed_after_the_head_are_refused(toy_cell, key, monkeypatch):
    config = toy_cell.models[1].config
    monkeypatch.setattr(config, key, 1, raising=False)
    check_cell(toy_cell, [])
    monkeypatch.setattr(config, key, 4.0)
    with pytest.raises(ValueError, match=rf"toy's draft changes its logits .*\({key}\)"):
        check_cell(toy_cell, [])


def test_batches_must_feed_the_ranks(toy_cell, monkeypatch):
    """The smallest of the recipe's, a method's own, and the rows that there are."""
    monkeypatch.setattr(cells, "world_size", lambda: 8)
    check_cell(toy_cell, [METHODS["adaspec"]])
    with pytest.raises(ValueError, match="batches of 4 rows do not feed 8 ranks; raise --batch"):
        check_cell(toy_cell, [METHODS["adaspec"], METHODS["best"]])
    with pytest.raises(ValueError, match="batches of 7 rows do not feed 8 ranks"):
        check_cell(replace(toy_cell, recipe=toy_cell.recipe._replace(batch_size=7)), [])
    with pytest.raises(ValueError, match="batches of 3 rows do not feed 8 ranks"):
        check_cell(replace(toy_cell, examples=toy_cell.examples[:3]), [])


def test_the_cache_must_have_room_unless_it_is_bounded(toy_cell, monkeypatch):
    tokens = sum(len(e.input_ids) - e.prompt_length for e in toy_cell.examples)
    size = tokens * 16 * 4
    Usage = type(cells.shutil.disk_usage("/"))

    def check(free, **changes):
        monkeypatch.setattr(cells.shutil, "disk_usage", lambda path: Usage(2**40, 0, free))
        check_cell(replace(toy_cell, settings=replace(toy_cell.settings, **changes)), [])

    check(size)
    with pytest.raises(ValueError, match=r"cached states take 0\.000 GiB.*lower --cache-gb"):
        check(size - 1)
    check(size - 1, cache_gb=(size - 1) / 2**30)
    check(size // 2, dtype="bfloat16")


# The plans of the stages


def plan_of(cell, method):
    return draft_plan(cell, method, Model("draft", "d"), Model("target", "t"))


def test_plans_are_the_recipe(toy_cell):
    cell = replace(toy_cell, recipe=Recipe(8, 0.25, (1, 15, 30)))
    target = target_plan(cell, Model("base", "b"))
    assert (target.name, target.init, target.lr) == ("target", Model("base", "b"), 0.5)
    assert (target.epochs, target.batch_size, target.seed) == (1, 8, 3)
    assert target.examples is cell.examples and target.method is None

    plan = plan_of(cell, METHODS["adaspec"])
    assert (plan.name, plan.init) == ("adaspec", Model("draft", "d")), "the base draft again"
    assert (plan.lr, plan.epochs, plan.batch_size, plan.seed) == (0.25, 30, 8, 3)
    assert plan.examples is cell.examples and plan.max_steps is None and plan.on_policy is None

    reference = plan_of(cell, reference_method(cell, METHODS["adaspec"]))
    assert (reference.name, reference.epochs) == ("distilled-15-epochs", 15)
    assert reference.method.divergence == "fkl" and reference.method.data == "ground-truth"
    uniform = plan_of(cell, METHODS["distillspec"])
    assert (uniform.name, uniform.epochs) == ("distilled-30-epochs", 30), "the draft's epochs"

    best = plan_of(cell, METHODS["best"])
    assert (best.name, best.epochs) == ("best-45-epochs", 45), "the reference's go to the draft"
    assert (best.batch_size, best.decay, best.lr) == (4, "linear", 0.25)


def test_a_methods_own_settings_go_before_the_recipe(toy_cell):
    method = Method("adaspec", batch=6, lr=0.1, epochs=4, decay="linear", reference_epochs=2)
    plan = plan_of(toy_cell, method)
    assert (plan.batch_size, plan.lr, plan.epochs, plan.decay) == (6, 0.1, 4, "linear")
    assert reference_method(toy_cell, method).epochs == 2
    method = Method("adaspec", reference="tvd", data="target", gap="tvd", k=0.2)
    uniform = reference_method(toy_cell, method)
    assert (uniform.divergence, uniform.data, uniform.name) == ("tvd", "target", "distillspec")
    for data in ("on-policy", "mixed"):
        assert reference_method(toy_cell, replace(method, data=data)).data == "ground-truth"


def test_stages_are_named_by_what_is_not_usual(toy_cell):
    names = {
        "adaspec-k-0.2-select-bottom": Method("adaspec", k=0.2, select="bottom"),
        "adaspec-epochs-5": Method("adaspec", epochs=5),
        "distilled-5-epochs-divergence-tvd": Method("distillspec", epochs=5, divergence="tvd"),
        "distilled-3-epochs-data-on-policy": Method("distillspec", data="on-policy"),
        "best-6-epochs": METHODS["best"],
        "best-2-epochs": replace(METHODS["best"], epochs=2),
    }
    for name, method in names.items():
        assert plan_of(toy_cell, method).name == name


def test_who_writes_the_responses_of_a_plan(toy_cell, monkeypatch):
    monkeypatch.setattr(
        cells, "written_by_target", lambda cell, target, draft, examples: [target, *examples]
    )
    plan = plan_of(toy_cell, Method("adaspec", data="target"))
    assert plan.examples == [Model("target", "t"), *toy_cell.examples]
    plan = plan_of(toy_cell, Method("distillspec", data="on-policy", refresh=7))
    assert (plan.on_policy.share, plan.on_policy.refresh, plan.on_policy.seed) == (1.0, 7, 3)
    assert plan.on_policy.examples is toy_cell.examples
    writer = plan.on_policy.writer
    assert (writer.max_length, writer.max_new_tokens, writer.batch_size) == (128, 128, 80)
    assert (writer.ends, writer.vocab_size) == ([0], len(toy_cell.tokenizer))
    assert plan_of(toy_cell, Method("distillspec", data="mixed", share=0.2)).on_policy.share == 0.2


def test_each_block_that_the_target_writes_has_draws_of_its_own(toy_cell, monkeypatch):
    seeds = []

    def write(writer, model, examples, seed, temperature, draft):
        seeds.append(seed)
        return examples

    monkeypatch.setattr(stages, "load_model", lambda *arguments: None)
    monkeypatch.setattr(stages.ResponseWriter, "write", write)
    settings = replace(toy_cell.settings, eval_batch=2)  # eight rows a block
    for seed in (0, 1):
        cell = replace(toy_cell, settings=settings, seed=seed)
        stages.written_by_target(cell, Model("target", "t"), None, cell.examples)
    assert len(seeds) == len(set(seeds)) == 6


# Matching (issue 13.9)


def schedule_of(cell, method, lengths, epochs):
    """The batches of a draft's training, as sizes in tokens."""
    epochs, batch_size, max_steps = cells.matching(cell, method, epochs, len(lengths))
    schedule = make_schedule(lengths, batch_size, 0, epochs, max_steps, "test")
    return [sum(lengths[row] for row in rows) for _, rows in schedule]


@pytest.mark.parametrize("rows", [17, 41, 64, 100, 373, 2000])
def test_matchings_share_what_they_say(toy_cell, rows):
    """Against DistillSpec: steps and passes; passes and tokens a step; loss-bearing tokens in all.
    With k = 0.4 on few rows, match=tokens had 0.60 (41 rows) and 0.80 (64) of them."""
    lengths = torch.randint(40, 120, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    uniform = schedule_of(toy_cell, METHODS["distillspec"], lengths, 3)
    steps = schedule_of(toy_cell, METHODS["adaspec"], lengths, 3)
    assert steps == uniform
    epochs = schedule_of(toy_cell, Method("adaspec", match="epochs"), lengths, 3)
    assert sum(epochs) == sum(uniform) and len(epochs) == 3 * -(-rows // 40)
    tokens = schedule_of(toy_cell, Method("adaspec", match="tokens"), lengths, 3)
    assert 0.97 <= 0.4 * sum(tokens) / sum(uniform) <= 1.1
    if rows >= 373:
        assert len(tokens) == pytest.approx(len(uniform), rel=0.05), "steps, too"
        assert 0.4 * max(tokens) == pytest.approx(max(uniform), rel=0.2)


def test_matching_goes_by_the_mean_of_a_fraction_that_changes(toy_cell):
    method = Method("adaspec", match="tokens", k=0.2, k_end=0.6, batch=4)
    assert cells.matching(toy_cell, method, 2, 100) == (5, 10, 50)
    assert cells.matching(toy_cell, replace(method, match="epochs"), 2, 100) == (2, 10, None)
    assert cells.matching(toy_cell, replace(method, match="steps"), 2, 100) == (2, 4, None)
    uniform = Method("distillspec", match="tokens")
    assert cells.matching(toy_cell, uniform, 2, 100) == (2, 16, None)
