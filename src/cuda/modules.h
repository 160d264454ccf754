/* Kernels that are embedded in the library as fat binaries, loaded once for each device. */
#ifndef FKDA_MODULES_H
#define FKDA_MODULES_H

#include <pthread.h>

#include "driver.h"

enum { FKDA_MAX_DEVICES = 64, FKDA_MAX_FUNCTIONS = 24 };

/* An embedded fat binary and the kernels in it. A definition is static and fills in all members but
 * `functions` and `loaded`. */
typedef struct fkda_module {
    const void *image;
    const char *names[FKDA_MAX_FUNCTIONS]; /* of its kernels, up to the first NULL */
    int shared_bytes; /* dynamic shared memory that a CTA of any of them takes, at most */
    pthread_mutex_t lock;
    CUfunction functions[FKDA_MAX_DEVICES][FKDA_MAX_FUNCTIONS];
    _Atomic(bool) loaded[FKDA_MAX_DEVICES];
} fkda_module;

/* Fills in functions[ordinal] for a device, whose context must be current. The first call for a device loads
 * all kernels of the module, so that a stream capture that follows finds every one loaded. */
flash_kda_status fkda_load_module(const fkda_driver *driver, fkda_module *module, int ordinal);

#endif
