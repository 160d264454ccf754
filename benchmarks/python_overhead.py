"""What a call costs in Python on top of the C library: python benchmarks/python_overhead.py [--rounds N]
[--calls N] [--pretended]

The overhead is the host time of flash_kda.fwd, decode, decode_layer or apply_records minus the host time of
the C function alone. The C function is called through ctypes with a copy of the struct that the Python
function has filled in. The work is one token of one head, so that it takes little of either time. Rounds of
the two kinds of call alternate, and the fastest round of each kind counts, because whatever else runs on the
machine can only slow a round down. On a GPU neither call waits for the device: each round starts with an
empty queue, and its calls fit into the queue.

With --pretended, tensors of the CPU are handed to a GPU that the pretended driver describes
(tests/pretend_driver, as in `make host-time`). No kernel runs, so a time is that of a call on a GPU without
the driver's own part. A call from PyTorch should take at most 8 us then: "within" or "above" stands behind
the line.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from typing import Any, Callable

import torch

import flash_kda
from flash_kda import _lib, _torch

STATES = ("initial_state", "final_state")
MOST_US = 8.0  # of a call from PyTorch on the pretended GPU


def torch_arguments(device: str, optional: tuple[str, ...]) -> dict[str, Any]:
    bf16 = {"dtype": torch.bfloat16, "device": device}
    f32 = {"dtype": torch.float32, "device": device}
    arguments: dict[str, Any] = {
        name: torch.randn(1, 1, 1, 128, **bf16) for name in ("q", "k", "v", "g", "out")
    }
    arguments["beta"] = torch.randn(1, 1, 1, **bf16)
    arguments["A_log"], arguments["dt_bias"] = torch.zeros(1, **f32), torch.zeros(1, 128, **f32)
    arguments["scale"], arguments["lower_bound"] = 128**-0.5, -5.0
    for name in optional:
        if name == "cu_seqlens":
            arguments[name] = torch.tensor([0, 1], device=device)
        else:
            arguments[name] = torch.zeros(1, 1, 128, 128, **f32)
    return arguments


def engine_arguments(device: str) -> dict[str, Any]:
    """As an engine calls: slices of one buffer, a pool that is both states, a workspace of its own."""
    arguments = torch_arguments(device, ("cu_seqlens",))
    buffer = torch.randn(1, 1, 3 * 128, dtype=torch.bfloat16, device=device)
    for name, part in zip(("q", "k", "v"), buffer.split(128, -1)):
        arguments[name] = part.unflatten(-1, (1, 128))
    pool = torch.zeros(4, 1, 128, 128, device=device)
    arguments |= {"initial_state": pool, "final_state": pool, "first_slot": 1, "max_seqlen": 1}
    arguments["state_indices"] = torch.tensor([2], dtype=torch.int32, device=device)
    arguments["has_initial_state"] = torch.tensor([True], device=device)
    size = flash_kda.get_workspace_size(1, 1)
    arguments["workspace"] = torch.empty(size, dtype=torch.uint8, device=device)
    return arguments


def decode_arguments(device: str, tokens: int = 1) -> dict[str, Any]:
    """As an engine calls decode: a pool, indices, padding."""
    arguments = torch_arguments(device, ())
    for name in ("q", "k", "v", "g", "out", "beta"):
        arguments[name] = arguments[name].repeat_interleave(tokens, 1)
    arguments["state"] = torch.zeros(4, 1, 128, 128, device=device)
    arguments["state_indices"] = torch.tensor([2], dtype=torch.int32, device=device)
    return {**arguments, "first_slot": 1}


def layer_arguments(device: str, tokens: int = 1) -> dict[str, Any]:
    """As an engine calls decode_layer."""
    arguments = decode_arguments(device, tokens)
    for name in ("q", "k", "v"):
        del arguments[name]
    bf16 = {"dtype": torch.bfloat16, "device": device}
    arguments["x"] = torch.randn(1, tokens, 3 * 128, **bf16)
    arguments["weight"], arguments["bias"] = torch.randn(3 * 128, 4, device=device), None
    arguments["conv_state"] = torch.zeros(4, 3 * 128, 3, **bf16)
    arguments["output_gate"] = torch.randn(1, tokens, 1, 128, **bf16)
    return {**arguments, "norm_weight": torch.ones(128, device=device)}


def apply_arguments(device: str) -> dict[str, Any]:
    arguments = decode_arguments(device)
    arguments = {n: arguments[n] for n in ("state", "state_indices", "first_slot")}
    arguments["records"] = torch.zeros(1, 4, 1, 3, 128, device=device)
    return {**arguments, "num_accepted_tokens": torch.tensor([1], dtype=torch.int32, device=device)}


def decode_calls(device: str) -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    return [
        ("decode, T = 1", flash_kda.decode, decode_arguments(device)),
        ("decode, T = 4", flash_kda.decode, decode_arguments(device, 4)),
        ("decode_layer, T = 1", flash_kda.decode_layer, layer_arguments(device)),
        ("decode_layer, T = 4", flash_kda.decode_layer, layer_arguments(device, 4)),
        ("apply_records", flash_kda.apply_records, apply_arguments(device)),
    ]


def pretend_gpu() -> None:
    """Makes calls on tensors of the CPU calls on the pretended GPU."""
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "pretended_counts_of_thread"):
        raise SystemExit("LD_LIBRARY_PATH must name the folder of the pretended driver")
    os.environ.setdefault("PRETEND_GPU", "90:132")
    _torch._DEVICES["cpu"] = _lib.CUDA
    _torch._current_stream = lambda index: 0


def numpy_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same memory as NumPy arrays."""
    import ml_dtypes

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.bfloat16:
            return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    return {name: convert(x) for name, x in arguments.items()}


def params_device(arguments: dict[str, Any]) -> Any:
    return next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))


def c_call(arguments: dict[str, Any], function: Callable[..., None] = flash_kda.fwd) -> Callable[[], None]:
    """The C function with the struct that the Python function fills in for these tensors."""
    function(**arguments)
    prepared = _torch._calls.latest
    assert prepared is not None
    params = type(prepared.params).from_buffer_copy(prepared.params)
    workspace = None
    if prepared.workspace_size:  # the workspace of that call went back to its owner
        bytes_with_room = params.workspace_size + 63
        workspace = torch.empty(bytes_with_room, dtype=torch.uint8, device=params_device(arguments))
        params.workspace = (workspace.data_ptr() + 63) & ~63
    call, reference = prepared.function, ctypes.byref(params)

    def run(keep: Any = (arguments, workspace)) -> None:
        status = call(reference)
        if status:
            raise _lib.last_error(status)

    return run


def microseconds(call: Callable[[], None], calls: int, on_gpu: bool) -> float:
    """The mean host time of a call in one round."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each kind of call (200)")
    parser.add_argument("--calls", type=int, default=50, help="calls in a round (50)")
    parser.add_argument("--pretended", action="store_true", help="calls on the pretended GPU")
    given = parser.parse_args()

    def compare(title: str, fwd: Callable[[], None], c: Callable[[], None], on_gpu: bool) -> None:
        for call in (fwd, c):
            microseconds(call, given.calls, on_gpu)
        rounds = [
            (microseconds(fwd, given.calls, on_gpu), microseconds(c, given.calls, on_gpu))
            for _ in range(given.rounds)
        ]
        total, alone = (min(column) for column in zip(*rounds))
        verdict = (f"  {'within' if total <= MOST_US else 'above'}") if given.pretended else ""
        print(
            f"{title:64} {total:8.2f} us  C alone {alone:8.2f} us  overhead {total - alone:6.2f} us{verdict}"
        )

    def compare_decode(device: str, named: str) -> None:
        for what, function, arguments in decode_calls(device):
            with torch.inference_mode():
                c = c_call(arguments, function)
                title = f"torch {named}, {what}, inference_mode"
                compare(title, lambda f=function, a=arguments: f(**a), c, device == "cuda")

    if given.pretended:
        pretend_gpu()
        arguments = engine_arguments("cpu")
        with torch.inference_mode():
            title = "torch pretended, slices, pool, workspace, inference_mode"
            compare(title, lambda: flash_kda.fwd(**arguments), c_call(arguments), False)
        compare_decode("cpu", "pretended")
        return
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for optional in ((), STATES, (*STATES, "cu_seqlens")):
            arguments = torch_arguments(device, optional)
            c = c_call(arguments)
            what = ", ".join(optional) or "no state"
            for mode in (torch.inference_mode, torch.enable_grad):
                with mode():
                    title = f"torch {device}, {what}, {mode.__name__}"
                    compare(title, lambda a=arguments: flash_kda.fwd(**a), c, device == "cuda")
            if device == "cpu":
                arrays = numpy_arguments(arguments)
                compare(f"numpy, {what}", lambda a=arrays: flash_kda.fwd(**a), c, False)
        arguments = engine_arguments(device)
        with torch.inference_mode():
            c = c_call(arguments)
            title = f"torch {device}, slices, pool, workspace, inference_mode"
            compare(title, lambda a=arguments: flash_kda.fwd(**a), c, device == "cuda")
        compare_decode(device, device)


if __name__ == "__main__":
    main()
