"""The options of a call: what it asks for apart from the contents of its arrays, scale and lower_bound.

`Options` holds all of them in one frozen object. `known_options` returns the same object for the same values,
and it has checked the values of every object that it returns. Hence two calls that ask for the same are told
by `is`.

An option is one field of `Options`. The field says which values the option takes, and from the field follow
the check and its sentence, what goes into C's struct, the argument of the operator torch.ops.flash_kda.fwd,
and whether an earlier call's struct can be reused. To add an option, change

1. _options.py: one field of `Options`;
2. _lib.py: the struct's field in `FwdParams`, as include/flash_kda.h has it;
3. __init__.py, `fwd`: the parameter, its lines in the docstring, and its value where `fwd` calls
   `known_options`; in `explain` likewise if the option changes what runs.

To add an optional array, change

1. _options.py: its name in `OPTIONAL_ARRAYS`, and in `WRITTEN_ARRAYS` if the call writes it;
2. _lib.py: the struct's field in `FwdParams`;
3. __init__.py, `fwd`: the parameter, its lines in the docstring, the two lines that append it to the arrays,
   and its entry in `given`.

Order counts in two places: `fwd` passes values to `known_options` in the order of the fields, and appends
arrays in the order of `OPTIONAL_ARRAYS`. tests/python/test_structure.py and test_errors.py notice a wrong
order. In the operator all options follow all arrays, so a new array moves the options' positions. It does not
change their names.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Callable

from . import _lib

REQUIRED_ARRAYS = ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias")
OPTIONAL_ARRAYS = ("initial_state", "final_state", "cu_seqlens", "nonfinite")
WRITTEN_ARRAYS = ("out", "final_state", "nonfinite")


@dataclass(frozen=True)
class _Takes:
    """Which values an option takes, and how C and PyTorch's operator take them."""

    type: Any  # any other type is a TypeError
    type_text: str
    schema: str  # the type in the operator's schema
    allows: Callable[[Any], bool] = lambda value: True  # what it refuses is a ValueError
    values_text: str = ""
    to_c: Callable[[Any], Any] = lambda value: value

    def check(self, name: str, value: Any) -> Any:
        """The value, as this type if it is another library's integer."""
        if self.type is int:
            value = as_int(value)
        if not isinstance(value, self.type):
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be {self.type_text}")
        if not self.allows(value):
            raise ValueError(f"{name} is {value!r}; it must be {self.values_text}")
        return value


def as_int(value: Any) -> Any:
    """The int that an integer of another library is (NumPy's, say: what has __index__), else the value."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _flag() -> _Takes:
    return _Takes(bool, "True or False", "bool")


def _count(bits: int, zero: str, schema: str = "int") -> _Takes:
    """An int of C's signed type with `bits` bits that is not negative. zero: what 0 means."""
    limit = 1 << (bits - 1)
    text = f"0 ({zero}) or more, and fit {bits} bits"
    return _Takes(int, "an int", schema, lambda value: 0 <= value < limit, text)


def _choice(*names: str) -> _Takes:
    """One of the names. C numbers them from 0."""
    text = ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'
    return _Takes(str, text, "str", names.__contains__, text, names.index)


def _kernel_name(kernel: str | None) -> bytes | None:
    """A character that C cannot read is replaced, so that the name becomes one that no kernel has."""
    return None if kernel is None else kernel.encode(errors="replace").replace(b"\0", b"?")


def _option(default: Any, takes: _Takes, c_name: str = "", operator_name: str = "") -> Any:
    """A field of Options. c_name and operator_name are its other names in C's struct and in the operator."""
    names = {"c_name": c_name, "operator_name": operator_name}
    return field(default=default, metadata={"takes": takes, **names})


@dataclass(frozen=True, eq=False)
class Options:
    """What one call asks for. Compared as objects are, by identity: see known_options."""

    #: for each of OPTIONAL_ARRAYS whether the call has it
    given: tuple[bool, ...] = (False,) * len(OPTIONAL_ARRAYS)
    # Inductor passes an operator's arguments by name beside a `kernel` of its own, so the operator has
    # another name.
    kernel: str | None = _option(
        None,
        _Takes((str, type(None)), "a string or None", "str?", to_c=_kernel_name),
        operator_name="kernel_name",
    )
    threads: int = _option(0, _count(32, "all"), c_name="cpu_threads")
    batch_invariant: bool = _option(False, _flag())
    max_seqlen: int = _option(0, _count(64, "not known", schema="SymInt"))  # C checks that it is at most T
    cut: str = _option("auto", _choice("auto", "never", "always", "mixed"))

    def checked(self) -> Options:
        """These options, once every value is known to be one that the option takes. Integers of other
        libraries have become ints."""
        values = {f.name: f.metadata["takes"].check(f.name, getattr(self, f.name)) for f in _OPTION_FIELDS}
        if all(values[f.name] is getattr(self, f.name) for f in _OPTION_FIELDS):
            return self
        return Options(self.given, **values)

    def apply_to(self, params: _lib.FwdParams) -> None:
        """Fills in what C's struct has for the options. The options were checked."""
        for option in _OPTION_FIELDS:
            value = option.metadata["takes"].to_c(getattr(self, option.name))
            setattr(params, option.metadata["c_name"] or option.name, value)

    def values(self) -> list[Any]:
        """The values of all options, in the order in which the operator takes them."""
        return [getattr(self, name) for name in OPTION_NAMES]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the call's arrays, in the order in which the call has them."""
        return REQUIRED_ARRAYS + tuple(name for name, given in zip(OPTIONAL_ARRAYS, self.given) if given)

    @cached_property
    def written(self) -> tuple[int, ...]:
        """The positions of the arrays that the call writes, among the call's arrays."""
        return tuple(i for i, name in enumerate(self.names) if name in WRITTEN_ARRAYS)


_OPTION_FIELDS = tuple(option for option in fields(Options) if "takes" in option.metadata)
OPTION_NAMES = tuple(option.name for option in _OPTION_FIELDS)
OPTION_DEFAULTS = tuple(option.default for option in _OPTION_FIELDS)


# Typed: 2 and 2.0 are different values, and so are True and 1, so that a wrong type never finds a right
# value's options. An error is not kept, so wrong values are checked, and refused, at every call.
@lru_cache(maxsize=1024, typed=True)
def _known(*values: Any) -> Options:
    options = Options(*values)
    checked = options.checked()
    return checked if checked is options else _known(checked.given, *checked.values())


def known_options(*values: Any) -> Options:
    """The one Options object for these values of its fields, which were checked.

    Raises:
        TypeError, ValueError: an option has a wrong value; the sentence names the option.
    """
    try:
        return _known(*values)
    except TypeError:
        pass
    # A value has a type without a hash for the cache, or a wrong one. The check says what is wrong.
    checked = Options(*values).checked()
    return _known(checked.given, *checked.values())


def operator_schema() -> str:
    """The optional arrays and the options as arguments in the schema of an operator of PyTorch."""
    arguments = []
    marks = iter("bcdefghijklmnopqrstuvwxyz")  # one for each array that is written; a is out's
    for name in OPTIONAL_ARRAYS:
        mark = f"({next(marks)}!)" if name in WRITTEN_ARRAYS else ""
        arguments.append(f"Tensor{mark}? {name}=None")
    for option in _OPTION_FIELDS:
        default = f'"{option.default}"' if isinstance(option.default, str) else option.default
        name = option.metadata["operator_name"] or option.name
        arguments.append(f"{option.metadata['takes'].schema} {name}={default}")
    return ", ".join(arguments)
