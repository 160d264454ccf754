/* Cuts sequences into segments and writes the lists of both passes, in one block. */
#ifndef FKDA_HOPPER_PLAN_CUH
#define FKDA_HOPPER_PLAN_CUH

#include "cut.cuh"
#include "fwd_shape.h"

namespace fkda
{

constexpr int PLAN_BUCKETS = 64; /* of lengths, by which a list is sorted: two to a lane of a warp */

struct Plan {
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    int *buckets; /* in shared memory: the numbers of segments, then where the next one goes */
    Cut rules;

    __device__ Plan(const fkda_fwd_args &a, const fkda_cut &c, int *b)
        : args(a), cut(c), buckets(b), rules{a, c}
    {
    }

    /* Which cut sequence has entry `at` of a list, where the sequences before c have before(c) entries. */
    template <class Before> __device__ int find_cut(int at, int count, Before before) const
    {
        int low = 0, high = count; /* before(low) <= at < before(high) */
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (before(middle) <= at ? low : high) = middle;
        }
        return low;
    }

    /* Of the first pass a cut sequence has an entry for each segment but the last, of the second pass for each but the first. */
    static __device__ int entries_before(const fkda_cut_sequence &c, int index)
    {
        return c.first_slot - index;
    }

    /* visit(segment) for each entry of a pass, all threads of the block together. */
    template <int pass, class Visit> __device__ void for_each(int cut_sequences, int slots, Visit visit) const
    {
        const fkda_cut_sequence *cuts = cut.cut_sequences;
        for (int e = threadIdx.x; e < slots - cut_sequences; e += blockDim.x) {
            const int c = find_cut(e, cut_sequences, [=](int i) { return entries_before(cuts[i], i); });
            visit(rules.segment(cuts[c], e - entries_before(cuts[c], c) + pass));
        }
        if constexpr (pass == 1) {
            for (int n = threadIdx.x; n < rules.sequences(); n += blockDim.x) {
                const int c = find_cut(n, cut_sequences, [=](int i) { return cuts[i].sequence; });
                if (cut_sequences && cuts[c].sequence == n) continue;
                visit(rules.whole(n));
            }
        }
    }

    /* The longest first; no piece is as long as two times the shortest, and one more chunk. */
    __device__ int bucket(const fkda_segment &s) const
    {
        const long long place =
            static_cast<long long>(s.length) * (PLAN_BUCKETS - 1) / (2 * cut.shortest + CHUNK);
        return PLAN_BUCKETS - 1 - static_cast<int>(min(place, PLAN_BUCKETS - 1LL));
    }

    template <int pass> __device__ void write_list(int cut_sequences, int slots) const
    {
        __syncthreads();
        for (int i = threadIdx.x; i < PLAN_BUCKETS; i += blockDim.x) buckets[i] = 0;
        __syncthreads();
        for_each<pass>(cut_sequences, slots,
                       [&](const fkda_segment &s) { atomicAdd(&buckets[bucket(s)], 1); });
        __syncthreads();
        if (threadIdx.x < 32) { /* to the sums of those before, two to a lane */
            const int lane = threadIdx.x, first = buckets[2 * lane], both = first + buckets[2 * lane + 1];
            int before = both;
            for (int by = 1; by < 32; by *= 2) {
                const int other = __shfl_up_sync(~0u, before, by);
                if (lane >= by) before += other;
            }
            buckets[2 * lane] = before - both;
            buckets[2 * lane + 1] = before - both + first;
            if (lane == 31) cut.counts->segments[pass] = before;
            if (lane == 0) cut.counts->drawn = 0;
        }
        __syncthreads();
        for_each<pass>(cut_sequences, slots, [&](const fkda_segment &s) {
            cut.lists[pass][atomicAdd(&buckets[bucket(s)], 1)] = s;
        });
    }

    /* Each thread's x becomes the sum of those of the threads before it; returns the sum of all. `scratch` has one for each warp. */
    template <class Number> static __device__ Number sum_before(Number &x, Number *scratch)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const Number own = x;
        for (int by = 1; by < 32; by *= 2) {
            const Number other = __shfl_up_sync(~0u, x, by);
            if (lane >= by) x += other;
        }
        __syncthreads();
        if (lane == 31) scratch[warp] = x;
        __syncthreads();
        Number before = 0, all = 0;
        for (int w = 0; w < FKDA_PLAN_THREADS / 32; w++) {
            if (w < warp) before += scratch[w];
            all += scratch[w];
        }
        x += before - own;
        return all;
    }

    /* How many segments sequence n is cut into, or 0. */
    __device__ int cut_into(int n, int sequences) const
    {
        const int wanted = n < sequences ? rules.segments_of(rules.sequence(n).length) : 1;
        return wanted > 1 ? wanted : 0;
    }

    __device__ void run(long long *scratch) const
    {
        const int sequences = rules.sequences(), thread = static_cast<int>(threadIdx.x);
        long long all = 0;
        for (int n = thread; n < sequences; n += FKDA_PLAN_THREADS) all += cut_into(n, sequences);
        /* Sequences that overlap, by a cu_seqlens that is wrong, could want more than there is. Then none is cut. */
        const bool fits = sum_before(all, scratch) <= cut.slots;
        int cuts = 0, slots = 0, groups = 0; /* of the sequences so far */
        for (int first = 0; fits && first < sequences; first += FKDA_PLAN_THREADS) {
            const int segments = cut_into(first + thread, sequences);
            int *sums = reinterpret_cast<int *>(scratch), index = segments > 0, slot = segments,
                group = Cut::groups_of(segments);
            const int new_cuts = sum_before(index, sums), new_slots = sum_before(slot, sums),
                      new_groups = sum_before(group, sums);
            if (segments)
                cut.cut_sequences[cuts + index] = {first + thread, segments, slots + slot, groups + group};
            cuts += new_cuts, slots += new_slots, groups += new_groups;
        }
        if (threadIdx.x == 0) cut.counts->cut_sequences = cuts;
        write_list<0>(cuts, slots);
        write_list<1>(cuts, slots);
    }
};

} // namespace fkda

#endif
