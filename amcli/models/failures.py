"""Turn what the libraries raise into one line and a hint, and keep them silent meanwhile."""

from __future__ import annotations

import errno
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from amcli.errors import AmkvError, AmkvWarning, OutOfMemoryError, UsageError

# Neither module declares what it exports, nor all of its types.
hf_logging: Any = importlib.import_module("transformers.utils.logging")
hub_logging: Any = importlib.import_module("huggingface_hub.utils.logging")
hub_utils: Any = importlib.import_module("huggingface_hub.utils")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of the libraries inside the block, and only there.

    `python -W` brings their warnings back.
    """
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub_level, hub_bars = hub_logging.get_verbosity(), not hub_utils.are_progress_bars_disabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=AmkvWarning)
            yield
    finally:
        hf_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            hf_logging.enable_progress_bar()
        # transformers switches the hub's bars along with its own.
        (hub_utils.enable_progress_bars if hub_bars else hub_utils.disable_progress_bars)()


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def explain(error: Exception, name: str, revision: str | None) -> AmkvError:
    """The error a user should see for `error`, raised while loading `name`."""
    chain = list(_chain(error))
    if "Unrecognized model in" in str(error):  # also when transformers got no config.json at all
        chain += _chain(_why_no_configuration(name, revision))
    if any(out_of_memory(link) for link in chain):
        return OutOfMemoryError(
            f"{name} does not fit into memory",
            "try dtype='bfloat16', device='cpu', or a smaller model",
            code="model-out-of-memory",
            field="model",
            model=name,
        )
    full = any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain)
    if full:
        return OutOfMemoryError(
            f"no space left to download {name}",
            "free some space, or set HF_HOME to another disk",
            code="download-disk-full",
            model=name,
        )
    found = _hub_error(chain, name, revision) or _model_error(chain, name)
    if found is not None:
        return found
    return AmkvError(
        f"cannot load {name}: {_first_line(error)}",
        "the exception that caused this one says where",
        code="model-not-loadable",
        field="model",
        model=name,
    )


def _why_no_configuration(name: str, revision: str | None) -> Exception | None:
    """What the hub raises when asked for a model's config.json; None for a path."""
    if Path(name).exists():
        return None
    try:
        huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:
        return error
    return None


def _hub_error(chain: list[BaseException], name: str, revision: str | None) -> AmkvError | None:
    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if among(hub.GatedRepoError):
        return UsageError(
            f"the model {name} is gated and your account has no access to it",
            f"accept its terms at https://huggingface.co/{name}, then run: hf auth login",
            code="model-gated",
            field="model",
            model=name,
        )
    if among(hub.RevisionNotFoundError):
        return UsageError(
            f"the model {name} has no revision {revision}",
            f"leave it out: {name}",
            code="unknown-revision",
            field="model",
            model=name,
            revision=revision,
        )
    if among(hub.RepositoryNotFoundError, hub.HFValidationError):
        return UsageError(
            f"there is no model {name}, neither as a folder nor on the Hugging Face hub",
            "check the name; for a private model run: hf auth login",
            code="unknown-model",
            field="model",
            model=name,
        )
    if among(hub.RemoteEntryNotFoundError):
        return UsageError(
            f"the model {name} has no config.json: it is not in the form of transformers",
            "choose the repository it was made from, or download its GGUF file and name that",
            code="model-not-transformers",
            field="model",
            model=name,
        )
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(link, hub.HfHubHTTPError) and status is not None:
            return AmkvError(
                f"the Hugging Face hub answered {status} when asked for {name}",
                "try again in a while, or give the folder of a model",
                code="hub-failed",
                field="model",
                model=name,
                status=status,
            )
    away = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, ConnectionError)
    if not among(*away) and not any("couldn't connect to" in str(link) for link in chain):
        return None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return AmkvError(
            f"the model {name} is not in the local cache, and HF_HUB_OFFLINE is set",
            f"unset HF_HUB_OFFLINE, or fetch it first: hf download {name}",
            code="hub-offline",
            field="model",
            model=name,
        )
    return AmkvError(
        f"the model {name} is not in the local cache, and the hub cannot be reached",
        "check the network, or give the folder of a model",
        code="hub-unreachable",
        field="model",
        model=name,
    )


def _model_error(chain: list[BaseException], name: str) -> AmkvError | None:
    text = "\n".join(str(link) for link in chain)
    if "trust_remote_code" in text:
        return UsageError(
            f"the model {name} brings its own code, which amkv does not run unasked",
            "choose a model that transformers supports itself, or read that code and pass "
            "trust_remote_code=True",
            code="model-brings-code",
            field="trust_remote_code",
            model=name,
        )
    if "does not recognize this architecture" in text or "Unrecognized model in" in text:
        return UsageError(
            f"transformers {transformers_version} does not know the architecture of {name}",
            "pip install --upgrade transformers, or choose another model",
            code="model-architecture-unknown",
            field="model",
            model=name,
        )
    if "Unrecognized configuration class" in text:
        return UsageError(
            f"{name} is not a causal language model",
            "choose one, such as Qwen/Qwen3-4B",
            code="model-not-causal",
            field="model",
            model=name,
        )
    if "not a valid JSON file" in text:
        return UsageError(
            f"the config.json of {name} is not valid JSON",
            "download the model again",
            code="model-damaged",
            field="model",
            model=name,
        )
    if any(isinstance(link, SafetensorError) for link in chain):
        return UsageError(
            f"the weights of {name} are damaged: {_first_line(chain[-1])}",
            "download the model again",
            code="model-damaged",
            field="model",
            model=name,
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
