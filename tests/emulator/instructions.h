/*
 * The functions of kernels/common/ptx.cuh, kernels/decode/ptx.cuh and kernels/hopper/ptx/ in C++: each does
 * what the PTX manual says about its instruction. The include guards of these headers are taken here, so
 * that the kernels get the functions below.
 */
#ifndef FKDA_EMULATOR_INSTRUCTIONS_H
#define FKDA_EMULATOR_INSTRUCTIONS_H

#define FKDA_PTX_CUH
#define FKDA_DECODE_PTX_CUH
#define FKDA_HOPPER_PTX_MBARRIER_CUH
#define FKDA_HOPPER_PTX_CLUSTER_CUH
#define FKDA_HOPPER_PTX_COPIES_CUH
#define FKDA_HOPPER_PTX_MEMORY_CUH
#define FKDA_HOPPER_PTX_CONTROL_CUH
#define FKDA_HOPPER_PTX_PATIENCE_CUH
#define FKDA_HOPPER_PTX_WGMMA_CUH

#include <map>

#include "../../kernels/hopper/fwd_args.h"
#include "descriptor.h"
#include "language.h"

namespace fkda
{

/* An address holds the rank of its CTA in the cluster above bit 24. */
inline uint32_t shared_address(const void *pointer)
{
    const emulator::Thread &t = emulator::thread();
    return static_cast<uint32_t>(static_cast<const unsigned char *>(pointer) - t.shared) |
           static_cast<uint32_t>(t.rank) << 24;
}
inline unsigned char *shared_memory(uint32_t address)
{
    return emulator::thread().shared + (address & 0xffffff);
}

/* The shared memory of the CTA, from its start on. */
inline unsigned char *cta_memory()
{
    return emulator::thread().shared;
}

template <class T> T *global_memory(T *pointer)
{
    return pointer;
}
inline void forget(uint32_t &)
{
}

inline void forget(int &)
{
}

inline void forget(long long &)
{
}

inline void read_indices(int &cta, int &thread)
{
    cta = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
}

/* ---- Numbers ---- */

inline float flushed(float x)
{
    return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}
inline float ex2(float x)
{
    return flushed(exp2f(flushed(x)));
}
inline float min_or_nan(float x, float y)
{
    return x < y || x != x ? x : y;
}
inline float rcp(float x)
{
    return flushed(1.0f / flushed(x));
}
inline float rsqrt_approx(float x)
{
    return 1.0f / sqrtf(flushed(x));
}
inline float tf32(float x) /* what the tensor core takes of x */
{
    return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}
inline float nearest_tf32(float x)
{
    const uint32_t bits = __float_as_uint(x);
    return x != x ? x : tf32(__uint_as_float(bits + 0xfff + (bits >> 13 & 1)));
}
inline uint16_t bf16_from(float x)
{
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x)
{
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
}
inline uint16_t half_from(float x)
{
    const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    const float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x1p-14f) /* a multiple of 2^-24 */
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(size * 0x1p24f)));
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}
inline float from_half(uint16_t x)
{
    const uint32_t exponent = x >> 10 & 31, fraction = x & 1023,
                   sign = static_cast<uint32_t>(x & 0x8000) << 16;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0)
        return copysignf(static_cast<float>(fraction) * 0x1p-24f, __uint_as_float(sign | 0x3f800000));
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint32_t pack_bf16(float low, float high)
{
    return bf16_from(low) | static_cast<uint32_t>(bf16_from(high)) << 16;
}
inline uint32_t pack_half(float low, float high)
{
    return half_from(low) | static_cast<uint32_t>(half_from(high)) << 16;
}
inline float half_low(uint32_t pair)
{
    return from_half(static_cast<uint16_t>(pair));
}
inline float half_high(uint32_t pair)
{
    return from_half(static_cast<uint16_t>(pair >> 16));
}
inline uint32_t multiply_halves(uint32_t x, uint32_t y)
{
    const auto product = [=](int shift) {
        return from_half(static_cast<uint16_t>(x >> shift)) * from_half(static_cast<uint16_t>(y >> shift));
    };
    return pack_half(product(0), product(16));
}

/* ---- Products of fragments: common/ptx.cuh says which lane has what ---- */

struct Fragments {
    float (*d)[4];
    const float *a, *b; /* the lane's numbers, in the order of its registers */
};

/* d += a b for a warp, for products with `depth` depths, of which a register has `neighbours`. */
inline void multiply_fragments(void *const *all, int depth, int neighbours)
{
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Fragments &x = *static_cast<Fragments *>(all[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < neighbours; i++)
                a[g + r % 2 * 8][t * neighbours + i + r / 2 * depth / 2] = x.a[r * neighbours + i];
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < neighbours; i++)
                b[t * neighbours + i + r * depth / 2][g] = x.b[r * neighbours + i];
    }
    for (int row = 0; row < 16; row++) {
        float sums[8] = {};
        for (int k = 0; k < depth; k++)
            for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
        for (int column = 0; column < 8; column++) {
            const Fragments &x = *static_cast<Fragments *>(all[row % 8 * 4 + column / 2]);
            (*x.d)[row / 8 * 2 + column % 2] += sums[column];
        }
    }
}

inline void mma_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1)
{
    const float a[] = {tf32(a0), tf32(a1), tf32(a2), tf32(a3)}, b[] = {tf32(b0), tf32(b1)};
    Fragments mine = {&d, a, b};
    emulator::gather("mma_tf32", &mine, [](void *const *all) { multiply_fragments(all, 8, 1); });
}

inline void mma_pairs(const char *what, float from(uint16_t), float (&d)[4], const uint32_t (&a)[4],
                      const uint32_t (&b)[2])
{
    float a_numbers[8], b_numbers[4];
    for (int i = 0; i < 8; i++) a_numbers[i] = from(static_cast<uint16_t>(a[i / 2] >> i % 2 * 16));
    for (int i = 0; i < 4; i++) b_numbers[i] = from(static_cast<uint16_t>(b[i / 2] >> i % 2 * 16));
    Fragments mine = {&d, a_numbers, b_numbers};
    emulator::gather(what, &mine, [](void *const *all) { multiply_fragments(all, 16, 2); });
}
inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1)
{
    mma_pairs("mma_bf16", from_bf16, d, {a0, a1, a2, a3}, {b0, b1});
}
inline void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1)
{
    mma_pairs("mma_half", from_half, d, {a0, a1, a2, a3}, {b0, b1});
}

/* ---- Matrices of 8 x 8 elements of 16 bits ---- */

struct MatrixRows {
    unsigned char *row; /* the row that this lane names */
    uint32_t *registers;
};

/* Calls move(in memory, in the register) for each element of each register of each lane. Lane 8 m + row names
 * the row of matrix m. */
template <class Move> void move_matrices(void *const *all, bool transposed, Move move)
{
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++)
            for (int i = 0; i < 2; i++) {
                const int g = lane / 4, two = lane % 4 * 2 + i;
                const int row = transposed ? two : g, column = transposed ? g : two;
                unsigned char *at = static_cast<MatrixRows *>(all[8 * m + row])->row + 2 * column;
                unsigned char *element =
                    reinterpret_cast<unsigned char *>(&static_cast<MatrixRows *>(all[lane])->registers[m]) +
                    2 * i;
                move(at, element);
            }
}

inline void matrices(const char *what, uint32_t (&r)[4], uint32_t row, bool transposed, bool store)
{
    if (row % 16) emulator::fail("%s from %u, which 16 does not divide", what, row);
    MatrixRows mine = {shared_memory(row), r};
    emulator::gather(what, &mine, [=](void *const *all) {
        for (int i = 0; store && i < 32; i++) emulator::mark_written(static_cast<MatrixRows *>(all[i])->row);
        move_matrices(all, transposed, [=](unsigned char *at, unsigned char *element) {
            memcpy(store ? at : element, store ? element : at, 2);
        });
    });
}
inline void load_matrices(uint32_t (&r)[4], uint32_t row)
{
    matrices("load_matrices", r, row, false, false);
}
inline void load_matrices(uint32_t (&r)[4], const void *row)
{
    load_matrices(r, shared_address(row));
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row)
{
    matrices("load_matrices_transposed", r, row, true, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row)
{
    load_matrices_transposed(r, shared_address(row));
}
inline void store_matrices(uint32_t row, const uint32_t (&r)[4])
{
    uint32_t copy[] = {r[0], r[1], r[2], r[3]};
    matrices("store_matrices", copy, row, false, true);
}
inline void store_matrices_transposed(uint32_t row, const uint32_t (&r)[4])
{
    uint32_t copy[] = {r[0], r[1], r[2], r[3]};
    matrices("store_matrices_transposed", copy, row, true, true);
}
inline uint32_t transpose_matrix(uint32_t x)
{
    struct {
        uint16_t in[2], out[2];
    } mine;
    memcpy(mine.in, &x, sizeof mine.in);
    using Mine = decltype(mine);
    emulator::gather("transpose_matrix", &mine, [](void *const *all) {
        for (int row = 0; row < 8; row++)
            for (int column = 0; column < 8; column++)
                static_cast<Mine *>(all[4 * column + row / 2])->out[row % 2] =
                    static_cast<Mine *>(all[4 * row + column / 2])->in[column % 2];
    });
    memcpy(&x, mine.out, sizeof x);
    return x;
}

/* ---- Memory ---- */

inline void store_16_if(void *to, uint4 x, bool valid)
{
    if (valid) memcpy(to, &x, sizeof x);
}
inline void copy_async_16(void *to, const void *from, bool valid)
{
    if (valid)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}
inline void copy_async_commit()
{
}
template <int pending> void copy_async_wait()
{
}
inline long long load_index_if(const void *tensor, long long i, bool is_i32, bool valid, long long otherwise)
{
    if (!valid) return otherwise;
    return is_i32 ? static_cast<const int *>(tensor)[i] : static_cast<const long long *>(tensor)[i];
}
inline void copy_async(void *to, const void *from, bool valid)
{
    if (valid) memcpy(to, from, 16);
}
template <int bytes> void copy_part_async(void *to, const void *from, bool valid)
{
    if (valid) memcpy(to, from, bytes);
}
inline void wait_for_copies()
{
}
template <int first, int threads> void barrier_sync(int index)
{
    emulator::barrier_sync(first + index, threads);
}
template <int first, int threads> void barrier_arrive(int index)
{
    emulator::barrier_arrive(first + index, threads);
}

/* ---- mbarriers ---- */

constexpr bool FOR_RACECHECK = false;

inline void mbarrier_init(uint64_t *barrier, int count)
{
    emulator::mbarrier_init(barrier, count);
}
inline void mbarrier_init_for_warps(uint64_t *barrier, int warps)
{
    emulator::mbarrier_init(barrier, warps);
}
inline void mbarrier_arrive(uint64_t *barrier)
{
    emulator::mbarrier_arrive(barrier, 0);
}
inline void mbarrier_arrive_warp(uint64_t *barrier)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}
inline void mbarrier_arrive_expecting(uint64_t *barrier, int bytes)
{
    emulator::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t *barrier, int parity)
{
    emulator::mbarrier_wait(barrier, parity);
}
inline bool mbarrier_test(uint64_t *barrier, int parity)
{
    return __shfl_sync(~0u, emulator::mbarrier_test(barrier, parity), 0);
}
inline void rest_for_a_while()
{
}
inline void give_up()
{
    emulator::trap();
}
inline void wear_patience() /* in every round of a wait that ends in a trap */
{
    if (emulator::out_of_patience()) emulator::trap();
}
inline void count_poll(unsigned &)
{
    wear_patience();
}
inline void mbarrier_wait_or_give_up(uint64_t *barrier, int parity)
{
    while (!emulator::mbarrier_test(barrier, parity)) {
        wear_patience();
        emulator::yield_to_ctas();
    }
    __syncwarp();
}
inline float load_shared(const float *from)
{
    return *from;
}
inline float load_ahead(const float *from)
{
    return *from;
}
inline float2 load_two_ahead(const float *from)
{
    return *reinterpret_cast<const float2 *>(from);
}
inline void prefetch_to_l2(const void *from, int bytes)
{
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
        emulator::fail("prefetch_to_l2 of %d bytes at %p", bytes, from);
}
inline uint32_t load_shared_16(uint32_t address)
{
    return *reinterpret_cast<const uint16_t *>(shared_memory(address));
}
inline int uniform(int x)
{
    if (__shfl_sync(~0u, x, 0) != x) emulator::fail("a number that should be equal in all lanes is not");
    return x;
}
inline void keep_in_register(int &)
{
}
inline uint32_t max_of_pairs(uint32_t x, uint32_t y)
{
    const uint32_t high = (x >> 16 > y >> 16 ? x : y) & 0xffff0000, low = (x & 0xffff) > (y & 0xffff) ? x : y;
    return high | (low & 0xffff);
}
inline float4 load_shared_four(const float *from)
{
    return *reinterpret_cast<const float4 *>(from);
}
inline void fence_mbarrier_init()
{
}

inline void let_next_kernel_start() /* the next kernel has started already, if it may start early */
{
}
inline void wait_for_previous_kernel()
{
    emulator::wait_for_previous_kernel();
}

/* ---- CTA pairs ---- */

inline int cluster_rank()
{
    return emulator::thread().rank;
}
inline void cluster_arrive()
{
    emulator::cluster_arrive();
}
inline void cluster_arrive_relaxed()
{
    emulator::cluster_arrive();
}
inline void cluster_wait()
{
    emulator::cluster_wait();
}
inline void cluster_sync_relaxed()
{
    cluster_arrive();
    cluster_wait();
}
inline void cluster_sync()
{
    cluster_arrive();
    cluster_wait();
}
template <class T> T *in_other_cta(T *pointer)
{
    emulator::check_other_cta();
    return reinterpret_cast<T *>(reinterpret_cast<unsigned char *>(pointer) + emulator::thread().to_other);
}
inline void store_in_other_cta(int *to, int x)
{
    *in_other_cta(to) = x;
}
inline void mbarrier_arrive_warp_in_other_cta(uint64_t *barrier)
{
    mbarrier_arrive_warp(in_other_cta(barrier));
}
inline void copy_to_other_cta(void *where, const void *from, int bytes, uint64_t *barrier)
{
    const auto *source = static_cast<const unsigned char *>(from);
    unsigned char *to = in_other_cta(static_cast<unsigned char *>(where));
    uint64_t *counts = in_other_cta(barrier);
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
        emulator::fail("copy_to_other_cta of %d bytes at shared memory + %u", bytes, shared_address(from));
    emulator::later([=] {
        for (int i = 0; i < bytes; i += 16) emulator::check_fenced(source + i, "a copy to the other CTA");
        memcpy(to, source, static_cast<size_t>(bytes));
        emulator::mbarrier_complete_bytes(counts, bytes);
    });
}
inline void set_flag(int *flag)
{
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
    emulator::count_step();
}
inline void await_flag(const int *flag)
{
    while (!__atomic_load_n(flag, __ATOMIC_ACQUIRE)) emulator::yield_to_ctas();
    __syncwarp();
}
inline bool elect_lane()
{
    __syncwarp();
    return threadIdx.x % 32 == 0;
}
template <int elements> void load_two_if(float &x, float &y, const void *from, bool valid)
{
    if (valid) memcpy(&x, static_cast<const float *>(from) + elements, 4);
    if (valid) memcpy(&y, static_cast<const float *>(from) + elements + 1, 4);
}
template <int elements> void load_pair_if(float &x, const void *from, bool valid)
{
    if (valid) memcpy(&x, static_cast<const uint16_t *>(from) + elements, 4);
}
template <int elements> void load_one_if(float &x, const void *from, bool valid)
{
    if (valid) memcpy(&x, static_cast<const float *>(from) + elements, 4);
}
template <int elements> void load_bf16_if(float &x, const void *from, bool valid)
{
    uint32_t bits = 0;
    if (valid) memcpy(&bits, static_cast<const uint16_t *>(from) + elements, 2);
    if (valid) memcpy(&x, &bits, 4);
}
template <int tiles> void load_four_if(float (&x)[4], const void *from, bool valid)
{
    if (valid) memcpy(x, static_cast<const float *>(from) + 128 * tiles, 16);
}
inline void fence_async_proxy()
{
    emulator::fence_async_proxy();
}
inline void fence_async_proxy_of_all_memory()
{
    emulator::fence_async_proxy();
}
inline void copy_box(void *to, const fkda_tma_descriptor *descriptor, int half, int token, int head, int row,
                     uint64_t *barrier)
{
    const emulator::Descriptor tensor = emulator::descriptor_of(descriptor->opaque);
    const uint32_t at = shared_address(to) & 0xffffff;
    unsigned char *shared = emulator::thread().shared;
    emulator::later([=] {
        const int32_t first[] = {64 * half, token, head, row};
        emulator::mbarrier_complete_bytes(barrier, emulator::copy_box(tensor, first, shared, at));
    });
}
inline void prefetch_descriptor(const fkda_tma_descriptor *)
{
}
inline void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier)
{
    if (shared_address(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
        emulator::fail("copy_bulk of %d bytes to shared memory + %u", bytes, shared_address(to));
    emulator::later([=] {
        memcpy(to, from, static_cast<size_t>(bytes));
        emulator::mbarrier_complete_bytes(barrier, bytes);
    });
}

inline void copy_bulk_to_global(void *to, const void *from, int bytes)
{
    const auto *source = static_cast<const unsigned char *>(from);
    for (int i = 0; i < bytes; i += 16) emulator::check_fenced(source + i, "a copy to global memory");
    memcpy(to, from, static_cast<size_t>(bytes));
}
/* Copies to global memory that a thread has started: how many have not read shared memory yet. */
inline int &copies_to_global()
{
    static thread_local std::map<const emulator::Thread *, int> of_thread;
    return of_thread[&emulator::thread()];
}
inline void start_copy_to_global(void *to, const void *from, int bytes)
{
    const auto *source = static_cast<const unsigned char *>(from);
    int &pending = copies_to_global();
    for (int i = 0; i < bytes; i += 16) emulator::check_fenced(source + i, "a copy to global memory");
    pending++;
    emulator::later([=, &pending] {
        memcpy(to, source, static_cast<size_t>(bytes));
        pending--;
    });
}
inline void wait_until_copies_have_read()
{
    while (copies_to_global()) emulator::yield_to_ctas();
}
inline void wait_for_copies_to_global()
{
    wait_until_copies_have_read();
}
inline void copy_bulk_to_pair(void *to, const void *from, int bytes, uint64_t *barrier)
{
    copy_bulk(to, from, bytes, barrier);
    copy_bulk(in_other_cta(static_cast<unsigned char *>(to)), from, bytes, in_other_cta(barrier));
}

template <int registers> void take_registers()
{
    emulator::set_registers(registers, true);
}
template <int registers> void give_registers()
{
    emulator::set_registers(registers, false);
}

/* ---- wgmma: descriptors are the real ones, by the PTX manual ---- */

inline uint32_t descriptor_address(const void *tile)
{
    return (shared_address(tile) & 0x3ffff) / 16;
}
inline uint64_t make_descriptor(uint32_t place, uint64_t leading, uint64_t stride, uint64_t swizzle)
{
    return place | leading / 16 << 16 | stride / 16 << 32 | swizzle << 62;
}
template <int column_step, int depth_step> uint64_t tile_descriptor(uint32_t place)
{
    return make_descriptor(place, depth_step, column_step, 0);
}
template <int block_step, int row_step> uint64_t swizzled_descriptor(uint32_t place)
{
    return make_descriptor(place, block_step, row_step, 1);
}

/* The numbers of a B operand of 16 depths.
 *
 * An operand that is not swizzled consists of core matrices of 8 x 16 bytes. The leading step leads to the
 * next core matrix along the depth, and the stride to the next one along the columns.
 *
 * A swizzled operand consists of rows of 128 bytes, whose units of 16 bytes are exchanged by bits 7 to 9 of
 * their address. In a column-major operand a row has 64 columns, and the leading step leads to the next
 * 64. */
template <int columns, bool column_major>
void load_operand(float (&to)[16][columns], const unsigned char *shared, uint64_t b)
{
    constexpr int UNIT = 8, ALONG = column_major ? columns : 16, ACROSS = column_major ? 16 : columns;
    const uint32_t place = (b & 0x3fff) << 4, leading = (b >> 16 & 0x3fff) << 4,
                   stride = (b >> 32 & 0x3fff) << 4;
    for (int across = 0; across < ACROSS; across++)
        for (int along = 0; along < ALONG; along += UNIT) {
            const int column = column_major ? along : across, depth = column_major ? across : along;
            uint32_t at;
            if (b >> 62 == 0) {
                at = place + static_cast<uint32_t>(column / 8) * stride +
                     static_cast<uint32_t>(depth / 8) * leading + static_cast<uint32_t>(across % 8 * 16);
            } else {
                at = place + static_cast<uint32_t>(along / 64) * leading +
                     static_cast<uint32_t>(across / 8) * stride +
                     static_cast<uint32_t>(across % 8 * 128 + along % 64 * 2);
                at ^= at >> 3 & 0x70;
            }
            uint16_t unit[UNIT];
            emulator::check_fenced(shared + at, "wgmma");
            memcpy(unit, shared + at, sizeof unit);
            for (int i = 0; i < UNIT; i++)
                (column_major ? to[depth][column + i] : to[depth + i][column]) = from_half(unit[i]);
        }
}

inline void wgmma_fence()
{
    __syncwarp();
}
inline void wgmma_commit()
{
    emulator::gather("wgmma_commit", nullptr, [](void *const *) { emulator::commit_products(); });
}
template <int pending> void wgmma_wait()
{
    emulator::gather("wgmma_wait", nullptr, [](void *const *) { emulator::wait_for_products(pending); });
}

template <bool add, bool column_major, int tiles>
void wgmma(float (&d)[tiles][4], const uint32_t (&a)[4], uint64_t b)
{
    struct Mine {
        float (*d)[4];
        uint32_t a[4];
        uint64_t b;
    } mine = {d, {a[0], a[1], a[2], a[3]}, b};
    emulator::gather("wgmma", &mine, [](void *const *all) {
        struct Product {
            float (*d[32])[4], a[16][16];
        } p;
        const uint64_t operand = static_cast<Mine *>(all[0])->b;
        unsigned char *shared = emulator::thread().shared;
        for (int lane = 0; lane < 32; lane++) {
            const Mine &x = *static_cast<Mine *>(all[lane]);
            if (x.b != operand) emulator::fail("wgmma with two descriptors");
            p.d[lane] = x.d;
            for (int i = 0; i < 8; i++)
                p.a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                    from_half(static_cast<uint16_t>(x.a[i / 2] >> i % 2 * 16));
        }
        emulator::issue_product([=] {
            float numbers[16][8 * tiles];
            load_operand<8 * tiles, column_major>(numbers, shared, operand);
            for (int row = 0; row < 16; row++) {
                float sums[8 * tiles] = {};
                for (int k = 0; k < 16; k++)
                    for (int column = 0; column < 8 * tiles; column++)
                        sums[column] += p.a[row][k] * numbers[k][column];
                for (int column = 0; column < 8 * tiles; column++) {
                    const int lane = row % 8 * 4 + column % 8 / 2, r = row / 8 * 2 + column % 2;
                    float &to = p.d[lane][column / 8][r];
                    to = add ? to + sums[column] : sums[column];
                }
            }
        });
    });
}

} // namespace fkda

#endif
