"""The choice of backend, and the warning where it is a slow one."""

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
    gpu, fallback = SimpleNamespace(name="gpu"), SimpleNamespace(name="fallback")
    return backend.choose(x, gpu=gpu, cpu=cpu, fallback=fallback).name


def test_a_gpu_without_triton_warns_once(without_triton):
    with pytest.warns(RuntimeWarning, match=r"Triton cannot be imported.*plain PyTorch") as caught:
        assert [choose(GPU), choose(GPU)] == ["fallback"] * 2
    assert len(caught) == 1


def test_no_warning_where_kernels_run(monkeypatch):
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
        assert choose(CPU, cpu_available=False) == "fallback"  # the kernel's module warns
