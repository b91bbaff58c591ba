"""Devices and dtypes by the names that users give them."""

from __future__ import annotations

import os
from typing import cast

import torch
from transformers import PreTrainedConfig

from amcli.errors import UsageError
from amcli.models import catalogue
from amcli.models.catalogue import AUTO
from amcli.system.processes import launched

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, full) for full, short in catalogue.DTYPES.items() for name in (full, short)
}


def device_of(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises UsageError for a missing one."""
    if launched() > 1:
        return _own_device(name)
    if name is None or name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {name!r}",
            "use cpu, cuda, cuda:0 or auto",
            code="unknown-device",
            field="device",
            device=name,
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        asked = f"device {name} was asked for, but PyTorch sees no CUDA device"
        if torch.version.cuda is not None or torch.version.hip is not None:
            raise UsageError(
                asked,
                "use device='cpu', or see whether nvidia-smi lists the GPU",
                code="gpu-missing",
                field="device",
                device=name,
            )
        raise UsageError(
            f"{asked}: this PyTorch is for CPUs only",
            "use device='cpu', or install PyTorch with CUDA: https://pytorch.org",
            code="gpu-not-supported",
            field="device",
            device=name,
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} was asked for, but there are {torch.cuda.device_count()}",
            "use device='cuda:0'",
            code="unknown-gpu",
            field="device",
            device=name,
            count=torch.cuda.device_count(),
        )
    return device


def _own_device(name: str | None) -> torch.device:
    """The device of one of several processes: a GPU each where there are any."""
    if name not in (None, AUTO, "cpu", "cuda"):
        raise UsageError(
            f"device {name} was asked for, but {launched()} processes have one each",
            "leave device out",
            code="device-per-process",
            field="device",
            device=name,
            processes=launched(),
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if name == "cpu" or own >= count:
        raise UsageError(
            f"{launched()} processes were started, and there are {count} GPUs for them",
            f"torchrun --nproc-per-node {count}",
            code="gpus-too-few",
            processes=launched(),
            count=count,
        )
    return torch.device("cuda", own)


def dtype_of(name: str | None, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    """The dtype of that name; None: float32 on a CPU, elsewhere the model's own 16 bits."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(
                f"unknown dtype {name!r}",
                "use float32, bfloat16 or float16",
                code="unknown-dtype",
                field="dtype",
                dtype=name,
            )
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = getattr(config.get_text_config(decoder=True), "dtype", None)
    brain = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if own == torch.float16 or (own == torch.bfloat16 and brain):
        return cast(torch.dtype, own)
    return torch.bfloat16 if brain else torch.float16
