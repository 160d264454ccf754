/* The CUDA backend as the rest of the library sees it: plain C. The driver is opened at run time
 * (driver.c). */
#ifndef FKDA_CUDA_H
#define FKDA_CUDA_H

#include "../bwd_problem.h"
#include "../decode_layer_problem.h"
#include "../decode_problem.h"
#include "../map_problem.h"
#include "../nonfinite.h"
#include "../plan.h"
#include "../problem.h"

/* context.c: the number of CUDA devices; 0 with *reason set to a sentence if none can be used. */
int fkda_cuda_device_count(const char **reason);
/* context.c: 10 * major + minor. */
flash_kda_status fkda_cuda_capability(int ordinal, int *capability);
/* driver.c: whether the driver makes TMA descriptors, as drivers of CUDA 12 and newer do. */
bool fkda_cuda_makes_tma_descriptors(void);
/* context.c: the number of SMs. */
flash_kda_status fkda_cuda_sms(int ordinal, int *sms);
flash_kda_status fkda_cuda_describe(int ordinal, flash_kda_device_info *info);

/* memory.c */
flash_kda_status fkda_cuda_malloc(int ordinal, size_t bytes, void **memory);
flash_kda_status fkda_cuda_free(int ordinal, void *memory);
flash_kda_status fkda_cuda_copy(int ordinal, void *to, const void *from, size_t bytes);
flash_kda_status fkda_cuda_synchronize(int ordinal, void *stream);

/* timing.c: calls run(argument) `repeats` times between two events on the stream, and writes the time between
 * the events of each call. */
flash_kda_status fkda_cuda_time(int ordinal, void *stream, flash_kda_status (*run)(void *), void *argument,
                                int repeats, float *milliseconds);

/* nonfinite.c: `count_nonfinite` of both kernels below. */
flash_kda_status fkda_cuda_count_nonfinite(const fkda_problem *problem, fkda_counted counted);

/* decode.c: `decode` and `apply` of both kernels below. */
flash_kda_status fkda_cuda_decode(const fkda_decode_problem *problem);
flash_kda_status fkda_cuda_apply(const fkda_apply_problem *problem);
void fkda_cuda_explain_decode(const fkda_decode_problem *problem, char *text, size_t size);
void fkda_cuda_explain_apply(const fkda_apply_problem *problem, char *text, size_t size);

/* decode_layer.c: `decode_layer` of both kernels below. */
flash_kda_status fkda_cuda_decode_layer(const fkda_decode_layer_problem *problem);
void fkda_cuda_explain_decode_layer(const fkda_decode_layer_problem *problem, char *text, size_t size);

/* bwd.c: `bwd`, `bwd_workspace` and `saved_bytes` of the kernel "portable", whose forward pass saves nothing:
 * its backward pass finds states beside gradients, in no time of their own. */
flash_kda_status fkda_cuda_bwd(const fkda_bwd_problem *problem);
size_t fkda_cuda_bwd_workspace(const fkda_bwd_problem *problem);
size_t fkda_portable_saved_bytes(const fkda_shape *shape);

/* map.c: `map`, `map_workspace` and `join` of both kernels below. */
flash_kda_status fkda_cuda_map(const fkda_map_problem *problem);
size_t fkda_cuda_map_workspace(const fkda_map_problem *problem);
flash_kda_status fkda_cuda_join(const fkda_join_problem *problem);

/* portable/portable.c: the functions of the kernel "portable" (kernel.h). */
flash_kda_status fkda_portable_make_plan(fkda_plan *plan);
flash_kda_status fkda_portable_run(const fkda_problem *problem, const fkda_plan *plan);
void fkda_portable_explain(const fkda_plan *plan, char *text, size_t size);

/* hopper/hopper.c: the functions of the kernel "hopper" (kernel.h). */
flash_kda_status fkda_hopper_make_plan(fkda_plan *plan);
flash_kda_status fkda_hopper_run(const fkda_problem *problem, const fkda_plan *plan);
void fkda_hopper_explain(const fkda_plan *plan, char *text, size_t size);

/* hopper/bwd.c: `bwd` and `bwd_workspace` of the kernel "hopper". hopper/border_states.h: `saved_bytes`. */
flash_kda_status fkda_hopper_bwd(const fkda_bwd_problem *problem);
size_t fkda_hopper_bwd_workspace(const fkda_bwd_problem *problem);

#endif
