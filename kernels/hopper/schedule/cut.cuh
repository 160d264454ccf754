/* How sequences are cut into segments: what the plan wrote or, where all sequences are as long, the same from that length. */
#ifndef FKDA_HOPPER_CUT_CUH
#define FKDA_HOPPER_CUT_CUH

#include "../block/cursor.cuh"
#include "../fwd_args.h"

namespace fkda
{

constexpr int CUT_CHUNK = FKDA_HOPPER_CHUNK_PAIR; /* segments end where chunks do */

struct Cut {
    const fkda_fwd_args &args;
    const fkda_cut &cut;

    __device__ Task sequence(int n) const
    {
        return find_task(args, n, 0, CUT_CHUNK);
    }

    __device__ int sequences() const
    {
        return args.sequences;
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

    /* The first chunk of segment i, of so many chunks of the sequence. */
    __device__ int begin_of(const fkda_cut_sequence &c, int i, int chunks) const
    {
        if (chunks == cut.relay.chunks) return cut.relay.first_chunk[i];
        return chunks / c.segments * i + chunks % c.segments * i / c.segments;
    }

    /* Segment i of a cut sequence. */
    __device__ fkda_segment segment(const fkda_cut_sequence &c, int i) const
    {
        const Task task = sequence(c.sequence);
        const int from = begin_of(c, i, task.chunks) * CUT_CHUNK,
                  to = begin_of(c, i + 1, task.chunks) * CUT_CHUNK;
        return {task.begin + from, min(to, task.length) - from, c.sequence, c.first_slot + i,
                (i == 0 ? FKDA_SEGMENT_FIRST : 0) | (i == c.segments - 1 ? FKDA_SEGMENT_LAST : 0)};
    }

    /* A sequence that is not cut. */
    __device__ fkda_segment whole(int n) const
    {
        const Task task = sequence(n);
        return {task.begin, task.length, n, -1, FKDA_SEGMENT_FIRST | FKDA_SEGMENT_LAST};
    }

    /* Of a head in a slot: the first of its eight flags of this kind. */
    __device__ int *flags(int head, int slot, int kind) const
    {
        return cut.flags + (slot * args.heads + head) * FKDA_SLOT_FLAGS + kind;
    }

    /* The rest is for when the plan is there. */

    /* Of each sequence, if they are alike. */
    __device__ int segments_of_each() const
    {
        return cut.segments ? cut.segments : segments_of(sequence(0).length);
    }

    __device__ int cut_sequences() const
    {
        if (!cut.equal_lengths) return cut.counts->cut_sequences;
        return segments_of_each() > 1 ? sequences() : 0;
    }

    __device__ fkda_cut_sequence cut_sequence(int c) const
    {
        if (!cut.equal_lengths) return cut.cut_sequences[c];
        const int segments = segments_of_each();
        return {c, segments, c * segments, c * groups_of(segments)};
    }

    /* What a launch works through, for every head. */
    __device__ int entries(int work) const
    {
        if (work == FKDA_SEQUENCES) return sequences();
        if (work == FKDA_FIRST_SEGMENTS) return cut_sequences();
        if (!cut.equal_lengths)
            return work == FKDA_INNER_SEGMENTS ? cut.counts->inner_segments : cut.counts->later_segments;
        const int segments = segments_of_each();
        return segments == 1 ? (work == FKDA_LATER_SEGMENTS) * sequences()
                             : sequences() * each(work, segments);
    }

    __device__ fkda_segment entry(int work, int e) const
    {
        if (work == FKDA_SEQUENCES) return whole(e);
        if (work == FKDA_FIRST_SEGMENTS) return segment(cut_sequence(e), 0);
        if (!cut.equal_lengths) return (work == FKDA_INNER_SEGMENTS ? cut.inner : cut.later)[e];
        const int segments = segments_of_each();
        if (segments == 1) return whole(e);
        return segment(cut_sequence(e / each(work, segments)), e % each(work, segments) + 1);
    }

    /* Inner or later segments of a sequence of so many. */
    static __device__ int each(int work, int segments)
    {
        return work == FKDA_INNER_SEGMENTS ? segments - 2 : segments - 1;
    }
};

} // namespace fkda

#endif
