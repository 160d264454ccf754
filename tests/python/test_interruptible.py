"""Signals during calls on the CPU: handlers run at once, and one that raises ends a long call."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from ml_dtypes import bfloat16

import flash_kda
from flash_kda import _call, _interruptible
from problems import REFERENCE_ARGUMENTS, hold_to, make, to_torch, truth

# Processor time of this process between the signal and the exception, in which a call that goes on computes.
# Other work on the machine takes none of it. The whole call takes seconds.
MOST_PROCESSOR_SECONDS = 0.1

DIRECT_ALONE = _interruptible._fwd[0], None  # the variant that lets Python handle signals is not called


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Programs that a shell starts in the background ignore SIGINT, and so does Python then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def zeros(T=60000, H=4):
    """The arguments of a call that takes seconds with one thread and the kernel cpu-portable."""
    a = {name: np.zeros((1, T, H, 128), bfloat16) for name in ("q", "k", "v", "g", "out")}
    a["beta"] = np.zeros((1, T, H), bfloat16)
    a["A_log"], a["dt_bias"] = np.zeros(H, np.float32), np.zeros((H, 128), np.float32)
    return {**a, "scale": 1.0, "lower_bound": -5.0}


def slow(a):
    flash_kda.fwd(**a, kernel="cpu-portable", threads=1)


def slow_reference(a):
    flash_kda.reference(**{name: a[name] for name in REFERENCE_ARGUMENTS if name in a})


class Foreign:
    """An array that is known through DLPack alone."""

    def __init__(self, tensor):
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__


def foreign(a):
    return {name: Foreign(x) if hasattr(x, "shape") else x for name, x in a.items()}


def call_and_wait(call, a, thread):
    """A signal that comes after the call must not count as one that ended it."""
    thread.start()
    call(a)
    thread.join()
    time.sleep(0.5)
    raise AssertionError("the call was over before the signal came")


def processor_seconds_to_stop(call, a, send, exception):
    """From the signal to the exception in the caller."""
    sent, began = [], time.process_time()

    def later():
        while time.process_time() < began + 0.1:  # until the call is well under way
            time.sleep(0.01)
        sent.append(time.process_time())
        send()

    thread = threading.Thread(target=later)
    with pytest.raises(exception):
        call_and_wait(call, a, thread)
    seconds = time.process_time() - sent[0]
    thread.join()
    return seconds


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_and_wait():
    interrupt()
    time.sleep(1)


@pytest.mark.parametrize("kind", ["numpy", "torch", "dlpack", "reference"])
def test_ctrl_c(kind):
    a, call = zeros(), slow
    if kind in ("torch", "dlpack"):
        pytest.importorskip("torch")
        a = to_torch(a, "cpu")
    if kind == "dlpack":
        a = foreign(a)
    if kind == "reference":
        call = slow_reference
    assert processor_seconds_to_stop(call, a, interrupt, KeyboardInterrupt) < MOST_PROCESSOR_SECONDS
    small = make(lengths=[5, 30], initial=np.float32)
    flash_kda.fwd(**small)
    hold_to(small, truth(small), "cpu")


def slow_backward(a):
    inputs = {name: x for name, x in a.items() if name != "out"}
    flash_kda.bwd(**inputs, dout=a["out"], dv=np.empty_like(a["v"]), kernel="cpu-portable", threads=1)


def test_ctrl_c_during_a_backward_pass():
    seconds = processor_seconds_to_stop(slow_backward, zeros(), interrupt, KeyboardInterrupt)
    assert seconds < MOST_PROCESSOR_SECONDS


def slow_maps(a):
    inputs = {name: x for name, x in a.items() if name not in ("q", "scale", "out", "final_state")}
    map = np.empty((1, a["v"].shape[2], 128, 128), np.float32)
    flash_kda.affine_map(**inputs, map=map, kernel="cpu-portable", threads=1)


def test_ctrl_c_while_maps_are_computed():
    seconds = processor_seconds_to_stop(slow_maps, zeros(), interrupt, KeyboardInterrupt)
    assert seconds < MOST_PROCESSOR_SECONDS


def test_ctrl_c_during_autograd():
    torch = pytest.importorskip("torch")
    tensors = to_torch(zeros(), "cpu")
    inputs = [tensors[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    out, _ = flash_kda.chunk_kda(*inputs, use_qk_l2norm_in_kernel=True)

    def backward(out):
        torch.autograd.backward(out, torch.zeros_like(out))

    seconds = processor_seconds_to_stop(backward, out, interrupt, KeyboardInterrupt)
    assert seconds < 4 * MOST_PROCESSOR_SECONDS  # of several threads
    assert all(x.grad is None for x in inputs)


# Decode: 24,000 states, of one slot that nothing writes, take seconds with cpu-portable.


def decode_zeros(N=6000, H=4, T=4):
    a = zeros(T=N * T, H=H)
    a |= {
        name: x.reshape(N, T, *x.shape[2:]) for name, x in a.items() if name in ("q", "k", "v", "g", "beta")
    }
    a["out"] = np.empty_like(a["v"])
    a["state"], a["state_indices"] = np.zeros((1, H, 128, 128), np.float32), np.zeros(N, np.int32)
    return {**a, "write_states": "none"}


def layer_zeros(N=6000, H=4, T=4):
    a = decode_zeros(N, H, T)
    for name in ("q", "k", "v"):
        del a[name]
    a["x"], a["weight"] = np.zeros((N, T, 3 * H * 128), bfloat16), np.zeros((3 * H * 128, 4), np.float32)
    return {**a, "bias": None, "conv_state": np.zeros((1, 3 * H * 128, 3), bfloat16)}


def records_zeros(N=3000, H=4, R=16):
    records = np.zeros((N, R, H, 3, 128), np.float32)
    state, accepted = np.zeros((N, H, 128, 128), bfloat16), np.full(N, R)
    return {"records": records, "num_accepted_tokens": accepted, "state": state}


def slow_call(function):
    return lambda a: function(**a, kernel="cpu-portable", threads=1)


def slow_decode_reference(a):
    flash_kda.decode_reference(**{name: x for name, x in a.items() if name != "out"})


def slow_layer_reference(a):
    flash_kda.decode_layer_reference(**{name: x for name, x in a.items() if name != "out"})


@pytest.mark.parametrize(
    ("call", "make_arguments"),
    [
        (slow_call(flash_kda.decode), decode_zeros),
        (slow_call(flash_kda.decode_layer), layer_zeros),
        (slow_call(flash_kda.apply_records), records_zeros),
        (slow_decode_reference, lambda: decode_zeros(N=200)),
        (slow_layer_reference, lambda: layer_zeros(N=200)),
    ],
    ids=["decode", "decode_layer", "apply_records", "decode_reference", "decode_layer_reference"],
)
def test_ctrl_c_during_decode(call, make_arguments):
    seconds = processor_seconds_to_stop(call, make_arguments(), interrupt, KeyboardInterrupt)
    assert seconds < MOST_PROCESSOR_SECONDS


def test_short_calls_of_decode_start_no_thread(monkeypatch):
    for name in ("_decode", "_decode_layer", "_apply"):
        monkeypatch.setattr(_interruptible, name, (getattr(_interruptible, name)[0], None))
    for make_arguments in (decode_zeros, layer_zeros):
        call = flash_kda.decode if make_arguments is decode_zeros else flash_kda.decode_layer
        call(**make_arguments(N=300, H=1), threads=1)
        with pytest.raises(TypeError, match="NoneType"):
            call(**make_arguments(N=3000, H=1), threads=1)
    flash_kda.apply_records(**records_zeros(N=100, H=1), threads=1)
    with pytest.raises(TypeError, match="NoneType"):
        flash_kda.apply_records(**records_zeros(N=1000, H=1), threads=1)


@pytest.fixture
def on_alarm():
    """Sets the handler of SIGALRM for the time of a test."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_any_handler_that_raises(on_alarm):
    def handler(number, frame):
        raise TimeoutError

    on_alarm(handler)

    def send():
        os.kill(os.getpid(), signal.SIGALRM)

    assert processor_seconds_to_stop(slow, zeros(), send, TimeoutError) < MOST_PROCESSOR_SECONDS


def test_many_signals_at_once(on_alarm):
    """After the first handler has raised, the next one runs when C no longer uses the arrays."""
    a = zeros()
    raised = written = False

    def handler(number, frame):
        # A signal may interrupt its own handler, in Python 3.9 between any two steps. It must do nothing
        # then: it would write before the exception of the first handler has ended the call of C.
        nonlocal raised, written
        if frame.f_code is handler.__code__:
            return
        if not raised:
            raised = True
            raise KeyboardInterrupt
        if not written:
            written = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            a["out"][:] = 7

    def slow_with_signals():
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.0005)
        slow(a)

    on_alarm(handler)
    for _ in range(20):
        raised = written = False
        with pytest.raises(KeyboardInterrupt):
            slow_with_signals()
        while not written:
            time.sleep(0.01)
        time.sleep(0.05)
        assert (a["out"] == 7).all()


def test_a_handler_that_returns_changes_nothing(on_alarm, monkeypatch):
    """The handler calls fwd itself, as long as the first call runs."""
    monkeypatch.setattr(_call, "_LONG_TOKENS", 100)
    outer, inner = make(T=3000, H=2, seed=1), make(T=300, H=1, seed=2)
    expected = truth(outer), truth(inner)
    handled = []

    def handler(number, frame):
        inner["out"][:] = np.nan
        flash_kda.fwd(**inner, kernel="cpu-portable")
        handled.append(np.isfinite(inner["out"].astype(np.float32)).all())

    on_alarm(handler)
    for _ in range(20):
        outer["out"][:] = np.nan
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        flash_kda.fwd(**outer, kernel="cpu-portable", threads=1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        hold_to(outer, expected[0], "cpu")
    assert handled
    assert all(handled)
    hold_to(inner, expected[1], "cpu")


def test_in_another_thread_nothing_special_happens(monkeypatch):
    """The main thread is interrupted, and the thread's call ends with its result."""
    a = make(T=4000, H=4)
    expected = truth(a)
    monkeypatch.setattr(_interruptible, "_fwd", DIRECT_ALONE)
    thread = threading.Thread(target=flash_kda.fwd, kwargs={**a, "kernel": "cpu-portable", "threads": 1})
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        interrupt_and_wait()
    thread.join()
    hold_to(a, expected, "cpu")


def test_short_calls_start_no_thread(monkeypatch):
    monkeypatch.setattr(_interruptible, "_fwd", DIRECT_ALONE)
    a = make(T=300)
    flash_kda.fwd(**a)
    a = make(T=4000, H=1)
    flash_kda.fwd(**a)


@pytest.fixture
def long_call(monkeypatch):
    monkeypatch.setattr(_call, "_LONG_TOKENS", 1)
    return make(T=100, H=1, seed=3)


def test_errors_of_long_calls(long_call):
    """The sentence is the one of the thread that called C."""
    long_call["lower_bound"] = 1.0
    with pytest.raises(ValueError, match=r"lower_bound is 1; it must be in \[-5, 0\]"):
        flash_kda.fwd(**long_call)


def test_a_workspace_is_reused(long_call):
    flash_kda.fwd(**long_call)
    block = _call._scratch.block
    flash_kda.fwd(**long_call)
    assert _call._scratch.block is block
    assert block[1]


def test_a_name_that_is_cut_inside_a_character():
    with pytest.raises(ValueError, match="kernel is "):
        flash_kda.fwd(**make(T=3), kernel="a" + "ä" * 200)
