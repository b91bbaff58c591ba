"""Find a model and its tokenizer, load them quietly, and say in one line what went wrong.

A model is named by `pocket` (the one in the package), a folder, a GGUF file, a hub id, or
`id@revision`.
The libraries underneath honour `HF_HOME` and `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.import_utils import is_accelerate_available

from amcli.errors import AmkvError, UsageError
from amcli.models import gguf, memory
from amcli.models.attention import NAME, register
from amcli.models.calling import widen_states
from amcli.models.catalogue import AUTO
from amcli.models.devices import device_of, dtype_of
from amcli.models.failures import explain, quiet
from amcli.models.geometry import ModelGeometry, refuse_attention, refuse_unsupported
from amcli.models.identity import Identity, differences, identify, untold
from amcli.models.lengths import forget_lengths, trained_length
from amcli.models.memory import Preview
from amcli.models.probe import probe
from amcli.models.sharding import Shard, here, leave_at_exit
from amcli.models.sources import ModelSource
from amcli.models.template import ChatTemplate


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run on compact caches, with all that an artifact says about it.

    `id` is what loads it again: `pocket`, an absolute folder or file, or a hub id; `revision` the
    resolved commit of a hub model, None otherwise. `model` is in eval mode without gradients.
    `device` takes token ids and gives logits; `geometry.devices` says where each layer is. With a
    `shard` of several, `geometry` is about this process's heads.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None
    geometry: ModelGeometry
    device: torch.device
    dtype: torch.dtype
    identity: Identity
    chat: ChatTemplate
    shard: Shard = field(default_factory=Shard)

    @property
    def config_hash(self) -> str:
        """Of its configuration."""
        return self.identity.config_hash

    @property
    def tokenizer_hash(self) -> str:
        """Of its tokenizer."""
        return self.identity.tokenizer_hash

    @property
    def template_hash(self) -> str | None:
        """Of its chat template; None without one."""
        return self.identity.template_hash

    def fingerprint(self) -> dict[str, Any]:
        """`{"model": …, "tokenizer": …}` as an artifact's manifest holds them."""
        return {
            "model": {
                "id": self.id,
                "revision": self.revision,
                "architecture": self.geometry.architecture,
                **self.identity.model(),
                "dtype": memory.dtype_name(self.dtype),
                "layers": [layer.manifest(self.shard.size) for layer in self.geometry.layers],
                "rope": self.geometry.rope,
            },
            "tokenizer": self.identity.tokenizer(),
        }

    def differences(
        self, manifest_model: Mapping[str, Any], manifest_tokenizer: Mapping[str, Any]
    ) -> list[str]:
        """Why an artifact made for the manifest's model does not fit; empty when it does."""
        mine = self.fingerprint()
        return differences(
            manifest_model, manifest_tokenizer, mine["model"], mine["tokenizer"], self.model.config
        )

    def untold(self, manifest_model: Mapping[str, Any]) -> list[str]:
        """What the manifest's model does not say, so that nothing can be compared: `weights`."""
        return untold(manifest_model, self.identity.model())


def load(
    spec: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    look: Callable[[Preview], None] = lambda preview: None,
) -> LoadedModel:
    """Load the model that `spec` names.

    device  `cpu`, `cuda`, `cuda:1`, …; CUDA where there is one; `auto`: layers are spread over all
            GPUs. Where `torchrun` started several processes, each has its share of the heads,
            on a device of its own
    dtype   a key of `devices.DTYPES`; float32 on the CPU, elsewhere the model's own 16-bit type, or
            bfloat16 where the device has it
    look    called with what is known before the weights are read; may raise to stop there

    Raises UsageError for a name, folder, device or model that cannot be used, AmkvError when the
    hub cannot be reached, OutOfMemoryError when the weights do not fit. Code that a model brings
    is run only with `trust_remote_code`.
    """
    register()
    with _opened(spec) as source:
        found = _find(source, device, dtype, trust_remote_code)
        found.preview.require_weights()
        look(found.preview)
        return _load(source, found)


def preview(
    spec: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Preview:
    """What is known of the model that `spec` names before its weights are read; arguments and
    errors as for `load`."""
    with _opened(spec) as source:
        return _find(source, device, dtype, trust_remote_code).preview


@contextmanager
def _opened(spec: str) -> Iterator[ModelSource]:
    """Where to load from; errors inside the block are put into words."""
    source = ModelSource.of(spec)
    with quiet(), ExitStack() as stack:
        if source.is_gguf:
            file = stack.enter_context(gguf.opened(Path(source.location)))
            source = replace(source, location=str(file.folder), gguf=file)
        try:
            yield source
        except AmkvError:
            raise
        except Exception as error:
            known = None if source.gguf is None else gguf.explain(error, source.gguf)
            raise known or explain(error, source.id, source.revision) from error


@dataclass(frozen=True)
class _Found:
    """A model before its weights are read; `options` are what transformers is given."""

    config: PreTrainedConfig
    options: dict[str, Any]
    commit: str | None
    device: torch.device
    dtype: torch.dtype
    shard: Shard
    preview: Preview


def _find(
    source: ModelSource, device_name: str | None, dtype_name: str | None, trust_remote_code: bool
) -> _Found:
    device, spread = device_of(device_name), device_name == AUTO
    # The configuration comes first: it is small, and most refusals need nothing more.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf is not None:
        options["gguf_file"] = source.gguf.file
    # All that follows is of this commit, whatever moves on the hub meanwhile.
    commit = source.commit()
    options["revision"] = commit or source.revision
    config = AutoConfig.from_pretrained(source.location, **options)
    refuse_unsupported(config)
    dtype = dtype_of(dtype_name, device, config)
    tokenizer = _tokenizer(source, options)
    if len(tokenizer) == 0:
        raise UsageError(
            f"{source.id} has no tokenizer",
            "choose a model that brings its own",
            code="model-incomplete",
            field="model",
            path=source.id,
        )
    shard = here(config)
    if (shard.size > 1 or spread) and not is_accelerate_available():
        raise UsageError(
            "several GPUs want the package accelerate",
            "pip install 'amkv[multi-gpu]'",
            code="package-missing",
            package="accelerate",
        )
    devices = [device]
    if shard.size > 1:
        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    elif spread and torch.cuda.device_count() > 1:
        options["device_map"] = AUTO
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    numbers = None if source.gguf is None else source.gguf.numbers
    need = memory.estimate(
        source.location, options["revision"], config, dtype, devices, shard.size, numbers
    )
    notes = () if source.gguf is None else source.gguf.notes(config)
    seen = Preview(
        source.id,
        devices,
        dtype,
        need,
        trained_length(config),
        tokenizer,
        notes,
        memory.layers_of(config),
        memory.query_width(config),
        memory.has_states(config),
    )
    return _Found(config, options, commit, device, dtype, shard, seen)


def _load(source: ModelSource, found: _Found) -> LoadedModel:
    options, config, device, shard = found.options, found.config, found.device, found.shard
    tokenizer = found.preview.tokenizer
    model = _weights(source, found.dtype, options, config)
    if not options.keys() & {"distributed_config", "device_map"}:
        torch.nn.Module.to(model, device)
    leave_at_exit()
    model.train(False).requires_grad_(False)
    forget_lengths(model)
    generation = getattr(model.generation_config, "eos_token_id", None)
    geometry = _probed(model, shard)
    chat = ChatTemplate(tokenizer, generation)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        id=source.id,
        revision=found.commit,
        geometry=geometry,
        device=device if shard.size > 1 else geometry.devices[0],
        dtype=found.dtype,
        identity=identify(model, config, chat, shard),
        chat=chat,
        shard=shard,
    )


def _probed(model: PreTrainedModel, shard: Shard) -> ModelGeometry:
    geometry = probe(model)
    if shard.size > 1 and geometry.states:
        raise UsageError(
            f"{geometry.architecture} has layers that keep a state, which is not divided",
            "start one process, with device='auto' for several GPUs",
            code="model-not-divisible",
            field="model",
            model=geometry.architecture,
        )
    if geometry.states:
        widen_states(model)
    return geometry


def _tokenizer(source: ModelSource, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    if source.gguf is None:
        return AutoTokenizer.from_pretrained(source.location, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
    except Exception as error:
        raise gguf.no_tokenizer(error, source.gguf) from error
    source.gguf.correct(tokenizer)
    return tokenizer


def _weights(
    source: ModelSource, dtype: torch.dtype, options: dict[str, Any], config: PreTrainedConfig
) -> PreTrainedModel:
    with ExitStack() as stack:
        if source.gguf is not None:
            source.gguf.fill()
            # Left to itself, transformers keeps weights packed where it has kernels for that, and
            # takes seconds to find the configuration in the file once more.
            packing = GgufConfig(dequantize=True)
            options = options | {"quantization_config": packing, "config": config}
            # Its progress bar for unpacking tensors obeys no setting.
            stack.enter_context(redirect_stderr(io.StringIO()))
        return _read(source, dtype, options, config.model_type)


def _read(
    source: ModelSource, dtype: torch.dtype, options: dict[str, Any], kind: str
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            attn_implementation=NAME,
            output_loading_info=True,
            **options,
        )
    except KeyError as error:
        if error.args != (NAME,):
            raise
        refuse_attention(kind)  # it looks up implementations in its own table
    model, report = loaded
    # transformers fills missing weights with random numbers and only logs it.
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise UsageError(
            f"the weights of {source.id} are incomplete: {len(absent)} tensors are missing or of "
            f"another shape, such as {absent[0]}",
            "download the model again, or check that it is a causal language model",
            code="model-incomplete",
            field="model",
            path=source.id,
        )
    return cast(PreTrainedModel, model)
