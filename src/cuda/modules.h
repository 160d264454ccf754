/* Kernels embedded in the library, loaded once per device. */
#ifndef FKDA_MODULES_H
#define FKDA_MODULES_H

#include <pthread.h>

#include "driver.h"

enum { FKDA_MAX_DEVICES = 64 };

/* One kernel function of one embedded fat binary; define it static and fill in the first fields. */
typedef struct fkda_function {
    const void *image; /* the fat binary */
    const char *name;
    int shared_bytes; /* dynamic shared memory a block needs */
    pthread_mutex_t lock;
    _Atomic(CUfunction) loaded[FKDA_MAX_DEVICES];
} fkda_function;

/* The function on a device, whose context must be current. Only the first call for a device loads. */
flash_kda_status fkda_load_function(const fkda_driver *driver, fkda_function *function, int ordinal,
                                    CUfunction *loaded);

#endif
