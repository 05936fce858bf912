"""extras.bench_scoring on a small model."""

import json

import pytest

import speculative
from extras import bench_scoring


@pytest.mark.parametrize("dtype, kind", [("float32", "thin"), ("bfloat16", "packed")])
def test_command(make_model, tokenizer, tmp_path, capsys, dtype, kind):
    make_model("llama").save_pretrained(tmp_path / "T")
    path = tmp_path / "scoring.json"
    flags = ["--dtype", dtype, "--rounds", "2", "--json", str(path)]
    command = ["--target", str(tmp_path / "T"), *flags]
    if kind == "packed" and not speculative.PACKED_PRODUCTS:
        with pytest.raises(ValueError, match="on CPUs with AVX-512 only"):
            bench_scoring.main(command)
        return
    bench_scoring.main(command)
    assert capsys.readouterr().out.count("plain") == 8
    ratios = json.loads(path.read_text())["ratios"]
    assert set(ratios) == {"plain", kind} and ratios["plain"]["1"] == [1, 1]
    assert all(
        len(by_tokens["8"]) == 2 and min(by_tokens["8"]) > 0 for by_tokens in ratios.values()
    )
