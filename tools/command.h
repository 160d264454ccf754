/* What the subcommands of `flash-kda` share. */
#ifndef TOOLS_COMMAND_H
#define TOOLS_COMMAND_H

#include <getopt.h>

#include "util.h"

/* The subcommands. argv[0] is the subcommand's name. The exit status is 0 if all is well, 1 if a result is
 * wrong and 2 after wrong use. */
int command_info(int argc, char **argv);
int command_check(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_run(int argc, char **argv);

/* Options of several subcommands. */
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
/* The lines of a help text about --cut. */
#define HEADS_DEVICE_AND_KERNEL_HELP                                                                         \
    "  --heads H            the number of heads; without it 96 on a GPU and 8 on the\n"                      \
    "                       CPU\n"                                                                           \
    "  --device cpu|cuda:N  the device; without it CUDA device 0 if it can be used,\n"                       \
    "                       else the CPU\n"                                                                  \
    "  --kernel NAME        a kernel of this build, instead of the default for the\n"                        \
    "                       device\n"

#define CUT_HELP                                                                                             \
    "  --cut HOW            how sequences may be cut into segments that run in\n"                            \
    "                       parallel. Only the kernel hopper cuts sequences:\n"                              \
    "                         auto    where it pays (the default)\n"                                         \
    "                         never   every sequence stays whole\n"                                          \
    "                         always  wherever there is room for two segments\n"                             \
    "                         mixed   only long sequences among short ones\n"

#define JSON_OPTION                                                                                          \
    {                                                                                                        \
        "json", no_argument, NULL, 'j'                                                                       \
    }
#define JSON_HELP "  --json               one JSON object, whose keys docs/command.md explains\n"

#define HELP_OPTION                                                                                          \
    {                                                                                                        \
        "help", no_argument, NULL, 'h'                                                                       \
    }

/* ---- options.c ---- */

/* The values of options. A value that is wrong ends the process with a sentence that names the option. */
flash_kda_device device_option(const char *text);
flash_kda_cut cut_option(const char *text);
int64_t heads_option(const char *text);

/* A whole number in [1, max]. */
int64_t number_option(const char *option, const char *text, int64_t max);

/* The tokens of each sequence as --lengths gives them: "1300,547", "1024x8" for eight of 1024, or both mixed.
 * The caller frees *lengths. Returns the number of sequences. */
int64_t lengths_option(const char *text, int64_t **lengths);

/* The number of heads if --heads is not given. */
int64_t default_heads(flash_kda_device device);

/* Says what getopt_long() could not use (found: what it has returned) and ends the process. */
void refuse_option(const char *command, char **argv, const struct option *options, int found)
    __attribute__((noreturn));

/* Arguments of a shape without data: enough to ask which kernel would run, and how. */
flash_kda_fwd_params shape_params(const int64_t *lengths, int64_t count, int64_t heads);

/* ---- find_device.c ---- */

/* All devices, the CPU first. The caller frees them. */
flash_kda_device_info *list_devices(int *count, const char **no_cuda);

/* The device's entry. Ends the process with the reason if the device can't be used. */
flash_kda_device_info find_device(flash_kda_device device);

/* CUDA device 0 if it can be used, else the CPU. */
flash_kda_device_info best_device(void);

/* Prints "cuda:0: NVIDIA H100 80GB HBM3, sm_90, 132 SMs, 80 GB", and what is in `more`, in as many lines as
 * needed, without a newline at the end. `column`: where the cursor is. */
void print_device(const flash_kda_device_info *info, const char *more, int column);

/* The same as members of a JSON object. */
void json_device(const flash_kda_device_info *info);

/* Says which CUDA devices there are that a command leaves out, and why: all that are not among `used` and
 * cannot be used, or all of them if no CUDA device is used. If there is none because CUDA cannot be used, it
 * says why, unless the user has asked for the devices (is_asked). As lines, or as a JSON array "left_out". */
void print_left_out(const flash_kda_device_info *used, int count, bool is_asked);
void json_left_out(const flash_kda_device_info *used, int count, bool is_asked);

/* Ends the process with the library's sentence if the device can't run the kernel (NULL: its default). */
void require_kernel(flash_kda_device device, const char *kernel);

#endif
