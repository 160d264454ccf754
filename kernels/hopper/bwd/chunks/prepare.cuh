/*
 * The first step of a chunk: where it is, its copies, and its preparation by the code of the forward pass:
 * K~, Q~, Kr, T and P; and K~ K^^T, which the forward pass does not keep.
 */
#ifndef FKDA_HOPPER_CHUNKS_PREPARE_CUH
#define FKDA_HOPPER_CHUNKS_PREPARE_CUH

#include "block.cuh"

namespace fkda
{

template <class Block> struct ChunkPreparation : Preparation<Block> {
    using Base = Preparation<Block>;
    using Base::args, Base::shared, Base::warp, Base::lane;
    using Sums = typename Base::Sums;
    using Gates = typename Base::Gates;
    const fkda_hopper_chunk_args &all;

    __device__ ChunkPreparation(const fkda_hopper_chunk_args &a, Shared<Block> &s)
        : Base(a.bwd.fwd, s), all(a)
    {
    }

    /* ---- Where the chunk is ---- */

    /* The first slot of a sequence. With cu_seqlens. */
    __device__ long long first_slot(int sequence) const
    {
        return sequence_border(args, sequence) / CHUNK_TOKENS + sequence;
    }

    /* The last sequence whose first slot is at or before a slot. With cu_seqlens. */
    __device__ int sequence_of(long long slot) const
    {
        int first = 0, end = args.sequences;
        while (first + 1 < end) {
            const int middle = first + (end - first) / 2;
            (first_slot(middle) <= slot ? first : end) = middle;
        }
        return first;
    }

    /* The chunk of CTA `i`: that of head i % HV of slot i / HV. All threads wait for this, so divisions are
     * left out where they can be. */
    __device__ void find_place(unsigned i)
    {
        const auto heads = static_cast<unsigned>(args.heads), group = static_cast<unsigned>(args.group),
                   row_slots = static_cast<unsigned>(all.bwd.row_slots);
        const unsigned slot = i / heads, head = i - slot * heads;
        ChunkCursor<Block> at;
        at.slot = slot;
        at.head = static_cast<int>(head);
        at.qk_head = static_cast<int>(group == 1 ? head : head / group);
        if (args.cu_seqlens)
            find_tokens(at);
        else {
            const unsigned row = slot < row_slots ? 0 : slot / row_slots;
            at.row = static_cast<int>(row);
            at.token = static_cast<int>((slot - row * row_slots) * CHUNK_TOKENS);
            at.left = min(max(static_cast<int>(args.tokens) - at.token, 0), CHUNK_TOKENS);
        }
        shared.at = at;
    }

    /* The tokens of a chunk whose slot is known. With cu_seqlens. */
    __device__ void find_tokens(ChunkCursor<Block> &at) const
    {
        const int sequence = sequence_of(at.slot);
        const Task task = find_task(args, sequence, at.head, CHUNK_TOKENS);
        /* Of the same border as the task, in case cu_seqlens changes. */
        const long long first = task.begin / CHUNK_TOKENS + sequence,
                        before = (at.slot - first) * CHUNK_TOKENS;
        at.row = 0;
        at.left = before < 0 || before >= task.length
                      ? 0
                      : static_cast<int>(min(task.length - before, static_cast<long long>(CHUNK_TOKENS)));
        at.token = static_cast<int>(task.begin + before);
    }

    /* ---- Copies, each by one thread ---- */

    __device__ const unsigned char *image(const unsigned char *images) const
    {
        return images + (shared.at.slot * args.heads + shared.at.head) * FKDA_HOPPER_BORDER_IMAGE;
    }

    __device__ void copy_image(ImageRows &rows, const unsigned char *from, uint64_t *barrier) const
    {
        mbarrier_arrive_expecting(barrier, FKDA_HOPPER_BORDER_IMAGE);
        copy_bulk(&rows, from, sizeof rows, barrier);
        copy_bulk(shared.image_scale, from + sizeof rows, sizeof shared.image_scale, barrier);
    }

    /* g, k and q. */
    __device__ void copy_inputs(typename Tokens<Block>::Half *to) const
    {
        const ChunkCursor<Block> &at = shared.at;
        uint64_t *const barrier = &shared.inputs_there;
        const bool with_g = !has_fp32_gates<Block>(args); /* gates in fp32 come from global memory */
        mbarrier_arrive_expecting(barrier, (with_g ? 6 : 4) * Block::HALF_TOKENS);
#pragma unroll
        for (int half = 0; half < DIM / 64; half++) {
            if (with_g) copy_box(to[half].tile[G], &all.g, half, at.token, at.head, at.row, barrier);
            copy_box(to[half].tile[K], &all.k, half, at.token, at.qk_head, at.row, barrier);
            copy_box(to[half].tile[Q], &all.q, half, at.token, at.qk_head, at.row, barrier);
        }
    }

    __device__ void copy_dout() const
    {
        const ChunkCursor<Block> &at = shared.at;
        uint64_t *const barrier = &shared.dout_there;
        mbarrier_arrive_expecting(barrier, 2 * Block::HALF_TOKENS);
#pragma unroll
        for (int half = 0; half < DIM / 64; half++)
            copy_box(shared.dout[half], &all.dout, half, at.token, at.head, at.row, barrier);
    }

    /* ---- Places of other threads' loads and stores ---- */

    __device__ void note_places() const
    {
        const ChunkCursor<Block> &at = shared.at;
        const fkda_bwd_args &b = all.bwd;
        const int bytes_of_g = Block::OPTIONS && args.g_is_f32 ? 4 : 2;
        const long long part =
            ((static_cast<long long>(at.row) * args.tokens + at.token) * args.heads + at.head) * DIM;
        TensorPlaces &to = shared.places;
        to.v = static_cast<const unsigned char *>(args.v) + 2 * at.place(args.v_strides, 0);
        to.dv = static_cast<unsigned char *>(b.dv) + 2 * at.place(b.dv_strides, 0);
        to.dg = static_cast<unsigned char *>(b.dg) + bytes_of_g * at.place(b.dg_strides, 0);
        to.dq = b.dq_parts ? reinterpret_cast<unsigned char *>(b.dq_parts + part)
                           : static_cast<unsigned char *>(b.dq) + 2 * at.place(b.dq_strides, 0, args.group);
        to.dk = b.dk_parts ? reinterpret_cast<unsigned char *>(b.dk_parts + part)
                           : static_cast<unsigned char *>(b.dk) + 2 * at.place(b.dk_strides, 0, args.group);
    }

    /* ---- The preparation ---- */

    __device__ void load_gate() const
    {
        const GateOfCall call = gate_of_call<Block>(args);
        const int head = shared.at.head, channel = 32 * warp + lane;
        const float A_log = Base::load_parameter(args.A_log, head);
        const float slope = Block::OPTIONS ? call.slope(A_log) : hopper_sigmoid_gate_slope(A_log);
        if (channel < DIM) {
            const float bias = Base::load_parameter(args.dt_bias, head * DIM + channel);
            shared.gate_offset[0][channel] =
                Block::OPTIONS ? call.offset(bias, slope) : hopper_sigmoid_gate_offset(bias, slope);
        }
        if (lane == 0)
            shared.gate[0][warp] = {slope,
                                    Block::OPTIONS ? call.factor(A_log, args.lower_bound)
                                                   : hopper_sigmoid_gate_inverse_bound(args.lower_bound),
                                    head};
    }

    /* The small matrices are triangles, of which only what is not zero is written. */
    __device__ void clear_matrices() const
    {
        constexpr int UNITS = offsetof(Stage<Block>, gamma_minus_1) / 16, KEYS = sizeof shared.keys / 16;
        const uint4 zeros = make_uint4(0, 0, 0, 0);
        for (int i = 32 * warp + lane; i < UNITS + KEYS; i += FKDA_HOPPER_CHUNK_THREADS)
            (i < UNITS ? reinterpret_cast<uint4 *>(&shared.stage[0])[i]
                       : reinterpret_cast<uint4 *>(&shared.keys)[i - UNITS]) = zeros;
    }

    /* The warp's 16 channels of both subchunks. Returns whether some factors were too large, and the
     * preparation must be careful (prepare_slice.cuh says how). */
    template <bool careful> __device__ bool prepare_channels()
    {
        Sums sums = {};
        Gates gates;
        gates.wide = false, gates.least = 0.0f;
        const int first = Base::SHARE * warp;
        static_assert(Base::SHARE == 16, "one slice of each subchunk");
        const uint32_t place =
            (shared_address(&shared.tokens[0].half[first / 64]) + matrix_row(lane)) ^ 2 * (first % 64);
#pragma unroll 1
        for (int sub = 0; sub < Block::SUBCHUNKS; sub++) {
            if (sub == 1) {
                __syncwarp();
#pragma unroll
                for (int i = 0; i < 12; i++) {
                    sums.within[0][i / 4][i % 4] = sums.within[1][i / 4][i % 4];
                    sums.within[1][i / 4][i % 4] = 0.0f;
                }
            }
            this->template prepare_slice<careful>({shared.at, sub, first, false},
                                                  place + sub * SUBCHUNK_BYTES, &shared.gate_offset[0][first],
                                                  shared.inverse_norm[0][0][0] + lane / 4 + sub * SUBCHUNK,
                                                  shared.stage[0].gamma_minus_1 + first, sums, gates);
        }
        const float unit = inverse_power(Base::key_scale(args));
#pragma unroll
        for (int i = 0; i < 16; i++)
            sums.across[i / 8][i / 4 % 2][i % 4] *= i < 8 ? unit * unit : unit * (1.0f / OPERAND_UNIT<Block>);
        this->store_sums(sums);
        if (!Block::UNBOUNDED || careful) return false;
        /* A gate of minus infinity, which is held in a careful preparation alone, leaves NaN in the sums. */
        __syncwarp();
        const float sum = shared.stage[0].gamma_minus_1[first + lane % 16];
        return __any_sync(~0u, gates.least < -Base::MAY_BE_WIDE || sum != sum);
    }

    /* K~ K^^T below the diagonal, from the products over channels, for tokens with tiny write strengths. Lane
     * 8 n + r has row r of tile n. */
    __device__ void add_keys() const
    {
        const Products<Block> &products = shared.products[0];
        const int n = lane / 8, r = lane % 8;
        float x[8];
        sum_partials<Block>(x, products, 0, Products<Block>::ON_DIAGONAL + n, r);
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = j < r ? x[j] : 0.0f;
        *shared.keys.at(8 * n + r, 8 * n) = pack_eight(x, PRODUCT_UNIT<Block>);
        if (n < Block::SUBCHUNKS) {
            sum_partials<Block>(x, products, 0, Products<Block>::BELOW_IT + n, r);
            *shared.keys.at(8 + SUBCHUNK * n + r, SUBCHUNK * n) = pack_eight(x, PRODUCT_UNIT<Block>);
        }
        sum_partials<Block>(x, products, 0, Products<Block>::ACROSS + n, r);
        *shared.keys.at(SUBCHUNK + n / 2 * 8 + r, n % 2 * 8) = pack_eight(x, 1.0f);
    }

    /* The products of queries with keys of the same token, before norms and in fp32, for P's diagonal: the
     * diagonal of q k^T of a subchunk, found as the sums of squares are (store_inverse_norms()). */
    __device__ void store_own_products(int sub) const
    {
        const auto &half = shared.tokens[0].half;
        const int row = lane / 4, odd = row % 2;
        float top[4] = {}, low[4] = {};
#pragma unroll
        for (int c = 0; c < DIM / 16; c++) {
            uint32_t a[4], b[4];
            load_matrices(a, (shared_address(half[c / 4].tile[Q] + sub * SUBCHUNK_BYTES) + matrix_row(lane)) ^
                                 c % 4 * 32);
            load_matrices(
                b, (shared_address(half[c / 4].tile[K] + sub * SUBCHUNK_BYTES) + matrix_row_by_token(lane)) ^
                       c % 4 * 32);
            mma_bf16(top, a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_bf16(low, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
        if (lane % 4 != row / 2) return;
        shared.attend_lack[SUBCHUNK * sub + row] = odd ? top[1] : top[0];
        shared.attend_lack[SUBCHUNK * sub + row + 8] = odd ? low[3] : low[2];
    }

    /* Two warps make T, P and, where it is needed, K~ K^^T: the first one inverts, and the second one adds
     * up what is not on L's diagonal meanwhile. `beta` is that of token `lane`. The matrices are there when
     * the CTA meets next. */
    __device__ void solve(Beta<Block> beta) const
    {
        if (warp >= SOLVERS) return;
        constexpr int THREADS = 32 * SOLVERS;
        Stage<Block> &stage = shared.stage[0];
        const Products<Block> &products = shared.products[0];
        const bool there = lane < shared.at.left;
        const float b = there ? write_strength<Block>(args, beta) : 0.0f,
                    divisor = divisor_above(largest_of_warp<Block>(b));
        const bool faint = __any_sync(~0u, there && is_faint(b, divisor));
        if (warp == 0) {
            add_diagonal<Block>(shared.scratch, stage, products, false, b, lane);
            __syncwarp();
            const float of_diagonal = b * inverse_power(divisor);
            invert_diagonal<Block>(shared.scratch, stage, of_diagonal, lane);
            barrier_sync<SOLVER_BARRIER, THREADS>(0);
            invert_below_diagonal<Block>(shared.scratch, stage, divisor, lane);
            shared.solve_lack[lane] = of_diagonal - half_low(pack_half(of_diagonal, 0.0f));
        } else {
            add_below_diagonal<Block>(shared.scratch, stage, products, b, lane);
            barrier_arrive<SOLVER_BARRIER, THREADS>(0);
            add_diagonal<Block>(shared.scratch, stage, products, true, b, lane);
            if (lane == 0) stage.divisor = divisor, shared.has_faint_write = faint;
            shared.strength[lane] = b;
            shared.slope[lane] = there ? slope_of(beta) : 0.0f;
            __syncwarp();
            store_attend_lack();
            if (faint) add_keys();
        }
    }

    /* What P lacks on its diagonal. Until now the place has the product, which may be infinite. */
    __device__ void store_attend_lack() const
    {
        const float norms = shared.inverse_norm[0][0][0][lane] * shared.inverse_norm[0][0][1][lane];
        const auto *const row =
            reinterpret_cast<const uint16_t *>(shared.stage[0].attend.at(lane, lane / 8 * 8));
        float &lack = shared.attend_lack[lane];
        lack = norms > 0.0f ? lack * norms - half_low(row[lane % 8]) : 0.0f;
    }

    /* The derivative of the write strength. */
    __device__ float slope_of(Beta<Block> beta) const
    {
        constexpr int TWICE_SIGMOID = 1, ACTIVATED = 2; /* flash_kda_beta */
        float x = __uint_as_float(static_cast<uint32_t>(beta) << 16);
        if (Block::OPTIONS && args.beta_is_f32) x = __uint_as_float(beta);
        if (Block::OPTIONS && args.beta_kind == ACTIVATED) return 1.0f;
        const float slope = rcp(1.0f + ex2(x * -LOG2_E)) * rcp(1.0f + ex2(x * LOG2_E));
        return Block::OPTIONS && args.beta_kind == TWICE_SIGMOID ? 2.0f * slope : slope;
    }

    /* The preparation has overwritten its inputs, so they are copied once more. */
    __device__ void prepare_carefully()
    {
        if (warp == 0 && lane == 0) copy_inputs(shared.tokens[0].half);
        mbarrier_wait(&shared.inputs_there, 1);
        if (shared.at.left < CHUNK_TOKENS) this->clear_past_end(0, shared.at.left);
        __syncthreads();
        prepare_channels<true>();
        fence_async_proxy();
        __syncthreads();
    }

    /* Until K~, Q~ and Kr are there. Returns beta in the warps that solve. */
    __device__ Beta<Block> run()
    {
        const ChunkCursor<Block> at = shared.at;
        Beta<Block> beta = 0;
        if (warp < SOLVERS) beta = load_beta(at);
        if (warp == CHUNK_WARPS - 1 && lane == 0) note_places();
        load_gate();
        clear_matrices();
        mbarrier_wait(&shared.inputs_there, 0);
        if (at.left < CHUNK_TOKENS) this->clear_past_end(0, at.left);
        if (warp < 4)
            store_norms<Block, 4>(shared.inverse_norm[0][0], shared.tokens[0], args, warp, lane);
        else if (warp < 4 + Block::SUBCHUNKS)
            store_own_products(warp - 4);
        if (Block::UNBOUNDED && warp == 0 && lane == 0) shared.is_wide = 0;
        __syncthreads();
        const bool wide = prepare_channels<false>();
        if (wide && lane == 0) shared.is_wide = 1;
        fence_async_proxy(); /* wgmma reads the tiles, and copies may overwrite them */
        __syncthreads();
        if constexpr (Block::UNBOUNDED)
            if (shared.is_wide) prepare_carefully();
        return beta;
    }

    __device__ Beta<Block> load_beta(const ChunkCursor<Block> &at) const
    {
        const long long from = at.place_of_beta(args.beta_strides, lane);
        if (lane >= at.left) return 0;
        if (Block::OPTIONS && args.beta_is_f32) return __ldg(static_cast<const uint32_t *>(args.beta) + from);
        return __ldg(static_cast<const uint16_t *>(args.beta) + from);
    }
};

} // namespace fkda

#endif
