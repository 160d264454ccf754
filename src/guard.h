/*
 * What the public calls do first and last, so that the calling thread's settings neither change a result nor
 * harm the process:
 *
 *   cancellation    pthread_cancel() takes effect after the call. A thread that ended inside it would leave
 *                   locks taken, and worker threads that still use its stack.
 *   floating point  The call computes with rounding to nearest, exceptions masked and no flushing of tiny
 *                   numbers. Otherwise the caller's rounding mode would change results, and an exception that
 *                   the caller has unmasked would end the process for a NaN in a tensor.
 *
 * Both are as before when the call returns. The exception flags that the call raised are dropped with it.
 */
#ifndef FKDA_GUARD_H
#define FKDA_GUARD_H

#include <fenv.h>
#include <signal.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

/* On x86-64 the library and its libm functions use SSE alone. Its register takes some nanoseconds to change,
 * where fesetenv() takes a hundred. */
#if defined(__x86_64__)
typedef unsigned fkda_float_settings;

static inline fkda_float_settings fkda_default_float_settings(void)
{
    const fkda_float_settings before = _mm_getcsr();
    _mm_setcsr(_MM_MASK_MASK);
    return before;
}

static inline void fkda_restore_float_settings(const fkda_float_settings *before)
{
    _mm_setcsr(*before);
}
#else
typedef fenv_t fkda_float_settings;

static inline fkda_float_settings fkda_default_float_settings(void)
{
    fkda_float_settings before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    return before;
}

static inline void fkda_restore_float_settings(const fkda_float_settings *before)
{
    fesetenv(before);
}
#endif

/* Blocks all signals that are sent to the process or to a thread, and returns what was blocked before. A
 * thread that is created meanwhile blocks them for good, so the application's handlers run on its own threads
 * as if the new one were not there. A signal that an instruction raises (SIGSEGV, say) stays deliverable: the
 * system would otherwise end the process without calling the application's handler. */
sigset_t fkda_block_signals(void);

typedef struct fkda_guard {
    int cancel_state;
    fkda_float_settings floats;
} fkda_guard;

fkda_guard fkda_guard_begin(void);
void fkda_guard_end(const fkda_guard *guard);

/* The first line of a public call. The guard ends where the function returns. */
#define FKDA_GUARD                                                                                           \
    const fkda_guard guard __attribute__((cleanup(fkda_guard_end), unused)) = fkda_guard_begin()

#endif
