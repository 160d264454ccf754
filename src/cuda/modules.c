/* Loads the kernels that are embedded in the library. */
#include "modules.h"

#include <stdatomic.h>

static flash_kda_status find_functions(const fkda_driver *driver, const fkda_module *m, CUmodule module,
                                       CUfunction *functions)
{
    CUresult result;
    for (int i = 0; i < FKDA_MAX_FUNCTIONS && m->names[i]; i++) {
        result = driver->cuModuleGetFunction(&functions[i], module, m->names[i]);
        if (result) return fkda_driver_fail("cuModuleGetFunction", result);
        result = driver->cuFuncSetAttribute(functions[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                            m->shared_bytes);
        if (result) return fkda_driver_fail("cuFuncSetAttribute", result);
    }
    return FLASH_KDA_OK;
}

/* A module that cannot be used is unloaded, so that a later try does not find two of them in memory. */
static flash_kda_status load(const fkda_driver *driver, const fkda_module *m, CUfunction *functions)
{
    CUmodule module;
    const CUresult result = driver->cuModuleLoadData(&module, m->image);
    if (result) return fkda_driver_fail("cuModuleLoadData", result);
    const flash_kda_status status = find_functions(driver, m, module, functions);
    if (status != FLASH_KDA_OK) driver->cuModuleUnload(module);
    return status;
}

flash_kda_status fkda_load_module(const fkda_driver *driver, fkda_module *m, int ordinal)
{
    flash_kda_status status = FLASH_KDA_OK;
    if (atomic_load_explicit(&m->loaded[ordinal], memory_order_acquire)) return FLASH_KDA_OK;
    pthread_mutex_lock(&m->lock);
    if (!atomic_load(&m->loaded[ordinal])) {
        status = load(driver, m, m->functions[ordinal]);
        if (status == FLASH_KDA_OK) atomic_store_explicit(&m->loaded[ordinal], true, memory_order_release);
    }
    pthread_mutex_unlock(&m->lock);
    return status;
}
