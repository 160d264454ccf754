/* Opens the NVIDIA driver at run time and puts its errors into sentences. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "../errors.h"
#include "cuda.h"

enum { WHY_BYTES = 400 };

static fkda_driver driver; /* its functions stay as they are once it is opened */
static atomic_bool opened;
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;

const char *fkda_result_name(CUresult result)
{
    const char *name = NULL;
    if (driver.cuGetErrorName) driver.cuGetErrorName(result, &name);
    return name ? name : "an unknown error";
}

/* The file that a function of the driver is in. */
static const char *file_of(void *function)
{
    Dl_info info;
    return dladdr(function, &info) && info.dli_fname ? info.dli_fname : "libcuda.so.1";
}

static bool find_functions(void *library, char why[WHY_BYTES])
{
    const struct {
        const char *symbol;
        void *slot;
        bool needed;
    } functions[] = {
#define NEEDED(name, symbol, arguments) {symbol, &driver.name, true},
#define NEW(name, symbol, arguments) {symbol, &driver.name, false},
        FKDA_DRIVER_FUNCTIONS(NEEDED) FKDA_NEW_DRIVER_FUNCTIONS(NEW)
#undef NEEDED
#undef NEW
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        *(void **)functions[i].slot = dlsym(library, functions[i].symbol);
        if (*(void **)functions[i].slot || !functions[i].needed) continue;
        const char *reason = dlerror();
        snprintf(why, WHY_BYTES, "the NVIDIA driver is too old: it has no %s (%s)", functions[i].symbol,
                 reason ? reason : "its address is null");
        return false;
    }
    return true;
}

/* Only one thread at a time may be here. What has failed is tried again by the next call, as a process may
 * have had no file descriptor or no memory left. */
static bool open_driver(char why[WHY_BYTES])
{
    enum { STUB_LIBRARY = 34 };
    static void *library;
    if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *reason = dlerror();
        snprintf(why, WHY_BYTES, "no NVIDIA driver could be opened: %s",
                 reason ? reason : "libcuda.so.1 could not be loaded");
        return false;
    }
    if (!find_functions(library, why)) return false;
    const CUresult result = driver.cuInit(0);
    void *init;
    memcpy(&init, &driver.cuInit, sizeof init);
    if (result == STUB_LIBRARY)
        snprintf(why, WHY_BYTES,
                 "%s is no NVIDIA driver but a stub, which CUDA toolkits have for linking: cuInit gave "
                 "CUDA_ERROR_STUB_LIBRARY (%d)",
                 file_of(init), result);
    else if (result)
        snprintf(why, WHY_BYTES, "the NVIDIA driver did not start: cuInit of %s gave %s (%d)", file_of(init),
                 fkda_result_name(result), result);
    return result == 0;
}

const fkda_driver *fkda_driver_open(const char **reason)
{
    static _Thread_local char why[WHY_BYTES];
    if (!atomic_load_explicit(&opened, memory_order_acquire)) {
        pthread_mutex_lock(&opening);
        const bool good = atomic_load_explicit(&opened, memory_order_relaxed) || open_driver(why);
        atomic_store_explicit(&opened, good, memory_order_release);
        pthread_mutex_unlock(&opening);
        if (!good) {
            if (reason) *reason = why;
            return NULL;
        }
    }
    if (reason) *reason = "";
    return &driver;
}

bool fkda_cuda_makes_tma_descriptors(void)
{
    return fkda_driver_open(NULL) && driver.cuTensorMapEncodeTiled;
}

flash_kda_status fkda_driver_fail(const char *call, CUresult result)
{
    /* What the driver reports after a trap. The driver does not say which kernel of the process has trapped,
     * so the sentence says only when a kernel of this library traps. */
    enum { ILLEGAL_INSTRUCTION = 715, LAUNCH_FAILED = 719 };
    if (result == ILLEGAL_INSTRUCTION || result == LAUNCH_FAILED)
        return fkda_fail(FLASH_KDA_DEVICE_ERROR,
                         "%s failed with %s (%d): a kernel stopped itself, and the process has lost its CUDA "
                         "context. A kernel of flash_kda stops itself when it has waited in vain for about "
                         "20 seconds: because two calls in flight shared a workspace, or because cu_seqlens "
                         "changed before a call was over",
                         call, fkda_result_name(result), result);
    return fkda_fail(FLASH_KDA_DEVICE_ERROR, "%s failed with %s (%d)", call, fkda_result_name(result),
                     result);
}
