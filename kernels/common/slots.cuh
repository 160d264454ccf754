/* Where the states of a sequence are, for all kernels. */
#ifndef FKDA_SLOTS_CUH
#define FKDA_SLOTS_CUH

#include "fwd_args.h"

namespace fkda
{

constexpr long long NO_SLOT = -1;

__device__ __forceinline__ long long read_index(const void *tensor, int is_i32, long long i)
{
    return is_i32 ? static_cast<const int *>(tensor)[i] : static_cast<const long long *>(tensor)[i];
}

/* The slot of a sequence in a tensor of that many slots, or NO_SLOT. */
__device__ inline long long find_slot(const fkda_fwd_args &args, long long slots, int sequence)
{
    long long slot = sequence;
    if (args.state_indices) {
        slot = read_index(args.state_indices, args.state_indices_are_i32, sequence);
        if (slot < args.first_slot) return NO_SLOT;
    }
    return slot >= 0 && slot < slots ? slot : NO_SLOT;
}

/* Where the initial state of a head of a sequence begins, in elements of the tensor, or NO_SLOT: the head
 * starts from zeros. */
__device__ inline long long find_initial_state(const fkda_fwd_args &args, int sequence, int head)
{
    const fkda_state_args &states = args.initial_state;
    if (!states.data || (args.has_initial_state && !args.has_initial_state[sequence])) return NO_SLOT;
    const long long slot = find_slot(args, states.slots, sequence);
    return slot == NO_SLOT ? NO_SLOT : slot * states.slot_stride + head * (128LL * 128);
}

/* Where the final state of a head of a sequence goes, or NO_SLOT: it is not written. */
__device__ inline long long find_final_state(const fkda_fwd_args &args, int sequence, int head)
{
    const fkda_state_args &states = args.final_state;
    if (!states.data) return NO_SLOT;
    const long long slot = find_slot(args, states.slots, sequence);
    return slot == NO_SLOT ? NO_SLOT : slot * states.slot_stride + head * (128LL * 128);
}

} // namespace fkda

#endif
