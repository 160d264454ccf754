/*
 * The preparation: everything of a chunk's tokens and channels that does not depend on the state, ahead of
 * the recurrence.
 *
 * Algorithm. Teams of two or four warps take the CTA's own chunks in turn. A warp has all tokens of a chunk
 * in its share of the channels. The team first finds the norms (norms.cuh), unless the loader does. Each warp
 * then works on 16 channels of a subchunk at a time (prepare_slice.cuh): gates, running sums of the log
 * decay, the decayed tiles K~, Q~ and Kr, which it writes over k, q and g, and products over channels. The
 * team then leaves the products to the solver, and the state's decay over the chunk to the recurrence.
 *
 * Why. Decays are counted from a subchunk's start, where exp(-G) stays in the range of fp32 even if all 16
 * gates are at the bound of -5. Products over channels inside a subchunk are tf32 for that range: k exp(-G)
 * reaches e^80. Products between subchunks, and all operands that meet the state, have factors of at most
 * one, and are fp16.
 *
 * Optimizations. Loops over subchunks and channels stay loops: the code of all roles together has to fit in
 * the instruction cache.
 */
#ifndef FKDA_HOPPER_PREPARE_CUH
#define FKDA_HOPPER_PREPARE_CUH

#include "bad_tokens.cuh"
#include "norms.cuh"
#include "prepare_slice.cuh"

namespace fkda
{

template <class Block> struct Preparation : SlicePreparation<Block> {
    using Base = SlicePreparation<Block>;
    using Base::args, Base::shared, Base::team, Base::warp, Base::lane, Base::g, Base::t, Base::gate_here;
    using Base::SAVES_REGISTERS, Base::SUBCHUNKS, Base::WARPS;
    using Sums = typename Base::Sums;
    using Gates = typename Base::Gates;
    using SlicePlace = typename Base::SlicePlace;
    static constexpr int SHARE = DIM / WARPS;                             /* channels of a warp */
    static constexpr int NORMS = (Block::QUERIES ? 2 : 1) * Block::CHUNK; /* of a chunk's keys and queries */
    static_assert(SHARE <= 64 && SHARE % 16 == 0, "a share lies in one half of the channels, 16 at a time");
    /* A general relay has no registers left for what tells whether it must be careful (prepare_slice.cuh). */
    static constexpr bool ALWAYS_CAREFUL = Block::GENERAL && Block::RELAYS;
    /* The team asks for the gates of a chunk's first slice right before it finds the norms. Without norms to
     * find, it asks before it waits for the inputs. So it does in a solo CTA, where ptxas makes the norms
     * wait for the gates. */
    static constexpr bool NORMS_HIDE_GATES = SUBCHUNKS == 2 && !Block::LOADER_FINDS_NORMS;
    unsigned meetings; /* of the team so far; for racecheck alone */

    __device__ Preparation(const fkda_fwd_args &a, Shared<Block> &s) : Base(a, s), meetings(0)
    {
    }

    /* The team's warps wait for each other. racecheck does not see the order that a named barrier makes
     * between warps which met at other named barriers before, as in the first phase of a relay; for it they
     * meet at an mbarrier. */
    __device__ void meet()
    {
        if constexpr (FOR_RACECHECK) {
            mbarrier_arrive_warp(&shared.meeting[team]);
            mbarrier_wait(&shared.meeting[team], meetings++ % 2);
        } else
            barrier_sync<TEAM_BARRIER, 32 * WARPS>(team);
    }

    /* ---- Once for each head ---- */

    /* Element i of A_log or dt_bias, which may be absent with options. */
    static __device__ float load_parameter(const float *tensor, int i)
    {
        return Block::OPTIONS && !tensor ? 0.0f : __ldg(&tensor[i]);
    }

    __device__ void load_gate_parameters(int head)
    {
        const GateOfCall call = gate_of_call<Block>(args);
        float bias[SHARE / 32]; /* on their way while A_log is waited for */
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++)
            bias[i] = load_parameter(args.dt_bias, head * DIM + warp * SHARE + 32 * i + lane);
        const float A_log = load_parameter(args.A_log, head);
        const float slope = Block::OPTIONS ? call.slope(A_log) : hopper_sigmoid_gate_slope(A_log);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++)
            shared.gate_offset[team][warp * SHARE + 32 * i + lane] =
                Block::OPTIONS ? call.offset(bias[i], slope) : hopper_sigmoid_gate_offset(bias[i], slope);
        gate_here = {slope,
                     Block::OPTIONS ? call.factor(A_log, args.lower_bound)
                                    : hopper_sigmoid_gate_inverse_bound(args.lower_bound),
                     head};
        if (lane == 0) shared.gate[team][warp] = gate_here;
        __syncwarp();
    }

    /* ---- Once for each chunk ---- */

    /* Makes the tokens from `left` on, which lie past the end of the sequence, have no effect: keys and
     * queries of zeros, norms that leave them zeros, and gates that decay by exactly nothing. */
    __device__ void clear_past_end(int slot, int left)
    {
        Tokens<Block> &tokens = shared.tokens[slot];
        if (Block::LOADER_FINDS_NORMS && warp == 0 && lane >= left)
            shared.inverse_norm[slot][0][0][lane] = 1.0f;
        const uint32_t none = no_decay<Block>(args);
        for (int i = 32 * warp + lane; i < (Block::CHUNK - left) * (DIM / 64) * (ROW / 16); i += 32 * WARPS) {
            auto &half = tokens.half[i / (ROW / 16) % 2];
            const int at = (left + i / (2 * ROW / 16)) * ROW + i % (ROW / 16) * 16;
            *reinterpret_cast<uint4 *>(&half.tile[G][at]) = make_uint4(none, none, none, none);
            *reinterpret_cast<uint4 *>(&half.tile[K][at]) = make_uint4(0, 0, 0, 0);
            if constexpr (Block::QUERIES)
                *reinterpret_cast<uint4 *>(&half.tile[Q][at]) = make_uint4(0, 0, 0, 0);
        }
        meet();
    }

    /* Turns the sums over all tokens into the state's decay over the chunk, less one. The decay of a slow
     * channel, rounded to fp32 itself, would be off by one amount chunk after chunk. Returns whether one of
     * this warp's sums is NaN, or one of the chunk's norms is not usual; if the preparation was not careful,
     * also whether there are wide elements. */
    template <bool careful>
    __device__ bool finish_gamma(float *gamma, const float *inverse_norm, Gates &gates) const
    {
        __syncwarp();
        float sum = 0.0f;
        bool usual = true;
#pragma unroll
        for (int i = 0; i < NORMS; i += 32)
            usual &= NORMS % 32 && lane >= NORMS ? true : is_usual_norm(inverse_norm[i + lane]);
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++) {
            float &x = gamma[32 * i + lane];
            sum += x;
            if (Block::UNBOUNDED && SUBCHUNKS == 1) gates.least = fminf(gates.least, x);
            x = ex2_minus_1(x);
        }
        bool unusual = sum != sum || !usual;
        if constexpr (Block::UNBOUNDED && !ALWAYS_CAREFUL) {
            const bool wide = gates.least < -Base::MAY_BE_WIDE;
            if (careful)
                gates.wide = __any_sync(~0u, wide);
            else
                unusual |= wide;
        }
        return __any_sync(~0u, unusual);
    }

    /* Finds the norms that are not usual, for which all warps of the team have come here. */
    __device__ void find_unusual_norms(int slot, int round, const ChunkCursor<Block> &at)
    {
        float *const inverse_norm = norms(slot, round)[0]; /* of keys, then of queries */
        bool any = false;
        for (int i = lane; i < NORMS; i += 32) any |= !is_usual_norm(inverse_norm[i]);
        if (!__any_sync(~0u, any)) return;
        meet(); /* all warps have looked */
        for (int i = 32 * warp + lane; i < NORMS; i += 32 * WARPS) {
            const bool is_key = i < Block::CHUNK;
            const fkda_token_strides &strides = is_key ? args.k_strides : args.q_strides;
            if (!is_usual_norm(inverse_norm[i]))
                inverse_norm[i] = unusual_inverse_norm<Block>(
                    args, is_key, at.place(strides, i % Block::CHUNK, args.group));
        }
        meet();
    }

    /* Prepares for the second try at a chunk (bad_tokens.cuh). If A_log or dt_bias is NaN, all tokens are
     * bad; the next chunk loads both anew. */
    __device__ void restore(int slot, int round, const ChunkCursor<Block> &at)
    {
        HeadGate &gate = shared.gate[team][warp];
        float *offset = &shared.gate_offset[team][warp * SHARE];
        bool bad_head = gate.slope != gate.slope || (Block::OPTIONS && gate.factor != gate.factor);
        __syncwarp();
        if (bad_head) gate_here.slope = gate.slope = NEAREST_TO_ZERO;
        if (Block::OPTIONS && bad_head) gate_here.factor = gate.factor = NEAREST_TO_ZERO;
#pragma unroll
        for (int i = 0; i < SHARE / 32; i++)
            if (float &x = offset[32 * i + lane]; x != x) x = 0.0f, bad_head = true;
        bad_head = __any_sync(~0u, bad_head);
        if (bad_head && lane == 0) gate.head = -1;
        __syncwarp();
        find_unusual_norms(slot, round, at);
        int first = restore_inputs<Block, SHARE>(args, shared.tokens[slot], at, warp * SHARE, gate, offset,
                                                 norms(slot, round)[0], lane);
        if (bad_head) first = 0;
        mbarrier_wait(&shared.product_ring.empty[team], round ^ 1);
        if (lane == 0) atomicMin(&shared.products[team].first_bad, first);
        __syncwarp();
    }

    /* Calls visit(w, tile, a, b) for all sums: w is 0 for K~ and 1 for Q~, a and b are in row g and columns 2
     * t and 2 t + 1 of the tile. */
    template <class Visit> __device__ void for_each_tile(const Sums &sums, Visit visit) const
    {
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            const float(&x)[3][4] = sums.within[sub];
            const int diagonal = Products<Block>::ON_DIAGONAL + 2 * sub,
                      below = Products<Block>::BELOW_IT + sub;
            if constexpr (Block::QUERIES) {
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    visit(which, diagonal, x[0][2 * which], x[0][2 * which + 1]);
                    visit(which, below, x[1][2 * which], x[1][2 * which + 1]);
                    visit(which, diagonal + 1, x[2][2 * which], x[2][2 * which + 1]);
                }
            } else {
                visit(0, diagonal, x[0][0], x[0][1]);
                visit(0, below, x[0][2], x[0][3]);
                visit(0, diagonal + 1, x[1][2], x[1][3]);
            }
        }
        if constexpr (SUBCHUNKS == 2) {
#pragma unroll
            for (int which = 0; which < (Block::QUERIES ? 2 : 1); which++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const float(&x)[4] = sums.across[which][n % 2];
                    visit(which, Products<Block>::ACROSS + n, x[n / 2 * 2], x[n / 2 * 2 + 1]);
                }
        }
    }

    /* The first PARTIALS warps leave their sums. If there are more warps, the other ones then add theirs. */
    __device__ void store_sums(const Sums &sums)
    {
        constexpr int PARTIALS = Block::PARTIALS;
        static_assert(WARPS == PARTIALS || WARPS == 2 * PARTIALS, "one or two warps to a partial sum");
        auto &to = shared.products[team].partial[warp % PARTIALS];
        float *const place = &to[0][0][g][2 * t];
        const auto at = [=](int which, int tile) {
            return place + 64 * (Products<Block>::TILES * which + tile);
        };
        if (warp < PARTIALS)
            for_each_tile(sums,
                          [=](int which, int tile, float x, float y) { store_two(at(which, tile), x, y); });
        if (WARPS == PARTIALS) return;
        meet();
        if (warp >= PARTIALS)
            for_each_tile(sums, [=](int which, int tile, float x, float y) {
                const float2 other = *reinterpret_cast<const float2 *>(at(which, tile));
                store_two(at(which, tile), x + other.x, y + other.y);
            });
    }

    /* The place of a chunk's norms; `round` is the parity of the team's round in the ring of products. */
    __device__ auto &norms(int slot, int round) const
    {
        return shared
            .inverse_norm[Block::LOADER_FINDS_NORMS ? slot : team][WARPS == Block::PARTIALS ? round : 0];
    }

    /* Prepares a slice. `place.channel` is counted from the warp's first channel. The addresses of the
     * slice's tile, offsets and norms are found anew for each slice, so that no register keeps them from
     * slice to slice. */
    template <bool careful>
    __device__ void find_and_prepare_slice(int slot, int round, SlicePlace place, Sums &sums, Gates &gates)
    {
        this->find_place();
        place.channel += warp * SHARE;
        auto &half = shared.tokens[slot].half[place.channel / 64];
        this->template prepare_slice<careful>(
            place,
            ((shared_address(&half) + matrix_row(lane)) ^ (2 * (place.channel % 64))) +
                place.sub * SUBCHUNK_BYTES,
            &shared.gate_offset[team][place.channel], norms(slot, round)[0] + g + place.sub * SUBCHUNK,
            shared.stage[slot].gamma_minus_1 + place.channel, sums, gates);
    }

    /* All slices of this warp. Returns whether it needs another try: with inputs that are restored, in which
     * gates are repaired (bad_tokens.cuh), or carefully. */
    template <bool careful>
    __device__ bool prepare_slices(int slot, int round, const ChunkCursor<Block> &at, bool repairs,
                                   Sums &sums, Gates &gates)
    {
        const int first = warp * SHARE; /* channel */
        if (Block::UNBOUNDED) gates.least = 0.0f;
        const uint32_t half = shared_address(&shared.tokens[slot].half[first / 64]) + matrix_row(lane);
        const float *factor = norms(slot, round)[0] + g;
        float *gamma = shared.stage[slot].gamma_minus_1;
#pragma unroll 1
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            if (sub == 1) { /* slices add to the last of `within`: the first subchunk's sums make room */
                __syncwarp();
#pragma unroll
                for (int i = 0; i < 12; i++) {
                    sums.within[0][i / 4][i % 4] = sums.within[SUBCHUNKS - 1][i / 4][i % 4];
                    sums.within[SUBCHUNKS - 1][i / 4][i % 4] = 0.0f;
                }
            }
#pragma unroll 1
            for (int c = 0; c < SHARE; c += 16) {
                if constexpr (Base::GATES_AHEAD && !careful && !SAVES_REGISTERS) {
                    const bool ends = c + 16 == SHARE;
                    gates.next += ends ? SUBCHUNK * args.g_strides.token - (SHARE - 16) : 16;
                    if (ends && sub + 1 == SUBCHUNKS) gates.next = nullptr;
                }
                if constexpr (Block::GENERAL || (Block::OPTIONS && careful))
                    find_and_prepare_slice<careful>(slot, round, {at, sub, c, repairs}, sums, gates);
                else
                    this->template prepare_slice<careful>(
                        {at, sub, first + c, repairs}, (half ^ 2 * (first % 64 + c)) + sub * SUBCHUNK_BYTES,
                        &shared.gate_offset[team][first + c], factor + sub * SUBCHUNK, gamma + first + c,
                        sums, gates);
            }
        }
        if (SAVES_REGISTERS) this->find_place();
        return finish_gamma<careful>(&shared.stage[slot].gamma_minus_1[warp * SHARE], norms(slot, round)[0],
                                     gates);
    }

    /* Ends the preparation of a chunk in an own slot: what the recurrence and the solver get. */
    __device__ void finish_chunk(int slot, int round, const Sums &sums)
    {
        fence_async_proxy();
        mbarrier_wait(&shared.product_ring.empty[team], round ^ 1);
        store_sums(sums);
        mbarrier_arrive_warp(&shared.product_ring.full[team]);
        mbarrier_arrive_warp(&shared.chunk_ring.ready[slot]);
    }

    /* ---- The role ---- */

    __device__ void run()
    {
        constexpr int RING = Block::OWN_SLOTS;
        Slot<RING> slot(team);
        /* The parity of a team's chunk follows from its slot, if the ring is an even number of rounds of the
         * teams. */
        constexpr bool PARITY_BY_SLOT = RING % (2 * Block::TEAMS) == 0;
        int count = 0; /* of the team's chunks so far */
        if (lane == 0) {
            shared.gate[team][warp].head = -1;
            if (warp == 0) shared.products[team].first_bad = NO_TOKEN; /* before the team first meets */
        }
        __syncwarp();
        ChunkCursor<Block> at(shared.work, Block::CTAS * team + pair_rank<Block>());
        /* The parity of the team's round in the ring of products. */
        const auto round = [&] { return (PARITY_BY_SLOT ? slot.index / Block::TEAMS : count) % 2; };
        const auto advance = [&] {
            slot.advance(Block::TEAMS);
            at.advance(Block::CTAS * Block::TEAMS);
            count++;
        };
        Gates gates;
        gates.wide = false;
        /* Whether the chunk is prepared carefully from the start: if the chunk before it had wide elements,
         * this one probably has some too. */
        const auto starts_carefully = [&] {
            return (Block::UNBOUNDED && !ALWAYS_CAREFUL && gates.wide) ||
                   (Base::GATES_AHEAD && at.here() < Block::CHUNK);
        };
        while (!at.done()) {
            /* Chunks without bad tokens. The rare rest stands outside this loop, because loops of all roles
             * share the instruction cache. */
            bool bad = false;
            while (!bad && !at.done()) {
                if (SAVES_REGISTERS) this->find_place();
                if (!NORMS_HIDE_GATES) ask_for_first_gates(at, gates);
                begin_chunk(slot, at, !Block::LOADER_FINDS_NORMS || count == 0, round(), gates);
                Sums sums = {};
                bad = starts_carefully() ||
                      prepare_slices<ALWAYS_CAREFUL>(slot.index, round(), at, false, sums, gates);
                if (bad) break;
                finish_chunk(slot.index, round(), sums);
                advance();
            }
            if (!bad) break;
            Sums sums = {};
            if constexpr (Block::UNBOUNDED && !ALWAYS_CAREFUL) {
                bool restores = !starts_carefully();
#pragma unroll 1
                for (;; restores = true) {
                    if (restores) restore(slot.index, round(), at);
                    sums = {};
                    if (!prepare_slices<true>(slot.index, round(), at, restores, sums, gates) || restores)
                        break;
                }
            } else {
                restore(slot.index, round(), at);
                prepare_slices<true>(slot.index, round(), at, true, sums, gates);
            }
            finish_chunk(slot.index, round(), sums);
            advance();
        }
    }

    /* Asks for the gates in fp32 of the team's next chunk, if it belongs to the same work item. */
    __device__ void prefetch_gates(const ChunkCursor<Block> &at) const
    {
        constexpr int AHEAD = Block::CTAS * Block::TEAMS * Block::CHUNK;
        bool there;
        if constexpr (Block::BACKWARDS)
            there = at.has_more_than(Block::CTAS * Block::TEAMS);
        else
            there = AHEAD + lane < at.left;
        if (lane < Block::CHUNK && there)
            prefetch_to_l2(static_cast<const float *>(args.g) +
                               at.place(args.g_strides, Block::BACKWARDS ? lane - AHEAD : AHEAD + lane) +
                               warp * SHARE,
                           SHARE * 4);
    }

    /* With GATES_AHEAD: asks for the raw gates of the first slice of a chunk that the sequence fills. */
    __device__ void ask_for_first_gates(const ChunkCursor<Block> &at, Gates &gates) const
    {
        if constexpr (Base::GATES_AHEAD)
            if (at.here() >= Block::CHUNK) {
                gates.next = this->first_gate(at, 0, warp * SHARE);
                this->load_gates_ahead(gates.raw, gates.next);
            }
    }

    /* Waits for the inputs of a chunk in an own slot, and for what else its preparation needs. */
    __device__ void begin_chunk(const Slot<Block::OWN_SLOTS> &slot, const ChunkCursor<Block> &at,
                                bool finds_norms, int round, Gates &gates)
    {
        constexpr int RING = Block::OWN_SLOTS;
        if (at.head != shared.gate[team][warp].head) load_gate_parameters(at.head);
        if (has_fp32_gates<Block>(args)) prefetch_gates(at);
        /* If another team had the slot in the round before, this team does not know whether that round is
         * over, and the parity of `loaded` could deceive it. `empty` says that it is over. */
        static_assert(RING >= Block::TEAMS, "a team's next slot is another one than its last slot");
        if (RING % Block::TEAMS) mbarrier_wait(&shared.chunk_ring.empty[slot.index], slot.parity ^ 1);
        if (finds_norms) mbarrier_wait(&shared.chunk_ring.loaded[slot.index], slot.parity);
        if (Block::LOADER_FINDS_NORMS) mbarrier_wait(&shared.chunk_ring.normed[slot.index], slot.parity);
        if (at.here() < Block::CHUNK) clear_past_end(slot.index, at.here());
        if (NORMS_HIDE_GATES) ask_for_first_gates(at, gates);
        if (!finds_norms) return;
        store_norms<Block, WARPS>(norms(slot.index, round), shared.tokens[slot.index], args, warp, lane);
        meet();
    }
};

} // namespace fkda

#endif
