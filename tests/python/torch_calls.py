"""What tests of fwd and decode on PyTorch tensors have in common: compilers, streams, CUDA graphs."""

import shutil

import pytest

torch = pytest.importorskip("torch")

COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on the CPU"),
        ],
    ),
]


def captured(call):
    """A CUDA graph of a call. The call is made once before, since the first one on a device loads kernels."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def call_behind_other_work(call, late):
    """Makes a call on a stream that is busy, and whose work ahead of the call gives the call's tensors the
    values of `late`. Asserts that the call does not wait, and returns its arguments once it is done."""
    tensors = {n: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for n, x in late.items()}
    call(**tensors)  # the first call on a device loads its kernels, which may wait
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, x in late.items():
            if isinstance(x, torch.Tensor):
                tensors[name].copy_(x)
        call(**tensors)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    return tensors
