/*
 * Sequences of different lengths in one launch, say one of 30,000 tokens and fifty of 100. Nobody knows them before it: each block finds
 * them, and from them what all pairs of blocks are there for. A long sequence has some pairs to each head, and is cut into one segment
 * more than these if they are two or more; they do what at_once.cuh says. The pairs that are left deal the rest out as any kernel does its
 * sequences, as pairs or, where heads are many, in blocks of their own.
 *
 * Pairs are given out one for each head of the sequence that would take longest, again and again, until the rest would take
 * longer than that.
 */
#ifndef FKDA_HOPPER_MIXED_CUH
#define FKDA_HOPPER_MIXED_CUH

#include "../block/shared.cuh"
#include "../costs.h"
#include "even_shares.cuh"
#include "relay.cuh"

namespace fkda
{

using MixedAssignment = Assignment<true>;

/* Where the block has its assignment once it is found, out of the assignment of all that it does later. */
template <class Block> static __device__ MixedAssignment &assignment_of()
{
    return reinterpret_cast<Shared<Block> *>(cta_memory())->assignment;
}

/* How a warp finds it: each lane has one of the long sequences. */
class MixedScheduler
{
    const Cut cut;
    const fkda_mixed &mixed;
    const int heads, lane;
    int sequence = 0, chunks = 0, pairs = 0; /* of the lane's; pairs: of each head, none without a sequence */
    int long_ones = 0, last_long = -1;
    int rest = 0, longest_of_rest = 0; /* chunks of the others */
    int left;                          /* pairs, for the rest */

    static constexpr int UNCOUNTED = 1 << 25; /* chunks, of lengths that are not to be believed */

  public:
    __device__ MixedScheduler(const fkda_hopper_fwd_args &all, const fkda_mixed &how, int of_warp)
        : cut{all.fwd, all.cut}, mixed(how), heads(all.fwd.heads), lane(of_warp), left(how.pairs)
    {
        measure();
        give_out();
    }

    /* The first chunk of segment i of so many, of a sequence of so many chunks. */
    static __device__ int begin_of(int i, int segments, int chunks)
    {
        if (i == 0 || i == segments) return i == 0 ? 0 : chunks;
        return max(i * (chunks + FKDA_RELAY_FIRST_LATE_CHUNKS + FKDA_RELAY_LAST_LATE_CHUNKS) / segments -
                       FKDA_RELAY_FIRST_LATE_CHUNKS,
                   i);
    }

    /* The assignment of a pair, by the lane that knows it. */
    __device__ void tell(int pair, MixedAssignment &assignment) const
    {
        const int number = pair - before(pairs * heads), first_slot = before(pairs > 1 ? pairs + 1 : 0);
        if (number >= 0 && number < pairs * heads) {
            assignment.is = MixedAssignment::LONG;
            assignment.sequence = sequence, assignment.pairs = pairs, assignment.first_slot = first_slot;
            assignment.head = number / pairs, assignment.segment = number % pairs;
        }
        const int rest_number = pair - (mixed.pairs - left);
        if (lane == 0 && rest_number >= 0) {
            assignment.is = rest_is_solo() ? MixedAssignment::REST_SOLO : MixedAssignment::REST;
            assignment.rest_pairs = left, assignment.rest_number = rest_number,
            assignment.last_long = last_long;
            assignment.pairs = 0;
        }
        __syncwarp();
    }

  private:
    /* The sum of x of the lanes before this one. */
    __device__ int before(int x) const
    {
        int sum = x;
        for (int by = 1; by < 32; by *= 2) {
            const int other = __shfl_up_sync(~0u, sum, by);
            if (lane >= by) sum += other;
        }
        return sum - x;
    }

    __device__ void measure()
    {
        for (int first = 0; first < cut.sequences(); first += 32) {
            const bool there = first + lane < cut.sequences();
            const int length = there ? cut.sequence(first + lane).length : 0;
            const int own = (length + CUT_CHUNK - 1) / CUT_CHUNK;
            bool in_rest = there;
            for (unsigned who = __ballot_sync(~0u, there && length >= cut.cut.shortest);
                 who && long_ones < mixed.most_long; who &= who - 1) {
                const int from = __ffs(static_cast<int>(who)) - 1;
                const int its = __shfl_sync(~0u, own, from);
                if (lane == long_ones) sequence = first + from, chunks = its, pairs = 1;
                if (lane == from) in_rest = false;
                last_long = first + from;
                long_ones++;
            }
            if (!in_rest) continue;
            rest = min(rest + own + FKDA_CHUNKS_PER_SWITCH, UNCOUNTED);
            longest_of_rest = max(longest_of_rest, own);
        }
        longest_of_rest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(longest_of_rest)));
        rest = __shfl_sync(~0u, before(rest) + rest, 31);
    }

    /* Whether blocks of their own would be through with the rest before pairs. They take as long for half a chunk as pairs for all
     * of it. */
    __device__ bool rest_is_solo() const
    {
        const float each = static_cast<float>(rest) * static_cast<float>(heads) / static_cast<float>(left),
                    longest = static_cast<float>(longest_of_rest);
        return FKDA_CLOCKS_SOLO_CHUNK * max(each, 2 * longest) < FKDA_CLOCKS_PAIR_CHUNK * max(each, longest);
    }

    /* In chunks, with so many pairs to a head. A step of the join is one. */
    __device__ int time(int with) const
    {
        return with == 0 ? 0 : with == 1 ? chunks : 2 * chunks / (with + 1) + mixed.cutting_chunks + with - 1;
    }

    __device__ void give_out()
    {
        left -= long_ones * heads;
        for (;;) {
            const int now = time(pairs);
            const int longest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(now)));
            const int who = __ffs(static_cast<int>(__ballot_sync(~0u, now == longest))) - 1;
            const bool pays = pairs <= FKDA_MAPS_CHAINED && time(pairs + 1) < now;
            const int after = left - heads;
            if (longest == 0 || after < (rest > 0) || !__shfl_sync(~0u, pays, who) ||
                static_cast<float>(rest) * static_cast<float>(heads) >
                    static_cast<float>(longest) * static_cast<float>(after))
                return;
            if (lane == who) pairs++;
            left = after;
        }
    }
};

/* What the pair of a long sequence has to do, as RelayAssignment says it elsewhere. */
struct LongAssignment {
    Cut cut;
    const MixedAssignment &assignment;
    int segments, head_index, heads, segment, spare;

    __device__ explicit LongAssignment(const fkda_hopper_fwd_args &all)
        : cut{all.fwd, all.cut}, assignment(assignment_of<Block<PairCta, Mixed>>()),
          segments(assignment.pairs > 1 ? assignment.pairs + 1 : 1), head_index(0), heads(1),
          segment(assignment.segment), spare(assignment.is == MixedAssignment::LONG ? -1 : 0)
    {
    }

    __device__ int of_head() const
    {
        return assignment.pairs;
    }
    __device__ int head(int) const
    {
        return assignment.head;
    }
    __device__ int maps() const
    {
        return max(segments - 2, 0);
    }
    __device__ fkda_cut_sequence sequence(int) const
    {
        return {assignment.sequence, segments, assignment.first_slot, 0};
    }

    __device__ fkda_segment segment_of(const fkda_cut_sequence &c, int i) const
    {
        if (segments == 1) return cut.whole(c.sequence);
        const Task task = cut.sequence(c.sequence);
        const int from = MixedScheduler::begin_of(i, segments, task.chunks) * CUT_CHUNK,
                  to = MixedScheduler::begin_of(i + 1, segments, task.chunks) * CUT_CHUNK;
        return {task.begin + from, min(to, task.length) - from, c.sequence, c.first_slot + i,
                (i == 0 ? FKDA_SEGMENT_FIRST : 0) | (i == segments - 1 ? FKDA_SEGMENT_LAST : 0)};
    }

    /* First segments are walked through by their own pairs. */
    static __device__ bool spares_compute_first()
    {
        return false;
    }
    static __device__ int spare_pairs()
    {
        return 1;
    }
    static __device__ int all_heads()
    {
        return 1;
    }
};

/* The rest, among the pairs that have it, or their blocks. */
template <class Block> struct RestWorkers {
    const MixedAssignment &assignment;
    const int long_from; /* tokens */

    __device__ explicit RestWorkers(const fkda_hopper_fwd_args &all)
        : assignment(assignment_of<Block>()), long_from(all.cut.shortest)
    {
    }
    __device__ int count() const
    {
        return assignment.rest_pairs * (FKDA_HOPPER_PAIR_CTAS / Block::CTAS);
    }
    __device__ int index() const
    {
        return Block::CTAS == 1 ? FKDA_HOPPER_PAIR_CTAS * assignment.rest_number + cluster_rank()
                                : assignment.rest_number;
    }
    __device__ bool skips(const fkda_segment &s) const
    {
        return s.sequence <= assignment.last_long && s.length >= long_from;
    }
    __device__ bool one_each(int items) const
    {
        return assignment.is == MixedAssignment::LONG || (assignment.last_long < 0 && items <= count());
    }
};

/* A block that has a assignment of the rest, in one assignment of what blocks do. */
template <class Block> struct MixedSource : EvenSharesSource<Block, RestWorkers<Block>> {
    using EvenSharesSource<Block, RestWorkers<Block>>::EvenSharesSource;
};
/* One that may have either. */
template <> struct MixedSource<Block<PairCta, Mixed>> {
    using OwnBlock = Block<PairCta, Mixed>;
    RelaySource<OwnBlock, LongAssignment> of_long;
    EvenSharesSource<OwnBlock, RestWorkers<OwnBlock>> of_rest;

    __device__ MixedSource(const fkda_hopper_fwd_args &all, int rank_in_pair, int lane)
        : of_long(all, rank_in_pair, lane), of_rest(all, rank_in_pair, lane)
    {
    }
    __device__ WorkItem next()
    {
        return of_long.assignment.spare < 0 ? of_long.next() : of_rest.next();
    }
};
/* Maps are of long ones. */
template <> struct MixedSource<Block<MapCta, Mixed>> : RelaySource<Block<MapCta, Mixed>, LongAssignment> {
    using RelaySource<Block<MapCta, Mixed>, LongAssignment>::RelaySource;
};

} // namespace fkda

#endif
