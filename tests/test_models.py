"""models.py: which models and tokenizers are refused, with what words, and what tells two apart."""

import json
import os
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GenerationConfig,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import data
import models
from models import (
    check_model,
    check_tokenizers,
    end_tokens,
    load_model,
    load_pair,
    load_tokenizer,
    model_identity,
    resolve_model,
    scratch_model,
    training_tokenizer,
)


class Evil:
    """What a pickle runs when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def save_model(folder, tokenizer, config, auto=AutoModelForCausalLM):
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    """The folder of a model that nothing is wrong with."""
    end = tokenizer.eos_token_id
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 256}
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer) + 8, bos_token_id=end, eos_token_id=end, **sizes
    )
    return save_model(tmp_path_factory.mktemp("models") / "good", tokenizer, config)


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(good, tmp_path / "model")


# What a folder can have wrong: a name, what damages a good one, and words of the message


def config_cut(folder):
    path = folder / "config.json"
    path.write_bytes(path.read_bytes()[:40])


def config_blank(folder):
    (folder / "config.json").write_text("{}")


def config_unknown(folder):
    change_config(folder, model_type="zzz")


def config_sizes(folder):
    change_config(folder, num_attention_heads=3)


def config_words(folder):
    change_config(folder, hidden_size="wide")


def too_many_layers(folder):
    change_config(folder, num_hidden_layers=10_000_000)


def own_code(folder):
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(folder, model_type="zzz", auto_map=code)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")


def no_language_model(folder):
    change_config(folder, architectures=["Bert\x1b[31mForMaskedLM"])


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def weights_cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def weights_noise(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def weights_none(folder):
    (folder / "model.safetensors").unlink()


def weights_few(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["gpt_neox.layers.0.attention.dense.weight"]
    save_file(weights, path, {"format": "pt"})


def weights_small(folder):
    change_config(folder, intermediate_size=48)


def write_index(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_outside(folder):
    write_index(folder, {"a": "../good/model.safetensors"})


def shard_above(folder):
    write_index(folder, {"a": "part.safetensors", "b": ".."})


def shard_missing(folder):
    write_index(folder, {"a": "part.safetensors", "b": "other.safetensors"})


def shard_number(folder):
    write_index(folder, {"a": 5})


def index_blank(folder):
    write_index(folder, {})
    (folder / "model.safetensors.index.json").write_text("{}")


def evil_pickle(folder):
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"a": Evil(folder / "ran")}, file, protocol=2)


def bin_cut(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    config_cut: "not a valid JSON",
    config_blank: "Should have a `model_type`",
    config_unknown: "zzz",
    config_sizes: "not divisible by the number of attention heads",
    config_words: "expected int, got str",
    too_many_layers: "config.json says 10000000 layers, more than 1000",
    own_code: "code of its own, which is never run",
    no_language_model: r"config.json says Bert\x1b[31mForMaskedLM, which is none",
    empty: "cannot load a causal language model",
    weights_cut: "cannot load weights from model.safetensors: Error while deserializing header",
    weights_noise: "cannot load weights from model.safetensors: Error while deserializing header",
    weights_none: "there is no model.safetensors",
    weights_few: "weights, config.json asks for",
    weights_small: "weights, config.json asks for",
    shard_outside: "names a file outside of the folder, ../good/model.safetensors",
    shard_above: "names a file outside of the folder, ..",
    shard_missing: "other.safetensors",
    shard_number: "cannot load a causal language model",
    index_blank: "weight_map",
    evil_pickle: "cannot load weights from pytorch_model.bin",
    bin_cut: "cannot load weights from pytorch_model.bin",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_models_are_refused_in_one_line(folder, damage):
    damage(folder)
    with pytest.raises(ValueError) as caught:
        check_model(str(folder))
    message = str(caught.value)
    assert DAMAGE[damage] in message and message.isprintable()  # a line end is not printable
    assert not (folder / "ran").exists()


def test_other_kinds_of_models_are_refused(tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes)
    save_model(tmp_path / "bert", tokenizer, bert, AutoModelForMaskedLM)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    save_model(tmp_path / "t5", tokenizer, t5, AutoModelForSeq2SeqLM)
    for name, words in (("bert", "config.json says BertForMaskedLM"), ("t5", "T5")):
        with pytest.raises(ValueError, match=rf"cannot load a causal language model.*{words}"):
            check_model(tmp_path / name)


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
def test_right_models_pass_and_are_loaded(architecture, kind, make_model, tmp_path):
    """From one file, from shards, and from a .bin: the codegen draft of the paper has no
    safetensors on its main branch."""
    model = make_model(architecture)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    if kind == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    checked = check_model(tmp_path)
    assert {parameter.device.type for parameter in checked.parameters()} == {"meta"}
    assert checked.num_parameters() == model.num_parameters()
    loaded = load_model(tmp_path, torch.float32, "cpu")
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert load_model(tmp_path, torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_weights_under_wrong_names_are_not_replaced_by_random_ones(folder):
    """As many as the config asks for: the check cannot tell, loading can."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["stray"] = weights.pop("gpt_neox.layers.0.attention.dense.weight")
    save_file(weights, path, {"format": "pt"})
    check_model(folder)
    with pytest.raises(ValueError, match=r"1 weights are missing, the first is .*dense\.weight"):
        load_model(folder, torch.float32, "cpu")


def test_a_pickle_is_never_run(folder):
    evil_pickle(folder)
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_model(folder, torch.float32, "cpu")
    assert not (folder / "ran").exists()


# Names


@pytest.mark.parametrize("load", [check_model, load_tokenizer, load_model])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}/no/such", "no such folder: "),
        ("../no/such", "no such folder: "),
        ("~/model", "no such folder: "),
        ("models/tagret", "no such folder: "),  # models/ is here, so this is a path
        ("models/target/config.json", "is a file; give the folder"),
        ("a b", "no such folder: "),
    ],
)
def test_mistyped_paths_are_not_tried_on_the_hub(tmp_path, monkeypatch, load, name, words):
    (tmp_path / "models" / "target").mkdir(parents=True)
    (tmp_path / "models" / "target" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", None)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", None)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=words) as caught:
        load(name.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The requests that reach a Hub of our own: it has no model whose name begins with smol,
    and is out of order for others."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            is_missing = "smol" in self.path
            self.send_response(404 if is_missing else 503)
            self.send_header("X-Error-Code", "RepoNotFound" if is_missing else "")
            self.end_headers()

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = {"ENDPOINT": address, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "c")}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.chdir(tmp_path)
    yield requests
    server.shutdown()


@pytest.mark.parametrize("load", [check_model, load_tokenizer, load_model])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2", "does not have it"),
        ("smol/lm2", "does not have it"),
        ("gpt2", "cannot be asked: .*503"),
        ("EleutherAI/pythia-31m", "cannot be asked: .*503"),
    ],
)
def test_the_hub_is_asked_once(hub, load, name, words):
    """A mistyped folder may look like an id; a download would be tried six times, in 23 seconds."""
    with pytest.raises(ValueError, match=rf"^no such folder: {name}; .*Hub {words}") as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert [path for path in hub if name in path] == [f"/api/models/{name}"]


def test_names_are_resolved_in_the_folder_of_models(tmp_path, monkeypatch):
    for name in ("models/pythia-31m", "models/org/other", "local"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("EleutherAI/pythia-31m", "models") == "models/pythia-31m"
    assert resolve_model("org/other", "models") == "models/org/other"
    assert resolve_model("local", "models") == "local"
    assert resolve_model("EleutherAI/pythia-31m", None) == "EleutherAI/pythia-31m"
    assert resolve_model("models//org/", None) == "models/org"
    for name, words in (
        ("missing", "model missing is not in models"),
        ("../local", "is outside of --models-dir models"),
        (str(tmp_path / "local"), "is outside of --models-dir models"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve_model(name, "models")


# Tokenizers


def with_hole(tokenizer, folder):
    """A tokenizer whose end token has an id beyond the number of its tokens."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    end = content["added_tokens"][0]
    far = len(tokenizer) + 5
    content["model"]["vocab"][end["content"]] = far
    end["id"] = far
    path.write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_tokenizers_with_holes_are_refused(tokenizer, tmp_path):
    """All logits are cut to len(tokenizer): a token beyond could never come."""
    holed = with_hole(tokenizer, tmp_path)
    assert holed.eos_token_id == len(holed) + 5
    words = f"tokenizer has {len(holed)} tokens, but {holed.eos_token!r} is number {len(holed) + 5}"
    for pair, role in (((holed, holed), "target"), ((tokenizer, holed), "draft")):
        with pytest.raises(ValueError, match=rf"the {role}'s .*{words}".replace("|", r"\|")):
            check_tokenizers(*pair)
    with pytest.raises(ValueError, match="tokens, but"):
        training_tokenizer(tmp_path, tmp_path)


def test_tokenizers_that_differ_are_refused(tokenizer, tmp_path):
    other = data.train_tokenizer(["zebra zebra zebra"], len(tokenizer))
    with pytest.raises(ValueError, match=r"the tokenizers differ: token 257 is '.*' in the target"):
        check_tokenizers(tokenizer, other)
    longer = data.train_tokenizer(["zebra zebra zebra"], 257)
    shorter = longer.convert_ids_to_tokens(list(range(len(longer))))
    with pytest.raises(ValueError, match=f"token {len(shorter)} is"):
        check_tokenizers(longer, tokenizer)
    check_tokenizers(tokenizer, tokenizer)


def test_a_pair_needs_an_end_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "good")
    assert training_tokenizer(tmp_path / "good", tmp_path / "good").eos_token == tokenizer.eos_token
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="needs an end token"):
        training_tokenizer(tmp_path / "endless", tmp_path / "endless")


def tokenizer_missing(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def tokenizer_cut(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [(tokenizer_missing, "is tokenizer.json missing?"), (tokenizer_cut, "cannot load a tokenizer")],
)
def test_damaged_tokenizers_are_refused_in_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_end_tokens(tokenizer, make_model):
    model = make_model()
    end = tokenizer.eos_token_id
    for ends, expected in ((None, [end]), (7, [7]), ([7, end], [7, end])):
        model.generation_config.eos_token_id = ends
        assert end_tokens(model, tokenizer) == expected
    model.generation_config.eos_token_id = None
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert end_tokens(model, endless) == []


# Loading


def test_pairs_are_checked_before_the_first_is_loaded(good, folder, monkeypatch):
    target, draft, tokenizer = load_pair(good, folder, torch.float32, "cpu")
    assert target.num_parameters() == draft.num_parameters()
    assert tokenizer.eos_token_id is not None
    monkeypatch.setattr(models, "load_model", None)
    weights_cut(folder)
    with pytest.raises(ValueError, match="deserializing header"):
        load_pair(good, folder, torch.float32, "cpu")


def test_scratch_models_have_the_sizes_and_their_seed(tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    a, b, c = (scratch_model(sizes, tokenizer, seed) for seed in (3, 3, 4))
    assert a.config.vocab_size == len(tokenizer) and a.config.intermediate_size == 64
    assert a.config.num_hidden_layers == 2 and a.config.max_position_embeddings == 1024
    weights = [model.get_input_embeddings().weight for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# What a model is


def test_a_model_is_its_content_however_its_path_is_typed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    identity = model_identity(str(folder), tmp_path / "out")
    spellings = ("model", "./model/", f"{folder}/", "../" + tmp_path.name + "/model")
    shutil.copytree(folder, "copy")
    for name in (*spellings, "copy"):
        assert model_identity(name, tmp_path / "out") == identity
    os.utime("model/config.json", (1, 1))
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("new")
    assert model_identity("model", tmp_path / "out") == identity


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_changed_content_is_noticed_at_equal_size_and_time(folder, tmp_path, file):
    identity = model_identity(folder, tmp_path)
    path = folder / file
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert model_identity(folder, tmp_path) != identity


def test_digests_are_computed_once(folder, tmp_path, monkeypatch):
    read = []
    checksum = models.checksum
    monkeypatch.setattr(models, "checksum", lambda path: read.append(path.name) or checksum(path))
    identity = model_identity(folder, tmp_path)
    assert set(read) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert len(set(read)) == len(read)
    read.clear()
    assert model_identity(folder, tmp_path) == identity and not read
    os.utime(folder / "config.json", (1, 1))
    assert model_identity(folder, tmp_path) == identity and read == ["config.json"]
    (tmp_path / "digests.json").write_text("{")  # damaged: computed anew
    assert model_identity(folder, tmp_path) == identity


def test_a_hub_id_is_its_name_and_revision(tmp_path, monkeypatch):
    """From the local cache of the Hub, as it lies on the disk after a download."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert model_identity("org/name", tmp_path) == f"org/name@{commit}"


# Generation settings


def test_generation_settings_that_are_ignored_are_named(tmp_path, make_model):
    for name, changes in (
        ("plain", {}),
        ("neutral", {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}),
        ("own", {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}),
        ("other", {"no_repeat_ngram_size": 3}),
    ):
        GenerationConfig(eos_token_id=1, **changes).save_pretrained(tmp_path / name)
    (tmp_path / "none").mkdir()
    own, other, *quiet = (str(tmp_path / n) for n in ("own", "other", "plain", "neutral", "none"))
    assert models.ignored_settings(own, other) == (
        "Ignored on both sides, of the models' own generation settings: the target's temperature "
        "0.6, the target's repetition_penalty 1.1, the draft's no_repeat_ngram_size 3"
    )
    assert models.ignored_settings(own).endswith("repetition_penalty 1.1"), "an EAGLE head"
    for name in quiet:
        assert models.ignored_settings(name, name) == ""
