/*
 * Relay: the schedule that computes all segments of long sequences in one launch. Each segment but the last
 * has a CTA pair, and pairs wait for each other at flags where the passes would wait for a whole launch.
 *
 * Algorithm. A CTA pair runs three phases, one after the other:
 *
 *   map phase     computes its segment's M and B or, of a first segment, the state after it;
 *   join phase    carries some rows of the head's state through all maps, from the state after the first
 *                 segment to the states that the later segments start from (join/relay_join.cuh);
 *   output phase  computes the outputs of its segment, or the last segment's if it is the pair of a first
 *                 segment.
 *
 * The outputs of first segments are computed by spare pairs, from the start of the launch on. If there are no
 * spare pairs, the pair of a first segment has no map phase: its output phase begins at the start of the
 * launch and computes the first segment's outputs and the state after it, and then the last segment's
 * outputs.
 *
 * Shared segments. If fewer CTA pairs than heads are left over, each head gets one or two extra, shorter
 * segments that are shared: a pair has such a segment of two to four heads, and computes first the maps of
 * all these heads, then the outputs.
 *
 * States in place. If the final state is the same tensor as the initial state, the last segment's pair must
 * not overwrite what a spare pair has yet to read. Once the spare pair has read the state, it sets flags of
 * the first segment's slot, which nothing else uses. The last segment's pair waits for these flags before it
 * stores. The same holds for state pools, in which a sequence finds both of its states by one index.
 *
 * Order of memory. A state or a map goes from one CTA pair to another through the workspace. The warp that
 * stores 16 rows sets their flag with a release at GPU scope, after all its lanes have met (set_flag). The
 * warp that needs the rows waits for the flag with an acquire (await_flag; both are in ptx/memory.cuh). A map
 * is then read by bulk copies, which belong to the async proxy, so the map fetcher puts a proxy fence between
 * the flag and the copy (fetch_maps() in join/relay_join.cuh). A map that is also stored by a bulk copy is
 * complete, and behind a proxy fence, before its flag is set (copy_bulk_to_global in ptx/copies.cuh).
 * join/layouts.cuh says how rows lie in the workspace. docs/hopper-kernel.md says, under "Barriers", who sets
 * which flag and who waits for it.
 *
 * Why. Between two launches CTAs end and others start, and the first chunk of a CTA takes long.
 *
 * Why no wait at a flag lasts for ever. relay_plan.c in src/cuda/hopper plans no more CTA pairs than run at
 * the same time, with one CTA on each SM. The launch is cooperative: either all its CTAs run at the same
 * time, so that every pair that is waited for runs, or the driver refuses the launch, and run_relay() in
 * launch.c runs the passes instead. All flags are cleared before the launch, so a flag of an earlier call is
 * never taken for one of this call.
 */
#ifndef FKDA_HOPPER_RELAY_CUH
#define FKDA_HOPPER_RELAY_CUH

#include "../block/shared.cuh"

namespace fkda
{

/* What this CTA pair is for. Heads are counted over all sequences here: head_index = sequence * heads +
 * head. */
struct RelayAssignment {
    Cut cut;
    const fkda_relay &plan;
    int segments;   /* of each sequence */
    int head_index; /* the first head of the pair */
    int heads;      /* how many heads the pair has */
    int segment;    /* the pair computes the maps of this segment of its heads */
    int spare;      /* the number of a spare pair among all spare pairs; negative for other pairs */

    static __device__ int pair()
    {
        return static_cast<int>(blockIdx.x) / FKDA_HOPPER_PAIR_CTAS;
    }

    /* x / y for small numbers, faster than an integer division. */
    static __device__ int quotient(int x, int y)
    {
        return static_cast<int>((static_cast<float>(x) + 0.5f) * rcp(static_cast<float>(y)));
    }

    __device__ explicit RelayAssignment(const fkda_hopper_fwd_args &all)
        : cut{all.fwd, all.cut}, plan(all.cut.relay), segments(plan.segments), heads(1), spare(-1)
    {
        const Task first = cut.sequence(0);
        if (first.chunks != plan.chunks) segments = min(cut.segments_of(first.length), plan.inner + 2);
        int rest = pair() - all_heads() * pairs_of_head();
        if (rest < 0) {
            head_index = quotient(pair(), pairs_of_head()), segment = pair() - head_index * pairs_of_head();
            return;
        }
        for (int i = 0; i < FKDA_RELAY_SHARED; i++) {
            const int each = plan.shared[i].heads;
            if (rest < plan.shared[i].pairs) {
                head_index = rest * each, heads = min(each, all_heads() - head_index),
                segment = pairs_of_head() + i;
                return;
            }
            rest -= plan.shared[i].pairs;
        }
        head_index = spare = rest, segment = 0;
    }

    /* Whether the pair has a map phase. */
    static __device__ bool has_map_phase(const fkda_hopper_fwd_args &all)
    {
        const fkda_relay &plan = all.cut.relay;
        const int of_head = plan.inner + 1, own = all.fwd.sequences * all.fwd.heads * of_head;
        if (plan.spare_pairs || pair() >= own) return pair() < plan.needed_pairs;
        return pair() != quotient(pair(), of_head) * of_head;
    }

    /* Pairs that one head has for itself. */
    __device__ int pairs_of_head() const
    {
        return plan.inner + 1;
    }
    __device__ int all_heads() const
    {
        return cut.args.sequences * cut.args.heads;
    }
    __device__ int sequence_of(int index) const
    {
        return cut.args.sequences == 1 ? 0 : index / cut.args.heads;
    }
    __device__ int head(int index) const
    {
        return index - sequence_of(index) * cut.args.heads;
    }
    __device__ fkda_cut_sequence sequence(int index) const
    {
        const int n = sequence_of(index);
        return {n, segments, n * segments, 0};
    }

    /* Spare pairs compute the outputs of first segments. */
    __device__ bool spares_compute_first() const
    {
        return plan.spare_pairs > 0 && segments > 1;
    }

    /* Maps of each head. */
    __device__ int maps() const
    {
        return max(segments - 2, 0);
    }

    __device__ int spare_pairs() const
    {
        return plan.spare_pairs;
    }

    __device__ fkda_segment segment_of(const fkda_cut_sequence &c, int i) const
    {
        return segments > 1 ? cut.segment(c, i) : cut.whole(c.sequence);
    }
};

/* Gives out the work items of one phase, by what the pair is for. */
template <class Block, class Assignment> struct RelaySource : WorkItemMaker<Block> {
    Assignment assignment;
    int head_index, next_segment; /* of the next work item; past the last segment: there is none */
    bool joins;                   /* the CTA takes part in the join phase */
    bool before_join;             /* the CTA takes part, and has met no work item yet that follows the join */

    __device__ RelaySource(const fkda_hopper_fwd_args &all, int rank_in_pair, int)
        : WorkItemMaker<Block>(all, rank_in_pair), assignment(all), head_index(assignment.head_index),
          joins(false), before_join(false)
    {
        if constexpr (Block::JOINS)
            joins = before_join = reinterpret_cast<const Shared<Block> *>(cta_memory())->join.has_rows;
        assignment.segments = Cut::of_first_lane(assignment.segments);
        next_segment = first_segment();
    }

    __device__ int first_segment() const
    {
        const int none = assignment.segments;
        if (assignment.spare >= 0)
            return !Block::MAPS && assignment.spares_compute_first() && head_index < assignment.all_heads()
                       ? 0
                       : none;
        if (assignment.segment > 0)
            return assignment.segment < assignment.segments - 1 ? assignment.segment : none;
        if (!Block::MAPS) return assignment.spares_compute_first() ? assignment.segments - 1 : 0;
        return assignment.spares_compute_first() ? 0 : none;
    }

    /* Goes to the next work item. A spare pair goes from the first segment of one head to the first segment
     * of another one. The pair of a first segment that has computed its outputs goes to the last segment of
     * its head. The pair of a shared segment goes to the segment of its next head. */
    __device__ void advance()
    {
        const bool first = next_segment == 0;
        if (!first && ++head_index < assignment.head_index + assignment.heads) return;
        next_segment = assignment.segments;
        if (Block::MAPS || !first) return;
        if (assignment.spare < 0)
            next_segment = assignment.segments > 1 ? assignment.segments - 1 : 1;
        else if ((head_index += assignment.spare_pairs()) < assignment.all_heads())
            next_segment = 0;
    }

    __device__ LoadedItem next()
    {
        const int i = next_segment, head = assignment.head(head_index);
        if (i >= assignment.segments) {
            LoadedItem none = WorkItemMaker<Block>::none();
            if (before_join) none.attributes |= JOINS_BEFORE;
            return none;
        }
        const fkda_cut_sequence c = assignment.sequence(head_index);
        const fkda_segment s = Cut::of_first_lane(assignment.segment_of(c, i));
        LoadedItem item = this->item_of(s, head);
        advance();
        if (Block::MAPS) {
            item.flags = this->rank == 0 ? assignment.cut.flags(head, s.slot, FKDA_FLAG_MAP)
                                         : assignment.cut.flags(head, s.slot + 1, FKDA_FLAG_STATE);
            item.attributes |= next_segment < assignment.segments ? SIGNALS_FINAL | NOT_LAST : SIGNALS_FINAL;
            return item;
        }
        if (i == 0) {
            if (assignment.segments == 1) return item;
            if (assignment.spares_compute_first()) { /* the state after it comes from a map phase */
                item.final = nullptr;
                if (in_place()) signal_or_await_read(item, c, head, SIGNALS_READ);
                return item;
            }
            item.flags = assignment.cut.flags(head, s.slot + 1, FKDA_FLAG_STATE) + item.first_row / 16;
            item.attributes |= SIGNALS_FINAL;
            return item;
        }
        item.flags = assignment.cut.flags(head, s.slot, i == 1 ? FKDA_FLAG_STATE : FKDA_FLAG_JOINED) +
                     item.first_row / 16;
        item.attributes |= AWAITS_INITIAL;
        if (joins) item.attributes |= before_join ? AFTER_JOIN | JOINS_BEFORE : AFTER_JOIN;
        before_join = false;
        if (i == assignment.segments - 1 && assignment.spares_compute_first() && in_place())
            signal_or_await_read(item, c, head, AWAITS_READ);
        return item;
    }

    __device__ bool in_place() const
    {
        return this->args.final_state.data && this->args.final_state.data == this->args.initial_state.data;
    }

    __device__ void signal_or_await_read(WorkItem &item, const fkda_cut_sequence &c, int head, int how) const
    {
        item.read_flags = assignment.cut.flags(head, c.first_slot, FKDA_FLAG_STATE) + item.first_row / 16;
        item.attributes |= how;
    }
};

} // namespace fkda

#endif
