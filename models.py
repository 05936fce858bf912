"""Models and tokenizers: find them, check them before long work, load, make and tell them apart.

Whatever is wrong with one is a ValueError of one line. Nothing that a model brings along is ever
run: no code of its own (`trust_remote_code` stays off), and a pickle only as weights.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXConfig,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from cli import printable
from hub import check_hub, loading
from own_rows import turn_end
from ranks import from_rank_0, rank
from short_head import shorten_head
from storage import checksum, read_json, write_json

MAX_LAYERS = 1000  # more would take minutes to build, even without weights
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first of these, or of their shards
# What makes a model the one it is, of the files in its folder
CONTENT = (
    "*.safetensors", "*.bin", "*.index.json", "config.json", "tokenizer*", "vocab*", "merges.txt",
    "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip

# Finding


def resolve_model(name: str, models_dir: str | None) -> str:
    """A model's folder under models_dir (by its whole name or the part after the slash), a local
    folder (a relative path), or without models_dir a Hub id. Raises ValueError for a name that is
    neither, or that leads out of models_dir.
    """
    candidates = []
    if models_dir:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            outside = f"model {name} is outside of --models-dir {models_dir}"
            raise ValueError(f"{outside}; name a folder in it, or leave --models-dir out")
        candidates = [Path(models_dir, name), Path(models_dir, name.split("/")[-1])]
    for path in (*candidates, Path(name)):
        if path.is_dir():
            return str(path)
    if models_dir:
        places = f"{candidates[0]} and {candidates[1]}"
        raise ValueError(f"model {name} is not in {models_dir} (looked for {places})")
    return name


def check_name(name: str) -> None:
    """Raises ValueError unless this is a folder, or the id of a model that the Hub or its cache
    here has: a mistyped path is no id, so the Hub is not asked for it."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; give the folder with config.json and the weights")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name))
    if not path.is_dir() and (not is_id or (len(path.parts) > 1 and path.parent.is_dir())):
        raise ValueError(f"no such folder: {name}")
    if not path.is_dir():
        check_hub(str(name), "model", "config.json")


# Checking and loading


def check_model(name) -> torch.nn.Module:
    """A causal language model on the meta device, after all checks that need no weights in memory:
    of safetensors only the headers are read.

    Raises ValueError: no such folder, a configuration that is unreadable or no causal LM's, code of
    the model's own, weights that are missing, cut short, too few or outside of the folder.
    """
    check_name(name)
    with loading(f"a causal language model from {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kinds = ", ".join(config.architectures or ["LMHeadModel"])
        if not re.search("ForCausalLM|LMHeadModel|ForConditionalGeneration", kinds):
            raise ValueError(f"config.json says {kinds}, which is none")  # BERT would load
        layers = getattr(config, "num_hidden_layers", 0)
        if layers > MAX_LAYERS:
            raise ValueError(f"config.json says {layers} layers, more than {MAX_LAYERS}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        size = getattr(config, "draft_vocab_size", None)
        if size:
            shorten_head(model, torch.empty(size, dtype=torch.long, device="meta"))
        tensors = {}
        for file in weight_files(name):
            with loading(f"weights from {Path(file).name}"):
                tensors |= load_state_dict(file, map_location="meta")
        if size:
            short_head_name(tensors, config)
        stored = sum(t.numel() for t in tensors.values() if t.is_floating_point())
        wanted = sum(parameter.numel() for parameter in model.parameters())
        if stored < wanted:
            raise ValueError(f"its files hold {stored:,} weights, config.json asks for {wanted:,}")
        model.generation_config = generation_config(name) or model.generation_config
    return model


def weight_files(name) -> list[str]:
    """The files that hold the weights, downloaded where `name` is a Hub id. Raises ValueError for
    an index that leads out of the folder, and where there are no weights.

    pytorch_model.bin, a pickle, only where there is no safetensors (the main branch of
    Salesforce/codegen-350M-mono has none): transformers reads tensors from it and runs nothing.
    """
    for file in WEIGHTS:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path:
            return [path]
        index = cached_file(name, f"{file}.index.json", _raise_exceptions_for_missing_entries=False)
        if index:
            shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            for shard in shards:
                if shard in ("", ".", "..") or Path(shard).name != shard:
                    raise ValueError(f"the index names a file outside of the folder, {shard}")
            return [cached_file(name, shard) for shard in shards]
    raise ValueError(f"there is no {WEIGHTS[0]}")


def load_model(name, dtype=torch.float32, device="cpu") -> torch.nn.Module:
    """A causal language model in evaluation mode. Raises ValueError, also for missing weights."""
    check_name(name)
    with loading(f"a causal language model from {name}"):
        short_head = short_head_tensors(name)
        # a short head is no head that transformers knows: it makes a random one, to be replaced
        with errors_only() if short_head else nullcontext():
            model, report = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(short_head),
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        if short_head:
            head = model.get_output_embeddings()
            names = {name for name, module in model.named_modules() if module is head}
            keys = sorted(key for key, *_ in report["mismatched_keys"])
            misfits = [key for key in keys if key.rpartition(".")[0] not in names]
            if misfits:
                raise ValueError(f"{len(misfits)} weights do not fit, the first is {misfits[0]}")
            shorten_head(model, short_head["token_ids"])
            model.get_output_embeddings().load_state_dict(short_head)
        return model.to(device).eval()


@contextmanager
def errors_only() -> Iterator[None]:
    """transformers without warnings."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def short_head_tensors(name) -> dict[str, Tensor]:
    """weight, token_ids and bias, if any, of a draft's short head (short_head.py); {} where its
    head is whole. Raises ValueError where config.json speaks of one and the files have none, or one
    of another size."""
    with loading(f"a causal language model from {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not getattr(config, "draft_vocab_size", None):
            return {}
        tensors = {}
        for file in weight_files(name):
            tensors |= load_file(file)
        prefix = short_head_name(tensors, config) + "."
        last = config.vocab_size - 1
        ids = tensors[f"{prefix}token_ids"]
        if not (ids[0] >= 0 and ids[-1] <= last and (ids.diff() > 0).all()):
            raise ValueError(f"its token_ids must be ascending numbers from 0 to {last}")
        names = [key for key in tensors if key.startswith(prefix)]
        return {key.removeprefix(prefix): tensors[key] for key in names}


def short_head_name(tensors: dict[str, Tensor], config) -> str:
    """What the short head is called among a model's stored tensors. Raises ValueError where there
    is none of the size that config.json says."""
    size = config.draft_vocab_size
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        weight = tensors.get(f"{name}.weight")
        if kind == "token_ids" and weight is not None and len(weight) == len(tensor) == size:
            return name
    raise ValueError(
        f"config.json says draft_vocab_size {size}, and its files hold no output head of {size} "
        "rows with token_ids"
    )


def load_tokenizer(name):
    """The tokenizer of a folder or Hub id. Raises ValueError where there is none."""
    check_name(name)
    with loading(f"a tokenizer from {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokens = set(tokenizer("Hello, world").input_ids)
        if not tokens - set(tokenizer.all_special_ids):  # transformers makes an empty one
            raise ValueError("it has no tokens; is tokenizer.json missing?")
    return tokenizer


def check_tokenizers(target_tokenizer, draft_tokenizer) -> None:
    """A draft's token ids must mean the same to the target, and lie below len(tokenizer), to which
    all logits are cut. Raises ValueError, naming the first token that does not."""
    for role, tokenizer in (("target", target_tokenizer), ("draft", draft_tokenizer)):
        size = len(tokenizer)
        for token, index in tokenizer.get_vocab().items():
            if index >= size:
                holes = f"has {size} tokens, but {token!r} is number {index}: ids without holes"
                raise ValueError(f"the {role}'s tokenizer {holes} are needed")
    tokens = [
        tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        for tokenizer in (target_tokenizer, draft_tokenizer)
    ]
    for index, (a, b) in enumerate(zip_longest(*tokens)):
        if a != b:
            tokens = f"token {index} is {a!r} in the target's, {b!r} in the draft's"
            raise ValueError(f"the tokenizers differ: {tokens}")


def common_tokenizer(target: str, draft: str):
    """The target's tokenizer. Raises ValueError where the draft's differs."""
    tokenizer = load_tokenizer(target)
    check_tokenizers(tokenizer, load_tokenizer(draft))
    return tokenizer


def training_tokenizer(target: str, draft: str):
    """The pair's tokenizer, fit to train with. Raises ValueError where the two disagree, naming the
    first token that differs, and where it has no end token."""
    tokenizer = common_tokenizer(target, draft)
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        missing = "an end token (eos_token) and a tokenizer.json"
        raise ValueError(f"the tokenizer of {target} needs {missing}")
    return tokenizer


def load_pair(target: str, draft: str, dtype=torch.float32, device="cpu"):
    """Target, draft and their tokenizer, all checked before the first is loaded."""
    for name in (target, draft):
        check_model(name)
    tokenizer = common_tokenizer(target, draft)
    return load_model(target, dtype, device), load_model(draft, dtype, device), tokenizer


def end_tokens(model, tokenizer, is_chat: bool = False) -> list[int]:
    """The tokens that end a text: those of the model's generation config, else the tokenizer's,
    and the one that ends a turn of a chat; [] where none is."""
    own = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if own is None else own
    ends = [ends] if isinstance(ends, int) else ends or []
    last = [turn_end(tokenizer)] if is_chat else []
    return list(dict.fromkeys([*ends, *last]))


def generation_config(name: str) -> GenerationConfig | None:
    """What a folder or Hub id says of generation; None where it says nothing."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return None


# Of a generation_config.json, what changes the tokens that generate() draws, and the values at
# which it changes nothing. Applied to one model of a pair alone, it would change acceptance.
NEUTRAL = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}


def ignored_settings(*names: str) -> str:
    """One line: which generation settings a target and its draft (folders or Hub ids) bring along,
    that nothing here applies to either; "" where they have none."""
    parts = []
    for role, name in zip(("target", "draft"), names, strict=False):
        config = generation_config(name)
        for key, neutral in NEUTRAL.items():
            value = getattr(config, key, None)
            if value not in (None, neutral):
                parts.append(f"the {role}'s {key} {value}")
    if not parts:
        return ""
    text = f"Ignored on both sides, of the models' own generation settings: {', '.join(parts)}"
    return printable(text)


# Making


def scratch_model(sizes: dict, tokenizer, seed: int) -> torch.nn.Module:
    """A GPT-NeoX of these sizes for this tokenizer, with random weights."""
    end = tokenizer.eos_token_id
    defaults = {"intermediate_size": 4 * sizes["hidden_size"], "max_position_embeddings": 1024}
    sizes = {**defaults, **sizes}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def keep_layers(model: torch.nn.Module, indices: Sequence[int]) -> torch.nn.Module:
    """Drop all decoder layers of a model but these, in place; returns it. Embeddings, last norm and
    head stay: a draft to start training from.

    Raises ValueError where the indices are not some of the model's layers, each once and in order,
    and for a model whose layers are not in one list.
    """
    config, base = model.config, model.base_model
    count = getattr(config, "num_hidden_layers", 0)  # of CodeGen too: an alias of its n_layer
    if not indices or sorted({*indices} & {*range(count)}) != list(indices):
        kept = f"cannot keep {len(indices)} of the model's {count} layers"
        raise ValueError(f"{kept}; at least one, and each once and in order, can be kept")
    names = [
        name
        for name, module in base.named_children()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected one list of {count} decoder layers, got {len(names)}"
        )
    layers = torch.nn.ModuleList(getattr(base, names[0])[i] for i in indices)
    setattr(base, names[0], layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in a cache
    for setting, value in list(vars(config).items()):
        is_by_layer = isinstance(value, (list, tuple)) and len(value) == count
        if "layer" in setting and is_by_layer:  # such as layer_types
            vars(config)[setting] = [value[i] for i in indices]
    config.num_hidden_layers = len(indices)
    return model


# Telling apart


def model_identity(name: str, folder) -> str:
    """What a model is, however its path is typed: of a folder the digest of what its weights,
    config and tokenizer files contain, of a Hub id its name with the revision.

    The digest of a file is remembered in `folder`/digests.json, and computed anew when its size,
    times or inode change. Rank 0 reads the files; to be called on all ranks.
    """
    return from_rank_0(_identity(name, folder) if rank() == 0 else None)


def _identity(name: str, folder) -> str:
    check_name(name)
    if not Path(name).is_dir():
        with loading(f"a configuration from {name}"):
            revision = Path(cached_file(name, "config.json")).parent.name  # snapshots/<revision>/
        return f"{name}@{revision}"
    remembered = read_json(Path(folder, "digests.json"))
    digests = dict(remembered)
    content = {}
    for path in sorted({path for pattern in CONTENT for path in Path(name).glob(pattern)}):
        state = path.stat()
        times = f"{state.st_mtime_ns} {state.st_ctime_ns}"
        key = f"{path.resolve()} {state.st_size} {times} {state.st_ino}"
        if key not in digests:
            digests[key] = checksum(path)
        content[path.name] = digests[key]
    if digests != remembered:
        write_json(Path(folder, "digests.json"), digests)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
