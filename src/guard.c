#define _POSIX_C_SOURCE 200809L
#include "guard.h"

#include <pthread.h>
#include <stddef.h>

fkda_guard fkda_guard_begin(void)
{
    fkda_guard guard = {.floats = fkda_default_float_settings()};
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &guard.cancel_state);
    return guard;
}

void fkda_guard_end(const fkda_guard *guard)
{
    fkda_restore_float_settings(&guard->floats);
    pthread_setcancelstate(guard->cancel_state, NULL);
}

sigset_t fkda_block_signals(void)
{
    static const int raised[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    sigset_t all, before;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof raised / sizeof *raised; i++) sigdelset(&all, raised[i]);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    return before;
}
