/*
 * The list of segments, for sequences of different lengths that are cut: one CTA decides from the lengths on
 * the device how each sequence is cut, and writes the lists that the passes after it work through (cut.cuh
 * reads them).
 *
 * Algorithm. The number of segments of a sequence depends on its length alone. Prefix sums over all sequences
 * give each cut sequence its number, its first slot and its first map group. Each thread then finds by
 * bisection which sequence an entry of a list belongs to, and writes the entry.
 *
 * Each length is read once to count segments. Entries of the lists read lengths again; should these have
 * changed, entries are wrong and as many as before, so that no list becomes too long.
 */
#ifndef FKDA_HOPPER_LIST_CUH
#define FKDA_HOPPER_LIST_CUH

#include "../fwd_shape.h"
#include "cut.cuh"

namespace fkda
{

/* All threads of the CTA call all functions together. */
struct SegmentLister {
    const fkda_fwd_args &args;
    const fkda_cut &cut;
    Cut rules;

    __device__ SegmentLister(const fkda_fwd_args &a, const fkda_cut &c) : args(a), cut(c), rules{a, c}
    {
    }

    /* The whole kernel. `scratch` is shared memory with one number for each warp. */
    __device__ void run(long long *scratch) const
    {
        const int sequences = rules.sequences(), thread = static_cast<int>(threadIdx.x);

        /* ---- The cut sequences ---- */
        int cuts = 0, slots = 0, groups = 0; /* of the sequences so far */
        for (int first = 0; first < sequences; first += FKDA_LIST_THREADS) {
            const int segments = cut_into(first + thread, sequences);
            int *sums = reinterpret_cast<int *>(scratch), index = segments > 0,
                group = rules.groups_of(segments);
            long long slot = segments;
            const long long new_slots = sum_before(slot, scratch);
            /* Sequences that overlap, by a wrong cu_seqlens, can need more slots than there are. Then these
             * sequences and all later ones stay whole. */
            if (slots + new_slots > cut.slots) break;
            const int new_cuts = sum_before(index, sums), new_groups = sum_before(group, sums);
            if (segments)
                cut.cut_sequences[cuts + index] = {first + thread, segments, slots + static_cast<int>(slot),
                                                   groups + group};
            cuts += new_cuts, slots += static_cast<int>(new_slots), groups += new_groups;
        }

        /* ---- The lists ---- */
        if (threadIdx.x == 0) *cut.counts = {slots - 2 * cuts, slots - cuts + sequences - cuts, cuts};
        __syncthreads();
        list_segments(cut.inner, cuts, slots, 2);
        list_segments(cut.later, cuts, slots, 1);
        list_whole_sequences(cut.later + slots - cuts, cuts);
    }

    /* How many segments sequence n is cut into; 0 if it is not cut. */
    __device__ int cut_into(int n, int sequences) const
    {
        const int wanted = n < sequences ? rules.segments_of(rules.sequence(n).length) : 1;
        return wanted > 1 ? wanted : 0;
    }

    /* Replaces each thread's x by the sum of x over the threads before it, and returns the sum over all
     * threads. */
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

    /* Which of `count` cut sequences entry `at` of a list belongs to, if before(c) entries precede the
     * entries of sequence c. */
    template <class Before> __device__ int find_cut(int at, int count, Before before) const
    {
        int low = 0, high = count; /* before(low) <= at < before(high) */
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (before(middle) <= at ? low : high) = middle;
        }
        return low;
    }

    /* Lists the segments of all cut sequences in order, without the first segment of each (left_out = 1) or
     * without its first and last one (left_out = 2). */
    __device__ void list_segments(fkda_segment *list, int cut_sequences, int slots, int left_out) const
    {
        const fkda_cut_sequence *cuts = cut.cut_sequences;
        const auto before = [=](int c) { return cuts[c].first_slot - left_out * c; };
        for (int e = threadIdx.x; e < slots - left_out * cut_sequences; e += blockDim.x) {
            const int c = find_cut(e, cut_sequences, before);
            const fkda_cut_sequence sequence = rules.checked(cuts[c]);
            list[e] = rules.segment(sequence, Cut::clamp(e - before(c) + 1, sequence.segments - 1));
        }
    }

    __device__ void list_whole_sequences(fkda_segment *list, int cut_sequences) const
    {
        const fkda_cut_sequence *cuts = cut.cut_sequences;
        for (int n = threadIdx.x; n < rules.sequences(); n += blockDim.x) {
            const int c = find_cut(n, cut_sequences, [=](int i) { return cuts[i].sequence; });
            const int first =
                cut_sequences ? cuts[c].sequence : n + 1; /* the last cut one up to n, or the first one */
            /* The bound matters if another call has overwritten `cuts`. */
            if (first != n)
                list[Cut::clamp(first > n ? n : n - c - 1, rules.sequences() - 1)] = rules.whole(n);
        }
    }
};

} // namespace fkda

#endif
