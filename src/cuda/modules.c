#include "modules.h"

#include <stdatomic.h>

static flash_kda_status load(const fkda_driver *driver, const fkda_function *f, CUfunction *function)
{
    CUmodule module;
    CUresult result = driver->cuModuleLoadData(&module, f->image);
    if (result) return fkda_driver_fail("cuModuleLoadData", result);
    result = driver->cuModuleGetFunction(function, module, f->name);
    if (result) return fkda_driver_fail("cuModuleGetFunction", result);
    result = driver->cuFuncSetAttribute(*function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                        f->shared_bytes);
    if (result) return fkda_driver_fail("cuFuncSetAttribute", result);
    return FLASH_KDA_OK;
}

flash_kda_status fkda_load_function(const fkda_driver *driver, fkda_function *f, int ordinal,
                                    CUfunction *loaded)
{
    flash_kda_status status = FLASH_KDA_OK;
    *loaded = atomic_load_explicit(&f->loaded[ordinal], memory_order_acquire);
    if (*loaded) return FLASH_KDA_OK;
    pthread_mutex_lock(&f->lock);
    *loaded = atomic_load(&f->loaded[ordinal]);
    if (!*loaded) {
        status = load(driver, f, loaded);
        if (status == FLASH_KDA_OK) atomic_store_explicit(&f->loaded[ordinal], *loaded, memory_order_release);
    }
    pthread_mutex_unlock(&f->lock);
    return status;
}
