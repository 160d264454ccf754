/*
 * The channel warps: they start the copies of chunks, prepare chunks for the row warps, and make dq, dk and
 * dg of the sums that the row warps leave.
 *
 * On the way back they prepare a chunk while the row warps have the chunk after it in hand, and then go
 * through the channels of the chunk after it.
 */
#ifndef FKDA_HOPPER_BWD_CHANNEL_ROLE_CUH
#define FKDA_HOPPER_BWD_CHANNEL_ROLE_CUH

#include "../../backward/prepare.cuh"
#include "loader.cuh"

namespace fkda
{

/* Chunks first to end - 1 of a sequence. */
struct ChunkRange {
    int first, end;
};

struct ChannelRole {
    HopperShared &s;
    const fkda_bwd_args &args;
    int loads = 0, prepared = 0, results = 0; /* how often, since the kernel's start */
    float beta = 0.0f;                        /* of token `thread` of the next chunk to be prepared */

    __device__ ChannelRole(HopperShared &shared, const fkda_bwd_args &a) : s(shared), args(a)
    {
    }

    static __device__ __forceinline__ int thread()
    {
        int cta, id;
        read_indices(cta, id);
        return id;
    }

    template <Way way> __device__ __forceinline__ void load(int chunk)
    {
        const unsigned id = static_cast<unsigned>(thread()),
                       slot = static_cast<unsigned>(loads++) % CHUNK_SLOTS;
        if (id < 32)
            load_chunk<way>(s.raw[slot], s.barriers.loaded[slot], args.fwd, s.piece, chunk,
                            static_cast<int>(id));
    }

    __device__ __forceinline__ float load_beta(int chunk) const
    {
        const fkda_fwd_args &f = args.fwd;
        const long long token = static_cast<long long>(chunk) * CHUNK + thread(),
                        at = token * f.beta_strides.token;
        if (thread() >= CHUNK || token >= s.piece.task.length) return 0.0f;
        return f.beta_is_f32 ? reinterpret_cast<const float *>(s.piece.beta)[at]
                             : from_bf16_bits(reinterpret_cast<const uint16_t *>(s.piece.beta)[at]);
    }

    template <Way way> __device__ __forceinline__ void prepare(int chunk)
    {
        const unsigned n = static_cast<unsigned>(prepared++), slot = n % PREPARED_SLOTS,
                       round = n / PREPARED_SLOTS, raw = n % CHUNK_SLOTS;
        const float strength = beta;
        const int next = way == FORWARDS ? chunk + 1 : chunk - 1;
        if (next >= 0) beta = load_beta(next);
        if (round > 0) mbarrier_wait(&s.barriers.empty[slot], (round - 1) & 1);
        mbarrier_wait(&s.barriers.loaded[raw], n / CHUNK_SLOTS & 1);
        Preparation<way, Scratch, Prepared>(s.scratch, s.prepared[slot], args, s.piece, s.gate, s.raw[raw])
            .run_to_last_meeting(chunk, strength);
        mbarrier_arrive_warp(&s.barriers.ready[slot]);
    }

    __device__ void go_forwards(ChunkRange range)
    {
        beta = load_beta(range.first);
        for (int i = 0; i < CHUNK_SLOTS - 1; i++)
            if (range.first + i < range.end) load<FORWARDS>(range.first + i);
        for (int chunk = range.first; chunk < range.end; chunk++) {
            ChannelTeam::meet(); /* all are through with the chunk before */
            if (chunk + CHUNK_SLOTS - 1 < range.end) load<FORWARDS>(chunk + CHUNK_SLOTS - 1);
            prepare<FORWARDS>(chunk);
        }
    }

    /* Without gradients, only prepares. A chunk is prepared before the one after it is finished, so that the
     * row warps have work meanwhile. */
    template <bool gradients> __device__ void go_back(ChunkRange range, ParameterSums &sums)
    {
        const int last = range.end - 1;
        if (last < range.first) return;
        constexpr int AHEAD = gradients ? 1 : 2; /* the third slot has the chunk that is finished */
        beta = load_beta(last);
        for (int i = 0; i < AHEAD; i++)
            if (last - i >= range.first) load<BACKWARDS>(last - i);
        for (int chunk = last; chunk >= range.first - gradients; chunk--) {
            ChannelTeam::meet(); /* all are through with the chunk before */
            if (chunk - AHEAD >= range.first) load<BACKWARDS>(chunk - AHEAD);
            if (chunk >= range.first) prepare<BACKWARDS>(chunk);
            if (gradients && chunk < last) finish(chunk + 1, chunk >= range.first ? 2 : 1, sums);
        }
    }

    /* dq, dk, dg and dbeta of the chunk that was prepared last but `before` - 1. */
    __device__ __forceinline__ void finish(int chunk, int before, ParameterSums &sums)
    {
        const unsigned n = static_cast<unsigned>(prepared - before), id = static_cast<unsigned>(thread()),
                       c = id % DIM;
        const HopperRaw &raw = s.raw[n % CHUNK_SLOTS];
        Prepared &p = s.prepared[n % PREPARED_SLOTS];
        const Outputs outputs = {args, s.piece};
        const ChannelTiles tiles(s.results, p, s.scratch.dg, s.scratch.writers);
        const ChannelOfChunk<HopperRaw> channel = {raw,
                                                   {args.fwd, s.gate, static_cast<int>(c)},
                                                   args.fwd.g_is_f32 != 0,
                                                   s.piece.task.length - chunk * CHUNK,
                                                   static_cast<int>(c)};
        mbarrier_wait(&s.barriers.results_full, results & 1);
        go_through_channels<ChannelTeam>(tiles, channel, static_cast<int>(id), sums);
        ChannelTeam::meet();
        outputs.store_rows(raw, chunk, tiles, static_cast<int>(id / 32), static_cast<int>(id % 32));
        outputs.store_dbeta(chunk, static_cast<int>(id), s.dbeta[results & 1], p.strength_slope);
        mbarrier_arrive_warp(&s.barriers.results_empty);
        results++;
    }
};

} // namespace fkda

#endif
