/*
 * What a forward pass asks of the driver, as functions that succeed and return at once: contexts, modules,
 * launches, memset and TMA descriptors. No kernel runs and no memory is touched, so the time of a forward
 * call is the library's own host time (benchmarks/host_time.c). Memory, copies and events stay failing stubs
 * (stubs.c): a program that wants results stops at its first allocation instead of printing numbers that no
 * GPU computed.
 */
#include "../../src/cuda/driver.h"
#include "counts.h"

#pragma GCC diagnostic ignored "-Wunused-parameter"

#define DECLARE(name, symbol, arguments) CUresult name arguments __asm__(symbol);
FKDA_DRIVER_FUNCTIONS(DECLARE)
FKDA_NEW_DRIVER_FUNCTIONS(DECLARE)

/* Handles point here: the library only keeps them and hands them back. */
static char handle;

static CUresult called(void)
{
    pretended_counts_of_thread()->calls++;
    return 0;
}

static CUresult launched(pretended_launch launch)
{
    pretended_counts *counts = pretended_counts_of_thread();
    counts->launch[counts->launches++ % PRETENDED_LAUNCHES] = launch;
    return called();
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = (CUcontext)&handle;
    return called();
}

CUresult cuCtxPushCurrent(CUcontext context)
{
    return called();
}

CUresult cuCtxPopCurrent(CUcontext *context)
{
    *context = (CUcontext)&handle;
    return called();
}

CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
    *module = (CUmodule)&handle;
    return called();
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = (CUfunction)&handle;
    return called();
}

CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value)
{
    return called();
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream)
{
    pretended_counts_of_thread()->memset_words += count;
    return called();
}

CUresult cuStreamSynchronize(CUstream stream)
{
    return called();
}

CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *tensor, const uint64_t *sizes,
                                const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                int interleave, int swizzle, int promotion, int fill)
{
    return called();
}

CUresult cuStreamGetGreenCtx(CUstream stream, CUgreenCtx *context)
{
    *context = NULL;
    return called();
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream stream, void **arguments, void **extra)
{
    return launched((pretended_launch){
        .ctas = grid_x * grid_y * grid_z,
        .threads = block_x * block_y * block_z,
        .shared_bytes = shared_bytes,
    });
}

CUresult cuLaunchKernelEx(const fkda_launch_config *config, CUfunction function, void **arguments,
                          void **extra)
{
    pretended_launch launch = {
        .ctas = config->grid_x * config->grid_y * config->grid_z,
        .threads = config->block_x * config->block_y * config->block_z,
        .shared_bytes = config->shared_bytes,
    };
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const fkda_launch_attribute *attribute = &config->attributes[i];
        if (attribute->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            launch.cooperative = attribute->value.cooperative;
        if (attribute->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            launch.early = attribute->value.programmatic_stream_serialization_allowed;
    }
    return launched(launch);
}
