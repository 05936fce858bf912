"""The Hugging Face Hub, asked once: where it cannot be reached, a download would try six times. And
what goes wrong as things are loaded, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from cli import printable


def check_hub(name: str, kind: str, file: str) -> None:
    """Raises ValueError unless the Hub, or its cache on this machine, has `name`, a "model" or a
    "dataset"; `file` is one that every such has."""
    try:
        if not try_to_load_from_cache(name, file, repo_type=kind):
            HfApi().repo_info(name, repo_type=kind, timeout=10)
        return
    except HFValidationError:
        answer = "it is none"
    except RepositoryNotFoundError:
        answer = "the Hub does not have it, or not for you"
    except Exception as error:
        answer = f"the Hub cannot be asked: {' '.join(str(error).split()):.200}"
    raise ValueError(printable(f"no such folder: {name}; as a Hub id (ORG/NAME): {answer}"))


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Whatever transformers, datasets and the Hub raise becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        is_vague = type(error).__module__.startswith("datasets.")  # its cause is not
        cause = error.__cause__ if is_vague and error.__cause__ else error
        text = " ".join(str(cause).split()) or type(cause).__name__
        if "trust_remote_code" in text:
            text = "it needs code of its own, which is never run"
        raise ValueError(printable(f"cannot load {what}: {text:.400}")) from error
