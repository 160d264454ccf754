"""vLLM's plug-in: this package behind vLLM's operators for KDA layers.

vLLM 0.33 calls `register` in every process, as the entry point of the group vllm.general_plugins. Three
operators of vLLM then go through this package: `_flashkda_C::fwd` (prefill),
`_flashkda_C::get_workspace_size`, and `_C::fused_kda_decode` (decode). Each operator keeps vLLM's schema and,
behind this package, vLLM's own implementation, which computes the calls that this package leaves to it:

- fwd: calls on GPUs for which this package has only its portable kernel, while vLLM has one (compute
  capability 10 and 12).
- fused_kda_decode: calls for which vLLM has a kernel, which are those with 12, 24, 48 or 96 heads and states
  in fp32 on compute capability 9.0, 10 and 12.
- calls that this package refuses.

vLLM asks functions of its layers whether an operator can serve a layer, and these functions know only vLLM's
own kernels. The plug-in makes them say yes for the other layers and GPUs that this package serves.

The environment variable FLASH_KDA_VLLM: "0" turns the plug-in off, "all" takes all calls that this package
can serve.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
import types
from functools import lru_cache
from typing import Any, Callable

import torch

from . import _engines, _lib

VARIABLE = "FLASH_KDA_VLLM"
# As the wheel of vLLM 0.33.0 declares them.
FWD = (
    "_flashkda_C::fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, "
    "Tensor(c!) workspace, Tensor A_log, Tensor dt_bias, float lower_bound, Tensor? initial_state=None, "
    "Tensor(b!)? final_state=None, Tensor? cu_seqlens=None, Tensor(d!)? checkpoint_state=None, "
    "Tensor? checkpoint_offsets=None) -> ()"
)
WORKSPACE_SIZE = "_flashkda_C::get_workspace_size(int T_total, int H, int N=1) -> int"
DECODE = (
    "_C::fused_kda_decode(Tensor x, Tensor weight, Tensor? bias, Tensor! conv_state, Tensor raw_g, "
    "Tensor raw_beta, Tensor A_log, Tensor dt_bias, Tensor state_indices, Tensor! state, Tensor! out, "
    "float? lower_bound=None, Tensor? output_gate=None, Tensor? norm_weight=None, float norm_eps=1e-5) -> ()"
)
FIRST_SLOT = 1  # vLLM keeps slot 0 free: an index of 0 or less means that a sequence has no state
_DIM, _CONV_WIDTH = 128, 4
_MOST_DECAY = -5.0  # the least lower_bound
# Where vLLM's own kernels run: major compute capabilities and, for decode, numbers of heads.
_THEIR_MAJORS, _THEIR_HEADS = (9, 10, 12), (12, 24, 48, 96)
_ALIGNMENT = 64  # bytes, of a workspace

_log = _engines.Log("vllm.flash_kda")
_takes_all = False  # what FLASH_KDA_VLLM said when the plug-in was loaded


# ---- Which calls are computed here -------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _gpu(index: int) -> tuple[str, tuple[int, int]]:
    """The kernel that this package has for a CUDA device, "" without one, and the compute capability."""
    for info in _lib.device_infos():
        if (info.device.type, info.device.index) == (_lib.CUDA, index):
            return info.kernel.decode(), torch.cuda.get_device_capability(index)
    return "", (0, 0)


def _takes(device: torch.device, is_theirs: Callable[[str, tuple[int, int]], bool]) -> bool:
    """Whether a call on the device is for this package, while vLLM has an implementation. is_theirs: says
    whether the call stays with vLLM, by this package's kernel and the compute capability."""
    if device.type != "cuda":
        return True
    kernel, capability = _gpu(torch.cuda.current_device() if device.index is None else device.index)
    if not kernel:
        return False
    return _takes_all or not is_theirs(kernel, capability)


def _takes_prefill(device: torch.device) -> bool:
    def is_theirs(kernel: str, capability: tuple[int, int]) -> bool:
        return capability[0] in _THEIR_MAJORS and not kernel.startswith("hopper")

    return _takes(device, is_theirs)


def _takes_decode(device: torch.device, heads: int, state: Any) -> bool:
    """state: the dtype of states."""

    def is_theirs(kernel: str, capability: tuple[int, int]) -> bool:
        serves = capability == (9, 0) or capability[0] in _THEIR_MAJORS[1:]
        return serves and heads in _THEIR_HEADS and state == torch.float32

    return _takes(device, is_theirs)


def _serves_layer(head_dim: int, input_dtype: Any, state_dtype: Any) -> bool:
    """Whether this package can compute a layer on the current CUDA device."""
    return (
        torch.cuda.is_available()
        and _gpu(torch.cuda.current_device())[0] != ""
        and head_dim == _DIM
        and input_dtype == torch.bfloat16
        and state_dtype in (torch.float32, torch.bfloat16)
    )


# ---- The operators -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _is_batch_invariant() -> bool:
    """Whether vLLM was asked for the same bits whatever else is in a batch."""
    return getattr(sys.modules.get("vllm.envs"), "VLLM_BATCH_INVARIANT", False) is True


def _longest(cu_seqlens: Any, tokens: int) -> int:
    """Tokens of the longest sequence, up to 7 more, or 0: not known. The operator gets lengths on the device
    alone. But vLLM's metadata of the batch, which is found by its cu_seqlens, has on the host how many blocks
    of 8 tokens the convolution of each sequence takes."""
    if cu_seqlens is None:
        return 0
    if cu_seqlens.shape[0] == 2:
        return tokens
    context = sys.modules.get("vllm.forward_context")
    try:
        for layer in context.get_forward_context().attn_metadata.values():  # type: ignore[union-attr]
            starts = getattr(layer, "non_spec_query_start_loc", None)
            if starts is not None and starts.data_ptr() == cu_seqlens.data_ptr():
                ((block, blocks),) = layer.nums_dict.items()
                if blocks["nums"].device.type == "cpu":
                    return min(tokens, block * int(blocks["nums"].max()))
                break
    except Exception:  # the metadata is not as vLLM 0.33 has it
        pass
    return 0


def _fwd(
    q: Any, k: Any, v: Any, g: Any, beta: Any, scale: float, out: Any, workspace: Any, A_log: Any,
    dt_bias: Any, lower_bound: float, initial_state: Any, final_state: Any, cu_seqlens: Any,
    checkpoint_state: Any, checkpoint_offsets: Any,
) -> None:  # fmt: skip
    """_flashkda_C::fwd."""
    start = -workspace.data_ptr() % _ALIGNMENT
    _engines.package().fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
        batch_invariant=_is_batch_invariant(),
        max_seqlen=_longest(cu_seqlens, q.shape[1]),
        workspace=workspace[start:] if start else workspace,
        checkpoint_states=checkpoint_state,
        checkpoint_offsets=checkpoint_offsets,
    )  # fmt: skip


def _decode(
    x: Any, weight: Any, bias: Any, conv_state: Any, raw_g: Any, raw_beta: Any, A_log: Any, dt_bias: Any,
    state_indices: Any, state: Any, out: Any, lower_bound: float | None, output_gate: Any, norm_weight: Any,
    norm_eps: float,
) -> None:  # fmt: skip
    """_C::fused_kda_decode."""
    _engines.package().decode_layer(
        x, weight, bias, conv_state, raw_g, raw_beta, A_log, dt_bias, state_indices, state, out=out,
        lower_bound=lower_bound, output_gate=output_gate, norm_weight=norm_weight, norm_eps=norm_eps,
        first_slot=FIRST_SLOT,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _our_workspace_size(T_total: int, H: int, N: int, device: str | None) -> int:
    size = _engines.package().get_workspace_size(T_total, H, N, device=device, largest_batch=True)
    return size + _ALIGNMENT - 1


def _workspace_size(T_total: int, H: int, N: int) -> int:
    """_flashkda_C::get_workspace_size. vLLM asks for its largest batch, and smaller ones can need more."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    if index is not None and not _takes_prefill(torch.device("cuda", index)):
        return 0  # vLLM's own kernels compute all calls
    return _our_workspace_size(T_total, H, N, None if index is None else f"cuda:{index}")


class _Operator:
    """One of vLLM's operators, which this package computes, or vLLM where the package leaves it a call."""

    def __init__(self, schema: str):
        self.schema = torch._C.parse_schema(schema)
        self.text = schema
        self.name = self.schema.name
        self.library: Any = None  # registrations last as long as it
        self.defaults = [a.default_value for a in self.schema.arguments if a.has_default_value()]

    def find(self) -> Any:
        """The operator as it is defined in this process, or None."""
        namespace, _, name = self.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        return None if packet is None else getattr(packet, "default", None)

    def adopt(self) -> None:
        """Puts this package in front of vLLM's implementation, or defines the operator if there is none."""
        if self.library is not None:
            return
        found = self.find()
        namespace, _, name = self.name.partition("::")
        if found is not None and _looks(found._schema) != _looks(self.schema):
            _log.once(
                ("schema", self.name),
                f"leaves the operator {self.name} as it is, since its schema is not that of vLLM 0.33: "
                f"{found._schema}",
                logging.WARNING,
            )
            return
        library = torch.library.Library(namespace, "FRAGMENT")
        if found is None:
            library.define(self.text.partition("::")[2])
        self._register(library, name, has_theirs=found is not None)
        self.library = library
        _log.once(
            ("adopted", self.name), f"is in front of vLLM's operator {self.name} ({VARIABLE}=0 turns it off)"
        )

    def _register(self, library: Any, name: str, has_theirs: bool) -> None:
        raise NotImplementedError

    def _theirs(self, key: str) -> Any:
        """vLLM's implementation for a dispatch key, or None."""
        try:
            return torch.library.get_kernel(self.name, key)
        except RuntimeError:
            return None

    def _all_arguments(self, arguments: tuple) -> tuple:
        """PyTorch leaves out the last arguments if they have their defaults."""
        missing = len(self.schema.arguments) - len(arguments)
        return (*arguments, *self.defaults[len(self.defaults) - missing :]) if missing else arguments


def _in_front(library: Any) -> dict[str, bool]:
    """How an implementation is registered. The operator may have another one, which then gets the calls that
    are not for this package. PyTorch before 2.8 need not be told so."""
    may_be_told = "allow_override" in inspect.signature(library.impl).parameters
    return {"with_keyset": True, **({"allow_override": True} if may_be_told else {})}


class _TensorOperator(_Operator):
    """takes: whether a call of these arguments is for this package. compute: computes it."""

    def __init__(self, schema: str, takes: Callable[..., bool], compute: Callable[..., None]):
        super().__init__(schema)
        self.takes, self.compute = takes, compute

    def _register(self, library: Any, name: str, has_theirs: bool) -> None:
        for key in ("CUDA", "CPU"):
            theirs = self._theirs(key) if has_theirs else None
            library.impl(name, self._implementation(theirs), key, **_in_front(library))
        # The operator writes tensors that are there, and returns nothing. vLLM may have said so already.
        with contextlib.suppress(RuntimeError):
            torch.library.register_fake(self.name, lambda *arguments, **named: None)

    def _implementation(self, theirs: Any) -> Callable[..., None]:
        def call(keys: Any, *arguments: Any) -> None:
            arguments = self._all_arguments(arguments)
            device = arguments[0].device
            if theirs is not None and not self.takes(*arguments):
                theirs.call_boxed(keys, *arguments)
                return
            try:
                with torch.no_grad():  # the gate's parameters may ask for gradients
                    self.compute(*arguments)
            except (RuntimeError, TypeError, ValueError) as error:
                if theirs is None:
                    raise
                _log.once(
                    ("refused", self.name, str(error)),
                    f"gives a call of {self.name} back to vLLM: {error}",
                    logging.WARNING,
                )
                theirs.call_boxed(keys, *arguments)
                return
            _log.once(("computes", self.name, device), f"computes {self.name} on {device}")

        return call


class _SizeOperator(_Operator):
    """get_workspace_size: enough for this package and for vLLM's kernels, as either may compute a call."""

    def _register(self, library: Any, name: str, has_theirs: bool) -> None:
        theirs = self._theirs("CPU") if has_theirs else None  # it depends on no device

        def call(keys: Any, *arguments: Any) -> int:
            arguments = self._all_arguments(arguments)
            size = 0 if theirs is None else theirs.call_boxed(keys, *arguments)
            try:
                return max(size, _workspace_size(*arguments))
            except (RuntimeError, TypeError, ValueError) as error:
                if theirs is None:
                    raise
                _log.once(
                    ("refused", self.name, str(error)),
                    f"has no workspace for vLLM's largest batch: {error}",
                    logging.WARNING,
                )
                return size

        library.impl(name, call, "CompositeExplicitAutograd", **_in_front(library))


def _looks(schema: Any) -> list:
    """What callers see of a schema: names, types, defaults, and what is written."""
    return [
        *(
            (a.name, str(a.type), a.default_value, a.alias_info is not None and a.alias_info.is_write)
            for a in schema.arguments
        ),
        *(str(r.type) for r in schema.returns),
    ]


_prefill = _TensorOperator(FWD, lambda q, *rest: _takes_prefill(q.device), _fwd)
_size = _SizeOperator(WORKSPACE_SIZE)
_decode_op = _TensorOperator(
    DECODE,
    lambda x, *rest: _takes_decode(x.device, x.shape[-1] // (3 * _DIM), rest[8].dtype),  # rest[8]: state
    _decode,
)


def _adopt_prefill(module: Any = None) -> None:
    _prefill.adopt()
    _size.adopt()


def _adopt_decode(module: Any = None) -> None:
    _decode_op.adopt()


def _make_prefill_there() -> bool:
    """Whether the operators of prefill are there, in vLLM's module or, in a build of vLLM without the module,
    in an empty one of that name, which the layers import."""
    name = "vllm._flashkda_C"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        sys.modules[name] = types.ModuleType(name)
    except ImportError:  # the module is there, and cannot be loaded
        return False
    _adopt_prefill()
    return _prefill.library is not None and _size.library is not None


# ---- The layers, which ask whether an operator can serve them ----------------------------------------------


KIMI_K3, GLM = "vllm.models.kimi_k3.nvidia.kda", "vllm.models.glm5next.common.kda"
_STATE_DTYPES = ("input_dtype", "conv_state_dtype", "recurrent_state_dtype")
# The functions of vLLM 0.33.0 that are replaced, and their parameters.
KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    KIMI_K3: {
        "is_flashkda_supported": ("head_dim", "input_dtype", "recurrent_state_dtype", "lower_bound"),
        "is_fused_kda_decode_supported": (
            "num_heads", "head_dim", "conv_width", "num_spec", *_STATE_DTYPES,
        ),
    },
    GLM: {"_resolve_kda_prefill_backend": ("backend", "head_dim", "dtype", "lower_bound")},
}  # fmt: skip


def _is_bounded(lower_bound: Any) -> bool:
    return lower_bound is not None and _MOST_DECAY <= lower_bound <= 0


def _adopt_kimi_k3(module: Any) -> None:
    why = _engines.differing(module, KNOWN[KIMI_K3])
    if why:
        _log.once(("layer", KIMI_K3), f"leaves vLLM's layer as it is: {why}", logging.WARNING)
        return
    prefill, decode = module.is_flashkda_supported, module.is_fused_kda_decode_supported

    def is_flashkda_supported(
        head_dim: int, input_dtype: Any, recurrent_state_dtype: Any, lower_bound: float | None
    ) -> bool:
        return prefill(head_dim, input_dtype, recurrent_state_dtype, lower_bound) or (
            _is_bounded(lower_bound)
            and _serves_layer(head_dim, input_dtype, recurrent_state_dtype)
            and _make_prefill_there()
        )

    def is_fused_kda_decode_supported(
        num_heads: int, head_dim: int, conv_width: int, num_spec: int, input_dtype: Any,
        conv_state_dtype: Any, recurrent_state_dtype: Any,
    ) -> bool:  # fmt: skip
        if decode(
            num_heads, head_dim, conv_width, num_spec, input_dtype, conv_state_dtype, recurrent_state_dtype
        ):
            return True
        if (conv_width, num_spec, conv_state_dtype) != (_CONV_WIDTH, 0, torch.bfloat16):
            return False
        if not _serves_layer(head_dim, input_dtype, recurrent_state_dtype):
            return False
        _adopt_decode()
        return _decode_op.library is not None

    module.is_flashkda_supported = is_flashkda_supported
    module.is_fused_kda_decode_supported = is_fused_kda_decode_supported


def _adopt_glm(module: Any) -> None:
    why = _engines.differing(module, KNOWN[GLM])
    if why:
        _log.once(("layer", GLM), f"leaves vLLM's layer as it is: {why}", logging.WARNING)
        return
    resolve = module._resolve_kda_prefill_backend

    def _resolve_kda_prefill_backend(
        backend: str, head_dim: int, dtype: Any, lower_bound: float | None
    ) -> str:
        try:
            chosen = resolve(backend, head_dim, dtype, lower_bound)
        except RuntimeError:  # "flashkda" was asked for, and vLLM's kernels do not serve the layer
            chosen = None
        if chosen is None or (chosen == "triton" and backend == "auto"):
            is_served = _is_bounded(lower_bound) and _serves_layer(head_dim, dtype, torch.float32)
            if is_served and _make_prefill_there():
                return "flashkda"
        return resolve(backend, head_dim, dtype, lower_bound) if chosen is None else chosen

    module._resolve_kda_prefill_backend = _resolve_kda_prefill_backend


_registered = False


def register() -> None:
    """The entry point. Changes nothing until vLLM imports what is to be changed."""
    global _registered, _takes_all
    how = _engines.setting(VARIABLE)
    if _registered or how == "off":
        return
    _registered, _takes_all = True, how == "all"
    for module, adopt in (
        ("vllm._flashkda_C", _adopt_prefill),
        ("vllm._C_stable_libtorch", _adopt_decode),
        (KIMI_K3, _adopt_kimi_k3),
        (GLM, _adopt_glm),
    ):
        _engines.when_there(module, adopt, _log)
