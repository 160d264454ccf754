/*
 * Mixed: the schedule for long sequences among short ones in one launch, say one of 30,000 tokens and fifty
 * of 100.
 *
 * Algorithm. The lengths are on the device, and the host does not know them. So each CTA pair begins with one
 * warp that reads all lengths and finds what every CTA pair is for; all of these warps find one and the same
 * answer.
 *
 *   1. Sequences of at least `shortest` tokens are long, up to a number of them. Each head of a long sequence
 *      gets a CTA pair. All other sequences are the rest.
 *   2. The long sequence that would take longest gets one more pair for each head, again and again, until the
 *      rest would take longer than it, or more pairs would not help.
 *   3. A long sequence with two or more pairs for each head is cut into one segment more than it has pairs
 *      for a head. Its pairs run a relay (relay.cuh) without spare pairs and without shared segments.
 *   4. The remaining pairs share the rest in even shares (even_shares.cuh), as CTA pairs or, where heads are
 *      many, as solo CTAs.
 *
 * What a CTA pair does depends on the lengths alone, so results are equal to the bit from run to run.
 */
#ifndef FKDA_HOPPER_MIXED_CUH
#define FKDA_HOPPER_MIXED_CUH

#include "../costs.h"
#include "even_shares.cuh"
#include "relay.cuh"

namespace fkda
{

/* Where a CTA keeps its assignment: a place that the roles of this block do not write. */
template <class Block> static __device__ MixedAssignment &mixed_assignment()
{
    return reinterpret_cast<Shared<Block> *>(cta_memory())->assignment;
}

/* Finds the assignments of all CTA pairs, by one warp. Each lane has at most one long sequence. */
class MixedScheduler
{
    const Cut cut;
    const fkda_mixed &mixed;
    const int heads, lane;
    /* This lane's long sequence; pairs: for each of its heads. Without a sequence both are 0. */
    int sequence = 0, chunks = 0, pairs = 0;
    int long_sequences = 0, last_long = -1;
    int rest = 0, longest_of_rest = 0; /* chunks of all sequences of the rest, and of the longest one */
    int left;                          /* CTA pairs that are left for the rest */

    /* The rest counts for no more chunks than this, so that wrong lengths do not overflow. */
    static constexpr int MOST_CHUNKS = 1 << 25;

  public:
    __device__ MixedScheduler(const fkda_hopper_fwd_args &all, const fkda_mixed &how, int lane_of_warp)
        : cut{all.fwd, all.cut}, mixed(how), heads(all.fwd.heads), lane(lane_of_warp), left(how.pairs)
    {
        measure();
        give_out_pairs();
    }

    /* The first chunk of segment i of a sequence that has `segments` segments and `chunks` chunks. First and
     * last segments are shorter than others by the chunks that their pair begins late. */
    static __device__ int begin_of(int i, int segments, int chunks)
    {
        if (i == 0 || i == segments) return i == 0 ? 0 : chunks;
        return max(i * (chunks + FKDA_RELAY_FIRST_LATE_CHUNKS + FKDA_RELAY_LAST_LATE_CHUNKS) / segments -
                       FKDA_RELAY_FIRST_LATE_CHUNKS,
                   i);
    }

    /* Writes the assignment of a pair, by the lane that knows it. */
    __device__ void assign(int pair, MixedAssignment &assignment) const
    {
        const int number = pair - sum_before(pairs * heads),
                  first_slot = sum_before(pairs > 1 ? pairs + 1 : 0);
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
    /* The sum of x over the lanes before this one. */
    __device__ int sum_before(int x) const
    {
        int sum = x;
        for (int by = 1; by < 32; by *= 2) {
            const int other = __shfl_up_sync(~0u, sum, by);
            if (lane >= by) sum += other;
        }
        return sum - x;
    }

    /* Step 1: reads all lengths. */
    __device__ void measure()
    {
        for (int first = 0; first < cut.sequences(); first += 32) {
            const bool exists = first + lane < cut.sequences();
            const int length = exists ? cut.sequence(first + lane).length : 0;
            const int own = (length + CUT_CHUNK - 1) / CUT_CHUNK;
            bool in_rest = exists;
            for (unsigned who = __ballot_sync(~0u, exists && length >= cut.cut.shortest);
                 who && long_sequences < mixed.most_long; who &= who - 1) {
                const int from = __ffs(static_cast<int>(who)) - 1;
                const int its = __shfl_sync(~0u, own, from);
                if (lane == long_sequences) sequence = first + from, chunks = its, pairs = 1;
                if (lane == from) in_rest = false;
                last_long = first + from;
                long_sequences++;
            }
            if (!in_rest) continue;
            rest = min(rest + own + FKDA_CHUNKS_PER_SWITCH, MOST_CHUNKS);
            longest_of_rest = max(longest_of_rest, own);
        }
        longest_of_rest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(longest_of_rest)));
        rest = __shfl_sync(~0u, sum_before(rest) + rest, 31);
    }

    /* The chunks that this lane's sequence would take with this many pairs for each head. A step of the join
     * counts as one chunk. */
    __device__ int time(int with) const
    {
        return with == 0 ? 0 : with == 1 ? chunks : 2 * chunks / (with + 1) + mixed.cutting_chunks + with - 1;
    }

    /* Step 2. */
    __device__ void give_out_pairs()
    {
        left -= long_sequences * heads;
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

    /* Step 4: whether solo CTAs would finish the rest before CTA pairs. A solo CTA's chunk has half the
     * tokens of a pair's, and a pair counts as two solo CTAs, so equal work is equally many chunks; only the
     * longest sequence has twice as many. */
    __device__ bool rest_is_solo() const
    {
        const float each = static_cast<float>(rest) * static_cast<float>(heads) / static_cast<float>(left),
                    longest = static_cast<float>(longest_of_rest);
        return FKDA_CLOCKS_SOLO_CHUNK * max(each, 2 * longest) < FKDA_CLOCKS_PAIR_CHUNK * max(each, longest);
    }
};

/* What the pair of a long sequence is for, in the form of RelayAssignment. The pair has one head, number
 * 0. */
struct LongAssignment {
    Cut cut;
    const MixedAssignment &assignment;
    int segments, head_index, heads, segment, spare;

    __device__ explicit LongAssignment(const fkda_hopper_fwd_args &all)
        : cut{all.fwd, all.cut}, assignment(mixed_assignment<Block<PairCta, Mixed>>()),
          segments(assignment.pairs > 1 ? assignment.pairs + 1 : 1), head_index(0), heads(1),
          segment(assignment.segment), spare(assignment.is == MixedAssignment::LONG ? -1 : 0)
    {
    }

    __device__ int pairs_of_head() const
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
        return Cut::part_of(task, MixedScheduler::begin_of(i, segments, task.chunks),
                            MixedScheduler::begin_of(i + 1, segments, task.chunks), c, i);
    }

    /* Long sequences have no spare pairs, and a pair has one head. RelaySource asks for the number of spare
     * pairs and of heads in every schedule, but uses them for spare pairs alone. */
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

/* The workers that have even shares of the rest: some CTA pairs of the grid, or their CTAs as solo CTAs. */
template <class Block> struct RestWorkers {
    const MixedAssignment &assignment;
    const int long_from; /* tokens */

    __device__ explicit RestWorkers(const fkda_hopper_fwd_args &all)
        : assignment(mixed_assignment<Block>()), long_from(all.cut.shortest)
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
    /* A pair with a long sequence never uses this source, and must not search for a share. */
    __device__ bool one_each(int items) const
    {
        return assignment.is == MixedAssignment::LONG || (assignment.last_long < 0 && items <= count());
    }
};

/* The work items of a CTA pair that computes outputs: those of its long sequence in a relay, or its share of
 * the rest. Solo CTAs have work items of the rest alone, and the map phase has work items of long sequences
 * alone, so they use one of the two sources directly (schedule.cuh). */
template <class Block> struct LongOrRest {
    RelaySource<Block, LongAssignment> of_long;
    EvenSharesSource<Block, RestWorkers<Block>> of_rest;

    __device__ LongOrRest(const fkda_hopper_fwd_args &all, int rank_in_pair, int lane)
        : of_long(all, rank_in_pair, lane), of_rest(all, rank_in_pair, lane)
    {
    }
    __device__ LoadedItem next()
    {
        return of_long.assignment.spare < 0 ? of_long.next() : of_rest.next();
    }
};

} // namespace fkda

#endif
