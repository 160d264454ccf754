/*
 * Stochastic rounding of a bf16 state, the same on the CPU and on a GPU. Included by C and by CUDA C++.
 *
 * A number x between two neighbours a and b of bf16 becomes b with the probability (x - a) / (b - a), so that
 * it is right on average. In bits: 16 random bits are added to the 32 of x, and the lower 16 of the sum are
 * dropped.
 *
 * The random numbers are Philox 4x32 with seven rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers:
 * as easy as 1, 2, 3", 2011). The key is the seed. The counter is the offset of the call and the place of the
 * number, so a number's random bits depend on nothing but these, whoever computes it. One block of four words
 * serves eight neighbouring channels of K.
 */
#ifndef FKDA_ROUNDING_H
#define FKDA_ROUNDING_H

#include <stdint.h>

#if defined(__CUDACC__)
#define FKDA_DEVICE static __device__ __forceinline__
#else
#define FKDA_DEVICE static inline
#endif

enum { FKDA_CHANNELS_OF_A_RANDOM_BLOCK = 8 };

typedef struct fkda_random_block {
    uint32_t word[4];
} fkda_random_block;

/* Numbers the blocks of eight channels of all states that a call may write. Block `channel_block` has
 * channels 8 channel_block to 8 channel_block + 7 of row v, in the state of head `head` of `heads`, as it is
 * after token `token` of the sequence. flash_kda_apply() and FLASH_KDA_WRITE_LAST write one state of a
 * sequence and pass 0 as `token`. */
FKDA_DEVICE uint64_t fkda_random_place(int64_t sequence, int token, int64_t heads, int64_t head, int v,
                                       int channel_block)
{
    const uint64_t state = ((uint64_t)sequence * 16 + (uint64_t)token) * (uint64_t)heads + (uint64_t)head;
    return (state * 128 + (uint64_t)v) * 16 + (uint64_t)channel_block;
}

FKDA_DEVICE fkda_random_block fkda_random(uint64_t seed, uint64_t offset, uint64_t place)
{
    uint32_t c0 = (uint32_t)offset, c1 = (uint32_t)(offset >> 32);
    uint32_t c2 = (uint32_t)place, c3 = (uint32_t)(place >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 7; round++) {
        const uint64_t a = (uint64_t)0xd2511f53u * c0, b = (uint64_t)0xcd9e8d57u * c2;
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        c0 = n0;
        c2 = n2;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    const fkda_random_block block = {{c0, c1, c2, c3}};
    return block;
}

/* The 16 random bits of channel i, 0 to 7, of a block. */
FKDA_DEVICE uint32_t fkda_random_bits(const fkda_random_block *block, int i)
{
    return i % 2 ? block->word[i / 2] >> 16 : block->word[i / 2] & 0xffffu;
}

/* The bits of an fp32 number, rounded to bf16. NaN and infinities stay what they are. */
FKDA_DEVICE uint16_t fkda_round_at_random(uint32_t bits, uint32_t random)
{
    if ((bits & 0x7f800000u) == 0x7f800000u)
        return (uint16_t)((bits >> 16) | ((bits & 0x007fffffu) ? 0x0040u : 0u));
    return (uint16_t)((bits + random) >> 16);
}

#endif
