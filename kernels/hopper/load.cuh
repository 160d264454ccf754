/* The loading role, a warp: brings q, k and g of chunk after chunk into the ring of inputs. */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include "shared.cuh"

namespace fkda
{

/* Starts the copies of a chunk: 16 bytes of every second token by each lane. */
template <int rows, bool whole>
__device__ __forceinline__ void load_input(const fkda_fwd_args &args, Input &input, const Position<rows> &at, int lane)
{
    const int first = lane / 16, channel = lane % 16 * 8;
    long long from = 2 * (((at.token + first) * args.heads + at.head) * DIM + channel);
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2, from += args.half_chunk_bytes / 4) {
        const bool valid = whole || i + first < at.left;
        const long long x = valid ? from : 0;
        copy_async_16(&input.g[i + first][channel], static_cast<const char *>(args.g) + x, valid);
        copy_async_16(&input.k[i + first][channel], static_cast<const char *>(args.k) + x, valid);
        copy_async_16(&input.q[i + first][channel], static_cast<const char *>(args.q) + x, valid);
    }
}

template <int rows> __device__ __forceinline__ void load(const fkda_fwd_args &args, Shared &shared, int lane)
{
    Slot<INPUTS> slot(0);
    for (Position<rows> at(args, 0); !at.done(args); at.advance(args, 1), slot.advance(1)) {
        mbarrier_wait(&shared.inputs.empty[slot.index], slot.parity ^ 1);
        if (at.left >= CHUNK)
            load_input<rows, true>(args, shared.input[slot.index], at, lane);
        else
            load_input<rows, false>(args, shared.input[slot.index], at, lane);
        mbarrier_arrive_after_copies(&shared.inputs.full[slot.index]);
    }
    copy_async_wait_all();
}

} // namespace fkda

#endif
