/*
 * The row warps: each carries 16 rows of V of a state, or of the gradient with respect to one, in fp32
 * accumulators, as the warps of ../../backward/rows.cuh do. Operands of the products are fp16.
 *
 * Units. An operand is divided by a power of two, its unit (half_tiles.cuh), and sums are multiplied by it.
 * The state, and its gradient, have a unit for all of the matrix, because sums over V run over all warps'
 * rows; so have the values of a chunk. What only a warp's own rows need has a unit of the warp.
 */
#ifndef FKDA_HOPPER_BWD_ROW_ROLE_CUH
#define FKDA_HOPPER_BWD_ROW_ROLE_CUH

#include "../../backward/walk.cuh"
#include "channel_role.cuh"
#include "sums.cuh"

namespace fkda
{

/* Rows of v or dout of a chunk in bf16, two neighbouring rows of V in a register. */
struct Values {
    uint32_t pair[4]; /* tokens g, g, g + 8, g + 8 and rows 2 t, 2 t + 8, 2 t, 2 t + 8 of the warp */

    __device__ __forceinline__ void load(const char *from, long long token_stride, int chunk, int length,
                                         RowPlace p)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = chunk * CHUNK + 8 * i + p.g;
            const bool there = from && chunk >= 0 && token < length;
            const auto *at =
                reinterpret_cast<const uint32_t *>(from + 2 * (token * token_stride + p.first)) + p.t;
            pair[2 * i] = there ? __ldg(at) : 0;
            pair[2 * i + 1] = there ? __ldg(at + 4) : 0;
        }
    }

    /* Transposed: rows g and g + 8 of V, and tokens 8 i + 2 t, + 1. */
    __device__ __forceinline__ void transpose(float (&d)[2][4]) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t two = transpose_matrix(pair[i]);
            d[i / 2][i % 2 * 2] = bf16_low(two), d[i / 2][i % 2 * 2 + 1] = bf16_high(two);
        }
    }
};

struct RowRole {
    HopperShared &s;
    const fkda_hopper_bwd_args &args;
    int taken = 0, results = 0; /* prepared slots and results, since the kernel's start */
    int turn = 0;               /* which of `carried` the carried matrix has */

    __device__ RowRole(HopperShared &shared, const fkda_hopper_bwd_args &a) : s(shared), args(a)
    {
    }

    /* ---- What is carried ---- */

    __device__ __forceinline__ void announce(Magnitudes &to, uint32_t largest) const
    {
        const RowPlace p = row_place();
        largest = __reduce_max_sync(~0u, largest);
        if (p.lane == 0) to.of_warp[p.warp] = largest;
    }

    /* After `x` was loaded. */
    __device__ __forceinline__ void begin(const Rows &x)
    {
        turn ^= 1;
        announce(s.carried[turn], largest_of(x.x));
    }

    /* The place of a border in front of a segment. */
    __device__ __forceinline__ long long border(int segment) const
    {
        return (s.piece.task.begin / args.bwd.segment + segment - 1) * args.bwd.fwd.heads + s.piece.task.head;
    }

    __device__ __forceinline__ void store_border(const Rows &x, Unit unit, unsigned char *images,
                                                 float *units, int segment) const
    {
        const RowPlace p = row_place();
        const long long at = border(segment);
        StateImage &to = *reinterpret_cast<StateImage *>(images + at * FKDA_HOPPER_BWD_IMAGE);
        if (p.warp == 0 && p.lane == 0) units[at] = unit.size;
#pragma unroll
        for (int i = 0; i < DIM / 4; i++) {
            const int row = p.first + p.g + i % 2 * 8, channel = 8 * (i / 2) + 2 * p.t;
            *reinterpret_cast<uint32_t *>(&to.x[row][StateImage::place(row, channel)]) =
                pack_half(x.x[i / 2][i % 2 * 2] * unit.inverse, x.x[i / 2][i % 2 * 2 + 1] * unit.inverse);
        }
    }

    __device__ __forceinline__ void load_border(Rows &x, const unsigned char *images, const float *units,
                                                int segment) const
    {
        const RowPlace p = row_place();
        const long long at = border(segment);
        const StateImage &from = *reinterpret_cast<const StateImage *>(images + at * FKDA_HOPPER_BWD_IMAGE);
        const float unit = units[at];
#pragma unroll
        for (int i = 0; i < DIM / 4; i++) {
            const int row = p.first + p.g + i % 2 * 8, channel = 8 * (i / 2) + 2 * p.t;
            const uint32_t two =
                *reinterpret_cast<const uint32_t *>(&from.x[row][StateImage::place(row, channel)]);
            x.x[i / 2][i % 2 * 2] = half_low(two) * unit, x.x[i / 2][i % 2 * 2 + 1] = half_high(two) * unit;
        }
    }

    /* Where the thread's first element of a state [V, K] is, from the state's start. */
    static __device__ __forceinline__ int first_element(int channel_step, int row_step)
    {
        const RowPlace p = row_place();
        return 2 * p.t * channel_step + (p.first + p.g) * row_step;
    }
    /* From that of element i to element 0. All steps are constants, which instructions encode. */
    template <int channel_step, int row_step> static constexpr __device__ int element(int i)
    {
        return (8 * (i / 4) + i % 2) * channel_step + i % 4 / 2 * 8 * row_step;
    }

    template <int channel_step, int row_step>
    static __device__ __forceinline__ void load_elements(Rows &x, const fkda_state_args &states, long long at,
                                                         bool is_bf16)
    {
        at += first_element(channel_step, row_step);
        if (is_bf16) {
            const uint16_t *const from = static_cast<const uint16_t *>(states.data) + at;
#pragma unroll
            for (int i = 0; i < DIM / 2; i++)
                x.x[i / 4][i % 4] = from_bf16_bits(from[element<channel_step, row_step>(i)]);
        } else {
            const float *const from = static_cast<const float *>(states.data) + at;
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) x.x[i / 4][i % 4] = from[element<channel_step, row_step>(i)];
        }
    }
    template <int channel_step, int row_step>
    static __device__ __forceinline__ void store_elements(const Rows &x, const fkda_state_args &states,
                                                          long long at)
    {
        float *const to = static_cast<float *>(states.data) + at + first_element(channel_step, row_step);
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) to[element<channel_step, row_step>(i)] = x.x[i / 4][i % 4];
    }

    __device__ __forceinline__ long long state_of_head(const fkda_state_args &states) const
    {
        return s.piece.sequence * states.slot_stride +
               s.piece.task.head * (static_cast<long long>(DIM) * DIM);
    }

    /* From a tensor of the call, or zeros. */
    __device__ __forceinline__ void load(Rows &x, const fkda_state_args &states, bool is_bf16) const
    {
        if (!states.data)
            x.clear();
        else if (args.bwd.fwd.state_k_first)
            load_elements<DIM, 1>(x, states, state_of_head(states), is_bf16);
        else
            load_elements<1, DIM>(x, states, state_of_head(states), is_bf16);
    }
    __device__ __forceinline__ void load_initial_state(Rows &x) const
    {
        load(x, args.bwd.fwd.initial_state, args.bwd.initial_is_bf16);
    }
    __device__ __forceinline__ void load_final_gradient(Rows &x) const
    {
        load(x, args.bwd.dfinal_state, args.bwd.dfinal_is_bf16);
    }

    /* The gradient with respect to the initial state, in fp32. */
    __device__ __forceinline__ void store_initial_gradient(const Rows &x) const
    {
        const fkda_state_args &states = args.bwd.dinitial_state;
        if (!states.data) return;
        if (args.bwd.fwd.state_k_first)
            store_elements<DIM, 1>(x, states, state_of_head(states));
        else
            store_elements<1, DIM>(x, states, state_of_head(states));
    }

    /* ---- Forwards ---- */

    __device__ __forceinline__ void load_values(Values &values, int chunk) const
    {
        values.load(s.piece.v, args.bwd.fwd.v_strides.token, chunk, s.piece.task.length, row_place());
    }
    __device__ __forceinline__ void load_dout(Values &values, int chunk) const
    {
        values.load(s.piece.dout, args.bwd.dout_strides.token, chunk, s.piece.task.length, row_place());
    }

    __device__ __forceinline__ unsigned char *record(int chunk_of_segment) const
    {
        int cta, thread;
        read_indices(cta, thread);
        return args.records +
               (static_cast<long long>(cta) * args.record_chunks + chunk_of_segment) * FKDA_HOPPER_BWD_RECORD;
    }

    __device__ __forceinline__ float4 *missed_record(int chunk_of_segment) const
    {
        return reinterpret_cast<float4 *>(record(chunk_of_segment) + FKDA_HOPPER_BWD_IMAGE);
    }

    /* Two tiles of channels: x becomes factor x + more x + unit (a b). */
    static __device__ __forceinline__ void add(Rows &x, int j, const float (&tmp)[2][4], float unit,
                                               const Prepared &prepared, int t)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int channel = 16 * j + 8 * i + 2 * t;
            const float2 factor = *reinterpret_cast<const float2 *>(&prepared.factor[channel]),
                         more = *reinterpret_cast<const float2 *>(&prepared.more[channel]);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float &y = x.x[2 * j + i][r];
                y = __fmaf_rn(y, r % 2 ? more.y : more.x, y * (r % 2 ? factor.y : factor.x));
                y = __fmaf_rn(tmp[i][r], unit, y);
            }
        }
    }

    /* Multiplies the columns of tokens by the units of a tile's rows. */
    static __device__ __forceinline__ void multiply_by_units(float (&x)[2][4], const Prepared &prepared,
                                                             const float (&units)[CHUNK])
    {
        if (!prepared.has_units()) return;
        const int t = row_place().t;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float2 unit = *reinterpret_cast<const float2 *>(&units[8 * i + 2 * t]);
#pragma unroll
            for (int r = 0; r < 4; r++) x[i][r] *= r % 2 ? unit.y : unit.x;
        }
    }

    /* d = x A^T for a tile of tokens and what its fp16 lack. The images of x are stored if there is a place
     * for them. */
    template <bool stores>
    __device__ __forceinline__ void read(float (&d)[2][4], const Rows &x, Unit unit, const TokenTile &tile,
                                         const TokenTile &lacks, StateImage *image) const
    {
        const RowPlace p = row_place();
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            uint32_t a[4], b[4];
            pack(a, x.x[2 * j], x.x[2 * j + 1], unit.inverse);
            if (stores) image->store_rows(a, p.first, 16 * j, p.lane);
            tile.load_columns(b, 0, 16 * j, p.lane);
            multiply(d, a, b);
            lacks.load_columns(b, 0, 16 * j, p.lane);
            multiply(d, a, b);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) d[i / 4][i % 4] *= unit.size;
    }

    /* Goes over a chunk. The team has met since the state was announced; `unit` is the state's. With records,
     * leaves an image and a record; the state after the last chunk of a segment is not wanted then. */
    template <bool records>
    __device__ __forceinline__ void step_forwards(Rows &x, Values &values, Unit unit, int chunk, int first,
                                                  bool is_last)
    {
        const unsigned n = static_cast<unsigned>(taken++), slot = n % PREPARED_SLOTS;
        Prepared &prepared = s.prepared[slot];
        float d[2][4] = {}, missed[2][4] = {};
        mbarrier_wait(&s.barriers.ready[slot], n / PREPARED_SLOTS & 1);
        read<records>(d, x, unit, prepared.k_read, prepared.k_lacks, &s.images[(chunk - first) & 1]);
        multiply_by_units(d, prepared, prepared.read_unit);
        if (records) fence_async_proxy();
        {
            const RowPlace p = row_place();
            float rest[2][4];
            values.transpose(rest);
#pragma unroll
            for (int i = 0; i < 8; i++) rest[i / 4][i % 4] -= d[i / 4][i % 4];
            multiply_by_inverse(missed, rest, prepared.inverse, p.g, p.t);
            if (!is_last) load_values(values, chunk + 1);
            if (records) {
                float4 *const to = missed_record(chunk - first) + 32 * p.warp + p.lane;
#pragma unroll
                for (int i = 0; i < 2; i++)
                    to[TEAM_THREADS * i] =
                        make_float4(missed[i][0], missed[i][1], missed[i][2], missed[i][3]);
                if (p.lane == 0 && p.warp == 0) s.image_units[chunk - first] = unit.size;
            }
        }
        if (!records || !is_last) {
            multiply_by_strengths(missed, missed, prepared, row_place().t);
            multiply_by_units(missed, prepared, prepared.rest_unit);
            const Unit of_u(__reduce_max_sync(~0u, largest_of(missed)));
            uint32_t a[4], lack[4], largest = 0; /* one token may have written nearly all of the state */
            pack(a, missed[0], missed[1], of_u.inverse);
            pack_lack(lack, a, missed[0], missed[1], of_u.inverse);
            const RowPlace p = row_place();
#pragma unroll
            for (int j = 0; j < DIM / 16; j++) {
                float tmp[2][4] = {};
                uint32_t b[4];
                prepared.k_rest.load_depths(b, 0, 16 * j, p.lane);
                multiply(tmp, a, b);
                multiply(tmp, lack, b);
                add(x, j, tmp, of_u.size, prepared, p.t);
            }
            largest = largest_of(x.x);
            turn ^= 1;
            announce(s.carried[turn], largest);
        }
        mbarrier_arrive_warp(&s.barriers.empty[slot]);
    }

    /* Copies the image of a chunk's state to the record. For one thread. */
    __device__ __forceinline__ void store_image(int chunk_of_segment) const
    {
        start_copy_to_global(record(chunk_of_segment), &s.images[chunk_of_segment & 1],
                             FKDA_HOPPER_BWD_IMAGE);
    }

    /* The chunks of a segment, from the state before it. Leaves their records. */
    __device__ void record_segment(Rows &x, ChunkRange range)
    {
        const bool copies = row_place().warp == 0 && row_place().lane == 0;
        Values values;
        load_values(values, range.first);
        begin(x);
        for (int chunk = range.first; chunk < range.end; chunk++) {
            if (copies) wait_until_copies_have_read(); /* of the chunk before the last one */
            RowTeam::meet();
            if (copies && chunk > range.first) store_image(chunk - 1 - range.first);
            step_forwards<true>(x, values, s.carried[turn].unit(), chunk, range.first,
                                chunk + 1 == range.end);
        }
        fence_async_proxy_of_all_memory(); /* what was missed comes back by copies */
        RowTeam::meet();
        if (!copies) return;
        store_image(range.end - 1 - range.first);
        wait_for_copies_to_global();
    }

    /* ---- Back ---- */

    /* Copies of a chunk's record to shared memory. For one thread. */
    __device__ __forceinline__ void load_missed(int chunk_of_segment) const
    {
        mbarrier_arrive_expecting(&s.barriers.missed_loaded, sizeof s.missed);
        copy_bulk(s.missed, missed_record(chunk_of_segment), sizeof s.missed, &s.barriers.missed_loaded);
    }
    __device__ __forceinline__ void load_image(int chunk_of_segment) const
    {
        mbarrier_arrive_expecting(&s.barriers.image_loaded, FKDA_HOPPER_BWD_IMAGE);
        copy_bulk(&s.images[0], record(chunk_of_segment), FKDA_HOPPER_BWD_IMAGE, &s.barriers.image_loaded);
    }

    /* Goes back over a chunk. The team has met since the gradient x was announced; `unit` is its unit. */
    template <bool gradients>
    __device__ __forceinline__ void step_back(Rows &x, Values &values, Unit unit, int chunk, int first)
    {
        const unsigned n = static_cast<unsigned>(taken++), slot = n % PREPARED_SLOTS;
        Prepared &prepared = s.prepared[slot];
        float dr[2][4] = {}, dout[2][4];
        mbarrier_wait(&s.barriers.ready[slot], n / PREPARED_SLOTS & 1);
        {
            float du[2][4] = {};
            read<gradients>(du, x, unit, prepared.k_rest, prepared.k_lacks, &s.images[1]);
            multiply_by_units(du, prepared, prepared.rest_unit);
            const RowPlace p = row_place();
            values.transpose(dout);
            if (chunk > first) load_dout(values, chunk - 1);
            multiply_upper(du, dout, prepared.attend_t, p.g, p.t);
            multiply_by_inverse_t(dr, du, prepared.inverse_t, p.g, p.t);
        }
        if (gradients) {
            const RowPlace p = row_place();
            float u[2][4];
            mbarrier_wait(&s.barriers.missed_loaded, results & 1);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float4 four = s.missed[TEAM_THREADS * i + 32 * p.warp + p.lane];
                u[i][0] = four.x, u[i][1] = four.y, u[i][2] = four.z, u[i][3] = four.w;
            }
            add_dbeta(s.dbeta[results & 1][p.warp], dr, u, p.g, p.t);
            multiply_by_strengths(dr, dr, prepared, p.t);
            Outputs{args.bwd, s.piece}.store_dv(chunk, dr, p.first, p.g, p.t);
            multiply_by_strengths(u, u, prepared, p.t);
            announce(s.of_writes, largest_of(u));
            announce(s.of_dout, largest_of(dout));
            announce(s.of_dr, largest_of(dr));
            RowTeam::meet();
            store_operand(s.operands.u, u, s.of_writes.unit().inverse);
            store_operand(s.operands.dout, dout, s.of_dout.unit().inverse);
            store_operand(s.operands.minus_dr, dr, -s.of_dr.unit().inverse);
        } else {
            multiply_by_strengths(dr, dr, prepared, row_place().t);
        }
        multiply_by(dout, args.bwd.fwd.scale);
        multiply_by_units(dout, prepared, prepared.read_unit);
        multiply_by_units(dr, prepared, prepared.read_unit);
        const Unit common(__reduce_max_sync(~0u, max(largest_of(dr), largest_of(dout))));
        uint32_t of_dout[4], of_dr[4];
        pack(of_dout, dout[0], dout[1], common.inverse);
        pack(of_dr, dr[0], dr[1], -common.inverse);
        const RowPlace p = row_place();
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            float tmp[2][4] = {};
            uint32_t b[4];
            prepared.q_read.load_depths(b, 0, 16 * j, p.lane);
            multiply(tmp, of_dout, b);
            prepared.k_read.load_depths(b, 0, 16 * j, p.lane);
            multiply(tmp, of_dr, b);
            add(x, j, tmp, common.size, prepared, p.t);
        }
        mbarrier_arrive_warp(&s.barriers.empty[slot]);
        turn ^= 1;
        announce(s.carried[turn], largest_of(x.x));
    }

    /* Rows of V of all tokens, as rows of tokens. */
    __device__ __forceinline__ void store_operand(TokenTile &to, const float (&x)[2][4], float factor) const
    {
        const RowPlace p = row_place();
        uint32_t a[4];
        pack(a, x[0], x[1], factor);
        to.store_transposed(a, 0, p.first, p.lane);
    }

    /* Goes back over a segment, and leaves the results of each chunk. */
    __device__ void go_back_over_segment(Rows &x, ChunkRange range)
    {
        const bool copies = row_place().warp == 0 && row_place().lane == 0;
        Values values;
        load_dout(values, range.end - 1);
        begin(x);
        for (int chunk = range.end - 1; chunk >= range.first; chunk--) {
            const int of_segment = chunk - range.first;
            fence_async_proxy(); /* `missed` takes the place of operands */
            RowTeam::meet();     /* all are through with operands and images */
            if (copies) load_missed(of_segment);
            if (copies) load_image(of_segment);
            const Unit unit = s.carried[turn].unit();
            step_back<true>(x, values, unit, chunk, range.first);
            RowTeam::meet(); /* the operands of the sums are there */
            mbarrier_wait(&s.barriers.image_loaded, results & 1);
            if (results > 0) mbarrier_wait(&s.barriers.results_empty, (results - 1) & 1);
            sum_over_rows(s,
                          {s.image_units[of_segment], unit.size, s.of_dout.unit().size * args.bwd.fwd.scale,
                           s.of_dr.unit().size, s.of_writes.unit().size});
            mbarrier_arrive_warp(&s.barriers.results_full);
            results++;
        }
    }

    /* ---- The walks that leave a border image for each chunk of 32 tokens ---- */

    __device__ __forceinline__ void store_border_image(const Rows &x, Unit unit, unsigned char *images,
                                                       int slot_of_sequence) const
    {
        const RowPlace p = row_place();
        unsigned char *const to = images + ((s.piece.slot + slot_of_sequence) * args.bwd.fwd.heads +
                                            s.piece.task.head) *
                                               FKDA_HOPPER_BORDER_IMAGE;
        StateImage &rows = *reinterpret_cast<StateImage *>(to);
        float *const scale = reinterpret_cast<float *>(to + sizeof rows);
        if (p.t == 0) scale[p.first + p.g] = unit.size, scale[p.first + p.g + 8] = unit.size;
#pragma unroll
        for (int i = 0; i < DIM / 4; i++) {
            const int row = p.first + p.g + i % 2 * 8, channel = 8 * (i / 2) + 2 * p.t;
            *reinterpret_cast<uint32_t *>(&rows.x[row][StateImage::place(row, channel)]) =
                pack_half(x.x[i / 2][i % 2 * 2] * unit.inverse, x.x[i / 2][i % 2 * 2 + 1] * unit.inverse);
        }
    }

    __device__ void walk_forwards_over_chunks()
    {
        const int chunks = s.piece.task.chunks, last = (chunks - 1) / 2 * 2;
        if (chunks == 0) return;
        Rows x;
        Values values;
        load_values(values, 0);
        load_initial_state(x);
        begin(x);
        for (int chunk = 0;; chunk++) {
            RowTeam::meet();
            const Unit unit = s.carried[turn].unit();
            if (chunk % 2 == 0) store_border_image(x, unit, args.states, chunk / 2);
            if (chunk == last) return;
            step_forwards<false>(x, values, unit, chunk, 0, false);
        }
    }

    __device__ void walk_back_over_chunks()
    {
        const int chunks = s.piece.task.chunks;
        Rows x;
        Values values;
        load_dout(values, chunks - 1);
        load_final_gradient(x);
        begin(x);
        for (int chunk = chunks - 1; chunk >= 0; chunk--) {
            RowTeam::meet();
            const Unit unit = s.carried[turn].unit();
            if (chunk % 2 == 1 || chunk == chunks - 1) store_border_image(x, unit, args.gradients, chunk / 2);
            step_back<false>(x, values, unit, chunk, 0);
        }
        store_initial_gradient(x);
    }

    /* ---- The walks between borders ---- */

    __device__ void walk_forwards(int last)
    {
        const fkda_bwd_args &a = args.bwd;
        Rows x;
        Values values;
        load_values(values, 0);
        load_initial_state(x);
        begin(x);
        for (int chunk = 0;; chunk++) {
            RowTeam::meet();
            const Unit unit = s.carried[turn].unit();
            if (chunk > 0 && chunk % chunks_of_segment(a) == 0)
                store_border(x, unit, args.states, args.state_units, chunk / chunks_of_segment(a));
            if (chunk == last) return;
            step_forwards<false>(x, values, unit, chunk, 0, false);
        }
    }

    __device__ void walk_back(int end)
    {
        const fkda_bwd_args &a = args.bwd;
        Rows x;
        Values values;
        load_dout(values, end - 1);
        load_final_gradient(x);
        begin(x);
        for (int chunk = end - 1;; chunk--) {
            RowTeam::meet();
            const Unit unit = s.carried[turn].unit();
            if (chunk + 1 < end && (chunk + 1) % chunks_of_segment(a) == 0)
                store_border(x, unit, args.gradients, args.gradient_units,
                             (chunk + 1) / chunks_of_segment(a));
            if (chunk + 1 == chunks_of_segment(a)) return;
            step_back<false>(x, values, unit, chunk, 0);
        }
    }
};

} // namespace fkda

#endif
