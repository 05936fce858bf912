"""extras.bench_scoring on a small model."""

import json

from extras import bench_scoring


def test_command(make_model, tokenizer, tmp_path, capsys):
    make_model("llama").save_pretrained(tmp_path / "T")
    path = tmp_path / "scoring.json"
    bench_scoring.main(["--target", str(tmp_path / "T"), "--rounds", "2", "--json", str(path)])
    assert capsys.readouterr().out.count("plain") == 8
    ratios = json.loads(path.read_text())["ratios"]
    assert ratios["plain"]["1"] == [1, 1]
    assert all(
        len(by_tokens["8"]) == 2 and min(by_tokens["8"]) > 0 for by_tokens in ratios.values()
    )
