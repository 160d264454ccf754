/* flash-kda info */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "terminal.h"

static const char help[] =
    "flash-kda info\n"
    "Prints the version, every device with the kernel that would run there (or the reason why none\n"
    "can), and all kernels of this build.\n"
    "\n"
    "flash-kda info --lengths LENGTHS [OPTION...]\n"
    "Says which kernel would run for a shape, why, and how it would lay the work out. Nothing is\n"
    "computed.\n"
    "\n"
    "  --lengths LENGTHS    the tokens of each sequence: 8192, or 1300,547,2048, or 1024x8 for eight\n"
    "                       sequences of 1024 tokens\n"
    "  --heads H            the number of heads; without it 96 on a GPU and 8 on the CPU\n"
    "  --device cpu|cuda:N  the device; without it CUDA device 0 if it can be used, else the CPU\n"
    "  --kernel NAME        a kernel of this build, instead of the default for the device\n" CUT_HELP
    "  --batch-invariant    asks for results that don't depend on what else is in the batch\n"
    "  --longest-unknown    says what runs if the caller does not give the longest sequence's length\n";

/* Why a device can't be used, after `where`. */
static void print_reason(const char *where, const char *reason)
{
    char text[512];
    snprintf(text, sizeof text, ": %s", reason);
    printf("%s%scan't be used%s", where, bad(), plain());
    print_wrapped(text, (int)(strlen(where) + strlen("can't be used")), 4);
    putchar('\n');
}

static void print_devices(void)
{
    int count;
    const char *no_cuda;
    flash_kda_device_info *infos = list_devices(&count, &no_cuda);
    printf("\n%sDevices%s\n", bold(), plain());
    for (int i = 0; i < count; i++) {
        printf("  ");
        print_device(&infos[i]);
        if (infos[i].kernel[0])
            printf("\n    runs kernel %s%s%s\n", good(), infos[i].kernel, plain());
        else
            print_reason("\n    ", infos[i].reason);
    }
    if (*no_cuda) print_reason("  cuda: ", no_cuda);
    free(infos);
}

static void print_kernels(void)
{
    int32_t count;
    must(flash_kda_list_kernels(NULL, 0, &count));
    flash_kda_kernel_info *infos = allocate((size_t)count, sizeof *infos);
    for (int i = 0; i < count; i++) infos[i].struct_size = sizeof *infos;
    must(flash_kda_list_kernels(infos, count, &count));
    printf("\n%sKernels%s\n", bold(), plain());
    bool cuda = false;
    for (int i = 0; i < count; i++) {
        cuda = cuda || infos[i].device_type == FLASH_KDA_CUDA;
        char text[512];
        const int indent =
            printf("  %-15s %-5s ", infos[i].name, infos[i].device_type == FLASH_KDA_CUDA ? "cuda" : "cpu");
        snprintf(text, sizeof text, "%s: %s\n", infos[i].archs, infos[i].description);
        print_wrapped(text, indent, indent);
    }
    if (!cuda) printf("  This build has no CUDA kernels: nvcc did not work, or FLASH_KDA_CUDA was off.\n");
    free(infos);
}

/* What the options of `info` ask for. */
typedef struct question {
    flash_kda_device_info device; /* struct_size 0: not given */
    const char *lengths, *kernel; /* NULL: not given */
    int64_t heads;                /* 0: not given */
    flash_kda_cut cut;
    bool cut_given, batch_invariant, longest_unknown;
} question;

static void explain(const question *asked)
{
    char words[1200];
    int64_t *lengths, count = lengths_option(asked->lengths, &lengths);
    const flash_kda_device_info device = asked->device.struct_size ? asked->device : best_device();
    const int64_t heads = asked->heads ? asked->heads : default_heads(device.device);
    flash_kda_fwd_params params = shape_params(lengths, count, heads);
    free(lengths);
    if (asked->longest_unknown) params.max_seqlen = 0;
    params.device = device.device;
    params.kernel = asked->kernel;
    params.cut = asked->cut;
    params.batch_invariant = asked->batch_invariant;
    must(flash_kda_explain(&params, words, sizeof words));
    printf("%s", bold());
    print_device(&device);
    printf("%s\n%lld %s, %lld tokens in all, %lld %s\n\n", plain(), (long long)count,
           count == 1 ? "sequence" : "sequences", (long long)params.q.shape[1], (long long)heads,
           heads == 1 ? "head" : "heads");
    print_wrapped(words, 0, 0);
}

/* Refuses the options that only say more about a shape, if there is no shape. */
static void refuse_without_lengths(const question *asked)
{
    const char *given = asked->heads                ? "--heads"
                        : asked->kernel             ? "--kernel"
                        : asked->cut_given          ? "--cut"
                        : asked->batch_invariant    ? "--batch-invariant"
                        : asked->longest_unknown    ? "--longest-unknown"
                        : asked->device.struct_size ? "--device"
                                                    : NULL;
    if (given) die("%s needs --lengths, for example --lengths 8192", given);
}

int command_info(int argc, char **argv)
{
    static const struct option options[] = {
        DEVICE_OPTION,
        KERNEL_OPTION,
        CUT_OPTION,
        BATCH_INVARIANT_OPTION,
        {"longest-unknown", no_argument, NULL, 'u'},
        {"heads", required_argument, NULL, 'H'},
        {"lengths", required_argument, NULL, 'l'},
        HELP_OPTION,
        {0},
    };
    question asked = {.cut = FLASH_KDA_CUT_AUTO};
    for (int c; (c = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd': asked.device = find_device(device_option(optarg)); break;
        case 'k': asked.kernel = optarg; break;
        case 'c':
            asked.cut = cut_option(optarg);
            asked.cut_given = true;
            break;
        case 'i': asked.batch_invariant = true; break;
        case 'u': asked.longest_unknown = true; break;
        case 'H': asked.heads = heads_option(optarg); break;
        case 'l': asked.lengths = optarg; break;
        default: refuse_option("info", argv);
        }
    }
    if (optind < argc) die("info takes no argument, but there is '%s'", argv[optind]);
    if (asked.lengths) {
        explain(&asked);
        return 0;
    }
    refuse_without_lengths(&asked);
    printf("flash_kda %s\n", flash_kda_version());
    print_devices();
    print_kernels();
    return 0;
}
