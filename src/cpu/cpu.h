/* The CPU backend and the fp64 reference as the rest of the library sees them. */
#ifndef FKDA_CPU_H
#define FKDA_CPU_H

#include "../bwd_problem.h"
#include "../decode_layer_problem.h"
#include "../decode_problem.h"
#include "../map_problem.h"
#include "../nonfinite.h"
#include "../plan.h"
#include "../problem.h"

/* parallel.c: how many CPUs the process may run on, at least 1. */
int fkda_cpu_count(void);

enum { FKDA_MAX_THREADS = 1024 }; /* of one call */

/* parallel.c: calls task(context, index, worker) for every index in [0, count), on up to `threads` threads,
 * all of which end before the function returns. `worker` is in [0, min(threads, FKDA_MAX_THREADS)). A task
 * that returns false stops the loop: tasks that run are finished, and no other begins. Returns whether all
 * tasks returned true. The calling thread must not be cancelled meanwhile (guard.h). */
bool fkda_parallel_for(int threads, int64_t count, bool (*task)(void *context, int64_t index, int worker),
                       void *context);

/* dispatch.c: the instruction set that the forward pass uses on this machine: "x86-64 avx512", ... */
const char *fkda_cpu_arch(void);

/* dispatch.c: whether this machine can run the kernel of that name. */
bool fkda_cpu_runs(const char *kernel);

/* fwd.c: the functions of the kernels "cpu" and "cpu-..." (kernel.h). */
flash_kda_status fkda_cpu_make_plan(fkda_plan *plan);
flash_kda_status fkda_cpu_run(const fkda_problem *problem, const fkda_plan *plan);
void fkda_cpu_explain(const fkda_plan *plan, char *text, size_t size);

/* nonfinite.c: `count_nonfinite` of the same kernels. */
flash_kda_status fkda_cpu_count_nonfinite(const fkda_problem *problem, fkda_counted counted);

/* decode.c: `decode` and `apply` of the same kernels. */
flash_kda_status fkda_cpu_decode(const fkda_decode_problem *problem);
void fkda_cpu_explain_decode(const fkda_decode_problem *problem, char *text, size_t size);
void fkda_cpu_explain_apply(const fkda_apply_problem *problem, char *text, size_t size);
flash_kda_status fkda_cpu_apply(const fkda_apply_problem *problem);

/* reference.c: writes out [B, T, HV, V] and, unless they are NULL, final_state [N, HV, V, K] and checkpoints
 * [rows, HV, V, K]. */
flash_kda_status fkda_cpu_reference(const fkda_problem *problem, double *out, double *final_state,
                                    double *checkpoints);

/* decode_reference.c: writes out [N, T, HV, V] and, unless it is NULL, states [N, T, HV, V, K]. With
 * cu_seqlens N is 1 and T the tokens of all sequences. */
flash_kda_status fkda_cpu_decode_reference(const fkda_decode_problem *problem, double *out, double *states);

/* decode_layer.c: `decode_layer` of the same kernels. */
flash_kda_status fkda_cpu_decode_layer(const fkda_decode_layer_problem *problem);
void fkda_cpu_explain_decode_layer(const fkda_decode_layer_problem *problem, char *text, size_t size);

/* decode_layer_reference.c: as fkda_cpu_decode_reference(). */
flash_kda_status fkda_cpu_decode_layer_reference(const fkda_decode_layer_problem *problem, double *out,
                                                 double *states);

/* bwd.c: `bwd` and `bwd_workspace` of the same kernels. */
flash_kda_status fkda_cpu_bwd(const fkda_bwd_problem *problem);
size_t fkda_cpu_bwd_workspace(const fkda_bwd_problem *problem);

/* bwd_reference.c: writes each gradient that has a pointer. */
flash_kda_status fkda_cpu_bwd_reference(const fkda_bwd_problem *problem,
                                        const flash_kda_gradients64 *gradients);

/* map.c and join.c: `map`, `map_workspace` and `join` of the same kernels. */
flash_kda_status fkda_cpu_map(const fkda_map_problem *problem);
size_t fkda_cpu_map_workspace(const fkda_map_problem *problem);
flash_kda_status fkda_cpu_join(const fkda_join_problem *problem);

/* map_reference.c: writes map [N, HV, K, K] and state [N, HV, V, K], unless they are NULL. */
flash_kda_status fkda_cpu_map_reference(const fkda_map_problem *problem, double *map, double *state);

#endif
