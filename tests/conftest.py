import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

import data


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on real rows of the offline task."""
    rows = data.load_rows("arithmetic", "train", limit=300)
    return data.train_tokenizer([row["question"] + row["answer"] for row in rows], 400)


@pytest.fixture(scope="session")
def examples(tokenizer):
    return data.encode("arithmetic", data.load_rows("arithmetic", "train", limit=60), tokenizer, 128)[0]


@pytest.fixture
def make_model(tokenizer):
    """make_model(architecture, seed, **sizes): a small random model with a padded head, of each kind the project names."""
    from transformers import AutoModelForCausalLM, CodeGenConfig, GPTNeoXConfig, LlamaConfig, PhiConfig

    hub_names = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    codegen = {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 8, "n_positions": 256, "n_ctx": 256}
    configs = {
        "neox": lambda **kw: GPTNeoXConfig(**(hub_names | kw)),
        "llama": lambda **kw: LlamaConfig(**(hub_names | {"tie_word_embeddings": True} | kw)),
        "phi": lambda **kw: PhiConfig(**(hub_names | {"resid_pdrop": 0.0} | kw)),
        "codegen": lambda **kw: CodeGenConfig(**(codegen | kw)),
    }

    def make(architecture="neox", seed=0, vocab_size=None, **sizes):
        torch.manual_seed(seed)
        end, vocab_size = tokenizer.eos_token_id, vocab_size or len(tokenizer) + 16
        config = configs[architecture](vocab_size=vocab_size, bos_token_id=end, eos_token_id=end, **sizes)
        return AutoModelForCausalLM.from_config(config).float().eval()

    return make
