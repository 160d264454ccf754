/*
 * The shared memory of a CTA of the backward pass on Hopper, and its barriers.
 *
 * Two teams of eight warps work on neighbouring chunks. The channel warps prepare chunks and go through
 * their channels; the row warps carry the state, or the gradient with respect to it, and have the products
 * with both. They hand on work through rings:
 *
 *     chunk ring      3 slots   q, k and g in memory    copies -> channel warps
 *     prepared ring   2 slots   a prepared chunk        channel warps -> row warps
 *     results         1 slot    sums over V             row warps -> channel warps
 */
#ifndef FKDA_HOPPER_BWD_SHARED_CUH
#define FKDA_HOPPER_BWD_SHARED_CUH

#include "../../backward/outputs.cuh"
#include "../ptx/control.cuh"
#include "../ptx/copies.cuh"
#include "bwd_args.h"
#include "bwd_shape.h"
#include "half_tiles.cuh"

namespace fkda
{

constexpr int TEAM_THREADS = FKDA_HOPPER_BWD_THREADS / 2, TEAM_WARPS = TEAM_THREADS / 32;
constexpr int CHUNK_SLOTS = 3, PREPARED_SLOTS = 2;
constexpr int MOST_CHUNKS = FKDA_HOPPER_BWD_SEGMENT / CHUNK;

struct ChannelTeam {
    static __device__ __forceinline__ void meet()
    {
        barrier_sync<1, TEAM_THREADS>(0);
    }
};

struct RowTeam {
    static __device__ __forceinline__ void meet()
    {
        barrier_sync<2, TEAM_THREADS>(0);
    }
};

/* A chunk as it is in memory; zeros past the sequence's end. */
struct __align__(16) HopperRaw
{
    uint16_t q[CHUNK][DIM], k[CHUNK][DIM];
    union {
        uint16_t bf16[CHUNK][DIM];
        float f32[CHUNK][DIM];
    } g;
};

/* What the preparation alone needs. The channel warps use the tiles for gradients afterwards. */
struct Scratch {
    typedef HopperRaw RawChunk;
    typedef ChannelTeam Team;

    union {
        Tile k_read;
        Tile dg;
    };
    union {
        Tile q_read;
        Tile writers;
    };
    Tile k_up;
    float l_columns[CHUNK][CHUNK + 4];
    float products[2][2][CHUNK][CHUNK + 2];
    float totals[2][DIM];
    int is_out_of_range;
    int is_kept; /* a channel keeps so much over the chunk that decayed keys need no units */
};

/* A slot of the prepared ring: shared.cuh of the portable kernel has the names. */
struct __align__(128) Prepared
{
    static constexpr bool HAS_UNITS = true;

    TokenTile k_read, q_read, k_rest; /* q_read without the call's scale */
    TokenTile k_lacks;                /* what fp16 lack, forwards of k_read and backwards of k_rest */
    union {
        Square inverse;   /* forwards */
        Square inverse_t; /* backwards */
    };
    Square attend_t;
    float factor[DIM], more[DIM]; /* of the decay, as in ../../backward/shared.cuh */
    float q_scale[CHUNK], k_scale[CHUNK], strength[CHUNK], strength_slope[CHUNK];
    /* Where all channels forget much, what rows of k_read and q_read, and of k_rest, are divided by.
     * Elsewhere read_unit[0] is 0, and the other units have no meaning. */
    float read_unit[CHUNK], rest_unit[CHUNK];

    __device__ __forceinline__ bool has_units() const
    {
        return read_unit[0] != 0.0f;
    }
    __device__ __forceinline__ void put_no_units()
    {
        read_unit[0] = 0.0f;
    }
    template <Way way>
    __device__ __forceinline__ void put_all(int token, int channel, float key, float rest, float query)
    {
        k_read.put(token, channel, key);
        k_rest.put(token, channel, rest);
        k_lacks.put(token, channel, lack_of_half(way == FORWARDS ? key : rest));
        if (way == BACKWARDS) q_read.put(token, channel, query);
    }
    template <Way way>
    __device__ __forceinline__ void put_key(Scratch & s, int token, int channel, float k, float up)
    {
        s.k_read.at(token, channel) = to_tf32(k * up);
        k_read.put(token, channel, k * up);
        if (way == FORWARDS) k_lacks.put(token, channel, lack_of_half(k * up));
    }
    template <Way way> __device__ __forceinline__ void put_rest(int token, int channel, float x)
    {
        k_rest.put(token, channel, x);
        if (way == BACKWARDS) k_lacks.put(token, channel, lack_of_half(x));
    }
    __device__ __forceinline__ void put_query(Scratch & s, int token, int channel, float q, float scale,
                                              float up)
    {
        s.q_read.at(token, channel) = to_tf32(q * scale * up);
        q_read.put(token, channel, q * up);
    }
    __device__ __forceinline__ void put_decay(int channel, float log2_decay)
    {
        split_decay(log2_decay, factor[channel], more[channel]);
    }
    template <Way way> __device__ __forceinline__ void put_inverse(int i, int j, float x)
    {
        if (way == BACKWARDS)
            inverse_t[j][i] = to_tf32(x);
        else
            inverse[i][j] = to_tf32(x);
    }
};

/* The sums over V of a chunk. */
struct __align__(16) Results
{
    Tile q_read, k_read, k_rest; /* gradients of Q~, K~ and Kr without exp(); then dq and dk */
    __align__(16) float2 pairs[CHUNK][CHUNK];
    float kept[DIM];
};

/* Largest magnitudes in each row warp's rows. */
struct __align__(16) Magnitudes
{
    uint32_t of_warp[TEAM_WARPS];

    __device__ __forceinline__ Unit unit() const
    {
        const uint4 a = *reinterpret_cast<const uint4 *>(of_warp),
                    b = *reinterpret_cast<const uint4 *>(of_warp + 4);
        return Unit(max(max(max(a.x, a.y), max(a.z, a.w)), max(max(b.x, b.y), max(b.z, b.w))));
    }
};

/*
 * | mbarrier      | arrivals  | who arrives            | who waits, and what may then happen        |
 * | loaded        | 1 + bytes | channel warp 0; copies | channel warps: the chunk may be read       |
 * | ready         | 8         | channel warps          | row warps: the prepared slot may be read   |
 * | empty         | 8         | row warps              | channel warps: it may be overwritten       |
 * | results full  | 8         | row warps              | channel warps: results may be read         |
 * | results empty | 8         | channel warps          | row warps: results may be overwritten      |
 * | image loaded  | 1 + bytes | row warp 0; copies     | row warps: the state's image may be read   |
 * | missed loaded | 1 + bytes | row warp 0; copies     | row warps: `missed` may be read            |
 */
struct BwdBarriers {
    uint64_t loaded[CHUNK_SLOTS], ready[PREPARED_SLOTS], empty[PREPARED_SLOTS];
    uint64_t results_full, results_empty, image_loaded, missed_loaded;

    __device__ __forceinline__ void set_up()
    {
        for (int i = 0; i < CHUNK_SLOTS; i++) mbarrier_init(&loaded[i], 1);
        for (int i = 0; i < PREPARED_SLOTS; i++) {
            mbarrier_init_for_warps(&ready[i], TEAM_WARPS);
            mbarrier_init_for_warps(&empty[i], TEAM_WARPS);
        }
        mbarrier_init_for_warps(&results_full, TEAM_WARPS);
        mbarrier_init_for_warps(&results_empty, TEAM_WARPS);
        mbarrier_init(&image_loaded, 1);
        mbarrier_init(&missed_loaded, 1);
        fence_mbarrier_init();
    }
};

/* Of the sums over V, [tokens, V]. dout without the call's scale. */
struct SumOperands {
    TokenTile dout, minus_dr, u;
};

struct HopperShared {
    StateImage images[2]; /* back: of the state before the chunk, and of the gradient after it */
    union {
        float4 missed[CHUNK * DIM / 4]; /* of the chunk; each row warp has what it stored itself */
        SumOperands operands;           /* later */
    };
    Prepared prepared[PREPARED_SLOTS];
    HopperRaw raw[CHUNK_SLOTS];
    Results results;
    Scratch scratch;
    float dbeta[2][TEAM_WARPS][CHUNK];
    /* The row warps write the one while the other is read: a warp may be a chunk ahead until they meet. */
    Magnitudes carried[2];
    Magnitudes of_dout, of_dr, of_writes;
    float image_units[MOST_CHUNKS]; /* of the records */
    Piece piece;
    GateOfHead gate;
    BwdBarriers barriers;
};
static_assert(sizeof(HopperShared) == FKDA_HOPPER_BWD_SHARED_BYTES, "keep bwd_shape.h in step");

} // namespace fkda

#endif
