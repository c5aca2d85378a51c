"""The choice of backend, and what is said where it is a slow one."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from mmvssm.ops import backend

GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
CPU = SimpleNamespace(is_cuda=False, device=torch.device("cpu"))


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(backend, "triton_available", lambda: False)
    backend.warn_no_triton.cache_clear()
    yield
    backend.warn_no_triton.cache_clear()


def choose(x, cpu_available=True):
    cpu = SimpleNamespace(name="cpu", available=lambda: cpu_available)
    gpu, anywhere = SimpleNamespace(name="gpu"), SimpleNamespace(name="anywhere")
    return backend.choose(x, gpu=gpu, cpu=cpu, anywhere=anywhere).name


def test_a_gpu_without_triton_says_so_once(without_triton):
    with pytest.warns(RuntimeWarning, match=r"Triton cannot be imported.*plain PyTorch") as caught:
        assert [choose(GPU), choose(GPU)] == ["anywhere"] * 2
    assert len(caught) == 1


def test_nothing_is_said_where_kernels_run(monkeypatch):
    monkeypatch.setattr(backend, "triton_available", lambda: True)
    monkeypatch.setattr(backend, "missing_for_triton", lambda: "")  # which asks Triton itself
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(GPU) == "gpu"
        assert choose(CPU) == "cpu"


def test_a_cpu_needs_no_triton(without_triton):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(CPU) == "cpu"
        assert choose(CPU, cpu_available=False) == "anywhere"  # who says so is the kernel's module
