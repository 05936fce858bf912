"""What a user can get wrong: the command lines refuse it before any work, in one line and with a
non-zero exit code.

A table of bad inputs through the real command lines, fuzzing of rows, and a look through the source
for calls that would run what comes from outside. (Arguments: test_settings.py.)
"""

import ast
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

import data
import run_all
import speculative

ROOT = Path(run_all.__file__).parent

# Models and rows, good and bad


class Evil:
    """What a pickle runs when it is loaded."""

    folder = None

    def __reduce__(self):
        return os.mkdir, (str(Evil.folder),)


class ModelFolders:
    """Folders of models: `target` and `draft` are right, each other has the fault that its name
    says."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        self.tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        self.ids["vocab_size"] = len(tokenizer) + 8

    def save(self, name, config, auto=AutoModelForCausalLM, tokenizer=None):
        auto.from_config(config).save_pretrained(self.folder / name)
        (tokenizer or self.tokenizer).save_pretrained(self.folder / name)
        return self.folder / name

    def neox(self, name, tokenizer=None, **changes):
        sizes = {"intermediate_size": 32, "max_position_embeddings": 256}
        config = GPTNeoXConfig(**sizes | self.small | self.ids | changes)
        return self.save(name, config, tokenizer=tokenizer)

    def edited(self, name, file, change):
        path = self.neox(name) / file
        path.write_bytes(change(path.read_bytes()))

    def config(self, name, **changes):
        self.edited(name, "config.json", lambda old: json.dumps(json.loads(old) | changes).encode())

    def save_all(self):
        self.neox("target")
        self.neox("draft")
        (self.folder / "a-file").write_text("weights")
        (self.folder / "empty").mkdir()
        self.edited("config-cut", "config.json", lambda old: old[:40])
        self.config("config-escape", architectures=["Evil\x1b[31m"])
        classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        self.config("own-code", model_type="zzz", auto_map=classes)
        source = f"import os\nos.mkdir({str(Evil.folder)!r})\n"
        (self.folder / "own-code" / "evil.py").write_text(source)
        self.edited("weights-cut", "model.safetensors", lambda old: old[:-100])
        path = self.neox("pickle")
        (path / "model.safetensors").unlink()
        with open(path / "pytorch_model.bin", "wb") as file:
            pickle.dump({"a": Evil()}, file)
        self.save_unfit()

    def save_unfit(self):
        """Models that are whole, and cannot be trained or decoded here, or not as a pair."""
        self.neox("narrow-head", vocab_size=len(self.tokenizer) - 1)
        self.neox("short-context", max_position_embeddings=64)
        other = data.train_tokenizer(["zebra zebra zebra"], len(self.tokenizer))
        self.neox("other-tokenizer", other)
        endless = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer.backend_tokenizer)
        self.neox("no-end", endless)
        sizes = self.small | self.ids | {"intermediate_size": 32}
        self.save("bert", BertConfig(**sizes), AutoModelForMaskedLM)
        sizes["num_key_value_heads"] = 2
        self.save("sliding", MistralConfig(**sizes, sliding_window=8))
        self.save("scaled", GraniteConfig(**sizes, logits_scaling=4.0))
        self.save("alibi", BloomConfig(**self.ids, hidden_size=16, n_layer=1, n_head=2))


def save_rows(folder):
    """Folders for --data-dir, of gsm8k but for `tests`; `good` is right, each other has the fault
    that its name says."""
    good = [
        json.dumps({"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"}) for i in range(40)
    ]
    faults = {
        "good": good,
        "empty": [],
        "blank": ["", " ", ""],
        "not-json": [*good[:2], "{'question': 1}"],
        "not-utf8": [good[0], "\udcff"],
        "half-json": [*good[:3], good[3][:9]],
        "deep": [good[0], "[" * 100_000],
        "array": [good[0], "[1, 2]"],
        "no-column": [*good[:4], '{"question": "Why?", "reply\\u001b[31m": "So."}'],
        "number": [good[0], '{"question": "Why?", "answer": 5}'],
        "list": ['{"question": ["Why?"], "answer": "So."}'],
        "surrogate": [good[0], r'{"question": "Why \ud800?", "answer": "So."}'],
        "few": good[:5],
        "no-text": ['{"question": "Why?", "answer": " "}'] * 40,
    }
    for name, lines in faults.items():
        (folder / name / "gsm8k").mkdir(parents=True)
        text = "".join(line + "\n" for line in lines).encode(errors="surrogateescape")
        (folder / name / "gsm8k" / "train.jsonl").write_bytes(text)
    (folder / "no-file").mkdir()
    (folder / "folder" / "gsm8k" / "train.jsonl").mkdir(parents=True)
    (folder / "tests" / "mbpp").mkdir(parents=True)
    row = {"text": "Add.", "code": "a + b", "test_list": "assert f()"}
    (folder / "tests" / "mbpp" / "train.jsonl").write_text(json.dumps(row))
    (folder / "prompts.jsonl").write_text('{"prompt": "What"}\n{"prompt": 5}\n')
    (folder / "prompts-latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("world")
    for name in ("models", "rows"):
        (folder / name).mkdir()
    Evil.folder = folder / "run-by-a-model"
    with contextlib.redirect_stderr(io.StringIO()):
        ModelFolders(folder / "models", tokenizer).save_all()
    save_rows(folder / "rows")
    return folder


@pytest.fixture
def call(exit_code, monkeypatch):
    """call(module, argv): the exit code of a command line, in this process."""

    def run(module, argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
        return exit_code(module.main, f"{module.__name__}.py")

    return run


# The table: each case is the end of a command line, and words of the message

DATA = {
    "no-file": "gsm8k/train.jsonl does not exist",
    "folder": "gsm8k/train.jsonl does not exist",
    "empty": "train.jsonl is empty",
    "blank": "train.jsonl is empty",
    "not-json": "train.jsonl, line 3: not JSON",
    "not-utf8": "train.jsonl, line 2: not JSON",
    "half-json": "train.jsonl, line 4: not JSON",
    "deep": "train.jsonl, line 2: not JSON",
    "array": "train.jsonl, line 2: must be a JSON object",
    "no-column": "train.jsonl, line 5: no column 'answer' (found 'question', 'reply\\x1b[31m')",
    "number": "train.jsonl, line 2: answer must be text, got 5",
    "list": "train.jsonl, line 1: question must be text, got ['Why?']",
    "surrogate": "train.jsonl, line 2: question holds half of a surrogate pair",
    "few": "too few to hold a tenth of them out",
    "no-text": "gsm8k: the prompt or the response of every row is empty",
}
MODELS = {
    "missing": "model missing is not in",
    "a-file": "model a-file is not in",
    "../models/draft": "is outside of --models-dir",
    "/etc": "is outside of --models-dir",
    "empty": "cannot load",
    "config-cut": "not a valid JSON",
    "config-escape": "config.json says Evil\\x1b[31m, which is none",
    "own-code": "code of its own, which is never run",
    "bert": "config.json says BertForMaskedLM",
    "weights-cut": "model.safetensors: Error while deserializing header",
    "pickle": "cannot load weights from pytorch_model.bin",
    "other-tokenizer": "the tokenizers differ: token 257 is",
    "narrow-head": "the output head has 399 rows, the tokenizer 400 tokens",
    "short-context": "has a context of 64 tokens; --max-length is 128",
    "sliding": "every layer must have full attention",
    "alibi": "takes no position_ids",
    "scaled": "changes its logits after the output head (logits_scaling)",
}
FEW = "--max-steps 1 --batch 4 --eval-prompts 4 --timed-prompts 1 --max-new-tokens 8"
FEW += " --max-length 128 --tasks gsm8k --out {w}/out"
TINY = "--pairs tiny --data-dir {w}/rows/good"
OWN = "--models-dir {w}/models --data-dir {w}/rows/good --pairs custom --target target"
ENDLESS = "--target {w}/models/no-end --draft {w}/models/no-end"
CASES = [
    *((f"--pairs tiny --data-dir {{w}}/rows/{name}", words) for name, words in DATA.items()),
    *((f"{OWN} --draft {name}", words) for name, words in MODELS.items()),
    (f"--pairs custom {ENDLESS} --data-dir {{w}}/rows/good", "an end token"),
    ("--pairs custom --target ../no/such --draft b --data-dir {w}/rows/good", "../no/such"),
    (
        "--target smolm2 --draft-layers 1 --data-dir {w}/rows/good",
        "no such folder: smolm2; as a Hub",
    ),
    (f"{OWN} --draft-layers 9", "cannot keep 9 of the model's 1 layers"),
    (f"{OWN} --draft-layers 1 --draft draft", "either --draft or --draft-layers"),
    ("--pairs tiny --tasks mbpp --data-dir {w}/rows/tests", "test_list must be a list of texts"),
    ("--pairs tiny --tasks custom", "give --data-dir"),
    (f"{TINY} --k 0", "argument --k: must be a number above 0"),
    (f"{TINY} --tasks gsm8k,custom", "custom/train.jsonl does not exist"),
    (f"{TINY} --max-length 4", "no rows are left"),
    (f"{TINY} --max-length 2000", "a context of 1024 tokens"),
    (f"{TINY} --max-new-tokens 1020", "a context of 1024 tokens"),
    (f"{TINY} --shard-target", "start with torchrun"),
    (f"{TINY} --out {{w}}/models/a-file", "is no folder to write to"),
    (f"{TINY} --out {{w}}/models/a-file/out", "is no folder to write to"),
    (f"{TINY} --out /proc/out", "is no folder to write to"),
]


def check(code, err, words):
    assert code in (1, 2) and err.count("\n") == 1 and words in err, err
    assert "error: " in err and "Traceback" not in err and "\x1b" not in err


@pytest.mark.parametrize(("end", "words"), CASES)
def test_run_all_refuses_before_any_work(end, words, world, call, capsys):
    code = call(run_all, f"{FEW} {end}".format(w=world).split(" "))
    check(code, capsys.readouterr().err, words)
    files = {path for path in (world / "out").rglob("*") if path.is_file()}
    allowed = {path for path in files if path.parent.name == "tokenised"}
    assert {path.name for path in files - allowed} <= {
        ".lock", "digests.json", "digests.json.sha256",
    }  # fmt: skip
    assert not Evil.folder.exists()


SPECULATIVE = [
    ("--gamma 0", "gamma must be at least 1"),
    ("--temperature -1", "temperature must be"),
    ("--temperature nan", "temperature must be"),
    ("--temperature 1e-38", "temperature must be"),
    ("--temperature hot", "argument --temperature: "),
    ("--lenience 0", "lenience must be in (0, 1]"),
    ("--lenience 1.5", "lenience must be in (0, 1]"),
    ("--lenience-fn linear", "did you mean 'lin'?"),
    ("--top-p 0", "top_p must be in (0, 1]"),
    ("--top-k -1", "top_k must be"),
    ("--max-new-tokens 0", "max_new_tokens must be at least 1"),
    ("--max-new-tokens 500", "context of 256 tokens"),
    ("--seed -1", "seed must be at least 0"),
    ("--dtype half", "unknown name 'half'"),
    ("--prompt=", "empty prompt"),
    ("--prompts {w}/rows", "Is a directory"),
    ("--prompts {w}/rows/prompts.jsonl", "line 2: prompt must be text, got 5"),
    ("--prompts {w}/rows/prompts-latin.jsonl", "line 1: not JSON"),
    ("--prompts {w}/rows/not-json/gsm8k/train.jsonl", "line 1: no column 'prompt' or 'messages'"),
    ("--target {w}/models/a-file", "is a file; give the folder"),
    ("--draft ../../etc/x", "no such folder"),
    ("--draft {w}/models/sliding", "every layer must have full attention"),
    ("--draft {w}/models/weights-cut", MODELS["weights-cut"]),
    ("--draft {w}/models/pickle", MODELS["pickle"]),
    ("--draft {w}/models/own-code", MODELS["own-code"]),
]


@pytest.mark.parametrize(("end", "words"), SPECULATIVE)
def test_speculative_refuses_too(end, words, world, call, capsys):
    argv = ["--target", f"{world}/models/target", "--draft", f"{world}/models/draft"]
    if "--prompt" not in end:
        argv += ["--prompt", "What"]
    code = call(speculative, [*argv, *end.format(w=world).split(" ")])
    check(code, capsys.readouterr().err, words)
    assert not Evil.folder.exists()


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_printed_as_json_is_json(world, call, capsys):
    """Issue 13.10: one token is the target's own, so that nothing is judged; alpha was NaN."""
    argv = ["--target", f"{world}/models/target", "--draft", f"{world}/models/draft"]
    argv += ["--prompt", "What", "--json", "--max-new-tokens"]
    assert call(speculative, [*argv, "1"]) == 0
    result = strict_json(capsys.readouterr().out)
    assert result["alpha"] is None and result["tau"] == 1 and result["generated"] == 1


def test_what_models_write_reaches_the_terminal_escaped(world, call, capsys):
    argv = ["--target", f"{world}/models/target", "--draft", f"{world}/models/draft"]
    argv += ["--prompt", "What \x1b[31m\x07 is", "--max-new-tokens", "40", "--temperature", "2"]
    assert call(speculative, argv) == 0
    out = capsys.readouterr().out
    assert "What \\x1b[31m\\x07 is" in out
    assert all(c.isprintable() or c in "\n\t" for c in out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "speculative.py --target /no/such --draft /no/such --prompt a",
        "run_all.py --tasks gsm8k --pairs tiny --data-dir {w}/rows/empty --out {w}/out",
        "-m torch.distributed.run --standalone --nproc_per_node 2 run_all.py --preset tiny "
        "--limit 8 --batch 1 --out {w}/out2",
    ],
    ids=["speculative", "run_all", "two ranks"],
)
def test_real_processes(command, world):
    argv = [sys.executable, *command.format(w=world).split()]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120)
    lines = [line for line in done.stderr.splitlines() if ".py" in line.split("error: ")[0]]
    messages = [line for line in lines if "error: " in line]
    assert done.returncode != 0 and len(messages) == 1, done.stderr
    if "torch" in command:  # torchrun adds its own account
        assert "batches of 1 rows do not feed 2 ranks; raise --batch" in messages[0]
    else:
        assert done.stderr == messages[0] + "\n"


# Security


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
RUNNERS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen")


def forbidden(source: str) -> list[str]:
    """Calls that run, or could be made to run, what comes from outside."""
    tree = ast.parse(source)
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(alias.name for alias in node.names)]
    imports = [name for name in names if name.split(".")[0] in PICKLES]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return imports + [ast.unparse(call.func) for call in calls if is_forbidden(call)]


def is_forbidden(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.split(".")[-1]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in RUNNERS or last in ("run_path", "run_module"):
        return True
    if any(given.get(key, "False") != "False" for key in ("shell", "allow_pickle")):
        return True
    if name == "torch.load" and given.get("weights_only") != "True":
        return True
    if given.get("trust_remote_code", "False") != "False":
        return True
    if given.get("weights_only", "True") != "True":
        return True
    # left out, transformers asks the user
    return (
        name.startswith("Auto") and last == "from_pretrained" and "trust_remote_code" not in given
    )


def test_nothing_runs_what_comes_from_outside():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]
    assert len(paths) >= 15
    calls = {path.name: forbidden(path.read_text()) for path in paths}
    assert calls == {path.name: [] for path in paths}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(name)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_forbidden_calls_are_found(source):
    assert forbidden(source)


# Fuzzing (hypothesis: requirements-test.txt)


def test_any_rows_are_read_or_refused(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    scalars = st.none() | st.booleans() | st.integers() | st.floats()
    scalars |= st.text(st.characters(), max_size=5)
    values = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
        ),
        max_leaves=3,
    )
    columns = st.sampled_from(["question", "answer", "text", "code", "test_list", "x"])
    texts = st.lists(st.text(max_size=4), max_size=2) | st.text(max_size=4)
    rows = st.dictionaries(columns, texts | values, max_size=6).map(json.dumps).map(str.encode)
    others = st.binary(max_size=20) | values.map(json.dumps).map(str.encode)
    contents = st.binary() | st.lists(rows | others, max_size=4).map(b"\n".join)
    tasks = st.sampled_from(["gsm8k", "mbpp"])

    @hypothesis.settings(max_examples=200, deadline=None, database=None)
    @hypothesis.given(tasks, contents, st.none() | st.integers(1, 3))
    def read(task, content, limit):
        (tmp_path / task).mkdir(exist_ok=True)
        (tmp_path / task / "train.jsonl").write_bytes(content)
        try:
            loaded = data.load_rows(task, "train", tmp_path, limit)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and "train.jsonl" in str(error)
        else:
            assert loaded
            for row in loaded:
                assert isinstance(data.TASKS[task].prompt(row), str)
                assert isinstance(data.TASKS[task].response(row), str)

    read()
