"""What a call asks for apart from the contents of its arrays and its numbers: the machinery of all functions.

Every function that hands arrays to C has a subclass of `CallOptions`: `fwd` in _options.py, `bwd` in
_backward_options.py, `affine_map` and `join_maps` in _map_options.py, and `decode`, `decode_layer` and
`apply_records` in _decode_options.py. The subclass names the function's arrays, and has
one field for each of its options. The field says which values the option takes. From the subclass follow the
checks and their sentences, what goes into C's struct, the function's operator in PyTorch, and whether an
earlier call's struct can be reused.

`KnownOptions` returns the same frozen object for the same values, and it has checked the values of every
object that it returns. Hence two calls that ask for the same are told by `is`.

To add a function, change

1. _lib.py: its struct, and a `Function`;
2. a module with the subclass of `CallOptions` and its `KnownOptions`;
3. __init__.py: the function itself;
4. _torch.py: `OPERATORS` at its end, which registers an operator with PyTorch for each function. `Operator`
   makes all that PyTorch needs, with the schema that follows from the subclass;
5. _layout.py: how its arrays may lie in memory, and which of them are written.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from functools import cache, cached_property, lru_cache
from typing import Any, Callable, ClassVar

from . import _lib


@dataclass(frozen=True)
class Takes:
    """Which values an option takes, and how C and PyTorch's operator take them."""

    type: Any  # any other type is a TypeError
    type_text: str
    schema: str  # the type in the operator's schema
    allows: Callable[[Any], bool] = lambda value: True  # what it refuses is a ValueError
    values_text: str = ""
    to_c: Callable[[Any], Any] | None = lambda value: value  # None: `CallOptions.apply_to` knows
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


def flag(to_c: Callable[[Any], Any] | None = lambda value: value) -> Takes:
    return Takes(bool, "True or False", "bool", to_c=to_c)


def count(bits: int, zero: str, schema: str = "int") -> Takes:
    """An int of C's signed type with `bits` bits that is not negative. zero: what 0 means."""
    limit = 1 << (bits - 1)
    text = f"0 ({zero}) or more, and fit {bits} bits"
    return Takes(int, "an int", schema, lambda value: 0 <= value < limit, text)


def choice(*names: str) -> Takes:
    """One of the names. C numbers them from 0."""
    text = ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'
    return Takes(str, text, "str", names.__contains__, text, names.index)


def option(default: Any, takes: Takes, c_name: str = "", operator_name: str = "") -> Any:
    """A field of an Options class. c_name and operator_name are its other names in C's struct and in the
    operator."""
    names = {"c_name": c_name, "operator_name": operator_name}
    return field(default=default, metadata={"takes": takes, **names})


def _kernel_name(kernel: str | None) -> bytes | None:
    """A character that C cannot read is replaced, so that the name becomes one that no kernel has."""
    return None if kernel is None else kernel.encode(errors="replace").replace(b"\0", b"?")


# Options that several functions have.


def kernel_option() -> Any:
    """Inductor passes an operator's arguments by name beside a `kernel` of its own, so the operator has
    another name."""
    takes = Takes((str, type(None)), "a string or None", "str?", to_c=_kernel_name)
    return option(None, takes, operator_name="kernel_name")


def threads_option() -> Any:
    return option(0, count(32, "all"), c_name="cpu_threads")


def first_slot_option() -> Any:
    return option(0, count(64, "every index is a slot"))


def negated_option(c_name: str) -> Any:
    """A flag that is True unless C's opposite flag is set."""
    return option(True, flag(lambda on: not on), c_name=c_name)


def gate_option(default: bool) -> Any:
    """A flag of the gate or of beta, of which GateAndBeta makes C's kinds."""
    return option(default, flag(to_c=None))


@dataclass(frozen=True, eq=False)
class CallOptions:
    """What one call asks for. Compared as objects are, by identity: see KnownOptions."""

    # Of the function, the same for all of its calls.
    function: ClassVar[_lib.Function]
    operator: ClassVar[str]  # the operator's name
    required_arrays: ClassVar[tuple[str, ...]]
    optional_arrays: ClassVar[tuple[str, ...]]
    written_arrays: ClassVar[tuple[str, ...]]
    #: the operator's arguments up to the last one without a default, in their order
    operator_head: ClassVar[tuple[str, ...]]
    #: its other arguments. Exported programs hold positions, so new arguments come last
    operator_rest: ClassVar[tuple[str, ...]]
    #: what to do instead of passing an array that is immutable, and a tracer of JAX
    instead_of_immutable: ClassVar[str]
    instead_of_tracer: ClassVar[str]

    #: bit i: the call has the i-th of optional_arrays
    given: int = 0

    @classmethod
    def bits_of(cls, *names: str) -> int:
        """`given` of a call that has these optional arrays."""
        return sum(1 << cls.optional_arrays.index(name) for name in names)

    def has(self, name: str) -> bool:
        """Whether the call has the optional array."""
        return bool(self.given & (1 << self.optional_arrays.index(name)))

    def checked(self) -> Any:
        """These options, once every value is known to be one that the option takes, and to make sense beside
        the others. Integers of other libraries have become ints."""
        cls: Any = type(self)
        options = option_fields(cls)
        values = {f.name: f.metadata["takes"].check(f.name, getattr(self, f.name)) for f in options}
        self.check_together()
        if all(values[f.name] is getattr(self, f.name) for f in options):
            return self
        rest = {f.name: getattr(self, f.name) for f in fields(self) if "takes" not in f.metadata}
        return type(self)(**values, **rest)

    def check_together(self) -> None:
        """Refuses options that make no sense beside each other, where C cannot see it."""

    def apply_to(self, params: Any) -> None:
        """Fills in what C's struct has for the options. The options were checked."""
        cls: Any = type(self)
        for f in option_fields(cls):
            to_c = f.metadata["takes"].to_c
            if to_c is not None:
                setattr(params, f.metadata["c_name"] or f.name, to_c(getattr(self, f.name)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the call's arrays, in the order in which the call has them."""
        return self.required_arrays + tuple(filter(self.has, self.optional_arrays))

    @cached_property
    def is_written(self) -> tuple[bool, ...]:
        """Whether the call writes its first, second, ... array."""
        return tuple(name in self.written_arrays for name in self.names)

    @cached_property
    def written(self) -> tuple[int, ...]:
        """The positions of the arrays that the call writes, among the call's arrays."""
        return tuple(i for i, written in enumerate(self.is_written) if written)

    @cached_property
    def pick_written(self) -> Callable[[list[Any]], tuple[Any, ...]]:
        """Returns the arrays that the call writes, of the call's arrays."""
        if len(self.written) > 1:
            return operator.itemgetter(*self.written)
        written = self.written
        return lambda arrays: tuple(arrays[i] for i in written)


class GateAndBeta:
    """What the options of the gate and of beta mean together. A subclass of CallOptions with this base has
    the fields use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval and has_lower_bound."""

    has: Callable[[str], bool]
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    has_lower_bound: bool  # None asks for the softplus gate, which is not bounded

    def check_together(self) -> None:
        """What C cannot see: it has other names for these options, and takes a lower_bound of None as 0."""
        if self.allow_neg_eigval and not self.use_beta_sigmoid_in_kernel:
            raise ValueError(
                "allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False; a beta that is activated "
                "already stays as it is, so allow_neg_eigval must be False"
            )
        if self.use_gate_in_kernel and not self.has_lower_bound and not self.has("A_log"):
            raise ValueError(
                "A_log is None and lower_bound is None; A_log must be given, as the softplus gate needs it"
            )
        if not self.use_gate_in_kernel:
            for name in ("A_log", "dt_bias"):
                if self.has(name):
                    raise ValueError(
                        f"{name} is given and use_gate_in_kernel is False; g is then the log decay "
                        f"itself, so {name} must be None"
                    )

    def apply_to(self, params: Any) -> None:
        super().apply_to(params)  # type: ignore[misc]
        if not self.use_gate_in_kernel:
            params.gate = _lib.GATE_ACTIVATED
        else:
            params.gate = _lib.GATE_BOUNDED if self.has_lower_bound else _lib.GATE_SOFTPLUS
        if not self.use_beta_sigmoid_in_kernel:
            params.beta_kind = _lib.BETA_ACTIVATED
        else:
            params.beta_kind = _lib.BETA_TWICE_SIGMOID if self.allow_neg_eigval else _lib.BETA_SIGMOID


@cache
def option_fields(cls: Any) -> tuple[Any, ...]:
    """The fields of an Options class that are options of the function."""
    return tuple(f for f in fields(cls) if "takes" in f.metadata)


class KnownOptions:
    """The Options objects of one class whose values were checked."""

    def __init__(self, cls: Any):
        self.cls = cls
        self._names = tuple(f.name for f in fields(cls))
        self._defaults = tuple(f.default for f in fields(cls))
        # Typed: 2 and 2.0 are different values, and so are True and 1, so that a wrong type never finds a
        # right value's options. An error is not kept, so wrong values are checked, and refused, at every
        # call.
        self.cached: Callable[..., Any] = lru_cache(maxsize=1024, typed=True)(self._make)
        self.defaults_for: dict[int, Any] = _DefaultsFor(self)

    def _make(self, *values: Any) -> Any:
        if len(values) < len(self._defaults):
            return self.cached(*values, *self._defaults[len(values) :])
        options = self.cls(*values)
        checked = options.checked()
        return checked if checked is options else self._cached_again(checked)

    def _cached_again(self, checked: Any) -> Any:
        return self.cached(*(getattr(checked, name) for name in self._names))

    def known(self, *values: Any) -> Any:
        """The one object for these values of its first fields, which were checked. The other fields have
        their defaults.

        Raises:
            TypeError, ValueError: an option has a wrong value; the sentence names the option.
        """
        try:
            return self.cached(*values)
        except TypeError:
            pass
        # A value has a type without a hash for the cache, or a wrong one. The check says what is wrong.
        return self._cached_again(self.cls(*values).checked())


class _DefaultsFor(dict):
    """The options of calls that ask for nothing but the defaults, by `given`. Looking here takes a quarter of
    the time of KnownOptions.known."""

    def __init__(self, known: KnownOptions):
        super().__init__()
        self._known = known

    def __missing__(self, given: int) -> Any:
        self[given] = self._known.known(given)
        return self[given]


def operator_defaults(cls: Any) -> tuple[Any, ...]:
    """The defaults of the operator's arguments in operator_rest."""
    defaults = {f.name: f.default for f in option_fields(cls)}
    return tuple(defaults.get(name) for name in cls.operator_rest)


def operator_schema(cls: Any) -> str:
    """The arguments of the function's operator, as PyTorch writes them in a schema."""
    options = {f.name: f for f in option_fields(cls)}
    marks = iter("abcdefghijklmnopqrstuvwxyz")  # one for each array that is written

    def text(name: str, default: str) -> str:
        if name in options:
            shown = options[name].metadata["operator_name"] or name
            value = options[name].default
            value = f'"{value}"' if isinstance(value, str) else value
            return f"{options[name].metadata['takes'].schema} {shown}={value}"
        if name in ("scale", "lower_bound"):
            return f"float{'?' * (name == 'lower_bound')} {name}"
        mark = f"({next(marks)}!)" if name in cls.written_arrays else ""
        return f"Tensor{mark}{'?' * (name in cls.optional_arrays)} {name}{default}"

    return ", ".join(
        [
            *(text(name, "") for name in cls.operator_head),
            *(text(name, "=None") for name in cls.operator_rest),
        ]
    )
