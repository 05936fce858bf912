"""Files that survive: whole or not there, damage noticed, named and removed, one run a folder."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

import storage
from storage import Checkpoints
from tests.damage import DAMAGES, flip, truncate

# Files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file"

    def write(content):
        def half_first(file):
            file.write(content[:3])
            assert not path.exists() or path.read_bytes() == b"before"
            file.write(content[3:])

        return half_first

    storage.write_file(path, write(b"before"))
    assert path.read_bytes() == b"before"
    storage.write_file(path, write(b"after"))
    assert path.read_bytes() == b"after" and names(path.parent) == ["file"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError, SafetensorError])
def test_what_fails_leaves_the_file_before_and_no_part(tmp_path, kind):
    """torch and safetensors have their own errors for a full disk."""
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"part")
        raise kind("no space left")

    message = rf"cannot write {path}\.partial: no space left \([\d,]+ MiB free there\)"
    with pytest.raises(OSError, match=message):
        storage.write_checked(path, fail)
    assert path.read_bytes() == b"before" and names(tmp_path) == ["file"]


def test_what_is_no_disks_fault_keeps_its_name(tmp_path):
    with pytest.raises(KeyError):
        storage.write_file(tmp_path / "file", lambda file: {}["missing"])


def test_checksums_are_those_of_sha256sum(tmp_path):
    path = tmp_path / "with a space"
    storage.write_checked(path, lambda file: file.write(b"content"))
    sidecar = tmp_path / "with a space.sha256"
    command = ["sha256sum", "--check", "--strict", sidecar.name]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert sidecar.read_text().split()[0] == storage.checksum(path)
    assert storage.is_whole(path) and names(tmp_path) == sorted([path.name, sidecar.name])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_removed(tmp_path, capsys, damage):
    path = tmp_path / "file.bin"
    storage.write_checked(path, lambda file: file.write(bytes(range(100))))
    assert storage.is_whole(path) and not capsys.readouterr().out
    damage(path)
    assert not storage.is_whole(path)
    assert f"{path} is damaged or was cut short" in capsys.readouterr().out
    assert not names(tmp_path)
    assert not storage.is_whole(path) and not capsys.readouterr().out, "nothing is no damage"


def test_json_comes_back_or_is_nothing(tmp_path, capsys):
    path = tmp_path / "content.json"
    assert storage.read_json(path) == {}
    content = {"rows": [1, 2.5, "three", None], "text": "ü"}
    storage.write_json(path, content)
    assert storage.read_json(path) == content
    storage.write_json(path, [content])
    assert storage.read_json(path) == {}, "whole, and nothing that we write"
    storage.write_json(path, content)
    flip(path)
    assert storage.read_json(path) == {} and not names(tmp_path)
    assert "content.json is damaged" in capsys.readouterr().out


def test_a_fingerprint_is_of_the_content(tmp_path):
    settings = {"lr": 1e-3, "sizes": {"layers": 2, "heads": 4}}
    fingerprint = storage.fingerprint(settings)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert fingerprint == storage.fingerprint({"sizes": {"heads": 4, "layers": 2}, "lr": 1e-3})
    changes = [{"lr": 2e-3}, {"sizes": {}}, {"seed": 0}]
    assert len({fingerprint, *(storage.fingerprint(settings | one) for one in changes)}) == 4


def test_one_run_a_folder(tmp_path):
    folder = tmp_path / "new" / "runs"
    with storage.lock(folder):
        with storage.lock(tmp_path / "other"):
            pass
        message = f"another run is using {folder}: wait for it"
        with pytest.raises(ValueError, match=message), storage.lock(folder):
            pass
    with storage.lock(folder):
        pass
    path = tmp_path / "file"
    path.touch()
    message = r"file is no folder to write to \(.*\); give another"
    with pytest.raises(ValueError, match=message), storage.lock(path):
        pass


def test_an_error_inside_a_run_is_not_the_locks(tmp_path):
    with pytest.raises(KeyError), storage.lock(tmp_path):
        raise KeyError("the run's own")


# Stages

SUMMARY = {"steps": 3, "loss": 1.5, "seconds": 2.0}


@pytest.fixture
def stage(make_model, tokenizer, tmp_path):
    """(folder of a finished stage, its settings)."""
    settings = {"lr": 1e-3, "seed": 0}
    folder = tmp_path / "adaspec"
    storage.save_stage(folder, settings, SUMMARY, make_model(), tokenizer)
    return folder, settings


def test_a_finished_stage_is_a_model_folder_that_says_what_made_it(
    stage, make_model, tokenizer, capsys
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, settings = stage
    finished = storage.finished_stage(folder, settings)
    assert finished == (str(folder), storage.fingerprint(settings))
    assert finished == storage.save_stage(folder, settings, SUMMARY, make_model(), tokenizer)
    done, saved = capsys.readouterr().out.splitlines()
    assert done == "  adaspec: done before"
    assert saved == "  adaspec: 3 steps, last loss 1.5000, 2.0 s"
    record = storage.read_json(folder / "stage.json")
    assert record["settings"] == settings and record["summary"] == SUMMARY
    assert record["fingerprint"] == finished.fingerprint
    assert record["git"] == storage.git_commit() and record["versions"] == storage.versions()
    assert record["files"].keys() == set(names(folder)) - {"stage.json", "stage.json.sha256"}
    model = AutoModelForCausalLM.from_pretrained(finished.path)
    assert all(map(torch.equal, model.parameters(), make_model().parameters()))
    assert len(AutoTokenizer.from_pretrained(finished.path)) == 400


def test_other_settings_are_another_stage(stage):
    folder, settings = stage
    assert storage.finished_stage(folder, settings | {"seed": 1}) is None
    assert storage.finished_stage(folder.with_name("distilled"), settings) is None
    assert storage.finished_stage(folder, settings)


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "stage.json"])
def test_a_damaged_stage_is_named_and_not_used(stage, capsys, damage, name):
    folder, settings = stage
    damage(folder / name)
    missing = not (folder / name).exists()
    assert storage.finished_stage(folder, settings) is None
    printed = capsys.readouterr().out
    assert f"{folder / name} is damaged" in printed or (missing and name == "stage.json")


def test_an_edited_stage_is_not_replaced(stage, capsys):
    """It was trained anew, and the edit was gone."""
    folder, settings = stage
    path = folder / "generation_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="has changed since training; put it back"):
        storage.finished_stage(folder, settings)
    path.unlink()
    assert storage.finished_stage(folder, settings) is None
    assert f"{path} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "null", '{"fingerprint": 1}', ""])
def test_a_stage_json_that_is_none_of_ours(stage, content):
    """Edited by hand, with and without the checksum to it: no error, and no finished stage."""
    folder, settings = stage
    path = folder / "stage.json"
    path.write_text(content)
    assert storage.finished_stage(folder, settings) is None
    if content:
        storage.write_json(path, json.loads(content))
        assert storage.finished_stage(folder, settings) is None


def test_a_stage_of_other_settings_goes_beside(stage, make_model, tokenizer, capsys):
    """With its fingerprint after the name, where it is found again; so nothing is replaced."""
    folder, settings = stage
    others = settings | {"lr": 1e-2}
    own = folder.with_name(f"adaspec-{storage.fingerprint(others)[:8]}")
    capsys.readouterr()
    assert storage.stage_folder(folder, settings) == folder and not capsys.readouterr().out
    assert storage.stage_folder(folder, others) == own
    told = capsys.readouterr().out
    assert told == f"  adaspec: other settings than in {folder}; goes to {own.name}\n"
    storage.save_stage(own, others, SUMMARY, make_model(seed=1), tokenizer)
    assert storage.stage_folder(folder, others) == own
    assert storage.stage_folder(folder, settings) == folder
    assert storage.finished_stage(folder, settings) and storage.finished_stage(own, others)
    flip(own / "stage.json")
    assert storage.stage_folder(folder, others) == own, "damaged: trained anew in its place"
    flip(folder / "stage.json")
    assert storage.stage_folder(folder, settings) == folder
    storage.save_stage(own, others, SUMMARY, make_model(seed=1), tokenizer)
    storage.remove_folder(folder)
    assert storage.stage_folder(folder, others) == own


def test_an_unfinished_stage_keeps_its_place(tmp_path):
    settings = [{"lr": rate} for rate in (0.1, 0.2)]
    folder = tmp_path / "adaspec"
    own = folder.with_name(f"adaspec-{storage.fingerprint(settings[1])[:8]}")
    expected = [folder, own]
    for i in range(2):
        assert storage.stage_folder(folder, settings[i]) == expected[i]
        states = storage.checkpoint_folder(expected[i])
        Checkpoints(states, storage.fingerprint(settings[i])).save(1, {})
    assert [storage.stage_folder(folder, each) for each in settings] == expected
    storage.remove_folder(storage.checkpoint_folder(folder))
    assert storage.stage_folder(folder, settings[1]) == own, "its state is there"


def test_a_new_stage_takes_the_old_ones_place(stage, make_model, tokenizer):
    """What a kill has left of a try before goes, and so do the checkpoints."""
    folder, settings = stage
    (folder / "left-over").touch()
    partial = folder.with_name("adaspec.partial")
    partial.mkdir()
    (partial / "left-over").touch()
    Checkpoints(storage.checkpoint_folder(folder), "fingerprint").save(1, {})
    storage.save_stage(folder, settings | {"seed": 1}, SUMMARY, make_model(seed=1), tokenizer)
    assert names(folder.parent) == ["adaspec"] and "left-over" not in names(folder)
    assert storage.finished_stage(folder, settings) is None
    assert storage.finished_stage(folder, settings | {"seed": 1})


def test_a_link_to_a_stage_is_replaced_and_not_followed(stage, make_model, tokenizer):
    folder, settings = stage
    link = folder.with_name("link")
    link.symlink_to(folder)
    storage.save_stage(link, settings | {"seed": 1}, SUMMARY, make_model(seed=1), tokenizer)
    assert not link.is_symlink() and storage.finished_stage(folder, settings)


def test_a_full_disk_leaves_the_stage_before(stage, make_model, tokenizer):
    folder, settings = stage
    model = make_model()

    def fail(path):
        path.mkdir()
        (path / "part").touch()
        raise SafetensorError("no space left")

    model.save_pretrained = fail
    with pytest.raises(OSError, match=r"cannot write .*adaspec\.partial: no space left"):
        storage.save_stage(folder, settings | {"seed": 1}, SUMMARY, model, tokenizer)
    assert names(folder.parent) == ["adaspec"] and storage.finished_stage(folder, settings)


# Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", "fingerprint")


def generations(checkpoints):
    """The steps of the states on the disk, each of which must have its checksum, and nothing
    else may be there."""
    paths = sorted(checkpoints.folder.glob("*.pt"))
    expected = [name for path in paths for name in (path.name, f"{path.name}.sha256")]
    assert names(checkpoints.folder) == expected
    return [int(path.name.split("-")[0]) for path in paths]


def test_two_generations_are_kept_and_the_newest_used(checkpoints):
    assert checkpoints.newest() is None
    for step in (9, 10, 100):
        checkpoints.save(step, {"step": torch.tensor(step)})
    assert generations(checkpoints) == [10, 100]
    newest = checkpoints.newest()
    assert newest.name == "000000100-fingerprint.pt"
    assert torch.load(newest, weights_only=True) == {"step": torch.tensor(100)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_generations_are_removed_and_two_good_ones_kept(checkpoints, damage, capsys):
    for step in (61, 62):
        checkpoints.save(step, {})
    damage(checkpoints.folder / "000000062-fingerprint.pt")
    assert checkpoints.newest().name == "000000061-fingerprint.pt"
    assert "000000062-fingerprint.pt is damaged" in capsys.readouterr().out
    checkpoints.save(63, {})
    assert generations(checkpoints) == [61, 63], "one damaged file costs one generation"
    for path in checkpoints.folder.glob("*.pt"):
        damage(path)
    assert checkpoints.newest() is None and generations(checkpoints) == []
    checkpoints.save(2, {})
    checkpoints.save(3, {})
    assert generations(checkpoints) == [2, 3]
    assert checkpoints.newest().name == "000000003-fingerprint.pt"


def test_what_other_settings_or_a_kill_have_left_is_removed(checkpoints):
    checkpoints.save(7, {})
    (checkpoints.folder / "000000008-fingerprint.pt.partial").touch()
    other = Checkpoints(checkpoints.folder, "other")
    assert checkpoints.newest().name == "000000007-fingerprint.pt"
    assert generations(checkpoints) == [7]
    assert other.newest() is None and names(checkpoints.folder) == []
    other.save(2, {})
    assert generations(other) == [2] and other.newest()


# Provenance


def test_git_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "__file__", str(tmp_path / "storage.py"))
    assert storage.git_commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "storage.py").touch()
    for arguments in (["init", "-q"], ["add", "storage.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    commit = storage.git_commit()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "storage.py").write_text("changed")
    assert storage.git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert storage.git_commit() == "unknown"


def test_the_command_line_is_as_typed(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["/env/bin/python", "-m", "extras.tree", "--json", "a b"])
    assert storage.command_line() == "python -m extras.tree --json 'a b'"
    command = ["/env/bin/python", "-u", "run_all.py", "--out", "my runs"]  # -u is torchrun's
    monkeypatch.setattr(sys, "orig_argv", command)
    monkeypatch.setattr(storage, "world_size", lambda: 8)
    assert storage.command_line() == "python run_all.py --out 'my runs'"
    monkeypatch.setenv("RANK", "0")
    assert storage.command_line() == "torchrun --nproc_per_node 8 run_all.py --out 'my runs'"


def test_versions_and_machine():
    assert re.fullmatch(r"\d+ x .+", storage.machine())
    assert storage.versions()["torch"] == torch.__version__
