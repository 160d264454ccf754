/* A kernel: one way to run the forward pass. kernels.c has the table of them. */
#ifndef FKDA_KERNEL_H
#define FKDA_KERNEL_H

#include "bwd_problem.h"
#include "decode_layer_problem.h"
#include "decode_problem.h"
#include "map_problem.h"
#include "nonfinite.h"
#include "plan.h"
#include "problem.h"

struct fkda_kernel {
    flash_kda_kernel_info info;
    int min_compute_capability; /* 10 * major + minor; 0 on the CPU */
    int max_compute_capability; /* 0: no limit */
    int32_t features;           /* of fkda_feature, that it knows */
    bool needs_tma;             /* the driver must be of CUDA 12 or newer, which makes TMA descriptors */
    /* Decides what a call of this shape runs, in a plan that has the shape already. Launches and reads
     * nothing. */
    flash_kda_status (*plan)(fkda_plan *plan);
    /* Does what the plan says. */
    flash_kda_status (*run)(const fkda_problem *problem, const fkda_plan *plan);
    /* Counts values that are not finite in the inputs or in the outputs, on the device where `run` works. */
    flash_kda_status (*count_nonfinite)(const fkda_problem *problem, fkda_counted counted);
    /* Do what flash_kda_decode() and flash_kda_apply() ask for. NULL in a kernel without FKDA_DECODE. */
    flash_kda_status (*decode)(const fkda_decode_problem *problem);
    flash_kda_status (*apply)(const fkda_apply_problem *problem);
    /* Does what flash_kda_decode_layer() asks for. NULL in a kernel without FKDA_DECODE_LAYER. */
    flash_kda_status (*decode_layer)(const fkda_decode_layer_problem *problem);
    /* Say how these calls lay their work out, as `explain` does for the forward pass. They follow no pointer
     * of the problem. */
    void (*explain_decode)(const fkda_decode_problem *problem, char *text, size_t size);
    void (*explain_apply)(const fkda_apply_problem *problem, char *text, size_t size);
    void (*explain_decode_layer)(const fkda_decode_layer_problem *problem, char *text, size_t size);
    /* Does what flash_kda_bwd() asks for, and says how many bytes of workspace that takes. NULL in a kernel
     * without FKDA_BACKWARD. */
    flash_kda_status (*bwd)(const fkda_bwd_problem *problem);
    size_t (*bwd_workspace)(const fkda_bwd_problem *problem);
    /* How many bytes of `saved` the forward pass writes. NULL in a kernel without FKDA_SAVED. */
    size_t (*saved_bytes)(const fkda_shape *shape);
    /* Do what flash_kda_map() and flash_kda_join() ask for, and say how many bytes of workspace the first
     * takes. NULL in a kernel without FKDA_MAPS. */
    flash_kda_status (*map)(const fkda_map_problem *problem);
    size_t (*map_workspace)(const fkda_map_problem *problem);
    flash_kda_status (*join)(const fkda_join_problem *problem);
    /* Says how the plan lays the work out: a few sentences without a newline at the end, in 512 bytes at
     * most. */
    void (*explain)(const fkda_plan *plan, char *text, size_t size);
};

/* Finds the kernel called `name`, or, if `name` is NULL, the first kernel in the table that the device can
 * run and that knows all the features. Refuses a kernel that lacks one of them. */
flash_kda_status fkda_find_kernel(flash_kda_device device, const char *name, int32_t features,
                                  const fkda_kernel **kernel);

/* Says in one sentence why the shape's kernel runs. */
void fkda_explain_choice(const fkda_shape *shape, char *text, size_t size);

/* The same without what the kernel is, for calls other than the forward pass. */
void fkda_explain_kernel(flash_kda_device device, const fkda_kernel *kernel, bool is_asked_for, char *text,
                         size_t size);

#endif
