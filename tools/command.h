/* What the subcommands of `flash-kda` share. */
#ifndef TOOLS_COMMAND_H
#define TOOLS_COMMAND_H

#include <getopt.h>

#include "util.h"

/* Each gets its own name as argv[0] and returns the exit status: 0 good, 1 a result was not, 2 wrong use. */
int command_info(int argc, char **argv);
int command_check(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_run(int argc, char **argv);

/* Options that several commands take. */
#define DEVICE_OPTION                                                                                        \
    {                                                                                                        \
        "device", required_argument, NULL, 'd'                                                               \
    }
#define KERNEL_OPTION                                                                                        \
    {                                                                                                        \
        "kernel", required_argument, NULL, 'k'                                                               \
    }
#define CUT_OPTION                                                                                           \
    {                                                                                                        \
        "cut", required_argument, NULL, 'c'                                                                  \
    }
#define BATCH_INVARIANT_OPTION                                                                               \
    {                                                                                                        \
        "batch-invariant", no_argument, NULL, 'i'                                                            \
    }
#define HELP_OPTION                                                                                          \
    {                                                                                                        \
        "help", no_argument, NULL, 'h'                                                                       \
    }

/* A device as --device names it, or the end of the process with a sentence. */
flash_kda_device device_option(const char *text);

/* How to cut as --cut names it, or the end of the process with a sentence. */
flash_kda_cut cut_option(const char *text);

/* A whole number in [1, max], or the end of the process with a sentence that names the option. */
int64_t number_option(const char *option, const char *text, int64_t max);

int64_t heads_option(const char *text);

/* Heads, where --heads is not given. */
int64_t default_heads(flash_kda_device device);

/* The tokens of each sequence as --lengths gives them, "1300,547" or "1024x8" or both mixed, to be freed; returns
 * how many there are, or ends the process with a sentence. */
int64_t lengths_option(const char *text, int64_t **lengths);

/* Arguments of that shape without data: enough to ask which kernel would run and how. */
flash_kda_fwd_params shape_params(const int64_t *lengths, int64_t count, int64_t heads);

/* Ends the process with the library's sentence if the device can't run that kernel (NULL: the default). */
void require_kernel(flash_kda_device device, const char *kernel);

/* Says what getopt_long() could not use and ends the process. */
void refuse_option(const char *command, char **argv) __attribute__((noreturn));

/* All devices, the CPU first; to be freed. */
flash_kda_device_info *list_devices(int *count, const char **no_cuda);

/* The device's entry; ends the process with the reason if the device can't be used. */
flash_kda_device_info find_device(flash_kda_device device);

/* CUDA device 0 if it can be used, else the CPU. */
flash_kda_device_info best_device(void);

/* One line: "cuda:0: NVIDIA H100 80GB HBM3, sm_90, 132 multiprocessors, 80 GB" */
void print_device(const flash_kda_device_info *info);

#endif
