/* Cuts sequences into segments and lists what the passes walk through, in one block. */
#ifndef FKDA_HOPPER_LIST_CUH
#define FKDA_HOPPER_LIST_CUH

#include "../fwd_shape.h"
#include "cut.cuh"

namespace fkda
{

struct SegmentLister {
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    Cut rules;

    __device__ SegmentLister(const fkda_fwd_args &a, const fkda_cut &c) : args(a), cut(c), rules{a, c}
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

    /* The segments of cut sequences but the first, or without the last too, in order; all threads of the block together. */
    __device__ void list_segments(fkda_segment *list, int cut_sequences, int slots, int left_out) const
    {
        const fkda_cut_sequence *cuts = cut.cut_sequences;
        const auto before = [=](int c) { return cuts[c].first_slot - left_out * c; };
        for (int e = threadIdx.x; e < slots - left_out * cut_sequences; e += blockDim.x) {
            const int c = find_cut(e, cut_sequences, before);
            list[e] = rules.segment(cuts[c], e - before(c) + 1);
        }
    }

    __device__ void list_whole_sequences(fkda_segment *list, int cut_sequences) const
    {
        const fkda_cut_sequence *cuts = cut.cut_sequences;
        for (int n = threadIdx.x; n < rules.sequences(); n += blockDim.x) {
            const int c = find_cut(n, cut_sequences, [=](int i) { return cuts[i].sequence; });
            const int first =
                cut_sequences ? cuts[c].sequence : n + 1; /* the last cut one up to n, or the first one */
            if (first != n) list[first > n ? n : n - c - 1] = rules.whole(n);
        }
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
        for (int w = 0; w < FKDA_LIST_THREADS / 32; w++) {
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
        for (int n = thread; n < sequences; n += FKDA_LIST_THREADS) all += cut_into(n, sequences);
        /* Sequences that overlap, by a cu_seqlens that is wrong, could want more than there is. Then none is cut. */
        const bool fits = sum_before(all, scratch) <= cut.slots;
        int cuts = 0, slots = 0, groups = 0; /* of the sequences so far */
        for (int first = 0; fits && first < sequences; first += FKDA_LIST_THREADS) {
            const int segments = cut_into(first + thread, sequences);
            int *sums = reinterpret_cast<int *>(scratch), index = segments > 0, slot = segments,
                group = Cut::groups_of(segments);
            const int new_cuts = sum_before(index, sums), new_slots = sum_before(slot, sums),
                      new_groups = sum_before(group, sums);
            if (segments)
                cut.cut_sequences[cuts + index] = {first + thread, segments, slots + slot, groups + group};
            cuts += new_cuts, slots += new_slots, groups += new_groups;
        }
        if (threadIdx.x == 0) *cut.counts = {slots - 2 * cuts, slots - cuts + sequences - cuts, cuts};
        __syncthreads();
        list_segments(cut.inner, cuts, slots, 2);
        list_segments(cut.later, cuts, slots, 1);
        list_whole_sequences(cut.later + slots - cuts, cuts);
    }
};

} // namespace fkda

#endif
