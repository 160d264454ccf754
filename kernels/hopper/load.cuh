/* The loading role, a warp: brings q, k and g of chunk after chunk into the ring of inputs. */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include "shared.cuh"

namespace fkda
{

/* A lane copies 16 bytes of every second token. */
template <int rows> __device__ __forceinline__ void load_inputs(const fkda_fwd_args &args, Shared &shared, int lane)
{
    const int first = lane / 16, channel = lane % 16 * 8;
    const long long step = static_cast<long long>(args.heads) * DIM;
    Slot<INPUTS> slot(0);
    for (Position<rows> at(args, 0); !at.done(args); at.advance(args, 1), slot.advance(1)) {
        Input &input = shared.input[slot.index];
        long long from = (at.token + first) * step + at.head * DIM + channel;
        mbarrier_wait(&shared.inputs.empty[slot.index], slot.parity ^ 1);
#pragma unroll
        for (int i = 0; i < CHUNK; i += 2, from += 2 * step) {
            const bool valid = i + first < at.left;
            const long long x = valid ? from : 0;
            copy_async_16(&input.g[i + first][channel], static_cast<const uint16_t *>(args.g) + x, valid);
            copy_async_16(&input.k[i + first][channel], static_cast<const uint16_t *>(args.k) + x, valid);
            copy_async_16(&input.q[i + first][channel], static_cast<const uint16_t *>(args.q) + x, valid);
        }
        mbarrier_arrive_after_copies(&shared.inputs.full[slot.index]);
    }
    copy_async_wait_all();
}

} // namespace fkda

#endif
