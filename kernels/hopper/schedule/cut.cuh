/*
 * How sequences are cut into segments, and the lists that a launch works through.
 *
 * If all sequences have one length, every CTA computes for itself how they are cut, and no lists are needed.
 * Otherwise the kernel fkda_hopper_list (list.cuh) has written lists into the workspace before.
 */
#ifndef FKDA_HOPPER_CUT_CUH
#define FKDA_HOPPER_CUT_CUH

#include "../../common/task.cuh"
#include "../fwd_args.h"
#include "../fwd_shape.h"

namespace fkda
{

constexpr int CUT_CHUNK =
    FKDA_HOPPER_CHUNK_PAIR; /* tokens: segments begin and end where chunks of a CTA pair do */

struct Cut {
    const fkda_fwd_args &args;
    const fkda_cut &cut;

    /* ---- Sequences and segments ---- */

    __device__ Task sequence(int n) const
    {
        return find_task(args, n, 0, CUT_CHUNK);
    }

    __device__ int sequences() const
    {
        return args.sequences;
    }

    /* A sequence of `length` tokens is cut into length / shortest segments. For a given `shortest`, as with
     * batch_invariant, the number depends on the length alone. */
    __device__ int segments_of(int length) const
    {
        return length >= 2 * cut.shortest ? length / cut.shortest : 1;
    }

    /* Groups that the maps of a sequence are composed in; 0 if they are joined one after the other. */
    static __device__ int groups_of(int segments)
    {
        const int maps = segments - 2;
        return maps > FKDA_MAPS_CHAINED ? (maps + FKDA_GROUP_MAPS - 1) / FKDA_GROUP_MAPS : 0;
    }

    /* The first chunk of segment i of a sequence of `chunks` chunks. */
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

    /* The first of eight flags of a head in a slot; `which` is FKDA_FLAG_MAP, FKDA_FLAG_STATE or
     * FKDA_FLAG_JOINED. */
    __device__ int *flags(int head, int slot, int which) const
    {
        return cut.flags + (slot * args.heads + head) * FKDA_SLOT_FLAGS + which;
    }

    /* ---- Lists: only once fkda_hopper_list is over, unless all lengths are equal ---- */

    /* Segments of each sequence, if all lengths are equal. */
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

    /* How many segments or whole sequences the list `work` (FKDA_SEQUENCES, ...) has. */
    __device__ int entries(int work) const
    {
        if (work == FKDA_SEQUENCES) return sequences();
        if (work == FKDA_FIRST_SEGMENTS) return cut_sequences();
        if (!cut.equal_lengths)
            return work == FKDA_INNER_SEGMENTS ? cut.counts->inner_segments : cut.counts->later_segments;
        const int segments = segments_of_each();
        return segments == 1 ? (work == FKDA_LATER_SEGMENTS) * sequences()
                             : sequences() * entries_of_each(work, segments);
    }

    __device__ fkda_segment entry(int work, int e) const
    {
        if (work == FKDA_SEQUENCES) return whole(e);
        if (work == FKDA_FIRST_SEGMENTS) return segment(cut_sequence(e), 0);
        if (!cut.equal_lengths) return (work == FKDA_INNER_SEGMENTS ? cut.inner : cut.later)[e];
        const int segments = segments_of_each();
        if (segments == 1) return whole(e);
        return segment(cut_sequence(e / entries_of_each(work, segments)),
                       e % entries_of_each(work, segments) + 1);
    }

    /* Inner or later segments of a sequence with `segments` segments. */
    static __device__ int entries_of_each(int work, int segments)
    {
        return work == FKDA_INNER_SEGMENTS ? segments - 2 : segments - 1;
    }
};

} // namespace fkda

#endif
