"""Workers of pytest-xdist share the cores: one thread each, or they wait for each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lissom.kernels._triton import INTERPRETED

from .pool import Pool
from .sanitizer import watched

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if INTERPRETED:
    from .interpreter import list_builtins_once

    list_builtins_once()

#: Files with something that is started once for all their tests, as the processes of tests.pool.
TOGETHER = ("test_sharding.py", "test_sharding_backward.py", "test_recipes.py", "test_package.py")


def _together(nodeid: str) -> bool:
    return nodeid.split("::")[0].endswith(TOGETHER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one worker does alone, and takes long, does not come last."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not _together(item.nodeid))


@pytest.fixture(autouse=True)
def sanitized() -> Iterator[None]:
    """No test passes by a launch whose result a GPU would not define."""
    with watched() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture
def quantize_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of most tests are far below the size from which moments are quantized."""
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)


@pytest.fixture
def quantize_all(quantize_small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows of few, which are kept in bf16 otherwise."""
    monkeypatch.setattr("lissom.optim.codec.SHORT", 0)


@pytest.fixture
def quantize_shards(quantize_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each rank has some rows of whatever can be cut."""
    monkeypatch.setattr("lissom.optim.codec.SPREAD", 1)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Processes for all tests of a file."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.hookimpl(optionalhook=True)  # xdist may be absent
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``--dist loadgroup``, a worker gets these files whole, and all others by function.

    The marks of xdist do not do it: 3.8 writes groups to where pytest 9.2 no longer looks for them
    (pytest-dev/pytest-xdist#1386). Each test went to whichever worker was free, and every worker
    started the processes.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFunction(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("::")[0] if _together(nodeid) else nodeid.split("[")[0]

    config.option.loadscopereorder = False  # in the order above, not by the number of tests
    return ByFunction(config, log)
