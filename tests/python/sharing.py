"""Calls that share a GPU with other work. test_sharing.py starts this program, once for each process of a
case, because a call that does not end can only be stopped together with its process.

    python sharing.py CASE CALLS SMS

CALLS is how many calls the case makes, SMS how many SMs the whole GPU has. The program prepares itself,
prints "ready" and waits for a line on its standard input. It prints what it did, and ends with the status 0
if every result was right. The status CANNOT means that the machine cannot do what the case needs; the last
line says why.
"""

import ctypes
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import flash_kda
from problems import hold_to, make, to_numpy, to_torch, truth

CANNOT = 77
WRITTEN = ("out", "final_state")
# A shape for each schedule: its name, the arguments of problems.make, the options of fwd, and what explain
# says of it on a GPU of compute capability 9.0 with 132 SMs.
SHAPES = (
    ("solo CTAs", dict(lengths=[50] * 4, H=32), {}, "128 solo CTAs"),
    ("CTA pairs", dict(T=300, H=16), dict(cut="never"), "16 CTA pairs"),
    ("relay", dict(T=1024, H=9), dict(cut="always"), "Relay:"),
    ("passes", dict(T=2048, H=6), {}, "Passes:"),
    ("batch invariant", dict(T=3000, H=4), dict(batch_invariant=True), "whatever the batch"),
    ("mixed", dict(lengths=[2000] + [40] * 20, H=4), dict(cut="mixed"), "Mixed:"),
    ("even shares", dict(T=100, H=96), {}, "on 66 CTA pairs .* share out all tokens evenly"),
    (
        "ragged, short",
        dict(lengths=[5, 0, 33, 16, 1, 64, 17, 40] * 3, H=20),
        {},
        "on 132 solo CTAs .* evenly",
    ),
    ("portable", dict(T=150, H=8), dict(kernel="portable"), 'Kernel "portable"'),
)


def cannot(reason):
    """Ends the program: the machine cannot do what the case needs."""
    print(reason, flush=True)
    sys.exit(CANNOT)


def bits(tensor):
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


class Shape:
    """A call of one shape: its inputs, and the results of the call alone on the default stream."""

    def __init__(self, number, sms):
        self.name, problem, self.options, words = SHAPES[number]
        self.problem = make(**problem, seed=number)
        self.arguments = to_torch(self.problem, "cuda")
        lengths = problem.get("lengths", [problem.get("T")])
        self.explained = flash_kda.explain(sum(lengths), problem["H"], len(lengths), "cuda:0", **self.options)
        units = next(d.units for d in flash_kda.devices() if d.type == "cuda")
        if torch.cuda.get_device_capability() == (9, 0) and units == sms == 132:
            assert re.search(words, self.explained, re.DOTALL), f"{self.name} runs as: {self.explained}"
        self.want = run_alone(self, torch.cuda.default_stream())

    def ctas_at_once(self):
        """How many CTAs a cooperative launch of this call has; 0 if the call makes none."""
        pairs = re.search(r"(Relay|Mixed):.* one launch on (\d+) CTA pairs", self.explained, re.DOTALL)
        return 2 * int(pairs[2]) if pairs else 0

    def hold_to_truth(self, results):
        """Asserts that the results of run_alone are within the error bars."""
        hold_to(to_numpy({**self.problem, **results}), truth(self.problem), "cuda")


def run_alone(shape, stream):
    """The results of one call on `stream` while nothing else runs."""
    results = {name: torch.full_like(shape.arguments[name], torch.nan) for name in WRITTEN}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        flash_kda.fwd(**{**shape.arguments, **results}, **shape.options)
    stream.synchronize()
    for name in WRITTEN:
        assert results[name].isfinite().all(), f"{shape.name}: {name} is not finite"
    return results


def same_bits(some, others):
    return all(torch.equal(bits(some[name]), bits(others[name])) for name in WRITTEN)


class Call:
    """A call that is made again and again on one stream, with memory of its own for its results. The GPU
    compares each result bit for bit with that of the call alone."""

    def __init__(self, shape, want=None):
        self.shape, self.want, self.graph = shape, want or shape.want, None
        self.asked = 0
        self.own = {name: torch.empty_like(shape.arguments[name]) for name in WRITTEN}
        self.wrong, self.made = torch.zeros(2, dtype=torch.int32, device="cuda").unbind()
        torch.cuda.synchronize()  # the zeros are there before any stream counts

    def enqueue(self):
        for tensor in self.own.values():
            tensor.fill_(torch.nan)
        flash_kda.fwd(**{**self.shape.arguments, **self.own}, **self.shape.options)
        different = [(bits(self.own[name]) != bits(self.want[name])).any() for name in WRITTEN]
        self.wrong += different[0] | different[1]
        self.made += 1

    def again(self):
        """Makes the call on the current stream, by a replay if it was captured, and does not wait for it."""
        self.asked += 1
        if self.graph is None:
            self.enqueue()
        else:
            self.graph.replay()

    def capture(self, stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.enqueue()
        self.graph = graph


class Products:
    """The neighbour: products of matrices of whole numbers, which are exact in any order of additions."""

    def __init__(self):
        self.a, self.b = (torch.randint(0, 2, (4096, 4096), device="cuda").bfloat16() for _ in range(2))
        self.want, self.result = self.a @ self.b, torch.empty_like(self.a)
        self.wrong = torch.zeros((), dtype=torch.int32, device="cuda")
        self.stream, self.asked = torch.cuda.Stream(), 0
        torch.cuda.synchronize()

    def multiply(self):
        self.asked += 1
        with torch.cuda.stream(self.stream):
            torch.mm(self.a, self.b, out=self.result)
            self.wrong += (self.result != self.want).any()


def take_turns(rows, calls, products=None, seed=0):
    """Makes `calls` calls, of which none is waited for. rows: streams with the calls of each; the streams
    take turns. Every eighth call is followed by a product."""
    chooser = random.Random(seed)
    for n in range(calls):
        stream, own = rows[n % len(rows)]
        with torch.cuda.stream(stream):
            chooser.choice(own).again()
        if products and n % 8 == 0:
            products.multiply()


def check(rows, products, what):
    """Waits for everything, asserts that all results were right, and says how many there were."""
    products.stream.synchronize()
    made, wrong = 0, {}
    for number, (stream, own) in enumerate(rows):
        stream.synchronize()
        for call in own:
            assert int(call.made) == call.asked, (
                f"{call.shape.name}: {int(call.made)} of {call.asked} calls ran"
            )
            made += call.asked
            if int(call.wrong):
                wrong[f"{call.shape.name}, stream {number}"] = f"{int(call.wrong)} of {call.asked}"
    assert not wrong, f"{what}: results that differ from those of the call alone: {wrong}"
    assert int(products.wrong) == 0, f"{what}: {int(products.wrong)} of {products.asked} products are wrong"
    shapes = {call.shape.name for _, own in rows for call in own}
    print(
        f"{what}: {made} calls of {len(shapes)} shapes on {len(rows)} streams, {products.asked} matrix "
        "products beside them, all bit-equal",
        flush=True,
    )


def new_rows(shapes, priorities=(0, -1, 0, -1)):
    """A stream of each priority, with a call of each shape."""
    return [(torch.cuda.Stream(priority=p), [Call(shape) for shape in shapes]) for p in priorities]


def ready():
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()


def streams(calls, shapes):
    """Four streams of two priorities beside matrix products."""
    rows, products = new_rows(shapes), Products()
    ready()
    began = time.monotonic()
    take_turns(rows, calls, products)
    check(rows, products, "streams of two priorities")
    print(f"computed from {began:.3f} to {time.monotonic():.3f} s", flush=True)


def threads(calls, shapes):
    """Six host threads, each with a stream of its own."""
    rows, products = new_rows(shapes, [0, -1, 0, -1, 0, -1]), Products()
    ready()
    with ThreadPoolExecutor(len(rows)) as pool:
        work = [pool.submit(take_turns, [row], calls // len(rows), seed=n) for n, row in enumerate(rows)]
        while not all(w.done() for w in work):
            products.multiply()
            products.stream.synchronize()
    for w in work:
        w.result()
    check(rows, products, f"{len(rows)} host threads")


def busy(calls, shapes):
    """As streams(), until the standard input is closed."""
    rows, products = new_rows(shapes), Products()
    ready()
    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), closed.set()), daemon=True).start()
    while not closed.is_set():
        take_turns(rows, 4 * len(SHAPES), products)
        torch.cuda.synchronize()
    check(rows, products, "the busy process")


def graphs(calls, shapes):
    """Captures every shape on two of four streams, then replays there beside calls on the other two."""
    rows, products = new_rows(shapes), Products()
    ready()
    for stream, own in rows[:2]:
        for call in own:
            call.capture(stream)
    take_turns(rows, calls, products)
    check(rows, products, "replays on two streams, calls on the others")


# ---- The driver: green contexts, and what PyTorch does not offer ----


class Driver:
    """Functions of the NVIDIA driver, by name."""

    NOT_SUPPORTED, TOO_LARGE, NO_AFFINITY, NO_PTX_COMPILER = 801, 720, 224, 221  # results

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")

    def result(self, name, *arguments):
        try:
            function = getattr(self.library, name)
        except AttributeError:
            cannot(f"the NVIDIA driver has no function {name}")
        return function(*arguments)

    def call(self, name, *arguments):
        result = self.result(name, *arguments)
        if result in (self.NOT_SUPPORTED, self.NO_PTX_COMPILER):
            cannot(f"{name} gave {result}, which says that the machine lacks what it needs")
        assert result == 0, f"{name} gave {result}"


class Resource(ctypes.Structure):
    """CUdevResource with type SM, and room for what later drivers may add."""

    SM = 1
    _fields_ = (
        ("type", ctypes.c_int),
        ("padding", ctypes.c_ubyte * 92),
        ("sms", ctypes.c_uint),
        ("rest", ctypes.c_uint64 * 20),
    )


class Affinity(ctypes.Structure):
    """CUexecAffinityParam of type SM_COUNT."""

    SM_COUNT = 0
    _fields_ = (("type", ctypes.c_int), ("sms", ctypes.c_uint))


class GreenContext:
    """A green context of at least `sms` SMs, as many as the GPU's granularity makes of it, with a stream."""

    def __init__(self, driver, sms):
        device, groups = ctypes.c_int(), ctypes.c_uint(1)
        whole, part, rest = Resource(), Resource(), Resource()
        description, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.handle = ctypes.c_void_p()
        by = ctypes.byref
        driver.call("cuDeviceGet", by(device), 0)
        driver.call("cuDeviceGetDevResource", device, by(whole), Resource.SM)
        driver.call("cuDevSmResourceSplitByCount", by(part), by(groups), by(whole), by(rest), 0, sms)
        driver.call("cuDevResourceGenerateDesc", by(description), by(part), 1)
        driver.call("cuGreenCtxCreate", by(self.handle), description, device, 1)  # with a default stream
        driver.call("cuGreenCtxStreamCreate", by(stream), self.handle, 1, 0)  # non-blocking, priority 0
        self.sms, self.stream = part.sms, torch.cuda.ExternalStream(stream.value)
        assert sms <= self.sms < whole.sms, f"{self.sms} of {whole.sms} SMs instead of {sms}"


class Probe:
    """An empty kernel whose CTAs do not fit on an SM together."""

    PTX = b".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry nothing() { ret; }\n"
    SHARED_BYTES, MAX_DYNAMIC_SHARED = 120 * 1024, 8

    def __init__(self, driver):
        module, self.function, self.driver = ctypes.c_void_p(), ctypes.c_void_p(), driver
        driver.call("cuModuleLoadData", ctypes.byref(module), self.PTX)
        driver.call("cuModuleGetFunction", ctypes.byref(self.function), module, b"nothing")
        driver.call("cuFuncSetAttribute", self.function, self.MAX_DYNAMIC_SHARED, self.SHARED_BYTES)

    def launch(self, stream, ctas):
        """The result of a cooperative launch of so many CTAs."""
        result = self.driver.result(
            "cuLaunchCooperativeKernel",
            *(self.function, ctas, 1, 1, 32, 1, 1, self.SHARED_BYTES),
            *(ctypes.c_void_p(stream.cuda_stream), None),
        )
        stream.synchronize()
        return result

    def largest(self, stream, most):
        """How many CTAs a cooperative launch may have, up to `most`; 0 if none is allowed."""
        allowed, refused = 0, most + 1
        while refused - allowed > 1:
            ctas = (allowed + refused) // 2
            result = self.launch(stream, ctas)
            assert result in (0, Driver.TOO_LARGE), f"a cooperative launch of {ctas} CTAs gave {result}"
            allowed, refused = (ctas, refused) if result == 0 else (allowed, ctas)
        return allowed


def green(calls, shapes):
    """Calls on streams of green contexts, first alone, then beside each other and a stream of all SMs."""
    driver = Driver()
    whole = torch.cuda.get_device_properties(0).multi_processor_count
    contexts = [GreenContext(driver, sms) for sms in (16, 32, 64) if sms <= whole // 2]
    products, probe = Products(), Probe(driver)
    rows = [(torch.cuda.Stream(), [Call(shape) for shape in shapes])]
    ready()
    for context in contexts:
        allowed, own = probe.largest(context.stream, whole), []
        print(f"green context of {context.sms} SMs: cooperative launches of up to {allowed} CTAs", flush=True)
        for shape in shapes:
            alone = run_alone(shape, context.stream)
            equal = same_bits(alone, shape.want)
            if shape.ctas_at_once() > allowed:
                shape.hold_to_truth(alone)
                print(
                    f"  {shape.name}: {shape.ctas_at_once()} CTAs at once are refused; within the error "
                    f"bars, {'the same bits as' if equal else 'other bits than'} on all SMs",
                    flush=True,
                )
            else:
                assert equal, f"{shape.name}: other bits on {context.sms} SMs than on all SMs"
            own.append(Call(shape, alone))
        assert allowed == context.sms, f"{context.sms} SMs, but cooperative launches of up to {allowed} CTAs"
        rows.append((context.stream, own))
    take_turns(rows, calls // 4, products)
    check(rows, products, f"{len(contexts)} green contexts and all SMs")


def green_current(calls, shapes):
    """A green context is the current one of the thread, and calls are made on a stream of it."""
    driver, by = Driver(), ctypes.byref
    context, converted, popped = GreenContext(driver, 16), ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuCtxFromGreenCtx", by(converted), context.handle)
    ready()
    for name, stream in (("its stream", context.stream), ("its default stream", torch.cuda.default_stream())):
        (shape,) = shapes
        call = Call(shape)
        q = torch.zeros_like(shape.arguments["q"])
        call.shape.arguments, given = {**shape.arguments, "q": q}, shape.arguments
        torch.cuda.synchronize()
        driver.call("cuCtxPushCurrent_v2", converted)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)  # clocks in which a call that does not wait for its stream would be made
            q.copy_(given["q"])
            call.again()
        stream.synchronize()
        driver.call("cuCtxPopCurrent_v2", by(popped))
        torch.cuda.synchronize()
        call.shape.arguments = given
        ordered = int(call.made) == 1 and int(call.wrong) == 0
        print(f"green context current, {name}: the call is {'' if ordered else 'NOT '}in order", flush=True)
        assert ordered or name == "its default stream", "a call did not wait for the work on its stream"


def green_capture(calls, shapes):
    """A call is captured on a stream of a green context that is too small for its cooperative launch, with
    which the replay would wait for ever: its results are right, and so are those of a call after it."""
    driver = Driver()
    context = GreenContext(driver, 16)
    ready()
    for shape in shapes:
        assert shape.ctas_at_once() > context.sms or torch.cuda.get_device_capability() != (9, 0)
        call = Call(shape)
        call.capture(context.stream)
        with torch.cuda.stream(context.stream):
            call.again()
        context.stream.synchronize()
        shape.hold_to_truth(call.own)
        print(f"{shape.name}, captured in a green context: right", flush=True)
        assert same_bits(run_alone(shape, torch.cuda.default_stream()), shape.want)


def other_context(calls, shapes):
    """A stream of a context that is not the primary one, with an execution affinity where MPS allows it: a
    call on it is refused with a sentence and writes nothing, or is right."""
    driver, by = Driver(), ctypes.byref
    context, stream, popped = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    (shape,) = shapes
    ready()
    result = driver.result("cuCtxCreate_v3", by(context), by(Affinity(Affinity.SM_COUNT, 32)), 1, 0, 0)
    kind = "with an execution affinity of 32 SMs"
    if result in (Driver.NO_AFFINITY, Driver.NOT_SUPPORTED):
        kind = "without execution affinity, which only MPS has"
        result = driver.result("cuCtxCreate_v3", by(context), None, 0, 0, 0)
    assert result == 0, f"cuCtxCreate_v3 gave {result}"
    driver.call("cuStreamCreate", by(stream), 1)
    driver.call("cuCtxPopCurrent_v2", by(popped))
    results = {name: torch.full_like(shape.arguments[name], torch.nan) for name in WRITTEN}
    torch.cuda.synchronize()
    sentence = None
    try:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.value)):
            flash_kda.fwd(**{**shape.arguments, **results}, **shape.options)
        driver.call("cuStreamSynchronize", stream)
    except RuntimeError as error:
        sentence = str(error)
    torch.cuda.synchronize()
    print(f"a context {kind}: {sentence or 'the call ran'}", flush=True)
    if sentence is None:
        assert same_bits(results, shape.want), "other bits than on the primary context"
    else:
        assert "CUDA_ERROR" in sentence, "the sentence does not say what the driver gave"
        assert all(results[name].isnan().all() for name in WRITTEN), "a refused call has written"


def limited(calls, shapes):
    """As streams(), in a process that MPS gives a part of the SMs: results are within the error bars, too."""
    driver, affinity = Driver(), Affinity()
    result = driver.result("cuCtxGetExecAffinity", ctypes.byref(affinity), Affinity.SM_COUNT)
    whole, reported = int(sys.argv[3]), torch.cuda.get_device_properties(0).multi_processor_count
    allowed = Probe(driver).largest(torch.cuda.current_stream(), whole)
    said = affinity.sms if result == 0 else f"unknown ({result})"
    print(
        f"{whole} SMs in all; the device says {reported}, the execution affinity {said}, cooperative "
        f"launches of up to {allowed} CTAs",
        flush=True,
    )
    if min(reported, affinity.sms if result == 0 else whole) >= whole:
        cannot("MPS does not limit the SMs of this process")
    assert allowed < whole, "more CTAs at once than this process may have SMs are not refused"
    for shape in shapes:
        shape.hold_to_truth(shape.want)
        if shape.ctas_at_once() > allowed:
            print(f"  {shape.name}: {shape.ctas_at_once()} CTAs at once are refused", flush=True)
    streams(calls, shapes)


# The shapes of a case that does not need all of them, because preparing them takes seconds.
NEEDED = {
    green_current: ("even shares",),
    green_capture: ("relay", "mixed"),
    other_context: ("CTA pairs",),
}
CASES = (streams, threads, busy, graphs, green, green_current, green_capture, other_context, limited)


def main():
    case = next(c for c in CASES if c.__name__ == sys.argv[1])
    calls, sms = int(sys.argv[2]), int(sys.argv[3])
    torch.cuda.init()
    needed = NEEDED.get(case, [name for name, *_ in SHAPES])
    shapes = [Shape(number, sms) for number, (name, *_) in enumerate(SHAPES) if name in needed]
    for shape in shapes if case in (streams, limited) else []:
        print(f"  {shape.name}: {shape.explained.splitlines()[1]}", flush=True)
    case(calls, shapes)


if __name__ == "__main__":
    main()
