/* Kernels embedded in the library, loaded once per device. */
#ifndef FKDA_MODULES_H
#define FKDA_MODULES_H

#include <pthread.h>

#include "driver.h"

enum { FKDA_MAX_DEVICES = 64, FKDA_MAX_FUNCTIONS = 8 };

/* An embedded fat binary and the kernels in it; define it static and fill in all but the last two. */
typedef struct fkda_module {
    const void *image;
    const char *names[FKDA_MAX_FUNCTIONS]; /* up to the first NULL */
    int shared_bytes;                      /* dynamic shared memory that a block of any of them may take */
    pthread_mutex_t lock;
    CUfunction functions[FKDA_MAX_DEVICES][FKDA_MAX_FUNCTIONS];
    _Atomic(bool) loaded[FKDA_MAX_DEVICES];
} fkda_module;

/* Fills in functions[ordinal] for a device, whose context must be current. Only the first call for a device
 * loads, and loads all: what a stream captures later finds every kernel there. */
flash_kda_status fkda_load_module(const fkda_driver *driver, fkda_module *module, int ordinal);

#endif
