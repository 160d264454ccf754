"""How the package is built: which module may import which, an array's path to C, and a call's options."""

import ast
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import flash_kda
from flash_kda import _call, _options
from problems import make_any, to_torch

PACKAGE = Path(flash_kda.__file__).parent
# From the bottom to the top: a module imports modules below it alone.
LEVELS = [
    {"_lib", "_later", "_nonfinite"},
    {"_call_options", "_interruptible", "_installed", "_engines", "_fla_context"},
    {"_options", "_backward_options", "_decode_options", "_map_options"},
    {"_call", "_layout"},
    {"_arrays"},
    {"_torch", "_functional", "_shapes"},
    {"_reference", "_autograd", "_fla"},
    {"_backward", "_chunk_kda", "_pieces"},
    {"_fused_recurrent_kda", "vllm", "sglang"},
    {"__init__", "__main__", "distributed", "fla", "jax"},
]
MOST_FUNCTIONS = 5  # of the package, before C has the call


def imports_of(module):
    """The modules of the package that a module imports, wherever in the module."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("flash_kda") for alias in node.names)


def test_modules_import_what_is_below_them():
    assert set.union(*LEVELS) == {path.stem for path in PACKAGE.glob("*.py")}
    for level, modules in enumerate(LEVELS):
        below = set().union(*LEVELS[:level])
        for module in modules:
            assert set(imports_of(module)) <= below, module


def holds(value, array):
    """Whether a local variable is the array, or a list or tuple that has it."""
    return value is array or (isinstance(value, (list, tuple)) and any(x is array for x in value))


def events_of(array, call):
    """What happens to the array until C has the call: ("call", function) and ("return", function) for every
    function of the package that holds the array, and for the last one, which holds its pointer. A
    comprehension is part of its function."""
    events = []

    def watch(frame, event, _):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event in ("call", "return") and path.parent.resolve() == PACKAGE.resolve() and name[0] != "<":
            function = f"{path.stem}.{name}"
            if function == "_call.run" or any(holds(x, array) for x in frame.f_locals.values()):
                events.append((event, function))

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return events[: events.index(("call", "_call.run")) + 1]


# These functions look at an array and return what they saw: a view, whether a prepared call fits, why the
# array's memory cannot be read, or the array as C takes it.
LOOK = (
    "_arrays._read_numpy",
    "_arrays.fits",
    "_torch._guards_for",
    "_torch.refuse_unreadable",
    "_torch.why_unreadable",
    "_layout.for_c",
    "_layout.readable",
    "_layout.taken_as",
    "_layout._fits",
    "_layout._is_copied",
    "_layout._strides_fit",
    "_layout._has_own_elements",
)


@pytest.mark.parametrize("module", ["_arrays", "_torch"])
@pytest.mark.parametrize(
    "name", ["q", "out", "cu_seqlens", "nonfinite", "state_indices", "checkpoint_states"]
)
def test_path_of_an_array_to_c(module, name, monkeypatch):
    """An array passes few functions. Each hands it on to the next, and none returns before C has the call."""
    a = make_any(pool=True, checkpoints="columns")
    a = {**a, "nonfinite": np.zeros((10, 2), np.int64)}
    if module == "_torch":
        pytest.importorskip("torch")
        a = to_torch(a, "cpu")
    monkeypatch.setattr(getattr(flash_kda, module), "_calls", _call.PreparedCalls())
    first = ["__init__.fwd", f"{module}.call_c", f"{module}._prepare_and_run", f"{module}._run", "_call.run"]
    second = ["__init__.fwd", f"{module}.call_c", f"{module}._run", "_call.run"]
    for functions in (first, second):
        assert len(functions) <= MOST_FUNCTIONS
        events = events_of(a[name], lambda: flash_kda.fwd(**a))
        assert [event for event in events if event[1] not in LOOK] == [("call", f) for f in functions]


def test_options_are_parameters_of_fwd():
    """In the order of the fields, in which fwd passes them, and with the fields' defaults."""
    parameters = inspect.signature(flash_kda.fwd).parameters.values()
    arrays = _options.OPTIONAL_ARRAYS
    keywords = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in arrays]
    assert keywords == [
        (f.name, f.default) for f in fields(_options.Options) if f.name not in ("given", "has_lower_bound")
    ]


def test_equal_options_are_one_object():
    given = _options.bits_of("A_log", "dt_bias", "initial_state", "cu_seqlens")
    options = _options.known_options(given, "cpu", 2, True, 5000, "never")
    assert options is _options.known_options(given, "cpu", 2, True, int("5000"), "never")
    assert options is not _options.known_options(given, "cpu", 2, True, 5001, "never")
    every = [f.default for f in fields(_options.Options)][6:]
    assert options is _options.known_options(given, "cpu", 2, True, 5000, "never", *every)
    assert _options.defaults_for[given] is _options.known_options(given)
    assert options.names == (*_options.REQUIRED_ARRAYS, "A_log", "dt_bias", "initial_state", "cu_seqlens")
    assert [options.names[i] for i in options.written] == ["out"]


def test_the_operator_keeps_the_positions_of_its_arguments():
    """Exported programs hold positions."""
    first = ("initial_state", "final_state", "cu_seqlens", "nonfinite")
    first += ("kernel", "threads", "batch_invariant", "max_seqlen", "cut")
    assert _options.OPERATOR_ARGUMENTS[: len(first)] == first
    assert sorted((*_options.OPERATOR_ARGUMENTS, "A_log", "dt_bias")) == sorted(
        (*_options.OPTIONAL_ARRAYS, *_options.OPTION_NAMES)
    )
