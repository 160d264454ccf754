/* The third launch: sums in a fixed order over the value heads that share a head of q and k, and over the
 * segments of all sequences. */
#ifndef FKDA_BACKWARD_REDUCE_CUH
#define FKDA_BACKWARD_REDUCE_CUH

#include "pieces.cuh"

namespace fkda
{

/* Threads that add up every 16th slot. A slot has a row of sums, for ddt_bias and then for dA_log, and each
 * thread four of them. */
constexpr int SLOT_THREADS = 2 * DIM / 4, SLOT_GROUPS = FKDA_BWD_REDUCE_THREADS / SLOT_THREADS;
static_assert(SLOT_GROUPS * 2 * DIM * sizeof(double) == FKDA_BWD_REDUCE_SHARED_BYTES);

/* dA_log and ddt_bias of a head, in fp64: a sum may be a millionth of its terms. */
__device__ inline void add_sums(const fkda_bwd_args &args, int head)
{
    auto &of_group = *reinterpret_cast<double(*)[SLOT_GROUPS][2 * DIM]>(cta_memory());
    const int thread = static_cast<int>(threadIdx.x), group = thread / SLOT_THREADS,
              first = thread % SLOT_THREADS * 4;
    double sum[4] = {};
#pragma unroll 8 /* loads that do not wait for each other */
    for (long long slot = group; slot < args.slots; slot += SLOT_GROUPS) {
        const float4 x =
            *reinterpret_cast<const float4 *>(args.sums + (slot * args.fwd.heads + head) * (2 * DIM) + first);
        sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) of_group[group][first + i] = sum[i];
    __syncthreads();
    double *const all = of_group[0];
    if (thread < 2 * DIM)
        for (int i = 1; i < SLOT_GROUPS; i++) all[thread] += of_group[i][thread];
    if (thread < DIM && args.ddt_bias) args.ddt_bias[head * DIM + thread] = static_cast<float>(all[thread]);
    __syncthreads();
    if (thread >= 32 || !args.dA_log) return;
    double *const rates = all + DIM;
    const double rate = (rates[thread] + rates[thread + 32]) + (rates[thread + 64] + rates[thread + 96]);
    __syncwarp();
    rates[thread] = rate;
    __syncwarp();
    if (thread) return;
    double of_all = 0.0;
    for (int i = 0; i < 32; i++) of_all += rates[i];
    args.dA_log[head] = static_cast<float>(of_all);
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

/* The first HV CTAs take sums over segments, if these are wanted, and each warp of the others has a row. */
__device__ inline void reduce(const fkda_bwd_args &args)
{
    const fkda_fwd_args &f = args.fwd;
    long long index = blockIdx.x;
    if (args.sums) {
        if (index < f.heads) return add_sums(args, static_cast<int>(index));
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
