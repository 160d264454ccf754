/* Opens the NVIDIA driver at run time and puts its errors into sentences. */
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#include "../errors.h"
#include "cuda.h"

static fkda_driver driver;
static char failure[256];
static pthread_once_t opened = PTHREAD_ONCE_INIT;

const char *fkda_result_name(CUresult result)
{
    const char *name = NULL;
    if (driver.cuGetErrorName) driver.cuGetErrorName(result, &name);
    return name ? name : "an unknown error";
}

static void open_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(failure, sizeof failure, "no NVIDIA driver: libcuda.so.1 could not be opened");
        return;
    }
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
        if (!*(void **)functions[i].slot && functions[i].needed) {
            snprintf(failure, sizeof failure, "the NVIDIA driver is too old: it has no %s",
                     functions[i].symbol);
            return;
        }
    }
    CUresult result = driver.cuInit(0);
    if (result)
        snprintf(failure, sizeof failure, "the NVIDIA driver did not start: cuInit gave %s",
                 fkda_result_name(result));
}

const fkda_driver *fkda_driver_open(const char **reason)
{
    pthread_once(&opened, open_driver);
    if (reason) *reason = failure;
    return failure[0] ? NULL : &driver;
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
