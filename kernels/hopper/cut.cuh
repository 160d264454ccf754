/* How sequences are cut into segments: what the plan wrote or, where all sequences are as long, the same from that length. */
#ifndef FKDA_HOPPER_CUT_CUH
#define FKDA_HOPPER_CUT_CUH

#include "../common/task.cuh"
#include "fwd_args.h"

namespace fkda
{

struct Cut {
    const fkda_fwd_args &args;
    const fkda_cut &cut;

    __device__ Task sequence(int n) const
    {
        return find_task(args, n * args.heads);
    }

    __device__ int sequences() const
    {
        return args.tasks / args.heads;
    }

    /* Into how many segments a sequence is cut: as many of at least `shortest` tokens as there is room for. Depends on its
     * length alone. */
    __device__ int segments_of(int length) const
    {
        return length >= 2 * cut.shortest ? length / cut.shortest : 1;
    }

    static __device__ int groups_of(int segments)
    {
        const int maps = segments - 2;
        return maps > FKDA_MAPS_CHAINED ? (maps + FKDA_GROUP_MAPS - 1) / FKDA_GROUP_MAPS : 0;
    }

    /* Segment i of a cut sequence. */
    __device__ fkda_segment segment(const fkda_cut_sequence &c, int i) const
    {
        const Task task = sequence(c.sequence);
        const long long chunks = task.chunks;
        const int from = static_cast<int>(chunks * i / c.segments) * CHUNK;
        const int to = static_cast<int>(chunks * (i + 1) / c.segments) * CHUNK;
        return {task.begin + from, min(to, task.length) - from, c.sequence, c.first_slot + i,
                (i == 0 ? FKDA_SEGMENT_FIRST : 0) | (i == c.segments - 1 ? FKDA_SEGMENT_LAST : 0)};
    }

    /* A sequence that is not cut. */
    __device__ fkda_segment whole(int n) const
    {
        const Task task = sequence(n);
        return {task.begin, task.length, n, -1, FKDA_SEGMENT_FIRST | FKDA_SEGMENT_LAST};
    }

    /* The rest is for when the plan is there. */

    __device__ int cut_sequences() const
    {
        if (!cut.alike) return cut.counts->cut_sequences;
        return segments_of(sequence(0).length) > 1 ? sequences() : 0;
    }

    __device__ fkda_cut_sequence cut_sequence(int c) const
    {
        if (!cut.alike) return cut.cut_sequences[c];
        const int segments = segments_of(sequence(0).length);
        return {c, segments, c * segments, c * groups_of(segments)};
    }

    /* What a pass walks through, for every head: in the first, of cut sequences all segments but the last; in the second, all but
     * the first, and sequences that are not cut. */
    __device__ int entries(int pass) const
    {
        if (!cut.alike) return cut.counts->segments[pass];
        const int segments = segments_of(sequence(0).length);
        return segments > 1 ? sequences() * (segments - 1) : pass * sequences();
    }

    __device__ fkda_segment entry(int pass, int e) const
    {
        if (!cut.alike) return cut.lists[pass][e];
        const int segments = segments_of(sequence(0).length);
        if (segments == 1) return whole(e);
        return segment(cut_sequence(e / (segments - 1)), e % (segments - 1) + pass);
    }
};

} // namespace fkda

#endif
