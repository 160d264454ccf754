/* Results below 2^-126 while a head is computed. */
#ifndef FKDA_CPU_FLUSH_H
#define FKDA_CPU_FLUSH_H

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

/* A state that fades and a decay at the bound pass through numbers below 2^-126, on which x86 CPUs are some
 * hundred times slower. While a head is computed, results below 2^-126 become 0; the caller's setting returns
 * afterwards. */
static inline unsigned fkda_flush_tiny_results(void)
{
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON);
    return before;
#else
    return 0;
#endif
}

static inline void fkda_restore_tiny_results(unsigned before)
{
#if defined(__SSE2__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

#endif
