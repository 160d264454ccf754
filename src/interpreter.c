/* Calls for bindings of an interpreter. The work runs in a thread of its own. The calling thread is the one
 * in which the interpreter handles signals: it waits for the work and lets the interpreter handle signals
 * meanwhile. The wait is in C because an interpreter may run a handler between any two of its own steps. */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "check_bwd.h"
#include "check_map.h"
#include "check_shared.h"
#include "check_tensor.h"
#include "errors.h"
#include "guard.h"

/* A signal ends the wait at once, unless the system gave it to another thread. */
enum { LOOK_AGAIN_MILLISECONDS = 20 };

typedef struct work {
    flash_kda_status (*compute)(const struct work *);
    const flash_kda_fwd_params *params;
    double *out64, *state64, *checkpoints64; /* of flash_kda_reference() */
    const flash_kda_bwd_params *bwd;
    const flash_kda_map_params *map;
    const flash_kda_gradients64 *gradients; /* of flash_kda_bwd_reference() */
    const void *decode; /* the struct of decode, decode_layer, apply and their references */
    flash_kda_status status;
    char sentence[512]; /* of the error, which is the working thread's */
    int pipe[2];        /* the working thread writes a byte when it has ended */
} work;

static flash_kda_status compute_fwd(const work *w)
{
    return flash_kda_fwd(w->params);
}

static flash_kda_status compute_reference(const work *w)
{
    return flash_kda_reference(w->params, w->out64, w->state64, w->checkpoints64);
}

static flash_kda_status compute_bwd(const work *w)
{
    return flash_kda_bwd(w->bwd);
}

static flash_kda_status compute_map(const work *w)
{
    return flash_kda_map(w->map);
}

static flash_kda_status compute_bwd_reference(const work *w)
{
    return flash_kda_bwd_reference(w->bwd, w->gradients);
}

static flash_kda_status compute_decode(const work *w)
{
    return flash_kda_decode(w->decode);
}

static flash_kda_status compute_decode_reference(const work *w)
{
    return flash_kda_decode_reference(w->decode, w->out64, w->state64);
}

static flash_kda_status compute_decode_layer(const work *w)
{
    return flash_kda_decode_layer(w->decode);
}

static flash_kda_status compute_decode_layer_reference(const work *w)
{
    return flash_kda_decode_layer_reference(w->decode, w->out64, w->state64);
}

static flash_kda_status compute_apply(const work *w)
{
    return flash_kda_apply(w->decode);
}

static void *start_compute(void *argument)
{
    work *w = argument;
    w->status = w->compute(w);
    snprintf(w->sentence, sizeof w->sentence, "%s", flash_kda_last_error());
    while (write(w->pipe[1], "", 1) != 1) {
    }
    return NULL;
}

static bool start_thread(work *w, pthread_t *thread)
{
    if (pipe(w->pipe) != 0) return false;
    for (int i = 0; i < 2; i++) fcntl(w->pipe[i], F_SETFD, FD_CLOEXEC);
    const sigset_t before = fkda_block_signals();
    const bool started = pthread_create(thread, NULL, start_compute, w) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!started)
        for (int i = 0; i < 2; i++) close(w->pipe[i]);
    return started;
}

/* Waits for the work's end. The calling thread has the interpreter's lock before and afterwards. */
static void wait_for_end(work *w, const flash_kda_interpreter *interpreter, int32_t *interrupt)
{
    struct pollfd end = {.fd = w->pipe[0], .events = POLLIN};
    bool raised = false; /* a handler's exception is under way, and no other handler may raise one */
    void *state = interpreter->release();
    while (poll(&end, 1, LOOK_AGAIN_MILLISECONDS) < 1) {
        if (raised) continue;
        interpreter->acquire(state);
        raised = interpreter->handle_signals() != 0;
        if (raised) __atomic_store_n(interrupt, 1, __ATOMIC_RELAXED);
        state = interpreter->release();
    }
    interpreter->acquire(state);
}

static flash_kda_status compute_here(work *w, const flash_kda_interpreter *interpreter)
{
    void *state = interpreter->release();
    const flash_kda_status status = w->compute(w);
    interpreter->acquire(state);
    return status;
}

/* Computes in a thread of its own; `interrupt` is what the work looks at. */
static flash_kda_status compute(work *w, const flash_kda_interpreter *interpreter, int32_t *interrupt)
{
    pthread_t thread;
    if (!start_thread(w, &thread)) return compute_here(w, interpreter);
    wait_for_end(w, interpreter, interrupt);
    pthread_join(thread, NULL);
    for (int i = 0; i < 2; i++) close(w->pipe[i]);
    return w->status == FLASH_KDA_OK ? FLASH_KDA_OK : fkda_fail(w->status, "%s", w->sentence);
}

static flash_kda_status check_interpreter(const flash_kda_interpreter *interpreter)
{
    if (interpreter) return FLASH_KDA_OK;
    return fkda_fail(FLASH_KDA_INVALID_VALUE,
                     "interpreter is null; it must point to a flash_kda_interpreter");
}

static flash_kda_status compute_forward(work *w, const flash_kda_fwd_params *params,
                                        const flash_kda_interpreter *interpreter)
{
    int32_t interrupt = 0;
    flash_kda_fwd_params own;
    TRY(check_interpreter(interpreter));
    TRY(fkda_complete_params(&params, &own));
    own = *params;
    own.struct_size = sizeof own;
    own.interrupt = &interrupt;
    w->params = &own;
    return compute(w, interpreter, &interrupt);
}

static flash_kda_status compute_backward(work *w, const flash_kda_bwd_params *params,
                                         const flash_kda_interpreter *interpreter)
{
    int32_t interrupt = 0;
    flash_kda_bwd_params own;
    TRY(check_interpreter(interpreter));
    TRY(fkda_complete_bwd_params(&params, &own));
    own = *params;
    own.struct_size = sizeof own;
    own.interrupt = &interrupt;
    w->bwd = &own;
    return compute(w, interpreter, &interrupt);
}

flash_kda_status flash_kda_fwd_for(const flash_kda_interpreter *interpreter,
                                   const flash_kda_fwd_params *params)
{
    FKDA_GUARD;
    work w = {.compute = compute_fwd};
    return compute_forward(&w, params, interpreter);
}

flash_kda_status flash_kda_reference_for(const flash_kda_interpreter *interpreter,
                                         const flash_kda_fwd_params *params, double *out64, double *state64,
                                         double *checkpoints64)
{
    FKDA_GUARD;
    work w = {
        .compute = compute_reference, .out64 = out64, .state64 = state64, .checkpoints64 = checkpoints64};
    return compute_forward(&w, params, interpreter);
}

flash_kda_status flash_kda_bwd_for(const flash_kda_interpreter *interpreter,
                                   const flash_kda_bwd_params *params)
{
    FKDA_GUARD;
    work w = {.compute = compute_bwd};
    return compute_backward(&w, params, interpreter);
}

flash_kda_status flash_kda_bwd_reference_for(const flash_kda_interpreter *interpreter,
                                             const flash_kda_bwd_params *params,
                                             const flash_kda_gradients64 *gradients)
{
    FKDA_GUARD;
    work w = {.compute = compute_bwd_reference, .gradients = gradients};
    return compute_backward(&w, params, interpreter);
}

/* ---- Decode, whose structs differ in nothing that is done here but their sizes ---- */

typedef struct params_type {
    const char *name;
    size_t least, most; /* bytes of the struct in the first version that had it, and in this one */
    size_t interrupt;   /* where the field is */
} params_type;

#define PARAMS_TYPE(type)                                                                                    \
    {                                                                                                        \
#type, offsetof(type, kernel), sizeof(type), offsetof(type, interrupt)                               \
    }
static const params_type decode_params = PARAMS_TYPE(flash_kda_decode_params);
static const params_type decode_layer_params = PARAMS_TYPE(flash_kda_decode_layer_params);
static const params_type apply_params = PARAMS_TYPE(flash_kda_apply_params);

/* Computes with a copy of the caller's struct. `own` has room for one. */
static flash_kda_status compute_with(work *w, const params_type *type, const void *params, void *own,
                                     const flash_kda_interpreter *interpreter)
{
    int32_t interrupt = 0;
    const volatile int32_t *const looked_at = &interrupt;
    TRY(check_interpreter(interpreter));
    TRY(fkda_complete_struct(&params, own, type->least, type->most, type->name));
    if (params != own) memcpy(own, params, type->most);
    memcpy(own, &type->most, sizeof type->most); /* struct_size, the first field */
    memcpy((char *)own + type->interrupt, &looked_at, sizeof looked_at);
    w->decode = own;
    return compute(w, interpreter, &interrupt);
}

flash_kda_status flash_kda_decode_for(const flash_kda_interpreter *interpreter,
                                      const flash_kda_decode_params *params)
{
    FKDA_GUARD;
    flash_kda_decode_params own;
    work w = {.compute = compute_decode};
    return compute_with(&w, &decode_params, params, &own, interpreter);
}

flash_kda_status flash_kda_decode_reference_for(const flash_kda_interpreter *interpreter,
                                                const flash_kda_decode_params *params, double *out64,
                                                double *states64)
{
    FKDA_GUARD;
    flash_kda_decode_params own;
    work w = {.compute = compute_decode_reference, .out64 = out64, .state64 = states64};
    return compute_with(&w, &decode_params, params, &own, interpreter);
}

flash_kda_status flash_kda_decode_layer_for(const flash_kda_interpreter *interpreter,
                                            const flash_kda_decode_layer_params *params)
{
    FKDA_GUARD;
    flash_kda_decode_layer_params own;
    work w = {.compute = compute_decode_layer};
    return compute_with(&w, &decode_layer_params, params, &own, interpreter);
}

flash_kda_status flash_kda_decode_layer_reference_for(const flash_kda_interpreter *interpreter,
                                                      const flash_kda_decode_layer_params *params,
                                                      double *out64, double *states64)
{
    FKDA_GUARD;
    flash_kda_decode_layer_params own;
    work w = {.compute = compute_decode_layer_reference, .out64 = out64, .state64 = states64};
    return compute_with(&w, &decode_layer_params, params, &own, interpreter);
}

flash_kda_status flash_kda_apply_for(const flash_kda_interpreter *interpreter,
                                     const flash_kda_apply_params *params)
{
    FKDA_GUARD;
    flash_kda_apply_params own;
    work w = {.compute = compute_apply};
    return compute_with(&w, &apply_params, params, &own, interpreter);
}

flash_kda_status flash_kda_map_for(const flash_kda_interpreter *interpreter,
                                   const flash_kda_map_params *params)
{
    FKDA_GUARD;
    int32_t interrupt = 0;
    flash_kda_map_params own;
    work w = {.compute = compute_map, .map = &own};
    TRY(check_interpreter(interpreter));
    TRY(fkda_complete_map_params(&params, &own));
    own = *params;
    own.struct_size = sizeof own;
    own.interrupt = &interrupt;
    return compute(&w, interpreter, &interrupt);
}
