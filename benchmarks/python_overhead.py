"""What a call costs in Python, on top of the C library: python benchmarks/python_overhead.py

Host time of flash_kda.fwd minus host time of the C function alone, called through ctypes with the very same
struct filled in advance. One token of one head, so that the work itself is small. Of many short rounds, each
kind of call in turn, the fastest counts: whatever else runs on the machine only adds. On a GPU neither call
waits for the device: each round starts with an empty queue and fits into it.
"""

from __future__ import annotations

import time
from typing import Any, Callable

import torch

import flash_kda
from flash_kda import _lib, _torch

ROUNDS, CALLS = 200, 50
STATES = ("initial_state", "final_state")


def torch_arguments(device: str, optional: tuple[str, ...]) -> dict[str, Any]:
    bf16 = {"dtype": torch.bfloat16, "device": device}
    f32 = {"dtype": torch.float32, "device": device}
    arguments = {name: torch.randn(1, 1, 1, 128, **bf16) for name in ("q", "k", "v", "g", "out")}
    arguments["beta"] = torch.randn(1, 1, 1, **bf16)
    arguments |= {"A_log": torch.zeros(1, **f32), "dt_bias": torch.zeros(1, 128, **f32)}
    arguments |= {"scale": 128**-0.5, "lower_bound": -5.0}
    for name in optional:
        shape = (1, 1, 128, 128)
        arguments[name] = (
            torch.tensor([0, 1], device=device) if name == "cu_seqlens" else torch.zeros(shape, **f32)
        )
    return arguments


def raw_call(arguments: dict[str, Any]) -> Callable[[], None]:
    """The C function with the struct that flash_kda.fwd would fill."""
    tensors = [arguments[name] for name in _lib.TENSOR_FIELDS if name in arguments]
    options = (*(name in arguments for name in _lib.TENSOR_FIELDS[8:]), None, 0, int)
    plan = _torch._new_plan(tensors, options)
    plan.scale.value, plan.bound.value = arguments["scale"], arguments["lower_bound"]
    if tensors[0].is_cuda:
        plan.stream.value = torch.cuda.current_stream().cuda_stream
    workspace = torch.empty(plan.workspace_size, dtype=torch.uint8, device=tensors[0].device)
    plan.workspace.value = workspace.data_ptr()
    call = _lib.lib.flash_kda_fwd

    def run(call=call, plan=plan, keep=(tensors, workspace)) -> None:
        if call(plan.ref):
            raise _lib.last_error(_lib.INVALID_VALUE)

    return run


def microseconds(call: Callable[[], None], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def compare(title: str, whole: Callable[[], None], raw: Callable[[], None], on_gpu: bool) -> None:
    for call in (whole, raw):
        microseconds(call, on_gpu)
    rounds = [(microseconds(whole, on_gpu), microseconds(raw, on_gpu)) for _ in range(ROUNDS)]
    total, alone = (min(column) for column in zip(*rounds))
    print(f"{title:52} {total:8.2f} us  C alone {alone:8.2f} us  overhead {total - alone:6.2f} us")


def numpy_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    import ml_dtypes

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return (
            x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
        )

    return {name: convert(x) for name, x in arguments.items()}


def main() -> None:
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for optional in ((), STATES, (*STATES, "cu_seqlens")):
            arguments = torch_arguments(device, optional)
            raw = raw_call(arguments)
            what = ", ".join(optional) or "no state"
            for mode in (torch.inference_mode, torch.enable_grad):
                with mode():
                    whole = lambda a=arguments: flash_kda.fwd(**a)  # noqa: E731
                    compare(f"torch {device}, {what}, {mode.__name__}", whole, raw, device == "cuda")
            if device == "cpu":
                arrays = numpy_arguments(arguments)
                compare(f"numpy, {what}", lambda a=arrays: flash_kda.fwd(**a), raw, False)


if __name__ == "__main__":
    main()
