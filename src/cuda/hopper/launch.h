/* Launches the Hopper kernels as a plan says. */
#ifndef FKDA_HOPPER_LAUNCH_H
#define FKDA_HOPPER_LAUNCH_H

#include "../../../kernels/hopper/fwd_args.h"
#include "../driver.h"
#include "plan.h"

/* When a kernel may start. */
typedef enum fkda_start {
    FKDA_IN_ORDER, /* when all work before it on the stream is over */
    FKDA_EARLY,    /* when the kernel before it lets it start; the kernel itself waits for what it needs */
    FKDA_TOGETHER, /* in order, with all CTAs running at the same time, because they wait for each other */
} fkda_start;

/* A kernel's grid, and the dynamic shared memory of a CTA in bytes. */
typedef struct fkda_grid {
    int64_t ctas;
    int threads, shared_bytes;
} fkda_grid;

/* Launches a kernel. A driver without cuLaunchKernelEx launches FKDA_EARLY kernels in order and refuses
 * FKDA_TOGETHER. */
CUresult fkda_hopper_launch_kernel(const fkda_driver *driver, CUstream stream, CUfunction kernel, void *args,
                                   fkda_grid grid, fkda_start when);

/* The driver's function that launches, for sentences about what failed. */
static inline const char *fkda_launching_function(const fkda_driver *driver)
{
    return driver->cuLaunchKernelEx ? "cuLaunchKernelEx" : "cuLaunchKernel";
}

/* The kernel that finds the maps of segments in a call with these features (fkda_feature), and the kernel
 * that joins maps. Their modules are loaded. */
flash_kda_status fkda_hopper_find_maps(const fkda_driver *driver, int32_t features, int ordinal,
                                       CUfunction *maps, CUfunction *join);

/* Enqueues everything that the plan asks for on the problem's stream. The device's context must be
 * current. */
flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *problem,
                                    const fkda_hopper_plan *plan);

/* The TMA descriptor of a tensor as fkda_hopper_fwd_args has it: [B, T, heads, 128] in boxes of `chunk`
 * tokens by 64 channels. A descriptor holds the tensor's address, so each call makes its descriptors anew.
 * They go to the kernel by value, inside of its arguments, and no memory on the device has to be kept for
 * them. */
CUresult fkda_describe_tensor(const fkda_driver *driver, fkda_tma_descriptor *descriptor,
                              const fkda_token_view *tensor, const fkda_shape *shape, int chunk);

#endif
