/* Launches the decode kernels. */
#include "decode_launch.h"

#include <stdio.h>

#include "cuda.h"

/* Kernels start before the previous one in the stream is over, where the driver and the GPU can do that. */
static flash_kda_status start(const fkda_driver *driver, CUfunction kernel, bool early, CUstream stream,
                              const fkda_decode_launch *l)
{
    void *pointers[] = {l->args};
    fkda_launch_attribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
    const fkda_launch_config config = {
        .grid_x = (unsigned)(l->heads << l->split),
        .grid_y = 1,
        .grid_z = 1,
        .block_x = (unsigned)l->threads,
        .block_y = 1,
        .block_z = 1,
        .shared_bytes = (unsigned)l->shared_bytes,
        .stream = stream,
        .attributes = &attribute,
        .attribute_count = 1,
    };
    CUresult result;
    attribute.value.programmatic_stream_serialization_allowed = 1;
    if (early && driver->cuLaunchKernelEx) {
        result = driver->cuLaunchKernelEx(&config, kernel, pointers, NULL);
        return result ? fkda_driver_fail("cuLaunchKernelEx", result) : FLASH_KDA_OK;
    }
    result = driver->cuLaunchKernel(kernel, config.grid_x, 1, 1, config.block_x, 1, 1, config.shared_bytes,
                                    stream, pointers, NULL);
    return result ? fkda_driver_fail("cuLaunchKernel", result) : FLASH_KDA_OK;
}

flash_kda_status fkda_launch_decode(flash_kda_device device, void *stream, fkda_module *module,
                                    const fkda_decode_launch *l)
{
    /* From this compute capability on, a kernel may start before the kernel in front of it has ended, and
     * waits for that end by itself. */
    enum { STARTS_EARLY = 90 };
    const fkda_driver *driver;
    const int ordinal = device.index;
    int capability;
    flash_kda_status status = fkda_cuda_capability(ordinal, &capability);
    if (status == FLASH_KDA_OK) status = fkda_enter_device(ordinal, &driver);
    if (status != FLASH_KDA_OK) return status;
    status = fkda_load_module(driver, module, ordinal);
    if (status == FLASH_KDA_OK)
        status = start(driver, module->functions[ordinal][l->kernel], capability >= STARTS_EARLY,
                       (CUstream)stream, l);
    return fkda_leave_device(driver, status);
}

void fkda_explain_launch(const char *name, const char *what, const fkda_decode_launch *l, char *text,
                         size_t size)
{
    const int ctas = 1 << l->split;
    snprintf(text, size,
             "One launch of %s: %s. %lld heads of sequences with %d %s each, %lld CTAs of %d threads and %d "
             "bytes of shared memory.",
             name, what, (long long)l->heads, ctas, ctas == 1 ? "CTA" : "CTAs", (long long)l->heads * ctas,
             l->threads, l->shared_bytes);
}
