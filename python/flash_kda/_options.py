"""The options of a call: what it asks for apart from the contents of its arrays, scale and lower_bound.

`Options` holds all of them in one frozen object. `known_options` returns the same object for the same values,
and it has checked the values of every object that it returns. Hence two calls that ask for the same are told
by `is`.

An option is one field of `Options`. The field says which values the option takes, and from the field follow
the check and its sentence, what goes into C's struct, the argument of the operator torch.ops.flash_kda.fwd,
and whether an earlier call's struct can be reused. To add an option, change

1. _options.py: one field of `Options`, at the end of those that `_option` makes;
2. _lib.py: the struct's field in `FwdParams`, as include/flash_kda.h has it;
3. __init__.py, `fwd`: the parameter, its lines in the docstring, its default in `is_plain`, and its value
   where `fwd` calls `known_options`; `explain` and _shapes.py likewise if it changes what runs.

To add an optional array, change

1. _options.py: its name at the end of `OPTIONAL_ARRAYS`, and in `WRITTEN_ARRAYS` if the call writes it;
2. _lib.py: the struct's field in `FwdParams`;
3. __init__.py, `fwd`: the parameter, its lines in the docstring, and its place in `is_plain` and in the list
   of arrays behind it.

Order counts in two places: `fwd` passes values to `known_options` in the order of the fields, and appends
arrays in the order of `OPTIONAL_ARRAYS`. tests/python/test_structure.py and test_errors.py notice a wrong
order. The operator's arguments only grow at the end: `OPERATOR_ARGUMENTS` has their order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, Callable

from . import _lib

REQUIRED_ARRAYS = ("q", "k", "v", "g", "beta", "out")
OPTIONAL_ARRAYS = (
    "A_log",
    "dt_bias",
    "initial_state",
    "final_state",
    "cu_seqlens",
    "nonfinite",
    "workspace",
    "state_indices",
    "has_initial_state",
    "checkpoint_states",
    "checkpoint_offsets",
    "checkpoint_indices",
    "checkpoint_starts",
)
WRITTEN_ARRAYS = ("out", "final_state", "nonfinite", "workspace", "checkpoint_states")


def bits_of(*names: str) -> int:
    """`Options.given` of a call that has these optional arrays."""
    return sum(1 << OPTIONAL_ARRAYS.index(name) for name in names)


BOTH_PARAMETERS = bits_of("A_log", "dt_bias")
BIT = {name: bits_of(name) for name in OPTIONAL_ARRAYS}


@dataclass(frozen=True)
class _Takes:
    """Which values an option takes, and how C and PyTorch's operator take them."""

    type: Any  # any other type is a TypeError
    type_text: str
    schema: str  # the type in the operator's schema
    allows: Callable[[Any], bool] = lambda value: True  # what it refuses is a ValueError
    values_text: str = ""
    to_c: Callable[[Any], Any] | None = lambda value: value  # None: `Options.apply_to` knows
    or_none: bool = False  # whether None is a value too

    def check(self, name: str, value: Any) -> Any:
        """The value, as this type if it is another library's integer."""
        if value is None and self.or_none:
            return value
        if self.type is int:
            value = as_int(value)
        if not isinstance(value, self.type):
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be {self.type_text}")
        if not self.allows(value):
            raise ValueError(f"{name} is {value!r}; it must be {self.values_text}")
        return value


def as_int(value: Any) -> Any:
    """The int that an integer of another library is (NumPy's, say: what has __index__), else the value."""
    if value is None or isinstance(value, int):  # torch.compile traces no exception of operator.index(None)
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _flag(to_c: Callable[[Any], Any] | None = lambda value: value) -> _Takes:
    return _Takes(bool, "True or False", "bool", to_c=to_c)


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

    #: bit i: the call has the i-th of OPTIONAL_ARRAYS
    given: int = 0
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
    first_slot: int = _option(0, _count(64, "every index is a slot"))
    checkpoint_every: int | None = _option(
        None,
        _Takes(
            int,
            "an int or None",
            "int?",
            lambda tokens: 0 < tokens < 1 << 63 and tokens % 16 == 0,
            "a multiple of 16 tokens, 16 or more, or None",
            to_c=lambda tokens: tokens or 0,
            or_none=True,
        ),
    )
    use_gate_in_kernel: bool = _option(True, _flag(to_c=None))
    use_qk_l2norm_in_kernel: bool = _option(True, _flag(lambda on: not on), c_name="qk_is_normalised")
    use_beta_sigmoid_in_kernel: bool = _option(True, _flag(to_c=None))
    allow_neg_eigval: bool = _option(False, _flag(to_c=None))
    state_v_first: bool = _option(True, _flag(lambda on: not on), c_name="state_k_first")
    #: whether lower_bound is a number; None asks for the softplus gate, which is not bounded
    has_lower_bound: bool = True

    def checked(self) -> Options:
        """These options, once every value is known to be one that the option takes, and to make sense beside
        the others. Integers of other libraries have become ints."""
        values = {f.name: f.metadata["takes"].check(f.name, getattr(self, f.name)) for f in _OPTION_FIELDS}
        self._check_gate_and_beta()
        if all(values[f.name] is getattr(self, f.name) for f in _OPTION_FIELDS):
            return self
        return Options(self.given, **values, has_lower_bound=self.has_lower_bound)

    def _check_gate_and_beta(self) -> None:
        """What C cannot see: it has other names for these options, and takes a lower_bound of None as 0."""
        if self.allow_neg_eigval and not self.use_beta_sigmoid_in_kernel:
            raise ValueError(
                "allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False; a beta that is activated "
                "already stays as it is, so allow_neg_eigval must be False"
            )
        if self.use_gate_in_kernel and not self.has_lower_bound and not self.given & BIT["A_log"]:
            raise ValueError(
                "A_log is None and lower_bound is None; A_log must be given, as the softplus gate needs it"
            )
        if not self.use_gate_in_kernel:
            for name in ("A_log", "dt_bias"):
                if self.given & BIT[name]:
                    raise ValueError(
                        f"{name} is given and use_gate_in_kernel is False; g is then the log decay "
                        f"itself, so {name} must be None"
                    )

    def apply_to(self, params: _lib.FwdParams) -> None:
        """Fills in what C's struct has for the options. The options were checked."""
        for option in _OPTION_FIELDS:
            to_c = option.metadata["takes"].to_c
            if to_c is not None:
                name = option.metadata["c_name"] or option.name
                setattr(params, name, to_c(getattr(self, option.name)))
        if not self.use_gate_in_kernel:
            params.gate = _lib.GATE_ACTIVATED
        else:
            params.gate = _lib.GATE_BOUNDED if self.has_lower_bound else _lib.GATE_SOFTPLUS
        if not self.use_beta_sigmoid_in_kernel:
            params.beta_kind = _lib.BETA_ACTIVATED
        else:
            params.beta_kind = _lib.BETA_TWICE_SIGMOID if self.allow_neg_eigval else _lib.BETA_SIGMOID

    def values(self) -> list[Any]:
        """The values of all options, in the order of OPTION_NAMES."""
        return [getattr(self, name) for name in OPTION_NAMES]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the call's arrays, in the order in which the call has them."""
        return REQUIRED_ARRAYS + tuple(name for name in OPTIONAL_ARRAYS if self.given & BIT[name])

    @cached_property
    def written(self) -> tuple[int, ...]:
        """The positions of the arrays that the call writes, among the call's arrays."""
        return tuple(i for i, name in enumerate(self.names) if name in WRITTEN_ARRAYS)


_OPTION_FIELDS = tuple(option for option in fields(Options) if "takes" in option.metadata)
OPTION_NAMES = tuple(option.name for option in _OPTION_FIELDS)
OPTION_DEFAULTS = tuple(option.default for option in _OPTION_FIELDS)
_FIELD_DEFAULTS = tuple(option.default for option in fields(Options))


# Typed: 2 and 2.0 are different values, and so are True and 1, so that a wrong type never finds a right
# value's options. An error is not kept, so wrong values are checked, and refused, at every call.
@lru_cache(maxsize=1024, typed=True)
def cached_options(*values: Any) -> Options:
    if len(values) < len(_FIELD_DEFAULTS):
        return cached_options(*values, *_FIELD_DEFAULTS[len(values) :])
    options = Options(*values)
    checked = options.checked()
    return checked if checked is options else _cached_again(checked)


def _cached_again(checked: Options) -> Options:
    return cached_options(checked.given, *checked.values(), checked.has_lower_bound)


def known_options(*values: Any) -> Options:
    """The one Options object for these values of its first fields, which were checked. The other fields have
    their defaults.

    Raises:
        TypeError, ValueError: an option has a wrong value; the sentence names the option.
    """
    try:
        return cached_options(*values)
    except TypeError:
        pass
    # A value has a type without a hash for the cache, or a wrong one. The check says what is wrong.
    return _cached_again(Options(*values).checked())


class _DefaultsFor(dict):
    """The Options of calls whose options have their defaults, by `given`. Looking here takes a quarter of the
    time of known_options."""

    def __missing__(self, given: int) -> Options:
        self[given] = known_options(given)
        return self[given]


defaults_for = _DefaultsFor()


# The arguments of the operator behind lower_bound, in their order. Exported programs hold positions, so new
# arguments come last.
_GROWN_FROM = OPTION_NAMES.index("first_slot"), OPTIONAL_ARRAYS.index("workspace")
OPERATOR_ARGUMENTS = (
    *OPTIONAL_ARRAYS[OPTIONAL_ARRAYS.index("initial_state") : _GROWN_FROM[1]],
    *OPTION_NAMES[: _GROWN_FROM[0]],
    *OPTIONAL_ARRAYS[_GROWN_FROM[1] :],
    *OPTION_NAMES[_GROWN_FROM[0] :],
)
OPERATOR_DEFAULTS = tuple(dict(zip(OPTION_NAMES, OPTION_DEFAULTS)).get(name) for name in OPERATOR_ARGUMENTS)


def operator_schema() -> str:
    """The optional arrays and the options as arguments in the schema of an operator of PyTorch."""
    arguments = []
    options = {option.name: option for option in _OPTION_FIELDS}
    marks = iter("bcdefghijklmnopqrstuvwxyz")  # one for each array that is written; a is out's
    for name in OPERATOR_ARGUMENTS:
        if name in OPTIONAL_ARRAYS:
            mark = f"({next(marks)}!)" if name in WRITTEN_ARRAYS else ""
            arguments.append(f"Tensor{mark}? {name}=None")
        else:
            option = options[name]
            default = f'"{option.default}"' if isinstance(option.default, str) else option.default
            shown = option.metadata["operator_name"] or name
            arguments.append(f"{option.metadata['takes'].schema} {shown}={default}")
    return ", ".join(arguments)
