/*
 * Decode one token: the state streams through shared memory.
 *
 * Algorithm. With the state decayed to the token,
 *
 *     p = S^T k,  r = S^T q         in a first pass over the state
 *     u = b (v - p),  out = scale (r + u (k . q))
 *     S = S + k u^T                 in a second pass
 *
 * Optimizations.
 * - A thread copies to shared memory exactly the elements that it computes with, all at once and in the
 *   background. It waits for nobody else, and few registers hold elements, so that many CTAs fit on an SM.
 * - Each warp prepares the token for itself, meanwhile. The lanes' parts of the vectors stay in registers and
 *   go to other lanes by shuffles. So warps never wait for each other.
 *
 * Which elements. A thread has squares of neighbouring rows and channels, which are pieces of 16 bytes: four
 * pieces of four fp32, or eight pieces of eight bf16. A piece is a row's part or, with K first, a channel's.
 * Its squares are in the same rows, and the squares of the lanes that share these rows take turns along the
 * channels. With K first fewer lanes share a row, so that a warp's copies take more neighbouring rows.
 *
 * The sum over channels is the same in all layouts of a type: of one row, eight sums of every eighth square,
 * which are then added 4, 2 and 1 apart.
 */
#ifndef FKDA_DECODE_ONE_CUH
#define FKDA_DECODE_ONE_CUH

#include "prepare.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace fkda
{

/* The token, as a lane has it: four channels of each vector. */
struct Token {
    float decay[4], key[4], query[4];
    float beta, kq; /* the write strength, and the product of key and query */
};

/* What a lane takes from others for a square. */
template <int side>
__device__ __forceinline__ void get_vector(float (&x)[side], const float (&from)[4], int four)
{
#pragma unroll
    for (int e = 0; e < side; e++) x[e] = __shfl_sync(~0u, from[e % 4], four + e / 4);
}

template <bool is_bf16, bool k_first> struct Stream {
    static constexpr int BYTES = is_bf16 ? 2 : 4, SIDE = 16 / BYTES; /* of an element; of a square */
    static constexpr int LANES = FKDA_DECODE_LANES_OF_A_ROW(k_first), SQUARES = DIM / SIDE / LANES;
    static constexpr int PARTS = 8 / LANES; /* of the sums over channels, in a lane */
    /* Sums that a lane gets: p and r of some rows, or one of them. */
    static constexpr int SUMS = 2 * SIDE / LANES, ROWS_OF_A_LANE = SUMS > 1 ? SUMS / 2 : 1;
    static constexpr int LANES_OF_A_SUM = SUMS > 1 ? 1 : 2; /* lanes that work on a row's sums */

    int lane;             /* of those that share rows */
    int row;              /* of V: the first of the thread's */
    unsigned char *first; /* the thread's first piece in shared memory; others are 512 bytes apart */

    __device__ __forceinline__ explicit Stream(int first_row)
    {
        const int thread = static_cast<int>(threadIdx.x);
        lane = thread % LANES;
        row = first_row + thread / LANES * SIDE;
        first = cta_memory() + thread / 32 * (512 * SIDE * SQUARES) + thread % 32 * 16;
    }

    /* Where a piece of a square is, in shared memory. */
    __device__ __forceinline__ unsigned char *place(int square, int piece) const
    {
        return first + (square * SIDE + piece) * 512;
    }

    /* The thread's first element of a state that begins at element `at` of the pool. */
    __device__ __forceinline__ char *first_address(void *states, long long at) const
    {
        const int channel = SIDE * lane;
        return static_cast<char *>(states) +
               (at + (k_first ? channel * DIM + row : row * DIM + channel)) * BYTES;
    }

    /* The bytes from there to a piece. */
    static __device__ __forceinline__ constexpr int offset(int square, int piece)
    {
        const int channel = SIDE * LANES * square;
        return (k_first ? (channel + piece) * DIM : piece * DIM + channel) * BYTES;
    }

    /* The first lane of the warp that has the channels of a square. */
    __device__ __forceinline__ int four(int square) const
    {
        return SIDE / 4 * (LANES * square + lane);
    }

    /* The row and the channel in its square of element i of a piece. */
    static __device__ __forceinline__ constexpr int row_of(int piece, int i)
    {
        return k_first ? i : piece;
    }
    static __device__ __forceinline__ constexpr int channel_of(int piece, int i)
    {
        return k_first ? piece : i;
    }

    /* Begins to copy the thread's part of a state, or does nothing if !valid. */
    __device__ __forceinline__ void copy(void *states, long long at, bool valid) const
    {
        const char *from = first_address(states, at);
#pragma unroll
        for (int square = 0; square < SQUARES; square++)
#pragma unroll
            for (int piece = 0; piece < SIDE; piece++)
                copy_async(place(square, piece), from + offset(square, piece), valid);
    }

    __device__ __forceinline__ void read(float (&x)[SIDE], int square, int piece) const
    {
        const uint4 four = *reinterpret_cast<const uint4 *>(place(square, piece));
        const uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < SIDE; i++) {
            if constexpr (is_bf16)
                x[i] = i % 2 ? bf16_high(word[i / 2]) : bf16_low(word[i / 2]);
            else
                x[i] = __uint_as_float(word[i]);
        }
    }

    /* p and r of the rows. */
    __device__ __forceinline__ void multiply(float (&sums)[2 * SIDE], const Token &token) const
    {
        float parts[PARTS][2 * SIDE] = {};
#pragma unroll
        for (int square = 0; square < SQUARES; square++) {
            float decay[SIDE], key[SIDE], query[SIDE];
            get_vector(decay, token.decay, four(square));
            get_vector(key, token.key, four(square));
            get_vector(query, token.query, four(square));
#pragma unroll
            for (int piece = 0; piece < SIDE; piece++) {
                float x[SIDE];
                read(x, square, piece);
#pragma unroll
                for (int i = 0; i < SIDE; i++) {
                    const int r = row_of(piece, i), c = channel_of(piece, i);
                    float *sum = &parts[square % PARTS][2 * r];
                    const float y = x[i] * decay[c];
                    sum[0] = __fmaf_rn(y, key[c], sum[0]);
                    sum[1] = __fmaf_rn(y, query[c], sum[1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * SIDE; i++)
            sums[i] = PARTS == 1 ? parts[0][i] : parts[0][i] + parts[PARTS - 1][i];
        sum_and_scatter<LANES>(sums);
    }

    /* The first row whose sums the lane gets. */
    __device__ __forceinline__ int own_row() const
    {
        return row + lane / LANES_OF_A_SUM * ROWS_OF_A_LANE;
    }

    /* p and r of its row number n. */
    __device__ __forceinline__ void own_sums(float &p, float &r, const float (&sums)[2 * SIDE], int n) const
    {
        if constexpr (SUMS > 1) {
            p = sums[2 * n], r = sums[2 * n + 1];
        } else {
            const float other = __shfl_xor_sync(~0u, sums[0], 1);
            p = lane % 2 ? other : sums[0], r = lane % 2 ? sums[0] : other;
        }
    }

    /* Gives each lane the u of its rows, from the lanes that have them. */
    __device__ __forceinline__ void share(float (&u)[SIDE], const float (&own)[ROWS_OF_A_LANE]) const
    {
        const int group = static_cast<int>(threadIdx.x) % 32 / LANES * LANES;
#pragma unroll
        for (int r = 0; r < SIDE; r++)
            u[r] = __shfl_sync(~0u, own[r % ROWS_OF_A_LANE], group + r / ROWS_OF_A_LANE * LANES_OF_A_SUM);
    }

    __device__ __forceinline__ fkda_random_block random_block(const Rounding &rounding, uint64_t random,
                                                              int square, int r) const
    {
        return fkda_random(rounding.seed, rounding.offset,
                           random | static_cast<unsigned>((row + r) * 16 + LANES * square + lane));
    }

    /* The random numbers of a square: of each of its rows, or with V first of the row of the next piece. */
    struct RandomBlocks {
        fkda_random_block block[k_first ? SIDE : 1];
    };

    __device__ __forceinline__ void draw(RandomBlocks &blocks, const Rounding &rounding, uint64_t random,
                                         int square) const
    {
        if constexpr (k_first)
#pragma unroll
            for (int r = 0; r < SIDE; r++) blocks.block[r] = random_block(rounding, random, square, r);
    }

    /* Stores a piece of a state. `to` is the thread's first element of it. `random`: the place of the random
     * numbers of row 0, channel 0. */
    template <bool at_random>
    __device__ __forceinline__ void store_piece(char *to, int square, int piece, const float (&x)[SIDE],
                                                RandomBlocks &blocks, const Rounding &rounding,
                                                uint64_t random) const
    {
        uint32_t word[4];
        if constexpr (at_random) {
            uint32_t bits[SIDE];
            if constexpr (!k_first) blocks.block[0] = random_block(rounding, random, square, piece);
#pragma unroll
            for (int i = 0; i < SIDE; i++)
                bits[i] = fkda_random_bits(&blocks.block[k_first ? i : 0], channel_of(piece, i));
            round_at_random(word, x, bits);
        } else if constexpr (is_bf16) {
#pragma unroll
            for (int i = 0; i < 4; i++) word[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) word[i] = __float_as_uint(x[i]);
        }
        __stcs(reinterpret_cast<uint4 *>(to + offset(square, piece)),
               make_uint4(word[0], word[1], word[2], word[3]));
    }

    /* Stores the state after the token. `random`: as in store_piece(). */
    template <bool at_random>
    __device__ __forceinline__ void store(void *states, long long at, const Token &token,
                                          const float (&u)[SIDE], const Rounding &rounding,
                                          uint64_t random) const
    {
        char *to = first_address(states, at);
#pragma unroll(at_random ? 1 : SQUARES)
        for (int square = 0; square < SQUARES; square++) {
            float decay[SIDE], key[SIDE];
            get_vector(decay, token.decay, four(square));
            get_vector(key, token.key, four(square));
            RandomBlocks blocks;
            if constexpr (at_random) draw(blocks, rounding, random, square);
#pragma unroll
            for (int piece = 0; piece < SIDE; piece++) {
                float x[SIDE];
                read(x, square, piece);
#pragma unroll
                for (int i = 0; i < SIDE; i++) {
                    const int c = channel_of(piece, i);
                    x[i] = __fmaf_rn(key[c], u[row_of(piece, i)], x[i] * decay[c]);
                }
                store_piece<at_random>(to, square, piece, x, blocks, rounding, random);
            }
        }
    }

    /* As fkda_round_at_random() does, with one test of all elements for numbers that are not finite. */
    static __device__ __forceinline__ void round_at_random(uint32_t (&word)[4], const float (&x)[SIDE],
                                                           const uint32_t (&bits)[SIDE])
    {
        float zero = 0.0f; /* NaN if an element is not finite */
#pragma unroll
        for (int i = 0; i < SIDE; i++) zero = __fmaf_rn(x[i], 0.0f, zero);
#pragma unroll
        for (int i = 0; i < SIDE / 2; i++)
            word[i] = (__float_as_uint(x[2 * i]) + bits[2 * i]) >> 16 |
                      ((__float_as_uint(x[2 * i + 1]) + bits[2 * i + 1]) & 0xffff0000u);
        if (zero == 0.0f) return;
#pragma unroll
        for (int i = 0; i < SIDE / 2; i++) {
            const uint32_t low = fkda_round_at_random(__float_as_uint(x[2 * i]), bits[2 * i]),
                           high = fkda_round_at_random(__float_as_uint(x[2 * i + 1]), bits[2 * i + 1]);
            word[i] = low | high << 16;
        }
    }
};

/* Prepares the token of a head. The warp that has the first rows writes the record's vectors over
 * channels. */
__device__ __forceinline__ void prepare_token(Token &token, const Preparation &preparation,
                                              const Inputs &inputs, float *record)
{
    unpack_four(token.query, inputs.q);
    unpack_four(token.key, inputs.k);
    preparation.read_gates(token.decay, inputs);
    preparation.find_decays(token.decay);
    preparation.normalise(token.query);
    preparation.normalise(token.key);
    token.kq = sum_of_products(token.key, token.query);
    token.beta = preparation.write_strength(inputs.beta);
    if (!record) return;
    const float *d = token.decay, *k = token.key;
    store_four(record + preparation.channel, d[0], d[1], d[2], d[3]);
    store_four(record + DIM + preparation.channel, k[0], k[1], k[2], k[3]);
}

/* The index of the slot that sequence n starts from, as it is in memory. There is no branch behind its load,
 * so that the load is not waited for before it is needed. */
__device__ __forceinline__ long long read_start_index(const fkda_decode_args &args, int n)
{
    const fkda_index_args &indices = args.state_indices;
    long long at = static_cast<long long>(n) * indices.columns;
    if (args.num_accepted_tokens.data)
        at += clamp(read_index(args.num_accepted_tokens, n), 1, indices.columns) - 1;
    return load_index_if(indices.data, at, indices.is_i32, indices.data != nullptr, n);
}

/* The slot that gets the state after the token, or NO_SLOT. */
__device__ __forceinline__ long long find_slot_to_write(const fkda_decode_args &args, const Work &work,
                                                        const Sequence &sequence, long long slot)
{
    if (args.write_states == FLASH_KDA_WRITE_NONE) return NO_SLOT;
    if (args.has_written_states) return find_written_slot(args, work.sequence, sequence, 0);
    if (args.write_states == FLASH_KDA_WRITE_EACH) return find_slot_after(args, work.sequence, 0);
    return slot;
}

template <bool is_bf16, bool k_first> __device__ __forceinline__ void decode_one(const fkda_decode_args &args)
{
    using State = Stream<is_bf16, k_first>;
    constexpr int OWN = State::ROWS_OF_A_LANE;
    const Work work = find_work(args.heads, args.split);
    const Sequence sequence = {work.sequence, 0, 1, 0};
    const State state(work.first_row);
    const int own_row = state.own_row();
    const long long v_at = find_row(args.v_strides, sequence, 0, work.head) + own_row;

    /* All loads begin before anything waits for one of them. That of the state waits for the index. */
    const long long index = read_start_index(args, work.sequence);
    Preparation preparation(args, work, sequence);
    const Inputs inputs = preparation.load(0);
    float a_log, own[OWN];
    uint16_t v[OWN];
    float4 dt_bias;
    preparation.load_gate(a_log, dt_bias);
#pragma unroll
    for (int n = 0; n < OWN; n++) v[n] = __ldg(static_cast<const uint16_t *>(args.v) + v_at + n);
    const Rounding rounding = find_rounding(is_bf16 ? args.rounding : nullptr, work, args.heads);
    const long long slot = check_slot(index, args.state_indices.data ? args.first_slot : 0, args.state);
    const bool exists = slot != NO_SLOT;
    state.copy(args.state.data, find_state(args.state, exists ? slot : 0, work.head), exists);
    if (!exists) return clear_sequence(args, work, sequence);

    Token token;
    preparation.set_gate(a_log, dt_bias);
    const bool is_first = work.first_row == 0 && threadIdx.x < 32;
    prepare_token(token, preparation, inputs, is_first ? find_record(args, work, 0, 0) : nullptr);
    const long long after = find_slot_to_write(args, work, sequence, slot);
    float *record = find_record(args, work, 0, 2);
    wait_for_copies();

    float sums[2 * State::SIDE], u[State::SIDE];
    state.multiply(sums, token);
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        float p, r;
        state.own_sums(p, r, sums, n);
        own[n] = token.beta * (bf16_low(v[n]) - p);
        if (state.lane % State::LANES_OF_A_SUM == 0) {
            store_output(args, work, sequence, 0, own_row + n, args.scale * __fmaf_rn(own[n], token.kq, r));
            if (record) record[own_row + n] = own[n];
        }
    }
    if (after == NO_SLOT) return;
    state.share(u, own);
    __syncwarp(); /* the compiler then reads the state again, and does not keep it in registers */
    const long long to = find_state(args.written, after, work.head);
    if constexpr (is_bf16) {
        const uint64_t random = fkda_random_place(work.sequence, 0, args.heads, work.head, 0, 0);
        if (rounding.at_random)
            return state.template store<true>(args.written.data, to, token, u, rounding, random);
    }
    state.template store<false>(args.written.data, to, token, u, rounding, 0);
}

} // namespace fkda

#endif
