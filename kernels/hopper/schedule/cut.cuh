/*
 * How sequences are cut into segments, and the lists that a launch works through.
 *
 * If all sequences have one length, every CTA computes for itself how they are cut, and no lists are needed.
 * Otherwise the kernel fkda_hopper_list (list.cuh) has written lists into the workspace before.
 *
 * No index leaves the tensors or the workspace, whatever cu_seqlens and the lists hold and however they
 * change between two reads: each function here reads a value once and brings what it makes of it into its
 * range.
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

/* Backwards, the last segment of a sequence is the first one, and lists are not used: all sequences that are
 * cut have one length. */
template <bool backwards> struct CutFor {
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

    /* A sequence of `length` tokens is cut into length / shortest segments of about one length. With
     * in_steps, for batch_invariant, the borders of segments depend on nothing but `shortest`: what comes
     * after a token then changes no border before it. */
    __device__ int segments_of(int length) const
    {
        if (cut.in_steps) return length > 2 * cut.shortest ? (length - 1) / cut.shortest : 1;
        return length >= 2 * cut.shortest ? length / cut.shortest : 1;
    }

    /* Groups that the maps of a sequence are composed in; 0 if they are joined one after the other. */
    __device__ int groups_of(int segments) const
    {
        const int maps = segments - 2;
        return maps > FKDA_MAPS_CHAINED && !cut.in_steps ? (maps + FKDA_GROUP_MAPS - 1) / FKDA_GROUP_MAPS : 0;
    }

    /* The first chunk of segment i of a sequence of `chunks` chunks. */
    __device__ int begin_of(const fkda_cut_sequence &c, int i, int chunks) const
    {
        if (cut.in_steps) return i == 0 ? 0 : (i + 1) * (cut.shortest / CUT_CHUNK);
        if (chunks == cut.relay.chunks && c.segments == cut.relay.segments) return cut.relay.first_chunk[i];
        return equal_begin_of(i, c.segments, chunks);
    }

    /* The first chunk of segment i, for segments of equal lengths: the first ones have a chunk more, if
     * chunks are left over. No product here is above `chunks`, so none leaves 32 bits, however many segments
     * there are. */
    static __device__ int equal_begin_of(int i, int segments, int chunks)
    {
        return chunks / segments * i + min(chunks % segments, i);
    }

    /* Segment i of a cut sequence. */
    __device__ fkda_segment segment(const fkda_cut_sequence &c, int i) const
    {
        const Task task = sequence(c.sequence);
        return part_of(task, begin_of(c, i, task.chunks), begin_of(c, i + 1, task.chunks), c, i);
    }

    /* Segment i of a cut sequence from one chunk to another one, both of which may lie outside of the
     * sequence if its length has changed since it was cut. */
    static __device__ fkda_segment part_of(const Task &task, int first_chunk, int end_chunk,
                                           const fkda_cut_sequence &c, int i)
    {
        const int from = min(clamp(first_chunk, task.chunks) * CUT_CHUNK, task.length),
                  to = min(clamp(end_chunk, task.chunks) * CUT_CHUNK, task.length);
        return {task.begin + from, max(to - from, 0), c.sequence, c.first_slot + i,
                (i == 0 ? FKDA_SEGMENT_FIRST : 0) | (i == c.segments - 1 ? FKDA_SEGMENT_LAST : 0)};
    }

    /* What lane 0 of the warp has. All lanes of the loader must go the same way, and each of them could have
     * read another value while it changed. */
    static __device__ int of_first_lane(int x)
    {
        return __shfl_sync(~0u, x, 0);
    }
    static __device__ fkda_segment of_first_lane(const fkda_segment &s)
    {
        return {__shfl_sync(~0u, s.begin, 0), of_first_lane(s.length), of_first_lane(s.sequence),
                of_first_lane(s.slot), of_first_lane(s.position)};
    }
    static __device__ fkda_cut_sequence of_first_lane(const fkda_cut_sequence &c)
    {
        return {of_first_lane(c.sequence), of_first_lane(c.segments), of_first_lane(c.first_slot),
                of_first_lane(c.first_group)};
    }

    /* The number in [0, most] that is next to x. */
    static __device__ int clamp(int x, int most)
    {
        return min(max(x, 0), most);
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
        if (!cut.equal_lengths) return clamp(cut.counts->cut_sequences, min(sequences(), cut.slots / 2));
        return segments_of_each() > 1 ? sequences() : 0;
    }

    __device__ fkda_cut_sequence cut_sequence(int c) const
    {
        if (!cut.equal_lengths) return checked(cut.cut_sequences[c]);
        const int segments = segments_of_each();
        return {c, segments, c * segments, c * groups_of(segments)};
    }

    /* An entry of a list as it is or, if another call has overwritten the list, within its bounds. */
    __device__ fkda_cut_sequence checked(fkda_cut_sequence c) const
    {
        c.sequence = clamp(c.sequence, sequences() - 1);
        c.segments = max(min(c.segments, cut.slots), 2);
        c.first_slot = clamp(c.first_slot, cut.slots - c.segments);
        c.first_group = clamp(c.first_group, cut.groups - groups_of(c.segments));
        return c;
    }
    __device__ fkda_segment checked(fkda_segment s) const
    {
        s.begin = min(max(s.begin, 0LL), args.tokens);
        s.length = static_cast<int>(min(static_cast<long long>(max(s.length, 0)), args.tokens - s.begin));
        s.sequence = clamp(s.sequence, sequences() - 1);
        s.slot = clamp(s.slot, cut.slots - 1);
        return s;
    }

    /* How many segments or whole sequences the list `work` (FKDA_SEQUENCES, ...) has. */
    __device__ int entries(int work) const
    {
        if (work == FKDA_SEQUENCES) return sequences();
        if (work == FKDA_FIRST_SEGMENTS) return cut_sequences();
        if (!cut.equal_lengths)
            return work == FKDA_INNER_SEGMENTS ? clamp(cut.counts->inner_segments, cut.slots)
                                               : clamp(cut.counts->later_segments, cut.slots + sequences());
        const int segments = segments_of_each();
        return segments == 1 ? (work == FKDA_LATER_SEGMENTS) * sequences()
                             : sequences() * entries_of_each(work, segments);
    }

    __device__ fkda_segment entry(int work, int e) const
    {
        if (work == FKDA_SEQUENCES) return whole(e);
        if (work == FKDA_FIRST_SEGMENTS) {
            const fkda_cut_sequence c = cut_sequence(e);
            return segment(c, backwards ? c.segments - 1 : 0);
        }
        if (!cut.equal_lengths) return checked((work == FKDA_INNER_SEGMENTS ? cut.inner : cut.later)[e]);
        /* The sequence may have become shorter since entries() has counted, and then it has no entry e. */
        const int segments = segments_of_each();
        if (segments == 1) return whole(min(e, sequences() - 1));
        const int of_each = max(entries_of_each(work, segments), 1);
        const int c = min(e / of_each, sequences() - 1), i = e % of_each + 1;
        return segment({c, segments, c * segments, 0}, backwards ? segments - 1 - i : i);
    }

    /* Inner or later segments of a sequence with `segments` segments. */
    static __device__ int entries_of_each(int work, int segments)
    {
        return work == FKDA_INNER_SEGMENTS ? segments - 2 : segments - 1;
    }
};
using Cut = CutFor<false>;

} // namespace fkda

#endif
