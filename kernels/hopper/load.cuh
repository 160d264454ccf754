/* The loading role, a warp: brings q, k and g of chunk after chunk into the ring of inputs, and finds the norms of q and k
 * once they are there. */
#ifndef FKDA_HOPPER_LOAD_CUH
#define FKDA_HOPPER_LOAD_CUH

#include "shared.cuh"

namespace fkda
{

/* Starts the copies of a chunk: 16 bytes of every second token by each lane. */
template <int rows>
__device__ __forceinline__ void load_input(const fkda_fwd_args &args, Input &input, const Position<rows> &at, int lane)
{
    const int first = lane / 16, channel = lane % 16 * 8;
    const long long step = static_cast<long long>(args.heads) * DIM;
    long long from = (at.token + first) * step + at.head * DIM + channel;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2, from += 2 * step) {
        const bool valid = i + first < at.left;
        const long long x = valid ? from : 0;
        copy_async_16(&input.g[i + first][channel], static_cast<const uint16_t *>(args.g) + x, valid);
        copy_async_16(&input.k[i + first][channel], static_cast<const uint16_t *>(args.k) + x, valid);
        copy_async_16(&input.q[i + first][channel], static_cast<const uint16_t *>(args.q) + x, valid);
    }
}

/* Sums of squares are the diagonal of x x^T: lane (g, t = g / 2) of the accumulators has tokens g and g + 8. */
__device__ __forceinline__ void store_inverse_norms(float (&to)[CHUNK], const uint16_t (&x)[CHUNK][Input::PITCH],
                                                    int lane)
{
    const int g = lane / 4, t = lane % 4;
    float top[4] = {}, low[4] = {};
#pragma unroll
    for (int c = 0; c < DIM; c += 16) {
        uint32_t a[4];
        load_matrices(a, &x[lane % 16][c + lane / 16 * 8]);
        mma_bf16(top, a[0], a[1], a[2], a[3], a[0], a[2]);
        mma_bf16(low, a[0], a[1], a[2], a[3], a[1], a[3]);
    }
    if (t == g / 2) {
        to[g] = rsqrt_approx((g % 2 ? top[1] : top[0]) + 1e-6f);
        to[g + 8] = rsqrt_approx((g % 2 ? low[3] : low[2]) + 1e-6f);
    }
}

__device__ __forceinline__ void measure_input(Shared &shared, const Slot<INPUTS> &slot, int lane)
{
    mbarrier_wait(&shared.inputs.full[slot.index], slot.parity);
    const Input &input = shared.input[slot.index];
    store_inverse_norms(shared.inverse_norm[slot.index][0], input.q, lane);
    store_inverse_norms(shared.inverse_norm[slot.index][1], input.k, lane);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.measured[slot.index]);
}

template <int rows> __device__ __forceinline__ void load(const fkda_fwd_args &args, Shared &shared, int lane)
{
    constexpr int AHEAD = INPUTS - TEAMS; /* a chunk is measured when those so far after it have been asked for */
    Slot<INPUTS> loaded(0), measured(0);
    int started = 0;
    for (Position<rows> at(args, 0); !at.done(args); at.advance(args, 1), loaded.advance(1)) {
        mbarrier_wait(&shared.inputs.empty[loaded.index], loaded.parity ^ 1);
        load_input(args, shared.input[loaded.index], at, lane);
        mbarrier_arrive_after_copies(&shared.inputs.full[loaded.index]);
        if (started < AHEAD) {
            started++;
        } else {
            measure_input(shared, measured, lane);
            measured.advance(1);
        }
    }
    for (; started > 0; started--, measured.advance(1)) measure_input(shared, measured, lane);
}

} // namespace fkda

#endif
