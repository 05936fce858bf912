import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import shutil

import pytest
import torch

import data
import ranks
from cli import run_command


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on real rows of the offline task."""
    rows = data.load_rows("arithmetic", "train", limit=300)
    return data.train_tokenizer([row["question"] + row["answer"] for row in rows], 400)


@pytest.fixture(scope="session")
def examples(tokenizer):
    """Sixty rows of 116 to 128 tokens, so that batches are padded."""
    rows = data.load_rows("arithmetic", "train", limit=60)
    whole, _ = data.encode("arithmetic", rows, tokenizer, 128)
    return [
        example._replace(input_ids=example.input_ids[: 128 - row % 13])
        for row, example in enumerate(whole)
    ]


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """make_model(architecture, seed, **sizes): a small random model with a padded head, of each
    kind the project names."""
    from transformers import (
        AutoModelForCausalLM,
        CodeGenConfig,
        GPTNeoXConfig,
        LlamaConfig,
        PhiConfig,
    )

    common = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
    }
    codegen = {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 8}
    codegen |= {"n_positions": 256, "n_ctx": 256}
    configs = {
        "neox": (GPTNeoXConfig, common),
        "llama": (LlamaConfig, common | {"tie_word_embeddings": True}),
        "phi": (PhiConfig, common | {"resid_pdrop": 0.0}),
        "codegen": (CodeGenConfig, codegen),
    }

    def make(architecture="neox", seed=0, vocab_size=None, **changes):
        torch.manual_seed(seed)
        end = tokenizer.eos_token_id
        config_class, sizes = configs[architecture]
        sizes = {"vocab_size": vocab_size or len(tokenizer) + 16, **sizes, **changes}
        config = config_class(bos_token_id=end, eos_token_id=end, **sizes)
        return AutoModelForCausalLM.from_config(config).float().eval()

    return make


@pytest.fixture
def device():
    """Where tests marked `gpu` run: on the GPU, or with GPU_TESTS_ON=cpu on the CPU."""
    name = os.environ.get("GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU (CUDA)")
    return torch.device(name)


@pytest.fixture(scope="session")
def short_flags():
    """The flags of a run of the tiny preset that takes seconds."""
    flags = "--preset tiny --limit 48 --max-steps 3 --eval-prompts 6 --timed-prompts 1"
    return f"{flags} --max-new-tokens 12".split()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, short_flags):
    """The --out folder of one finished run with `short_flags`, for all tests: nobody writes to it.
    A test that goes on from it takes `run_copy`."""
    import run_all

    out = tmp_path_factory.mktemp("finished-run")
    run_all.main([*short_flags, "--out", str(out)])
    return out


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of `finished_run` to change and to go on from."""
    return shutil.copytree(finished_run, tmp_path / "runs")


@pytest.fixture(autouse=True)
def no_stop_signal(monkeypatch):
    """No test is stopped by the signal that another one has sent."""
    monkeypatch.setattr(ranks, "stop_signal", None)


class Ended(Exception):
    pass


@pytest.fixture
def exit_code(monkeypatch):
    """exit_code(main, prog, ...): that of cli.run_command, in this process."""

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(ranks, "stop_on_signals", lambda: None)

    def run(main, prog, **options):
        with pytest.raises(Ended) as end:
            run_command(main, prog, **options)
        return end.value.args[0]

    return run
