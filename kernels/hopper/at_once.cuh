/*
 * All segments in one launch, where every head of a segment but the last has a pair of blocks and all of them run at the same time:
 * blocks then wait for each other where else one launch would wait for the one before. A pair
 *
 *   finds its segment's map and what that makes of zeros, or of a first segment the state after it;
 *   carries some rows of the head through all maps, from the state after the first segment to those that others start from (join.cuh); and
 *   walks through its segment. The pair of a first segment does so for the last one.
 *
 * First segments' outputs are the work of pairs that are more than that, from the start. If there are none, the pair of a first segment
 * walks through that from the start, to its outputs and the state after it; it has no map to find, and begins with its second part.
 *
 * Where so many pairs are left that heads could have half of one more each, say, a segment more is shared: a pair has it of two heads, finds
 * one's map and then the other's, and later walks through one and then the other. It is shorter than the others.
 *
 * Each goes on where the flags of what it needs are set (fkda_cut), which are zeros before the launch.
 */
#ifndef FKDA_HOPPER_AT_ONCE_CUH
#define FKDA_HOPPER_AT_ONCE_CUH

#include "deal.cuh"
#include "join.cuh"
#include "shared.cuh"

namespace fkda
{

/* What the pair that asks is there for. */
struct AtOnce {
    Cut cut;
    const fkda_relay &plan;
    int segments; /* of each sequence */
    int unit;     /* the pair's first head, counted over all sequences; */
    int units;    /* how many it has; */
    int segment;  /* and the segment of theirs that it finds the maps of */
    int spare;    /* or, if this is not negative, its number among those that are more than are needed */

    static __device__ int pair()
    {
        return static_cast<int>(blockIdx.x) / FKDA_HOPPER_PAIR_CTAS;
    }

    /* Of small numbers. */
    static __device__ int quotient(int x, int y)
    {
        return static_cast<int>((static_cast<float>(x) + 0.5f) * rcp(static_cast<float>(y)));
    }

    __device__ explicit AtOnce(const fkda_hopper_fwd_args &all)
        : cut{all.fwd, all.cut}, plan(all.cut.relay), segments(plan.segments), units(1), spare(-1)
    {
        const Task first = cut.sequence(0);
        if (first.chunks != plan.chunks) segments = min(cut.segments_of(first.length), plan.inner + 2);
        int rest = pair() - heads() * of_head();
        if (rest < 0) {
            unit = quotient(pair(), of_head()), segment = pair() - unit * of_head();
            return;
        }
        for (int i = 0; i < FKDA_RELAY_SHARED; i++) {
            const int each = plan.shared[i].heads;
            if (rest < plan.shared[i].pairs) {
                unit = rest * each, units = min(each, heads() - unit), segment = of_head() + i;
                return;
            }
            rest -= plan.shared[i].pairs;
        }
        unit = spare = rest, segment = 0;
    }

    /* Whether the pair may have something to do before states are joined. */
    static __device__ bool finds_maps(const fkda_hopper_fwd_args &all)
    {
        const fkda_relay &plan = all.cut.relay;
        const int of_head = plan.inner + 1, own = all.fwd.sequences * all.fwd.heads * of_head;
        if (plan.spare_pairs || pair() >= own) return pair() < plan.needed_pairs;
        return pair() != quotient(pair(), of_head) * of_head;
    }

    __device__ int of_head() const /* pairs that have one head, for each head */
    {
        return plan.inner + 1;
    }
    __device__ int heads() const /* of all sequences */
    {
        return cut.args.sequences * cut.args.heads;
    }
    __device__ int sequence_of(int of_unit) const
    {
        return cut.args.sequences == 1 ? 0 : of_unit / cut.args.heads;
    }
    __device__ int head(int of_unit) const
    {
        return of_unit - sequence_of(of_unit) * cut.args.heads;
    }
    __device__ fkda_cut_sequence sequence(int of_unit) const
    {
        const int n = sequence_of(of_unit);
        return {n, segments, n * segments, 0};
    }

    /* Whether the pair of a first segment leaves its outputs to another one. */
    __device__ bool spared() const
    {
        return plan.spare_pairs > 0 && segments > 1;
    }

    __device__ int maps() const /* of a head */
    {
        return max(segments - 2, 0);
    }

    __device__ int spares() const
    {
        return plan.spare_pairs;
    }

    __device__ fkda_segment segment_of(const fkda_cut_sequence &c, int i) const
    {
        return segments > 1 ? cut.segment(c, i) : cut.whole(c.sequence);
    }
};

/* The rows of a head are carried in JOIN_PARTS, by a block each: those of the pairs that have this head alone in turn, without the one that has
 * the first segment, and is late, where there are enough others. Called ahead, since what is computed first takes time. */
constexpr int JOIN_PARTS = DIM / FKDA_JOIN_ROWS;
template <class Way> static __device__ void share_out(const Way &way, Joining<true> &join, int rank)
{
    const int left_out = FKDA_HOPPER_PAIR_CTAS * (way.of_head() - 1) >= JOIN_PARTS;
    const int part = FKDA_HOPPER_PAIR_CTAS * (way.segment - left_out) + rank;
    const bool none =
        way.maps() == 0 || way.spare >= 0 || way.segment >= way.of_head() || part < 0 || part >= JOIN_PARTS;
    join.when = none                              ? Joining<true>::NO_PART
                : way.spared() || way.segment > 0 ? Joining<true>::AT_FIRST
                                                  : Joining<true>::LATER;
    if (none) return;
    join.head = way.head(way.unit), join.first_slot = way.sequence(way.unit).first_slot + 1,
    join.maps = way.maps();
    join.part = part, join.step = FKDA_HOPPER_PAIR_CTAS * (way.of_head() - left_out);
}

template <class Kind, class Way = AtOnce> struct AtOnceDealer : Dealing<Kind> {
    Way way;
    int unit, next; /* the next piece: a head, and which of its segments; past the last: none */
    bool joins;

    __device__ AtOnceDealer(const fkda_hopper_fwd_args &all, int block_rank, int)
        : Dealing<Kind>(all, block_rank), way(all), unit(way.unit), joins(false)
    {
        if constexpr (Kind::JOINS)
            joins =
                reinterpret_cast<const Shared<Kind> *>(block_memory())->join.when != Joining<true>::NO_PART;
        next = first_segment();
    }

    __device__ int first_segment() const
    {
        const int none = way.segments;
        if (way.spare >= 0) return Kind::OUTPUTS && way.spared() && unit < way.heads() ? 0 : none;
        if (way.segment > 0) return way.segment < way.segments - 1 ? way.segment : none;
        if (Kind::OUTPUTS) return way.spared() ? way.segments - 1 : 0;
        return way.spared() ? 0 : none;
    }

    /* A first segment's walk is followed by another such one, or by the last segment's. A segment that is shared is followed by the same
     * one of the next head. */
    __device__ void advance()
    {
        const bool first = next == 0;
        if (!first && ++unit < way.unit + way.units) return;
        next = way.segments;
        if (!Kind::OUTPUTS || !first) return;
        if (way.spare < 0)
            next = way.segments > 1 ? way.segments - 1 : 1;
        else if ((unit += way.spares()) < way.heads())
            next = 0;
    }

    __device__ Piece deal()
    {
        const int i = next, head = way.head(unit);
        if (i >= way.segments) return Dealing<Kind>::none();
        const fkda_cut_sequence c = way.sequence(unit);
        const fkda_segment s = way.segment_of(c, i);
        Piece piece = this->piece_of(s, head);
        advance();
        if (!Kind::OUTPUTS) {
            piece.flags = this->rank == 0 ? way.cut.flags(head, s.slot, FKDA_FLAG_MAP)
                                          : way.cut.flags(head, s.slot + 1, FKDA_FLAG_STATE);
            piece.kind |= next < way.segments ? SIGNAL | MORE : SIGNAL;
            return piece;
        }
        if (i == 0) {
            if (way.segments == 1) return piece;
            if (way.spared()) { /* the state after it comes from the first part of the pair of the segment */
                piece.final = nullptr;
                return piece;
            }
            piece.flags = way.cut.flags(head, s.slot + 1, FKDA_FLAG_STATE) + piece.first_row / 16;
            piece.kind |= SIGNAL;
            return piece;
        }
        piece.flags =
            way.cut.flags(head, s.slot, i == 1 ? FKDA_FLAG_STATE : FKDA_FLAG_JOINED) + piece.first_row / 16;
        piece.kind |= AWAIT;
        if (this->joins) piece.kind |= JOIN;
        return piece;
    }
};

/* For the join: all of the block's own slots but the first, and the last slot. */
template <class Kind> struct AtOnceMemory {
    static constexpr int QUARTERS = MAP_QUARTERS_AHEAD, IN_FRONT = QUARTERS - 1;
    struct Front {
        MapQuarter quarter[IN_FRONT];
    };
    struct Back {
        MapQuarter quarter;
        JoinRows rows;
    };
    static_assert(sizeof(Front) <= (Kind::OWN - 1) * sizeof(Tokens<Kind>) &&
                      sizeof(Back) <= sizeof(Tokens<Kind>),
                  "that is where they are");
    Shared<Kind> &shared;

    __device__ Back &back() const
    {
        return *reinterpret_cast<Back *>(&shared.tokens[Kind::SLOTS - 1]);
    }
    __device__ MapQuarter &quarter(int i) const
    {
        return i < IN_FRONT ? reinterpret_cast<Front *>(&shared.tokens[1])->quarter[i] : back().quarter;
    }
    __device__ JoinRows &rows() const
    {
        return back().rows;
    }
    __device__ Ring<QUARTERS> &ring() const
    {
        return shared.join.ring;
    }

    /* The blocks of a pair need the same maps: each brings every other quarter, to both. */
    static __device__ void bring(MapQuarter *to, const MapQuarter *from, int q, uint64_t *barrier)
    {
        if (q % FKDA_HOPPER_PAIR_CTAS == cluster_rank()) copy_bulk_to_both(to, from, sizeof *to, barrier);
    }
    static __device__ void release(uint64_t *barrier)
    {
        arrive_in_both(barrier);
    }
    static __device__ void arrive_in_both(uint64_t *barrier)
    {
        mbarrier_arrive_warp(barrier);
        mbarrier_arrive_warp_there(barrier);
    }
};

/* A block's part in the join. */
template <class Kind> struct AtOnceJoin {
    using Memory = AtOnceMemory<Kind>;
    Shared<Kind> &shared;
    Join<Memory> join;
    int first_slot, maps;

    __device__ AtOnceJoin(const fkda_hopper_fwd_args &all, Shared<Kind> &s)
        : shared(s), join(all.fwd, all.cut, Memory{s}), first_slot(s.join.first_slot), maps(s.join.maps)
    {
        join.head = s.join.head;
    }

    __device__ int *flags(int slot, int kind) const
    {
        return Cut{join.args, join.cut}.flags(join.head, slot, kind);
    }

    /* By one warp. */
    __device__ void bring_maps()
    {
        if (shared.join.when == Joining<true>::NO_PART) return;
        mbarrier_wait(&shared.join.room, 0);
#pragma unroll 1
        for (int part = shared.join.part; part < JOIN_PARTS; part += shared.join.step)
            join.bring(join.way_through(first_slot, maps), [&](int slot) {
                await_flag(flags(slot, FKDA_FLAG_MAP) + threadIdx.x % (DIM / 16));
                fence_async_proxy_of_all_memory();
            });
    }

    /* By the recurrence's. */
    __device__ void carry_rows()
    {
        const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
        static_assert(FKDA_MAPS_CHAINED < 32, "a lane for each state");
        Memory::arrive_in_both(&shared.join.room);
        join.sync(); /* rows go where the last chunk of a piece before may be */
#pragma unroll 1
        for (int part = shared.join.part; part < JOIN_PARTS; part += shared.join.step) {
            join.row = part * FKDA_JOIN_ROWS;
            await_flag(flags(first_slot + min(lane, maps), FKDA_FLAG_STATE) + part);
            join.carry_from(first_slot, join.way_through(first_slot, maps));
            join.sync(); /* all rows are there */
            for (int i = warp; i < maps; i += join.WARPS)
                set_flag(flags(first_slot + 1 + i, FKDA_FLAG_JOINED) + part);
        }
        fence_async_proxy(); /* later copies overwrite the rows */
        Memory::arrive_in_both(&shared.join.over);
    }
};

} // namespace fkda

#endif
