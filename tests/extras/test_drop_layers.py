"""drop_layers.py: which layers the flags choose, and the folder that comes out."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from extras.drop_layers import chosen_layers, main


@pytest.fixture
def target(make_model, tokenizer, tmp_path):
    """The folder of a model of five layers."""
    make_model("llama", num_hidden_layers=5).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def arguments(source, out, *flags):
    return ["--target", str(source), "--out", str(out), *flags]


@pytest.mark.parametrize(
    ("first", "last", "every", "expected"),
    [
        (2, 0, None, [0, 1]),
        (0, 1, None, [9]),
        (2, 1, None, [0, 1, 9]),
        (0, 0, 3, [0, 3, 6, 9]),
        (0, 0, 4, [0, 4, 8]),
        (0, 0, 10, [0]),
    ],
)
def test_which_layers_are_chosen(first, last, every, expected):
    assert chosen_layers(10, first, last, every) == expected


def test_a_draft_is_a_folder_with_the_targets_tokenizer(target, tokenizer, tmp_path, capsys):
    main(arguments(target, tmp_path / "out", "--first", "2", "--last", "1"))
    assert "out: layers 0, 1, 4 of 5, " in capsys.readouterr().out
    whole, draft = (
        AutoModelForCausalLM.from_pretrained(path) for path in (target, tmp_path / "out")
    )
    for own, index in zip(draft.model.layers, (0, 1, 4), strict=True):
        assert own.mlp.up_proj.weight.equal(whole.model.layers[index].mlp.up_proj.weight)
    assert draft.lm_head.weight.equal(whole.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="is there already"):  # never over what is there
        main(arguments(target, tmp_path / "out", "--every", "2"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --first, --last or both, or else --every"),
        (["--first", "1", "--every", "2"], "give --first, --last or both, or else --every"),
        (["--first", "-1"], "argument --first: must be a whole number of at least 0"),
        (["--every", "0"], "argument --every: must be a whole number of at least 1"),
    ],
)
def test_flags_without_a_meaning_are_refused(flags, words, target, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(target, tmp_path / "out", *flags))
    assert words in capsys.readouterr().err


def test_what_cannot_be_cut_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="cannot keep 6 of the model's 5 layers"):
        main(arguments(target, tmp_path / "out", "--first", "4", "--last", "2"))
    with pytest.raises(ValueError, match="no such folder"):
        main(arguments(tmp_path / "none", tmp_path / "out", "--first", "1"))
    for path in target.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        main(arguments(target, tmp_path / "out", "--first", "1"))
    assert not (tmp_path / "out").exists()
