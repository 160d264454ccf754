/* Vectors of FKDA_LANES floats through the compiler's vector extensions, so that one source serves every
 * instruction set. The including file defines FKDA_LANES as its compile flags allow. */
#ifndef FKDA_SIMD_H
#define FKDA_SIMD_H

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { LANES = FKDA_LANES };

/* Vectors may alias floats, because the scratch and the tensors are declared as plain arrays. */
typedef float vec __attribute__((vector_size(4 * FKDA_LANES), may_alias));
typedef float vec_unaligned __attribute__((vector_size(4 * FKDA_LANES), may_alias, aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * FKDA_LANES), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * FKDA_LANES), may_alias));
typedef uint64_t wide_uvec __attribute__((vector_size(4 * FKDA_LANES), may_alias));
typedef uint16_t bf16vec __attribute__((vector_size(2 * FKDA_LANES), may_alias));
typedef uint16_t bf16vec_unaligned __attribute__((vector_size(2 * FKDA_LANES), may_alias, aligned(2)));

/* INLINE is for functions with an argument that callers pass as a constant: each call becomes code of its
 * own. UNROLL is for loops over arrays that are to lie in registers. Sanitizers check code as it is written,
 * and copies of it would only take longer to compile. */
#if defined(FKDA_SANITIZED)
#define INLINE static inline
#define UNROLL
#elif defined(__clang__)
#define INLINE __attribute__((always_inline)) static inline
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define INLINE __attribute__((always_inline)) static inline
#define UNROLL _Pragma("GCC unroll 16")
#endif

static inline vec splat(float x)
{
    return x - (vec){0};
}

static inline vec *vec_at(float *x)
{
    return (vec *)x;
}

/* load() reads the scratch, which is aligned. load_f32() and load_bf16() read tensors, which may not be. */
static inline vec load(const float *x)
{
    return *(const vec *)x;
}

static inline vec load_f32(const float *x)
{
    return *(const vec_unaligned *)x;
}

static inline void store_f32(float *to, vec x)
{
    *(vec_unaligned *)to = x;
}

/* GCC 12 makes a conversion between 16 and 32 bits of five instructions where AVX-512 has one, so these are
 * named. */
static inline uvec widen(bf16vec x)
{
#if FKDA_LANES == 16
    return (uvec)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, uvec);
#endif
}

/* Drops the upper 16 bits of each lane. */
static inline bf16vec narrow(uvec x)
{
#if FKDA_LANES == 16
    return (bf16vec)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, bf16vec);
#endif
}

static inline vec load_bf16(const uint16_t *x)
{
    bf16vec bits = *(const bf16vec_unaligned *)x;
    return (vec)(widen(bits) << 16);
}

/* Lanes of `yes` where `mask` is all ones, and lanes of `no` where it is 0. */
static inline vec choose(ivec mask, vec yes, vec no)
{
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

/* Rounds to the nearest bf16, ties to even. NaN stays NaN. */
static inline void store_bf16(uint16_t *to, vec x)
{
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if FKDA_LANES == 16
    const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    rounded = (uvec)_mm512_mask_mov_epi32((__m512i)rounded, is_nan, _mm512_set1_epi32(0x7fc0));
#else
    uvec is_nan = (uvec)(x != x);
    rounded = (is_nan & 0x7fc0) | (~is_nan & rounded);
#endif
    *(bf16vec_unaligned *)to = narrow(rounded);
}

/* The 64-bit products of the lower halves of 64-bit lanes and a factor. GCC 12 multiplies whole lanes where
 * the instruction is not named, which takes three times as long. */
static inline wide_uvec multiply_lower(wide_uvec x, uint32_t factor)
{
#if FKDA_LANES == 16
    return (wide_uvec)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif FKDA_LANES == 8
    return (wide_uvec)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
    return (wide_uvec)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
    return (x & 0xffffffffu) * factor;
#endif
}

/* Splits 2^x into power * (1 + fraction) for |x| <= 125, and returns the fraction, in [-0.3, 0.42]. */
static inline vec exp2_fraction(vec x, vec *power)
{
    /* Adding 1.5 * 2^23 + 127 leaves the nearest integer in the low bits, biased as an exponent. */
    const float magic = 12582912.0f + 127.0f;
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    vec p = f * 1.53533619e-4f + 1.33988738e-3f;
    p = p * f + 9.61843729e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    *power = (vec)((uvec)shifted << 23);
    return p * f;
}

/* 2^x for |x| <= 125, and NaN for NaN. The relative error is below 1e-7, and 2^0 is exactly 1. */
static inline vec exp2_near(vec x)
{
    vec power, fraction = exp2_fraction(x, &power);
    return (fraction + 1.0f) * power;
}

/* 2^x - 1 for |x| <= 125. The relative error is small near 0 too. */
static inline vec exp2_minus_1(vec x)
{
    vec power, fraction = exp2_fraction(x, &power);
    return fraction * power + (power - 1.0f);
}

/* 2^x for any x up to 125: 0 below 2^-126, and NaN for NaN. */
static inline vec exp2_at_most_1(vec x)
{
    const ivec is_tiny = x < -126.0f;
    return choose(is_tiny, splat(0.0f), exp2_near(choose(is_tiny, splat(-126.0f), x)));
}

/* log2(1 + t) for t in [0, 1], and NaN for NaN. The relative error is small near 0 too. The function
 * sums a series in z = t / (2 + t), as log(1 + t) = 2 artanh(z), with coefficients fitted to [0, 1/3]. */
static inline vec log2_1_plus(vec t)
{
    const vec z = t / (t + 2.0f), w = z * z;
    vec p = w * 4.06527430e-1f + 4.03386235e-1f;
    p = p * w + 5.77437401e-1f;
    p = p * w + 9.61791635e-1f;
    p = p * w + 2.88539004f;
    return p * z;
}

/* 1 / (1 + 2^x) for any x. Where |x| is beyond exp2_near()'s range, the result is below 2^-124 or is 1. */
static inline vec sigmoid_exp2(vec x)
{
    x = choose(x < -125.0f, splat(-125.0f), x);
    x = choose(x > 125.0f, splat(125.0f), x);
    return 1.0f / (1.0f + exp2_near(x));
}

/* Expands to index(a, b, 0), index(a, b, 1), ... for every lane of a vector. */
#if FKDA_LANES == 16
#define EACH_LANE(index, a, b)                                                                               \
    index(a, b, 0), index(a, b, 1), index(a, b, 2), index(a, b, 3), index(a, b, 4), index(a, b, 5),          \
        index(a, b, 6), index(a, b, 7), index(a, b, 8), index(a, b, 9), index(a, b, 10), index(a, b, 11),    \
        index(a, b, 12), index(a, b, 13), index(a, b, 14), index(a, b, 15)
#elif FKDA_LANES == 8
#define EACH_LANE(index, a, b)                                                                               \
    index(a, b, 0), index(a, b, 1), index(a, b, 2), index(a, b, 3), index(a, b, 4), index(a, b, 5),          \
        index(a, b, 6), index(a, b, 7)
#else
#define EACH_LANE(index, a, b) index(a, b, 0), index(a, b, 1), index(a, b, 2), index(a, b, 3)
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Sums of LANES vectors together. FOLD(g, a, b) halves two vectors by adding neighbouring groups of g lanes,
 * and keeps the order of the groups. After log2(LANES) rounds of folds, lane i of one vector has the sum of
 * x[i]. */
#define GROUP_LANE(g, odd, i) ((i) / (g)*2 * (g) + (i) % (g) + (odd) * (g))
#define FOLD(g, a, b)                                                                                        \
    (SHUFFLE(a, b, EACH_LANE(GROUP_LANE, g, 0)) + SHUFFLE(a, b, EACH_LANE(GROUP_LANE, g, 1)))

static inline vec lane_sums(vec x[LANES])
{
#if FKDA_LANES == 16
    UNROLL
    for (int i = 0; i < 8; i++) x[i] = FOLD(8, x[2 * i], x[2 * i + 1]);
#endif
#if FKDA_LANES >= 8
    UNROLL
    for (int i = 0; i < 4; i++) x[i] = FOLD(4, x[2 * i], x[2 * i + 1]);
#endif
    UNROLL
    for (int i = 0; i < 2; i++) x[i] = FOLD(2, x[2 * i], x[2 * i + 1]);
    return FOLD(1, x[0], x[1]);
}

/* Makes columns of rows: log2(LANES) times, each row of the first half is interleaved with its partner in the
 * second half. */
#define MIXED_LANE(first, unused, i) ((first) + (i) / 2 + (i) % 2 * FKDA_LANES)
static inline void transpose(vec x[LANES])
{
    for (int step = 1; step < LANES; step *= 2) {
        vec mixed[LANES];
        UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            vec a = x[i], b = x[i + LANES / 2];
            mixed[2 * i] = SHUFFLE(a, b, EACH_LANE(MIXED_LANE, 0, 0));
            mixed[2 * i + 1] = SHUFFLE(a, b, EACH_LANE(MIXED_LANE, FKDA_LANES / 2, 0));
        }
        UNROLL
        for (int i = 0; i < LANES; i++) x[i] = mixed[i];
    }
}

#endif
