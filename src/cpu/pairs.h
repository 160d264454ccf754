/* Pairs of neighbouring bf16 numbers: a vector of 32-bit words in memory as two vectors of fp32, and back.
 * The first vector has the even numbers and the second one the odd numbers. Part of decode_block.h. */
#ifndef FKDA_CPU_PAIRS_H
#define FKDA_CPU_PAIRS_H

#include <stdbool.h>

#include "simd.h"

typedef uint32_t uvec_unaligned __attribute__((vector_size(4 * FKDA_LANES), may_alias, aligned(2)));
typedef uint16_t pairvec __attribute__((vector_size(4 * FKDA_LANES), may_alias));

/* In memory the first number of a pair is the lower half of its word on little-endian machines. */
#define FIRST_IS_LOWER (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)

static inline vec first_of_pairs(uvec pairs)
{
    return FIRST_IS_LOWER ? (vec)(pairs << 16) : (vec)(pairs & 0xffff0000u);
}

static inline vec second_of_pairs(uvec pairs)
{
    return FIRST_IS_LOWER ? (vec)(pairs & 0xffff0000u) : (vec)(pairs << 16);
}

/* Brings numbers from their order in memory into two vectors for each vector of pairs. */
static inline void split_row(float *x, int count)
{
    for (int i = 0; i < count; i += 2 * LANES) {
        const vec a = load(x + i), b = load(x + i + LANES);
        *vec_at(x + i) = SHUFFLE(a, b, EACH_LANE(GROUP_LANE, 1, 0));
        *vec_at(x + i + LANES) = SHUFFLE(a, b, EACH_LANE(GROUP_LANE, 1, 1));
    }
}

/* The upper halves of two vectors of 32-bit words, as pairs: those of `lower` in the lower halves. */
static inline uvec upper_halves(uvec lower, uvec upper)
{
#if FKDA_LANES == 16
    return (uvec)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(lower >> 16), (__m512i)upper);
#elif FKDA_LANES == 8
    return (uvec)_mm256_blend_epi16((__m256i)(lower >> 16), (__m256i)upper, 0xaa);
#else
    return lower >> 16 | (upper & 0xffff0000u);
#endif
}

static inline uvec lower_halves(uvec lower, uvec upper)
{
#if FKDA_LANES == 16
    return (uvec)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)lower, (__m512i)(upper << 16));
#elif FKDA_LANES == 8
    return (uvec)_mm256_blend_epi16((__m256i)lower, (__m256i)(upper << 16), 0xaa);
#else
    return (lower & 0xffffu) | upper << 16;
#endif
}

/* x + 1 where rest > most, else x: for each half of a word. */
static inline uvec add_1_above(uvec x, uvec rest, pairvec most)
{
#if FKDA_LANES == 16
    const __mmask32 above = _mm512_cmpgt_epu16_mask((__m512i)rest, (__m512i)most);
    return (uvec)_mm512_mask_sub_epi16((__m512i)x, above, (__m512i)x, _mm512_set1_epi16(-1));
#else
    return (uvec)((pairvec)x - (pairvec)((pairvec)rest > most));
#endif
}

/* Stores pairs, rounded to the nearest bf16, ties to even: a number's upper half grows by 1 if its lower half
 * is above a half of the upper half's last place, or is a half and the upper half is odd. NaN becomes the
 * default NaN; without NaN the caller saves that. */
INLINE void round_pairs(uint16_t *to, vec first, vec second, bool has_nan)
{
    if (has_nan) {
        const vec nan = (vec)((uvec){0} + 0x7fc00000u);
        first = choose(first != first, nan, first);
        second = choose(second != second, nan, second);
    }
    const uvec lower = (uvec)(FIRST_IS_LOWER ? first : second);
    const uvec upper = (uvec)(FIRST_IS_LOWER ? second : first);
    const uvec rounded = upper_halves(lower, upper), rest = lower_halves(lower, upper);
    *(uvec_unaligned *)to = add_1_above(rounded, rest, (pairvec){0} + 0x8000 - ((pairvec)rounded & 1));
}

/* Stores pairs, rounded at random: fkda_round_at_random() of rounding.h. A word of `random` has the 16 random
 * bits of each number of a pair. Adding them to a number carries into the upper half if the lower half is
 * above what they leave of 16 bits. The lower half of an infinity is 0, and that of a NaN becomes 0, so that
 * nothing is added to their upper halves. */
INLINE void round_pairs_at_random(uint16_t *to, vec first, vec second, uvec random)
{
    first = choose(first != first, (vec)(((uvec)first & 0xffff0000u) | 0x00400000u), first);
    second = choose(second != second, (vec)(((uvec)second & 0xffff0000u) | 0x00400000u), second);
    const uvec lower = (uvec)(FIRST_IS_LOWER ? first : second);
    const uvec upper = (uvec)(FIRST_IS_LOWER ? second : first);
    *(uvec_unaligned *)to =
        add_1_above(upper_halves(lower, upper), lower_halves(lower, upper), (pairvec)~random);
}

#endif
