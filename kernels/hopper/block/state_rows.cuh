/*
 * The rows of the state that a recurrence warp carries, and how they come from memory and go there.
 *
 * A warpgroup owns 64 rows of V and all of K, as the transposed state S^T [V, K] in fp32 accumulators of
 * wgmma. Warp w of the warpgroup has rows 16 w to 16 w + 15, and lane (g, t) = (lane / 4, lane % 4) has rows
 * g and g + 8 of the warp's 16 rows.
 */
#ifndef FKDA_HOPPER_STATE_ROWS_CUH
#define FKDA_HOPPER_STATE_ROWS_CUH

#include "../join/layouts.cuh"
#include "shared.cuh"

namespace fkda
{

template <class Block> struct StateRows {
    /* Whether work items of this block may start from a state in memory. Work items of all other blocks start
     * from zeros or from the identity. */
    static constexpr bool STARTS_FROM_STATES = !Block::MAPS || Block::RELAYS;
    const fkda_hopper_fwd_args &all;
    const fkda_fwd_args &args;
    Shared<Block> &shared;
    int lane;
    /* state[s]: rows g, g, g + 8, g + 8 and channels 8 s + 2 t, + 1, + 0, + 1 */
    float state[DIM / 8][4];
    float scale
        [2];     /* powers of two that the state's two rows, and their V and U, are divided by; 1 for a map */
    bool is_map; /* the work item computes M, so its values are zeros */

    __device__ StateRows(const fkda_hopper_fwd_args &a, Shared<Block> &s, int thread)
        : all(a), args(a.fwd), shared(s), lane(thread & 31)
    {
    }

    /* ---- Where rows are ---- */

    /* The warp's first row, counted from the first row of the CTA. */
    static __device__ int warp_row()
    {
        int cta, thread; /* read again for each use: registers are scarce */
        read_indices(cta, thread);
        return thread >> 5 << 4;
    }

    /* The warp's rows, counted in groups of 16 rows of the head. */
    static __device__ int row_group(const WorkItem &item)
    {
        return (item.first_row + warp_row()) / 16;
    }

    /* Where this lane's part of a state [V, K] begins, in elements of the head's. */
    __device__ int state_begin(const WorkItem &item) const
    {
        return (item.first_row + warp_row() + (lane >> 2)) * DIM + 2 * (lane & 3);
    }

    /* The same for a state [K, V]. */
    __device__ int k_first_begin(const WorkItem &item) const
    {
        return 2 * (lane & 3) * DIM + item.first_row + warp_row() + (lane >> 2);
    }

    /* ---- From memory ---- */

    /* The functions load_tiles_* load the tiles of a state from tile s on, if the state has the type or
     * the layout that the function's name says. */
    template <int s>
    static __device__ void load_tiles_fp32(float (&raw)[DIM / 8][4], const void *from, bool is_fp32)
    {
        float(&x)[4] = raw[s];
        load_two_if<8 * s>(x[0], x[1], from, is_fp32);
        load_two_if<8 * s + 8 * DIM>(x[2], x[3], from, is_fp32);
        if constexpr (s + 1 < DIM / 8) load_tiles_fp32<s + 1>(raw, from, is_fp32);
    }
    template <int s>
    static __device__ void load_tiles_bf16(float (&raw)[DIM / 8][4], const void *from, bool is_bf16)
    {
        float(&x)[4] = raw[s];
        load_pair_if<8 * s>(x[0], from, is_bf16);
        load_pair_if<8 * s + 8 * DIM>(x[2], from, is_bf16);
        if constexpr (s + 1 < DIM / 8) load_tiles_bf16<s + 1>(raw, from, is_bf16);
    }
    /* The same for a state [K, V]: neighbouring lanes have neighbouring rows. */
    template <int s>
    static __device__ void load_tiles_k_first_fp32(float (&raw)[DIM / 8][4], const void *from, bool is_fp32)
    {
        float(&x)[4] = raw[s];
        load_one_if<8 * s * DIM>(x[0], from, is_fp32);
        load_one_if<(8 * s + 1) * DIM>(x[1], from, is_fp32);
        load_one_if<8 * s * DIM + 8>(x[2], from, is_fp32);
        load_one_if<(8 * s + 1) * DIM + 8>(x[3], from, is_fp32);
        if constexpr (s + 1 < DIM / 8) load_tiles_k_first_fp32<s + 1>(raw, from, is_fp32);
    }
    template <int s>
    static __device__ void load_tiles_k_first_bf16(float (&raw)[DIM / 8][4], const void *from, bool is_bf16)
    {
        float(&x)[4] = raw[s];
        load_bf16_if<8 * s * DIM>(x[0], from, is_bf16);
        load_bf16_if<(8 * s + 1) * DIM>(x[1], from, is_bf16);
        load_bf16_if<8 * s * DIM + 8>(x[2], from, is_bf16);
        load_bf16_if<(8 * s + 1) * DIM + 8>(x[3], from, is_bf16);
        if constexpr (s + 1 < DIM / 8) load_tiles_k_first_bf16<s + 1>(raw, from, is_bf16);
    }
    template <int s>
    static __device__ void load_tiles_image(float (&raw)[DIM / 8][4], const void *from, bool is_image)
    {
        load_four_if<s>(raw[s], from, is_image);
        if constexpr (s + 1 < DIM / 8) load_tiles_image<s + 1>(raw, from, is_image);
    }

    /*
     * Loads the state before a work item: from memory, or zeros or the identity.
     *
     * Nothing here branches: behind a branch ptxas would put wgmma products one after the other. All loads of
     * one type are issued before those of the next type, because a load into a register waits for the
     * previous load into the same register, even if the previous one loads nothing.
     */
    __device__ void load_state(const WorkItem &item)
    {
        const bool is_bf16 = item.initial && item.attributes & INITIAL_BF16,
                   is_image = item.initial && item.attributes & INITIAL_IMAGE,
                   is_fp32 = item.initial && !is_bf16 && !is_image;
        const bool k_first = Block::STATES && args.state_k_first;
        const int begin = state_begin(item);
        const char *from = static_cast<const char *>(global_memory(item.initial));
        float raw[DIM / 8][4];
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 4; r++) raw[s][r] = 0.0f;
        if constexpr (STARTS_FROM_STATES) load_tiles_fp32<0>(raw, from + 4 * begin, is_fp32 && !k_first);
        if constexpr (STARTS_FROM_STATES && Block::STATES)
            load_tiles_k_first_fp32<0>(raw, from + 4 * k_first_begin(item), is_fp32 && k_first);
        if constexpr (!Block::MAPS)
            load_tiles_image<0>(raw, from + row_group(item) * sizeof(StateImage::tile[0]) + 16 * lane,
                                is_image);
        if constexpr (STARTS_FROM_STATES) load_tiles_bf16<0>(raw, from + 2 * begin, is_bf16 && !k_first);
        if constexpr (STARTS_FROM_STATES && Block::STATES)
            load_tiles_k_first_bf16<0>(raw, from + 2 * k_first_begin(item), is_bf16 && k_first);
        const int diagonal = warp_row() + (lane >> 2) - 2 * (lane & 3); /* of the identity: row less column */
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = raw[s][2 * r], y = raw[s][2 * r + 1];
                if constexpr (STARTS_FROM_STATES) {
                    y = !is_bf16 ? y : k_first ? bf16_low(__float_as_uint(y)) : bf16_high(__float_as_uint(x));
                    x = is_bf16 ? bf16_low(__float_as_uint(x)) : x;
                }
                if constexpr (Block::MAPS) {
                    x = is_map && diagonal == 8 * (s - r) ? 1.0f : x;
                    y = is_map && diagonal == 8 * (s - r) + 1 ? 1.0f : y;
                }
                state[s][2 * r] = x, state[s][2 * r + 1] = y;
            }
    }

    /* ---- To memory ---- */

    /* This lane, read again where maps are stored: otherwise the compiler would keep places that are made
     * from it in registers, from the first chunk on. */
    static __device__ int read_lane()
    {
        int cta, thread;
        read_indices(cta, thread);
        return thread & 31;
    }

    /* Stores rows of a map through shared memory, over the place of tokens: one bulk copy for each warp. The
     * function is for the last work item of a relay's map phase, after which no copy brings anything to the
     * place of tokens, and none takes anything from there to the other CTA. */
    __device__ void store_map_by_copy(MapRowGroup &to, const SlotCursor<Block> &after) const
    {
        const int this_lane = read_lane();
        const Slot<Block::OWN_SLOTS> last = after.last_own();
        mbarrier_wait(&shared.chunk_ring.empty[last.index], last.parity);
        barrier_sync<RECURRENCE_BARRIER, 32 * Block::RECURRENCE_WARPS>(0);
        MapRowGroup &here = reinterpret_cast<MapRowGroup *>(shared.tokens)[warp_row() >> 4];
#pragma unroll
        for (int s = 0; s < DIM / 8; s += 2) {
            uint32_t high[4], low[4]; /* of two tiles, rows g and g + 8 */
#pragma unroll
            for (int i = 0; i < 4; i++)
                MapRowGroup::split(high[i], low[i], state[s + i / 2][i % 2 * 2],
                                   state[s + i / 2][i % 2 * 2 + 1]);
            store_matrices(shared_address(here.unit(MapRowGroup::HIGH, this_lane & 15, s + (this_lane >> 4))),
                           high);
            store_matrices(shared_address(here.unit(MapRowGroup::LOW, this_lane & 15, s + (this_lane >> 4))),
                           low);
        }
        fence_async_proxy();
        __syncwarp();
        if (this_lane == 0) copy_bulk_to_global(&to, &here, sizeof here);
    }

    /* Stores rows of a map word by word, in few registers. For a relay's map phase while chunks of another
     * work item come to the place of tokens. */
    __device__ void store_map_by_words(MapRowGroup &to) const
    {
        const int this_lane = read_lane();
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t high, low;
                MapRowGroup::split(high, low, state[s][2 * r], state[s][2 * r + 1]);
                uint32_t *at =
                    reinterpret_cast<uint32_t *>(to.unit(MapRowGroup::HIGH, (this_lane >> 2) + 8 * r, s)) +
                    (this_lane & 3);
                at[0] = high;
                at[sizeof to.part[0] / 4] = low;
            }
    }

    /* Stores rows of a map in units of 16 bytes: lanes of a quad exchange words, until a lane has tile 4 j +
     * t of its rows, which is eight neighbours. */
    __device__ void store_map_by_units(MapRowGroup &to) const
    {
        const int this_lane = read_lane();
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                uint32_t high[4], low[4];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    MapRowGroup::split(high[n], low[n], state[4 * j + n][2 * r], state[4 * j + n][2 * r + 1]);
                transpose_in_quad(high, this_lane);
                transpose_in_quad(low, this_lane);
                const int row = (this_lane >> 2) + 8 * r, u = 4 * j + (this_lane & 3);
                *to.unit(MapRowGroup::HIGH, row, u) = make_uint4(high[0], high[1], high[2], high[3]);
                *to.unit(MapRowGroup::LOW, row, u) = make_uint4(low[0], low[1], low[2], low[3]);
            }
    }

    __device__ void store_image(float4 (&to)[DIM / 8][32]) const
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
            to[s][lane] = make_float4(state[s][0] * scale[0], state[s][1] * scale[0], state[s][2] * scale[1],
                                      state[s][3] * scale[1]);
    }

    /* Stores the state as [K, V]; this lane's part begins at element `begin` of the head's. */
    __device__ void store_k_first(void *to, int begin, bool is_bf16) const
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = begin + (8 * s + i % 2) * DIM + i / 2 * 8;
                const float x = state[s][i] * scale[i / 2];
                if (is_bf16)
                    static_cast<uint16_t *>(to)[at] = static_cast<uint16_t>(pack_bf16(x, x));
                else
                    static_cast<float *>(to)[at] = x;
            }
    }

    /* Stores the state as [V, K] in fp32, in units of 16 bytes: the lanes of two pairs of channels exchange
     * words, until the even one has four neighbours of tile s and the odd one four of tile s + 1. `to` is at
     * the warp's first row. The four lanes of a row cover two sectors of 32 bytes. */
    __device__ void store_units_fp32(float *to) const
    {
        const int this_lane = read_lane();
        const bool odd = this_lane & 1;
        to += (this_lane >> 2) * DIM + (odd ? 8 : 0) + 4 * (this_lane >> 1 & 1);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int s = 0; s < DIM / 8; s += 2) {
                float x[2], other[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float low = state[s][2 * r + i] * scale[r],
                                high = state[s + 1][2 * r + i] * scale[r];
                    x[i] = odd ? high : low;
                    other[i] = __shfl_xor_sync(~0u, odd ? low : high, 1);
                }
                *reinterpret_cast<float4 *>(to + 8 * r * DIM + 8 * s) =
                    odd ? make_float4(other[0], other[1], x[0], x[1])
                        : make_float4(x[0], x[1], other[0], other[1]);
            }
    }

    /* The same in bf16: the lanes of a quad exchange words, until a lane has the eight channels of tile
     * 4 j + t. */
    __device__ void store_units_bf16(uint16_t *to) const
    {
        const int this_lane = read_lane();
        to += (this_lane >> 2) * DIM + 8 * (this_lane & 3);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                uint32_t x[4];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    x[n] =
                        pack_bf16(state[4 * j + n][2 * r] * scale[r], state[4 * j + n][2 * r + 1] * scale[r]);
                transpose_in_quad(x, this_lane);
                *reinterpret_cast<uint4 *>(to + 8 * r * DIM + 32 * j) = make_uint4(x[0], x[1], x[2], x[3]);
            }
    }

    /* Stores the state of an item with outputs in the layout of the caller's states; the head's state begins
     * at `to`. */
    __device__ void store_in_layout(void *to, bool is_bf16) const
    {
        const int row = Block::ROWS * pair_rank<Block>() + warp_row(), first = row * DIM;
        if (args.state_k_first)
            store_k_first(to, 2 * (read_lane() & 3) * DIM + row + (read_lane() >> 2), is_bf16);
        else if (is_bf16)
            store_units_bf16(static_cast<uint16_t *>(to) + first);
        else
            store_units_fp32(static_cast<float *>(to) + first);
    }

    /* Stores what is carried as the image of chunk number `chunk` of the item's sequence
     * (../bwd/chunks/chunk_args.h): the same fp16 as in the operands of products, and the rows' scales. */
    __device__ void store_chunk_image(const WorkItem &item, int chunk) const
    {
        const fkda_state_args &images = args.checkpoints.states;
        const int slot = item.images.first + chunk;
        if (static_cast<unsigned>(slot) >= images.slots) return; /* NO_IMAGES, or cu_seqlens has changed */
        const int this_lane = read_lane(), row = item.first_row + warp_row() + (this_lane >> 2);
        unsigned char *to =
            static_cast<unsigned char *>(images.data) +
            (static_cast<long long>(slot) * args.heads + item.head) * FKDA_HOPPER_BORDER_IMAGE;
        if ((this_lane & 3) == 0) {
            float *const scales = reinterpret_cast<float *>(to + 2 * DIM * DIM) + row;
            scales[0] = scale[0], scales[8] = scale[1];
        }
        /* Unit u of a row lies at u ^ row % 8, which changes units inside of the eight of 64 channels. */
        to += row * (2 * DIM);
        const int place = 16 * ((this_lane & 3) ^ (row & 7));
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                uint32_t x[4];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    x[n] = pack_half(state[4 * j + n][2 * r], state[4 * j + n][2 * r + 1]);
                transpose_in_quad(x, this_lane);
                *reinterpret_cast<uint4 *>(to + (place ^ j % 2 * 64) + j / 2 * 128 + r * 8 * (2 * DIM)) =
                    make_uint4(x[0], x[1], x[2], x[3]);
            }
    }

    /* Stores the state after a work item. `after` is at the chunk behind the work item's last one. */
    __device__ void store_state(const WorkItem &item, const SlotCursor<Block> &after) const
    {
        void *to = global_memory(item.final);
        if constexpr (Block::MAPS)
            if (is_map) {
                MapRowGroup &rows = static_cast<MapImage *>(to)->row_group[row_group(item)];
                if constexpr (!Block::RELAYS)
                    store_map_by_units(rows);
                else if (!Block::MIXED && item.attributes & NOT_LAST) /* mixed: pairs have one work item */
                    store_map_by_words(rows);
                else
                    store_map_by_copy(rows, after);
                return;
            }
        if (Block::MAPS || item.attributes & FINAL_IMAGE)
            return store_image(static_cast<StateImage *>(to)->tile[row_group(item)]);
        const bool is_bf16 = item.attributes & FINAL_BF16;
        if constexpr (Block::STATES) return store_in_layout(to, is_bf16);
        const int begin = state_begin(item);
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = begin + 8 * r * DIM + 8 * s;
                const float x = state[s][2 * r] * scale[r], y = state[s][2 * r + 1] * scale[r];
                if (is_bf16)
                    *reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(to) + at) = pack_bf16(x, y);
                else
                    store_two(static_cast<float *>(to) + at, x, y);
            }
    }
};

} // namespace fkda

#endif
