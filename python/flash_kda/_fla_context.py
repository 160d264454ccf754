"""Calls of flash-linear-attention's chunk_kda with `cp_context`, by `flash_kda.distributed.chunk_kda`.

A `cp_context` of FLA describes one rank's share of a packed batch: where sequences begin within the share,
and on how many ranks before this one the first of them has tokens. `flash_kda.distributed.chunk_kda` wants to
know where all sequences begin. So the ranks tell each other once for each context, and the context keeps what
was found.
"""

from __future__ import annotations

import sys
from typing import Any

_FOUND = "_borders_of_flash_kda"  # the attribute of a context


def why_not(call: dict[str, Any]) -> str:
    """Why `chunk_kda` below cannot serve a call with cp_context, or "". All ranks of a group find the same
    reason, since a rank that declined a call by itself would leave the others waiting."""
    context = call["cp_context"]
    if getattr(context, "group", None) is None or context.cu_seqlens is None:
        return "flash_kda takes a cp_context with a group and cu_seqlens, and one of them is missing"
    layout = getattr(context, "layout", "contiguous")
    if layout != "contiguous":
        return f"flash_kda takes a cp_context whose layout is contiguous, and it is {layout}"
    for name in ("use_graph", "return_intermediate_states", "output_final_state"):
        if call.get(name):
            return f"flash_kda takes no {name} with cp_context"
    return "flash_kda takes no initial_state with cp_context" if call.get("initial_state") is not None else ""


def borders_of(context: Any) -> Any:
    """cu_seqlens of the whole batch, int64 [N + 1] in CPU memory. A call of all ranks of the context's group,
    the first time that a context is given."""
    found = getattr(context, _FOUND, None)
    if found is None:
        import torch
        import torch.distributed as dist

        local = context.cu_seqlens if context.cu_seqlens_cpu is None else context.cu_seqlens_cpu
        shares: list[Any] = [None] * dist.get_world_size(context.group)
        dist.all_gather_object(shares, (local.tolist(), context.pre_num_ranks or 0), group=context.group)
        found = torch.tensor(joined(shares), dtype=torch.int64)
        setattr(context, _FOUND, found)
    return found


def joined(shares: list[tuple[list[int], int]]) -> list[int]:
    """shares: by rank, where sequences begin and end within its share, and on how many ranks before it the
    first of them has tokens. Returns where they begin and end in the whole batch."""
    borders, start = [0], 0
    for local, ranks_before in shares:
        begins = local[1:-1] if ranks_before else local[:-1]
        borders += [start + at for at in begins if start + at > borders[-1]]
        start += local[-1]
    return [*borders, start]


def chunk_kda(call: dict[str, Any]) -> tuple[Any, None]:
    """call: the arguments of FLA's chunk_kda by name, of which those are left out that have no effect."""
    package: Any = sys.modules[__package__]
    call = dict(call)
    context = call.pop("cp_context")
    for name in ("chunk_size", "use_graph", "max_num_seqs", "return_intermediate_states", "cu_seqlens_cpu"):
        call.pop(name, None)
    call["cu_seqlens"] = borders_of(context)
    return package.distributed.chunk_kda(**call, group=context.group)
