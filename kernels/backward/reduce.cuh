/* The third launch: sums in a fixed order over the value heads that share a head of q and k, and over the
 * segments of all sequences. */
#ifndef FKDA_BACKWARD_REDUCE_CUH
#define FKDA_BACKWARD_REDUCE_CUH

#include "pieces.cuh"

namespace fkda
{

/* dA_log and ddt_bias of a head, in fp64: a sum may be a millionth of its terms. */
__device__ inline void add_sums(const fkda_bwd_args &args, int head, int channel)
{
    double *const rates = reinterpret_cast<double *>(cta_memory());
    double bias = 0.0, rate = 0.0;
#pragma unroll 8 /* loads that do not wait for each other */
    for (long long slot = 0; slot < args.slots; slot++) {
        const float *from = args.sums + (slot * args.fwd.heads + head) * (2 * DIM) + channel;
        bias += from[0];
        rate += from[DIM];
    }
    if (args.ddt_bias) args.ddt_bias[head * DIM + channel] = static_cast<float>(bias);
    rates[channel] = rate;
    __syncthreads();
    if (channel || !args.dA_log) return;
    double sum = 0.0;
    for (int c = 0; c < DIM; c++) sum += rates[c];
    args.dA_log[head] = static_cast<float>(sum);
}

/* dq or dk of four channels of a head of q and k. */
__device__ inline void add_parts(const fkda_fwd_args &f, const float *parts, void *to,
                                 const fkda_token_strides &strides, long long row, int head, int channel)
{
    float4 sum = make_float4(0, 0, 0, 0);
    for (int i = 0; i < f.group; i++) {
        const float4 x =
            *reinterpret_cast<const float4 *>(parts + (row * f.heads + head * f.group + i) * DIM + channel);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    const long long at =
        row / f.tokens * strides.batch + row % f.tokens * strides.token + head * strides.head + channel;
    *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(to) + at) =
        make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}

/* The first HV CTAs take sums over segments, if these are wanted, and the others four rows each. */
__device__ inline void reduce(const fkda_bwd_args &args)
{
    const fkda_fwd_args &f = args.fwd;
    long long index = blockIdx.x;
    if (args.sums) {
        if (index < f.heads) return add_sums(args, static_cast<int>(index), threadIdx.x);
        index -= f.heads;
    }
    const int qk_heads = f.heads / f.group;
    index = index * (FKDA_BWD_REDUCE_THREADS / 32) + threadIdx.x / 32;
    const long long row = index / qk_heads, rows = f.cu_seqlens ? f.tokens : f.tokens * f.sequences;
    const int head = static_cast<int>(index % qk_heads), channel = threadIdx.x % 32 * 4;
    if (row >= rows) return;
    if (args.dq_parts && args.dq) add_parts(f, args.dq_parts, args.dq, args.dq_strides, row, head, channel);
    if (args.dk_parts && args.dk) add_parts(f, args.dk_parts, args.dk, args.dk_strides, row, head, channel);
}

} // namespace fkda

#endif
