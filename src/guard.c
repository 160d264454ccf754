#include "guard.h"

#include <pthread.h>

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
