/*
 * Counts the values of several tensors that are NaN or infinite, and finds the first place of one in each
 * tensor, for compute capability 8.0 and newer.
 *
 * Algorithm. The host gives each tensor a number of CTAs in proportion to its bytes. The threads of these
 * CTAs stride over the tensor in vectors of 16 bytes, so that each element is loaded once. A thread keeps its
 * count and its smallest place in registers, warps reduce both with shuffles, and the CTA adds them to the
 * tensor's record with one atomicAdd and one atomicMin. Sums and minima of integers do not depend on the
 * order of the CTAs.
 *
 * A tensor that is not contiguous consists of runs of neighbours. A warp takes a part of a run at a time.
 * Where vectors of 16 bytes do not fit the runs, which happens in beta alone, each thread takes elements one
 * by one.
 *
 * Optimizations.
 * - A CTA without a hit does no atomic. The first CTA of a tensor is the exception: the host has set all bits
 *   of the records in one memset, so that a record starts as count -1 and, for the unsigned atomicMin, the
 *   largest place. The first CTA adds the 1 that is missing. A place that nothing has lowered reads as -1 in
 *   the caller's signed type, which is what "none" must be.
 * - A thread loads several vectors before it looks at the first one, so that enough loads are in flight.
 * - A vector is first asked whether it has any such value. Only then its values are counted.
 */
#include "../common/ptx.cuh"
#include "count_args.h"

namespace fkda
{

struct Found {
    unsigned long long count = 0, first = ~0ull; /* ~0: no place */

    __device__ __forceinline__ void add(unsigned long long many, unsigned long long place)
    {
        count += many;
        first = min(first, place);
    }
};

/* All bits of the exponent are set in NaN and in infinities alone. `element` is 0 or 1 for the two bf16 of a
 * word, and 0 for an fp32. */
template <class Element> __device__ __forceinline__ bool is_nonfinite(uint32_t word, int element)
{
    const uint32_t exponent = sizeof(Element) == 2 && element == 0 ? 0x7f80u : 0x7f800000u;
    return (word & exponent) == exponent;
}

/* Adds what is not finite in a vector, whose first element has the index `place`. */
template <class Element>
__device__ __forceinline__ void look_at_vector(const uint4 &vector, unsigned long long place, Found &found)
{
    constexpr int IN_WORD = 4 / sizeof(Element), IN_VECTOR = 4 * IN_WORD;
    const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
    bool any = false;
#pragma unroll
    for (int i = 0; i < IN_VECTOR; i++) any |= is_nonfinite<Element>(words[i / IN_WORD], i % IN_WORD);
    if (!any) return;
    int many = 0, first = 0;
#pragma unroll
    for (int i = IN_VECTOR - 1; i >= 0; i--)
        if (is_nonfinite<Element>(words[i / IN_WORD], i % IN_WORD)) many++, first = i;
    found.add(many, place + first);
}

/* The elements before the first vector and behind the last one, each by a thread of its own. */
template <class Element>
__device__ __forceinline__ void look_at_element(const Element *data, long long place, Found &found)
{
    if (is_nonfinite<Element>(data[place], 0)) found.add(1, place);
}

template <class Element>
__device__ void look_at_tensor(const fkda_count_tensor &tensor, int cta, Found &found)
{
    constexpr int IN_VECTOR = 16 / sizeof(Element);
    const Element *data = static_cast<const Element *>(tensor.data);
    const int thread = threadIdx.x;
    const long long to_alignment = (0 - reinterpret_cast<uintptr_t>(data)) % 16 / sizeof(Element);
    const long long lead = min(to_alignment, tensor.elements), vectors = (tensor.elements - lead) / IN_VECTOR,
                    behind = lead + vectors * IN_VECTOR;
    const uint4 *from = reinterpret_cast<const uint4 *>(data + lead);

    const long long step = static_cast<long long>(tensor.ctas) * FKDA_COUNT_THREADS;
    long long at = static_cast<long long>(cta) * FKDA_COUNT_THREADS + thread;
    for (; at < vectors; at += FKDA_COUNT_VECTORS * step) {
        uint4 loaded[FKDA_COUNT_VECTORS];
#pragma unroll
        for (int i = 0; i < FKDA_COUNT_VECTORS; i++)
            loaded[i] = at + i * step < vectors ? __ldg(from + at + i * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < FKDA_COUNT_VECTORS; i++)
            look_at_vector<Element>(loaded[i], lead + (at + i * step) * IN_VECTOR, found);
    }
    if (cta == 0 && thread < lead) look_at_element(data, thread, found);
    if (cta == 0 && thread < tensor.elements - behind) look_at_element(data, behind + thread, found);
}

/* Where a run begins, in elements behind the data, and the index of its first element. */
struct Run {
    long long offset, index; /* index below 0: no such memory belongs to the call */
};

__device__ inline long long find_slot(const fkda_count_pool &pool, long long sequence)
{
    if (pool.has_initial_state && !pool.has_initial_state[sequence]) return -1;
    if (!pool.state_indices) return sequence;
    const long long slot = pool.indices_are_i32
                               ? static_cast<const int *>(pool.state_indices)[sequence]
                               : static_cast<const long long *>(pool.state_indices)[sequence];
    return slot < pool.first_slot || slot >= pool.slots ? -1 : slot;
}

__device__ inline Run find_run(const fkda_count_tensor &tensor, long long r)
{
    if (tensor.pool.slots) {
        const long long slot = find_slot(tensor.pool, r);
        return {slot * tensor.strides[2], slot * tensor.run};
    }
    const long long k = r % tensor.sizes[1], rest = r / tensor.sizes[1], j = rest % tensor.sizes[0],
                    i = rest / tensor.sizes[0];
    return {i * tensor.strides[0] + j * tensor.strides[1] + k * tensor.strides[2], r * tensor.run};
}

template <class Element> __device__ void look_at_runs(const fkda_count_tensor &tensor, int cta, Found &found)
{
    constexpr int IN_VECTOR = 16 / sizeof(Element), PART = 32 * FKDA_COUNT_VECTORS; /* vectors */
    const Element *data = static_cast<const Element *>(tensor.data);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long vectors = tensor.run / IN_VECTOR, parts = (vectors + PART - 1) / PART,
                    all = tensor.elements / tensor.run * parts,
                    step = static_cast<long long>(tensor.ctas) * (FKDA_COUNT_THREADS / 32);
    for (long long at = static_cast<long long>(cta) * (FKDA_COUNT_THREADS / 32) + warp; at < all;
         at += step) {
        const Run run = find_run(tensor, at / parts);
        const long long first = at % parts * PART + lane;
        if (run.index < 0) continue;
        const uint4 *from = reinterpret_cast<const uint4 *>(data + run.offset);
        uint4 loaded[FKDA_COUNT_VECTORS];
#pragma unroll
        for (int i = 0; i < FKDA_COUNT_VECTORS; i++)
            loaded[i] = first + 32 * i < vectors ? __ldg(from + first + 32 * i) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < FKDA_COUNT_VECTORS; i++)
            look_at_vector<Element>(loaded[i], run.index + (first + 32 * i) * IN_VECTOR, found);
    }
}

template <class Element>
__device__ void look_at_elements(const fkda_count_tensor &tensor, int cta, Found &found)
{
    const Element *data = static_cast<const Element *>(tensor.data);
    const long long step = static_cast<long long>(tensor.ctas) * FKDA_COUNT_THREADS;
    long long at = static_cast<long long>(cta) * FKDA_COUNT_THREADS + threadIdx.x;
    for (; at < tensor.elements; at += step) {
        const Run run = find_run(tensor, at / tensor.run);
        const long long inside = at % tensor.run;
        if (run.index >= 0 && is_nonfinite<Element>(data[run.offset + inside], 0))
            found.add(1, run.index + inside);
    }
}

template <class Element> __device__ void look_at(const fkda_count_tensor &tensor, int cta, Found &found)
{
    if (tensor.run == tensor.elements && !tensor.pool.slots)
        look_at_tensor<Element>(tensor, cta, found);
    else if (tensor.by_vectors)
        look_at_runs<Element>(tensor, cta, found);
    else
        look_at_elements<Element>(tensor, cta, found);
}

/* The sum and the minimum over the CTA, for thread 0. */
__device__ __forceinline__ void reduce(Found &found)
{
    constexpr int WARPS = FKDA_COUNT_THREADS / 32;
    static_assert(WARPS * sizeof(Found) == FKDA_COUNT_SHARED_BYTES, "what the host asks for");
    Found *of_warps = reinterpret_cast<Found *>(cta_memory());
    const int thread = threadIdx.x;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        const unsigned long long count = __shfl_xor_sync(~0u, found.count, by),
                                 first = __shfl_xor_sync(~0u, found.first, by);
        found.add(count, first);
    }
    if (thread % 32 == 0) of_warps[thread / 32] = found;
    __syncthreads();
    if (thread != 0) return;
    for (int i = 1; i < WARPS; i++) found.add(of_warps[i].count, of_warps[i].first);
}

} // namespace fkda

extern "C" __global__ void __launch_bounds__(FKDA_COUNT_THREADS, FKDA_COUNT_CTAS_PER_SM)
    fkda_count_nonfinite(const __grid_constant__ fkda_count_args args)
{
    using namespace fkda;
    int index = 0;
    while (index + 1 < args.count && static_cast<int>(blockIdx.x) >= args.tensors[index + 1].first_cta)
        index++;
    const fkda_count_tensor &tensor = args.tensors[index];
    const int cta = static_cast<int>(blockIdx.x) - tensor.first_cta;
    Found found;
    if (tensor.is_bf16)
        look_at<uint16_t>(tensor, cta, found);
    else
        look_at<uint32_t>(tensor, cta, found);
    reduce(found);
    if (threadIdx.x != 0 || (cta != 0 && found.count == 0)) return;
    unsigned long long *record = reinterpret_cast<unsigned long long *>(tensor.record);
    atomicAdd(&record[0], found.count + (cta == 0));
    if (found.count) atomicMin(&record[1], found.first);
}
