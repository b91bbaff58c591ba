"""Attention whose columns only the device knows, against the same with shapes that say it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_models_attend_kernels import Case, assert_close, interpreter, random_case

from amcli.models import attend as module

STORES = ["native", "int8", "int4", "k4v4", "k8v8", "k3v2"]


def random_room(seed: int, dtypes: list[torch.dtype], scale: int) -> tuple[Case, Case]:
    """A case with spare room right of the newest columns, which only the device knows, and the
    same without; sometimes with a window and without a prefix."""
    case = random_case(seed, dtypes, scale, STORES)
    pick = random.Random(seed)
    query = case.query[:, :, -pick.choice([1, 1, 3]) :]
    B, H, n = case.keys.shape[:3]
    case.options.pop("live", None)
    keys, values = (
        torch.cat([x, torch.randn(B, H, pick.choice([1, 90]), x.shape[3]).to(x.dtype)], 2)
        for x in (case.keys, case.values)
    )
    if values.shape[2] < keys.shape[2]:
        keys = keys[:, :, : values.shape[2]]
    values = values[:, :, : keys.shape[2]]
    m = min(query.shape[2], n)
    prefix: Any = case.prefix
    if pick.random() < 0.5:
        prefix = None
        case.options["window"] = pick.choice([1, 5, 40, n, 10 * n])
    at = torch.arange(n - m, n)
    given = dict(case.options)
    return (
        Case(query[:, :, -m:], prefix, keys, values, {**given, "at": at}),
        Case(query[:, :, -m:], prefix, case.keys, case.values, given),
    )


@pytest.mark.parametrize("seed", range(200, 230))
def test_columns_that_only_the_device_knows(seed: int) -> None:
    """In plain PyTorch, and by the kernels."""
    room, case = random_room(seed, [torch.float32], 1)
    assert_close(room.plain(), case.plain())


@pytest.mark.parametrize("seed", range(200, 224))
def test_the_kernels_read_columns_that_only_the_device_knows(seed: int) -> None:
    interpreter()
    room, case = random_room(seed, [torch.float32, torch.float16], 1)
    assert_close(room.by_kernels(), case.plain())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300, 380))
def test_columns_that_only_the_device_knows_on_cuda(seed: int) -> None:
    room, case = random_room(seed, [torch.float32, torch.float16, torch.bfloat16], 10)
    want = Case(
        case.query.double(), case.prefix, case.keys.double(), case.values.double(), case.options
    ).plain()
    assert_close(room.to("cuda").plain().cpu(), want.to(case.query.dtype))
    assert module.KERNELS.broken == []
