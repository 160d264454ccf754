/* Which tokens of a sequence's records are applied. What the tensors say is clamped, as in sequence.cuh. */
#ifndef FKDA_DECODE_ACCEPTED_CUH
#define FKDA_DECODE_ACCEPTED_CUH

#include "sequence.cuh"

namespace fkda
{

/* How many tokens are accepted, before wrong tokens end the list. */
__device__ __forceinline__ int count_accepted(const fkda_past_args &past, int n)
{
    long long most = min(past.columns, MAX_TOKENS);
    if (past.accepted.data && past.accepted.columns < most) most = past.accepted.columns;
    return static_cast<int>(clamp(read_index(past.num_accepted_tokens, n), 0, most));
}

/* How many of `count` accepted tokens there are up to the first wrong one. Lane i gets the record of token
 * number i. */
__device__ __forceinline__ int find_accepted(int &record, const fkda_past_args &past, int n, int count)
{
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool is_one = lane < count;
    long long token = lane;
    if (is_one && past.accepted.data)
        token = read_index(past.accepted, static_cast<long long>(n) * past.accepted.columns + lane);
    const bool is_right = is_one && token >= 0 && token < past.columns;
    record = is_right ? static_cast<int>(token) : 0;
    return __ffs(static_cast<int>(~__ballot_sync(~0u, is_right))) - 1;
}

} // namespace fkda

#endif
