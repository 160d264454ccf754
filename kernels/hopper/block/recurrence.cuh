/*
 * The recurrence: one or two warpgroups that carry the state through a work item's chunks, in order.
 *
 * Algorithm. For each chunk, with K~, Q~ and Kr of the chunk's tokens, T and P of its stage, and S the state:
 *
 *     (K~ S)^T, (Q~ S)^T        one product: K~ and Q~ are side by side in one operand
 *     R^T = (V - K~ S)^T
 *     U^T = R^T T^T             meanwhile S^T = S^T diag(gamma) in fp32
 *     O^T = (Q~ S)^T + U^T P^T
 *     S^T = S^T + U^T Kr
 *
 * The state is the accumulator of the last product (state_rows.cuh). Two neighbouring accumulator tiles,
 * packed to fp16, are an A operand as they are, and R^T and U^T are too; B operands are read where the chunk
 * was prepared. So neither the state nor R and U pass through shared memory. V comes in and O goes out
 * through shared memory, transposed on the way by ldmatrix and stmatrix.
 *
 * Optimizations. What stands between two products decides the speed.
 *   - A load from shared memory that is issued behind products waits while they read their operands. So v is
 *     loaded before K~ S, and the state's decay as soon as K~ S is there.
 *   - While K~ S is on its way the warp looks whether v fits the rows' scales (scaled_rows.cuh). While T R is
 *     on its way, it decays the state and stores the outputs of the chunk before, if outputs have room of
 *     their own.
 *   - While the state is updated, the warp writes this chunk's outputs to shared memory, finds the next
 *     chunk's slot and asks whether that chunk is ready.
 *   - The slot and the descriptors of slot 0 are kept in uniform registers, where wgmma takes descriptors
 *     from. Descriptors made in other registers would have to be moved there, one by one.
 */
#ifndef FKDA_HOPPER_RECURRENCE_CUH
#define FKDA_HOPPER_RECURRENCE_CUH

#include "../join/relay_join.cuh"
#include "scaled_rows.cuh"

namespace fkda
{

template <class Block> struct Recurrence : ScaledRows<Block> {
    using Base = ScaledRows<Block>;
    using Base::all, Base::args, Base::shared, Base::lane, Base::state, Base::scale, Base::is_map,
        Base::warp_row;
    using Base::CHUNK, Base::SUBCHUNKS, Base::TILES, Base::READ;
    using Base::may_grow, Base::has_grown, Base::misfit, Base::adapt, Base::choose_first_scales,
        Base::load_state, Base::store_state, Base::value_factor, Base::may_leap;
    using Base::value_place, Base::least_again, Base::least_of, Base::faint, Base::load_raw,
        Base::unpack_values, Base::largest;
    using Raw = typename Base::Raw;
    using Order = ChunkOrder<Block>;
    using Stage = fkda::Stage<Block>;
    uint32_t tokens_descriptor, stage_descriptor; /* the descriptor_address of slot 0 */
    int output_place;                             /* this lane's place in the rows of outputs */

    __device__ Recurrence(const fkda_hopper_fwd_args &a, Shared<Block> &s, int thread) : Base(a, s, thread)
    {
        tokens_descriptor = uniform(descriptor_address(shared.tokens));
        stage_descriptor = uniform(descriptor_address(shared.stage));
        const int row = thread >> 5 << 4; /* the warp's first */
        const int half = (row >> 6) * Block::HALF_TOKENS, first = (row & 63) >> 3;
        output_place = half + ((lane >> 1) * ROW | ((lane & 1) ^ first ^ (lane >> 1 & 7)) * 16);
        value_place = half + (matrix_row_by_token(lane) ^ first * 16);
        keep_in_register(output_place), keep_in_register(value_place);
    }

    /* ---- Outputs ---- */

    /* With room of their own, outputs are stored during the next chunk. Otherwise they go where the warp's v
     * was, and are stored during their own chunk. */
    static constexpr bool STORED_LATER = Block::ROOM_FOR_OUTPUTS;

    __device__ unsigned char *output_tile(int index) const
    {
        if constexpr (STORED_LATER)
            return shared.outputs;
        else
            return shared.tokens[index].v[0];
    }

    /* Leaves the sum of x and y in shared memory; tile i of them has tokens 8 i to 8 i + 7. */
    __device__ void put_output(int index, const float (&x)[TILES][4], const float (*y)[4]) const
    {
        const float top = args.scale * scale[0], low = args.scale * scale[1];
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int tile = 2 * sub + i;
                pairs[2 * i] = pack_bf16((x[tile][0] + y[tile][0]) * top, (x[tile][1] + y[tile][1]) * top);
                pairs[2 * i + 1] =
                    pack_bf16((x[tile][2] + y[tile][2]) * low, (x[tile][3] + y[tile][3]) * low);
            }
            store_matrices_transposed(shared_address(output_tile(index) + value_place + sub * SUBCHUNK_BYTES),
                                      pairs);
        }
        if (!STORED_LATER) fence_async_proxy(); /* copies of later chunks overwrite the outputs */
    }

    /* Stores the outputs of the first `tokens` tokens. Lane 2 i + h takes rows 8 h to 8 h + 7 of token i of
     * each subchunk, which go to `to`. */
    __device__ void store_output(int index, char *to, int tokens) const
    {
        __syncwarp();
#pragma unroll
        for (int sub = 0; sub < SUBCHUNKS; sub++) {
            const uint4 row =
                *reinterpret_cast<const uint4 *>(output_tile(index) + output_place + sub * SUBCHUNK_BYTES);
            store_16_if(to + sub * args.chunk_bytes, row, lane / 2 + sub * SUBCHUNK < tokens);
        }
    }

    /* ---- One chunk ---- */

    /* Two tiles of accumulators side by side, as an A operand. */
    __device__ static void pack_operand(uint32_t (&a)[4], const float (&x)[4], const float (&y)[4])
    {
        a[0] = pack_half(x[0], x[1]), a[1] = pack_half(x[2], x[3]);
        a[2] = pack_half(y[0], y[1]), a[3] = pack_half(y[2], y[3]);
    }

    /* What fp16 lacks of two tiles of accumulators whose operand is `a`, as another operand. */
    __device__ static void pack_rest(uint32_t (&rest)[4], const uint32_t (&a)[4], const float (&x)[4],
                                     const float (&y)[4])
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&from)[4] = i < 2 ? x : y;
            rest[i] = pack_half(from[i % 2 * 2] - half_low(a[i]), from[i % 2 * 2 + 1] - half_high(a[i]));
        }
    }

    /* The chunk's decay, less one, of the channels of this lane's accumulators: one float4 for two tiles. */
    __device__ void load_gamma(float4 (&gamma_minus_1)[DIM / 16], const Stage &stage) const
    {
#pragma unroll
        for (int i = 0; i < DIM / 16; i++)
            gamma_minus_1[i] = load_shared_four(&stage.gamma_minus_1[16 * i + 4 * (lane & 3)]);
    }

    /* S^T = S^T diag(gamma) */
    __device__ void decay(const float4 (&gamma_minus_1)[DIM / 16])
    {
#pragma unroll
        for (int s = 0; s < DIM / 8; s += 2) {
            const float4 x = gamma_minus_1[s / 2];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                state[s][r] = __fmaf_rn(state[s][r], r % 2 ? x.y : x.x, state[s][r]);
                state[s + 1][r] = __fmaf_rn(state[s + 1][r], r % 2 ? x.w : x.z, state[s + 1][r]);
            }
        }
    }

    /* T and P for the tokens of subchunk i; `stage_place` is the stage's descriptor_address. */
    static __device__ uint64_t solve_operand(uint32_t stage_place, int i)
    {
        return decltype(Stage::solve)::operand(stage_place + offsetof(Stage, solve) / 16, i);
    }
    static __device__ uint64_t attend_operand(uint32_t stage_place, int i)
    {
        return decltype(Stage::attend)::operand(stage_place + offsetof(Stage, attend) / 16, i);
    }
    /* The same with columns and depths exchanged: T and P themselves, where the operands above are their
     * transposes. Of the two tiles each is laid out as the transpose of the other one. */
    static __device__ uint64_t solve_transposed(uint32_t stage_place, int i)
    {
        return decltype(Stage::attend)::operand(stage_place + offsetof(Stage, solve) / 16, i);
    }
    static __device__ uint64_t attend_transposed(uint32_t stage_place, int i)
    {
        return decltype(Stage::solve)::operand(stage_place + offsetof(Stage, attend) / 16, i);
    }

    /* ---- One chunk, backwards ---- */

    /* The gradients of a chunk's outputs, as operands, and whether the chunk leaves the usual path. */
    struct OutputGradients {
        uint32_t a[SUBCHUNKS][4];
        bool unusual;
    };

    /* Prepares these operands for the scales that the rows have. `left` is as in ChunkOrder. */
    __device__ void prepare_gradients(OutputGradients &to, int index, int left)
    {
        const bool look = looks_at(left);
        const Raw raw = load_raw(shared.tokens[index]);
        const float high = largest(raw, 0) * value_factor(), low = largest(raw, 1) * value_factor();
        const bool act = misfit(high, low, least_of(look));
        to.unusual = __any_sync(~0u, act) | (Order::here(left) < CHUNK);
        float v[TILES][4];
        unpack_gradients(v, raw);
        pack_gradients(to, v);
    }

    /* Images are stored while a product is in flight, except where there are too few registers for it. */
    static constexpr bool STORES_IN_FLIGHT = !Block::BACKWARDS || Block::ROWS == 64;

    /* Every 128 tokens. */
    static __device__ bool looks_at(int left)
    {
        return (Order::before(left) & (128 - CHUNK)) == 0;
    }

    __device__ void unpack_gradients(float (&v)[TILES][4], const Raw &raw) const
    {
        unpack_values(v, raw);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) v[i][r] *= args.scale;
    }

    __device__ void pack_gradients(OutputGradients &to, float (&v)[TILES][4]) const
    {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) v[i][r] *= inverse_power(scale[r / 2]);
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) pack_operand(to.a[i], v[2 * i], v[2 * i + 1]);
    }

    /* Chooses scales anew where a chunk does not fit the present ones, and prepares its operands again. */
    __device__ void adapt_gradients(OutputGradients &to, int index, int here, bool look)
    {
        float v[TILES][4], nothing[READ][4] = {};
        unpack_gradients(v, load_raw(shared.tokens[index]));
        adapt(v, nothing, shared.tokens[index].v[0], shared.stage[index], here, look);
        pack_gradients(to, v);
    }

    /*
     * Carries the gradient D with respect to the state from behind the chunk to the front of it, with the
     * gradients dO of outputs. T, P and the decayed tiles are those of the forward pass, with rows and
     * columns of the products exchanged:
     *
     *     dU^T = D^T Kr^T + dO^T P        both in one sum
     *     dR^T = dU^T T                   meanwhile D^T = D^T diag(gamma) in fp32
     *     D^T  = D^T + dO^T Q~ - dR^T K~  the first product does not wait for dR
     *
     * `left` is as in ChunkOrder. On return the last products are in flight, during which the
     * operands of the next chunk are prepared. store_image() stores D behind the chunk while dU is found.
     */
    template <class StoreImage>
    __device__ void step_back(int index, int left, OutputGradients &out, StoreImage store_image)
    {
        using Tokens = fkda::Tokens<Block>;
        Stage &stage = shared.stage[index];
        const uint32_t tokens_place = tokens_descriptor + index * static_cast<int>(sizeof(Tokens) / 16);
        const uint32_t stage_place = stage_descriptor + index * static_cast<int>(sizeof(Stage) / 16);
        float du[TILES][4], dr[TILES][4];
        uint32_t a[DIM / 16][4];

        /* ---- Does this chunk leave the usual path? ---- */
        bool look = looks_at(left);
        const float divisor = stage.divisor;
        if ((look || may_leap()) && __any_sync(~0u, has_grown())) look = true, faint = true;
        if (__builtin_expect(out.unusual | (look & faint), 0))
            adapt_gradients(out, index, Order::here(left), look);
        else
            least_again = 0.0f;

        /* ---- dU ---- */
        if constexpr (!STORES_IN_FLIGHT) store_image();
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) pack_operand(a[s], state[2 * s], state[2 * s + 1]);
        wgmma_fence();
        wgmma<false, false>(du, a[0], Tokens::rest_by_channel(tokens_place, 0));
#pragma unroll
        for (int s = 1; s < DIM / 16; s++)
            wgmma<true, false>(du, a[s], Tokens::rest_by_channel(tokens_place, s));
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++)
            wgmma<true, true>(du, out.a[i], attend_transposed(stage_place, i));
        wgmma_commit();
        if constexpr (STORES_IN_FLIGHT) store_image();
        wgmma_wait<0>();

        /* ---- dR ---- */
        if (__builtin_expect(divisor < 1.0f, 0))
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int r = 0; r < 4; r++) du[i][r] *= divisor;
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) pack_operand(a[i], du[2 * i], du[2 * i + 1]);
        float4 gamma_minus_1[DIM / 16];
        load_gamma(gamma_minus_1, stage); /* in front of the products, behind which it would wait */
        wgmma_fence();
        wgmma<false, false>(dr, a[0], solve_transposed(stage_place, 0));
#pragma unroll
        for (int i = 1; i < SUBCHUNKS; i++) wgmma<true, false>(dr, a[i], solve_transposed(stage_place, i));
        wgmma_commit();

        /* ---- D ---- If keys are alike, most of D is taken out again: dR keeps all bits, in two parts. */
        decay(gamma_minus_1);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++)
            wgmma<true, true>(state, out.a[i], Tokens::by_token(tokens_place, Q, i));
        wgmma_commit();
        wgmma_wait<1>();
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) {
            pack_operand(a[SUBCHUNKS + i], dr[2 * i], dr[2 * i + 1]);
            pack_rest(a[2 * SUBCHUNKS + i], a[SUBCHUNKS + i], dr[2 * i], dr[2 * i + 1]);
#pragma unroll
            for (int part = 1; part <= 2; part++)
#pragma unroll
                for (uint32_t &pair : a[part * SUBCHUNKS + i])
                    pair ^= 0x80008000; /* the signs of both halves */
        }
        wgmma_fence();
#pragma unroll
        for (int part = 1; part <= 2; part++)
#pragma unroll
            for (int i = 0; i < SUBCHUNKS; i++)
                wgmma<true, true>(state, a[part * SUBCHUNKS + i], Tokens::by_token(tokens_place, K, i));
        wgmma_commit();
    }

    /* ---- One chunk, forwards ---- */

    /*
     * Computes the chunk in slot `index`, whose work item has `left` tokens from the chunk's first one on,
     * and which begins `position` tokens behind the start of what the schedule gave out. In a pair, every
     * second chunk lies in a received slot, which the other CTA has filled (SlotCursor).
     *
     * On return the products of the state's update are in flight. For outputs, (Q~ S)^T is in the last tiles
     * of `read`, and U^T P^T is on its way to `own`. store_before() stores the outputs of the chunk before
     * or, in a walk, the state before the chunk.
     */
    template <class Store>
    __device__ void step(int index, int left, int position, float (&read)[READ][4], float (&own)[TILES][4],
                         Store store_before)
    {
        const bool look = (position & (128 - CHUNK)) == 0 && (!Block::MAPS || !is_map), whole = left >= CHUNK;
        Stage &stage = shared.stage[index];
        const uint32_t tokens_place =
            tokens_descriptor + index * static_cast<int>(sizeof(Tokens<Block>) / 16);
        const uint32_t stage_place = stage_descriptor + index * static_cast<int>(sizeof(Stage) / 16);
        float v[TILES][4], u[TILES][4]; /* u: R^T, then U^T */
        uint32_t a[DIM / 16][4];

        /* ---- K~ S and Q~ S ---- */
        const Raw raw = load_raw(shared.tokens[index]);
#pragma unroll
        for (int s = 0; s < DIM / 16; s++) pack_operand(a[s], state[2 * s], state[2 * s + 1]);
        wgmma_fence();
        wgmma<false, false>(read, a[0], Tokens<Block>::decayed(tokens_place, 0));
#pragma unroll
        for (int s = 1; s < DIM / 16; s++)
            wgmma<true, false>(read, a[s], Tokens<Block>::decayed(tokens_place, s));
        wgmma_commit();
        if constexpr (Block::IMAGES) store_before();

        /* ---- Meanwhile: does this chunk leave the usual path? ---- */
        if constexpr (Block::OPTIONS)
            if (look && may_grow() && __any_sync(~0u, has_grown())) faint = true;
        const float high = largest(raw, 0), low = largest(raw, 1);
        const bool act = misfit(high, low, least_of(look));
        /* The load gives 0 instead of the divisor if v does not fit. Its address depends on v, so that the
         * compiler cannot move the look at v behind the wait. */
        const float divisor = load_shared(__any_sync(~0u, act) ? &stage.zero : &stage.divisor);
        const bool usual = (divisor == 1.0f) & whole & !(look & faint);
        unpack_values(v, raw);
        wgmma_wait<0>();
        if (__builtin_expect(!usual, 0)) {
            adapt(v, read, shared.tokens[index].v[0], stage, left, look);
        } else {
            least_again = 0.0f;
        }

        /* ---- R, and U = T R ---- */
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                u[i][r] = __fmaf_rn(v[i][r], inverse_power(scale[r / 2]), -read[i][r]);
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) pack_operand(a[i], u[2 * i], u[2 * i + 1]);
        float4 gamma_minus_1[DIM / 16];
        load_gamma(gamma_minus_1, stage); /* in front of the products, behind which it would wait */
        wgmma_fence();
        wgmma<false, true>(u, a[0], solve_operand(stage_place, 0));
#pragma unroll
        for (int i = 1; i < SUBCHUNKS; i++) wgmma<true, true>(u, a[i], solve_operand(stage_place, i));
        wgmma_commit();

        /* ---- Meanwhile: outputs of the chunk before, and the state's decay ---- */
        if constexpr (!Block::IMAGES) store_before();
        decay(gamma_minus_1);
        wgmma_wait<0>();

        /* ---- U P for outputs, and the state's update ---- */
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++) pack_operand(a[SUBCHUNKS + i], u[2 * i], u[2 * i + 1]);
        /* Gradients need more bits of what is written: a token may write nearly all of a state. */
        if constexpr (Block::IMAGES)
#pragma unroll
            for (int i = 0; i < SUBCHUNKS; i++)
                pack_rest(a[2 * SUBCHUNKS + i], a[SUBCHUNKS + i], u[2 * i], u[2 * i + 1]);
        wgmma_fence();
        if constexpr (Block::OUTPUTS) {
            wgmma<false, false>(own, a[SUBCHUNKS], attend_operand(stage_place, 0));
#pragma unroll
            for (int i = 1; i < SUBCHUNKS; i++)
                wgmma<true, false>(own, a[SUBCHUNKS + i], attend_operand(stage_place, i));
            wgmma_commit();
        }
#pragma unroll
        for (int i = 0; i < SUBCHUNKS; i++)
            wgmma<true, true>(state, a[SUBCHUNKS + i], Tokens<Block>::k_rest(tokens_place, i));
        if constexpr (Block::IMAGES)
#pragma unroll
            for (int i = 0; i < SUBCHUNKS; i++)
                wgmma<true, true>(state, a[2 * SUBCHUNKS + i], Tokens<Block>::k_rest(tokens_place, i));
        wgmma_commit();
    }

    /* ---- One work item ---- */

    /* Whether a CTA may overwrite a state that another one starts from (schedule/relay.cuh). */
    static constexpr bool OVERWRITES_STATES = Block::JOINS && !Block::MIXED;

    /* Leaves the state as it is, with the notes that belong to it. */
    __device__ void save(const WorkItem &item) const
    {
        PieceState &to = *static_cast<PieceState *>(global_memory(item.final));
        const int rows = Base::row_group(item);
#pragma unroll
        for (int s = 0; s < DIM / 8; s++)
            to.rows.tile[rows][s][lane] = make_float4(state[s][0], state[s][1], state[s][2], state[s][3]);
        to.notes[rows][lane] =
            make_float4(scale[0], scale[1], least_again, __uint_as_float(static_cast<unsigned>(faint)));
    }

    /* The scales and notes before a work item, behind load_state(): those that were saved, or those of a new
     * state. */
    __device__ void take_notes(const WorkItem &item)
    {
        float x[4] = {1.0f, 1.0f, 0.0f, 0.0f};
        if constexpr (Block::PIECES) {
            const PieceState *from = static_cast<const PieceState *>(global_memory(item.initial));
            load_four_if<0>(x, &from->notes[Base::row_group(item)][lane], item.attributes & RESTORES);
        }
        scale[0] = x[0], scale[1] = x[1];
        least_again = __any_sync(~0u, x[2] == Base::CHOOSE) ? Base::CHOOSE
                      : __any_sync(~0u, x[2] != 0.0f)       ? Base::SMALL
                                                            : 0.0f;
        faint = __any_sync(~0u, __float_as_uint(x[3]) != 0);
    }

    /* Stores the checkpoint behind a chunk, of which CheckpointRing::number_of says `number`. */
    __device__ void store_checkpoint(int number)
    {
        bool more = true;
#pragma unroll 1
        for (number--; more; number++) {
            const Slot<CHECKPOINTS_AHEAD> slot(number);
            mbarrier_wait(&shared.checkpoints.ring.full[slot.index], slot.parity);
            const auto entry = shared.checkpoints.entry[slot.index];
            mbarrier_arrive_warp(&shared.checkpoints.ring.empty[slot.index]);
            more = entry.more;
            /* Otherwise the compiler would find all products with the scales in front of the loop, and keep
             * them in registers. */
            for (float &x : scale) x = __shfl_xor_sync(~0u, x, 0);
            if (entry.to) Base::store_in_layout(global_memory(entry.to), args.checkpoints.is_bf16);
        }
    }

    /* Of a walk: stores what is carried, if a chunk of FKDA_HOPPER_BWD_CHUNK tokens begins here or,
     * backwards, ends here. The last one of a sequence may end anywhere. */
    __device__ void store_image(const WorkItem &item, int left) const
    {
        constexpr int OF_IMAGE = FKDA_HOPPER_BWD_CHUNK;
        int at; /* tokens of the sequence before this place */
        bool stores = true;
        if constexpr (Block::BACKWARDS) {
            at = item.images.before + left;
            stores = at % OF_IMAGE == 0 || (left == item.length && !(item.attributes & INITIAL_IMAGE));
            at--;
        } else {
            at = item.images.before + item.length - left;
            stores = at % OF_IMAGE == 0;
        }
        if (CHUNK == OF_IMAGE || stores) Base::store_chunk_image(item, at / OF_IMAGE);
    }

    __device__ void compute_item(const WorkItem &item, SlotCursor<Block> &place)
    {
        char *to = static_cast<char *>(args.out) +
                   2 * (token_place(args.out_strides, item.row, item.token + lane / 2, item.head) +
                        item.first_row + warp_row() + lane % 2 * 8);
        float read[READ][4] = {}, own[TILES][4] = {};
        OutputGradients gradients; /* backwards: of the next chunk */
        is_map = item.attributes & IS_MAP;
        if (item.attributes & AWAITS_INITIAL) await_flag(&item.flags[warp_row() >> 4]);
        load_state(item);
        if constexpr (OVERWRITES_STATES)
            if (item.attributes & SIGNALS_READ) set_flag(&item.read_flags[warp_row() >> 4]);
        if constexpr (Block::PIECES)
            take_notes(item);
        else
            scale[0] = scale[1] = 1.0f, least_again = 0.0f, faint = false;
        bool ready = item.length > 0 && (!Block::MAPS || !is_map);
        if constexpr (Block::PIECES) ready = ready && !(item.attributes & SCALES_CHOSEN);
        if (ready) choose_first_scales(Order::here(item.length), place);
        int position = Block::PIECES ? item.attributes >> PHASE_BIT << 4 : 0;
        const long long stride = SUBCHUNKS * args.chunk_bytes;
        int slot = uniform(place.index());
        if constexpr (Block::BACKWARDS)
            if (item.length > 0) prepare_gradients(gradients, slot, item.length);
        for (int left = item.length; left > 0; left = Order::advance(left)) {
            if constexpr (Block::BACKWARDS) {
                step_back(slot, left, gradients, [&] { store_image(item, left); });
            } else {
                if (!ready) mbarrier_wait(&shared.chunk_ring.ready[slot], place.parity());
                step(slot, left, position, read, own, [&] {
                    if constexpr (Block::IMAGES)
                        store_image(item, left);
                    else if constexpr (STORED_LATER)
                        store_output(0, to - stride, left == item.length ? 0 : CHUNK);
                });
            }
            SlotCursor<Block> next = place;
            next.advance();
            const int next_slot = uniform(next.index());
            if constexpr (!Block::BACKWARDS) {
                ready = mbarrier_test(&shared.chunk_ring.ready[next_slot], next.parity());
            } else if (Order::advance(left) > 0) {
                mbarrier_wait(&shared.chunk_ring.ready[next_slot], next.parity());
                prepare_gradients(gradients, next_slot, Order::advance(left));
            }
            int checkpoint = 0;
            if constexpr (Block::CHECKPOINTS) checkpoint = shared.checkpoints.number_of[slot];
            if constexpr (Block::OUTPUTS) {
                wgmma_wait<1>();
                put_output(slot, own, &read[TILES]);
                if constexpr (!STORED_LATER) store_output(slot, to, left);
                to += stride;
            }
            wgmma_wait<0>();
            release(place);
            if constexpr (Block::CHECKPOINTS)
                if (__builtin_expect(checkpoint != 0, 0)) store_checkpoint(checkpoint);
            place = next, slot = next_slot, position += CHUNK;
        }
        if (STORED_LATER && item.length > 0) store_output(0, to - stride, (item.length - 1) % CHUNK + 1);
        if constexpr (OVERWRITES_STATES)
            if (item.attributes & AWAITS_READ) await_flag(&item.read_flags[warp_row() >> 4]);
        if (Block::PIECES && item.attributes & SAVES)
            save(item);
        else if (item.final)
            store_state(item, place);
        if (item.attributes & SIGNALS_FINAL) set_flag(&item.flags[warp_row() >> 4]);
    }

    /* The warp has read everything that it needs of a chunk. The CTA that sent the chunk is told too. */
    __device__ void release(const SlotCursor<Block> &place) const
    {
        mbarrier_arrive_warp(&shared.chunk_ring.empty[place.index()]);
        if (Block::CTAS == 2 && !place.is_own())
            mbarrier_arrive_warp_in_other_cta(&shared.chunk_ring.empty[place.own().index]);
    }

    /* ---- The role ---- */

    __device__ void run()
    {
        SlotCursor<Block> place;
        WorkCursor items(shared.work);
        /* Of all that a CTA reads, only states in the workspace can come from the previous kernel. */
        if (Block::OUTPUTS) wait_for_previous_kernel();
        for (;; items.finish()) {
            const WorkItem &item = items.current(); /* read again for each use: registers are scarce */
            if constexpr (Block::JOINS)
                if (item.attributes & JOINS_BEFORE) RelayJoin<Block>(all, shared).carry_rows();
            if (item.attributes & NO_WORK) break;
            compute_item(item, place);
        }
    }
};

} // namespace fkda

#endif
