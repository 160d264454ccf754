/* The CUDA backend as the rest of the library sees it. Plain C: the driver is opened at run time. */
#ifndef FKDA_CUDA_H
#define FKDA_CUDA_H

#include "../internal.h"

/* devices.c: the number of CUDA devices; 0 with *reason set to a sentence if there are none to use. */
int fkda_cuda_device_count(const char **reason);
flash_kda_status fkda_cuda_capability(int ordinal, int *capability);
flash_kda_status fkda_cuda_describe(int ordinal, flash_kda_device_info *info);
flash_kda_status fkda_cuda_multiprocessors(int ordinal, int *count);

/* memory.c */
flash_kda_status fkda_cuda_malloc(int ordinal, size_t bytes, void **memory);
flash_kda_status fkda_cuda_free(int ordinal, void *memory);
flash_kda_status fkda_cuda_copy(int ordinal, void *to, const void *from, size_t bytes);
flash_kda_status fkda_cuda_synchronize(int ordinal, void *stream);
flash_kda_status fkda_cuda_time_fwd(const flash_kda_fwd_params *params, int repeats, float *milliseconds);

/* portable.c */
size_t fkda_cuda_portable_workspace_size(const fkda_problem *problem);
flash_kda_status fkda_cuda_portable_fwd(const fkda_problem *problem);
void fkda_cuda_portable_explain(const fkda_problem *problem, char *text, size_t size);

/* hopper.c: never cut */
size_t fkda_cuda_hopper_whole_workspace_size(const fkda_problem *problem);
flash_kda_status fkda_cuda_hopper_whole_fwd(const fkda_problem *problem);
void fkda_cuda_hopper_whole_explain(const fkda_problem *problem, char *text, size_t size);

/* segments.c: sequences cut into segments where that pays; wherever they can be; and only if their lengths differ */
size_t fkda_cuda_hopper_workspace_size(const fkda_problem *problem);
flash_kda_status fkda_cuda_hopper_fwd(const fkda_problem *problem);
void fkda_cuda_hopper_explain(const fkda_problem *problem, char *text, size_t size);

#endif
