/* flash-kda info */
#include <stdio.h>
#include <stdlib.h>

#include "command.h"
#include "terminal.h"

static const char help[] =
    "flash-kda info [--lengths LENGTHS [--heads H] [--device cpu|cuda:N] [--kernel NAME] "
    "[--batch-invariant] [--longest-unknown]]\n\n"
    "Prints the version, every device with the kernel that would run there (or why none can), and all "
    "kernels of\n"
    "this build. A kernel's name may be given to --kernel.\n\n"
    "With --lengths, the tokens of each sequence (8192, or 1300,547,2048, or 1024x8 for eight of 1024): "
    "which\n"
    "kernel runs for that shape, why, and how it lays the work out. Nothing is computed. --device is CUDA "
    "device 0\n"
    "if it can be used, else the CPU; --batch-invariant asks for results that don't depend on the batch, "
    "and\n"
    "--longest-unknown for what runs if the caller doesn't say how long the longest sequence is.\n";

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
            printf("\n    %scan't be used%s: %s\n", bad(), plain(), infos[i].reason);
    }
    if (*no_cuda) printf("  cuda: can't be used: %s\n", no_cuda);
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
        printf("  %-15s %-5s %s: %s\n", infos[i].name,
               infos[i].device_type == FLASH_KDA_CUDA ? "cuda" : "cpu", infos[i].archs, infos[i].description);
    }
    if (!cuda) printf("  This build has no CUDA kernels: nvcc did not work, or FLASH_KDA_CUDA was off.\n");
    free(infos);
}

static void explain(const flash_kda_device_info *info, const char *kernel, flash_kda_cut cut,
                    bool batch_invariant, bool longest_unknown, const char *text, int64_t heads)
{
    char words[1200];
    int64_t *lengths, count = lengths_option(text, &lengths);
    flash_kda_fwd_params params = shape_params(lengths, count, heads);
    if (longest_unknown) params.max_seqlen = 0;
    free(lengths);
    params.device = info->device;
    params.kernel = kernel;
    params.cut = cut;
    params.batch_invariant = batch_invariant;
    must(flash_kda_explain(&params, words, sizeof words));
    printf("%s", bold());
    print_device(info);
    printf("%s\n%lld %s, %lld tokens in all, %lld %s\n\n%s", plain(), (long long)count,
           count == 1 ? "sequence" : "sequences", (long long)params.q.shape[1], (long long)heads,
           heads == 1 ? "head" : "heads", words);
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
    flash_kda_device_info info = {0};
    const char *kernel = NULL, *lengths = NULL;
    int64_t heads = 0;
    flash_kda_cut cut = FLASH_KDA_CUT_AUTO;
    bool batch_invariant = false, longest_unknown = false, cut_given = false;
    for (int c; (c = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        switch (c) {
        case 'h': fputs(help, stdout); return 0;
        case 'd': info = find_device(device_option(optarg)); break;
        case 'k': kernel = optarg; break;
        case 'c':
            cut = cut_option(optarg);
            cut_given = true;
            break;
        case 'i': batch_invariant = true; break;
        case 'u': longest_unknown = true; break;
        case 'H': heads = heads_option(optarg); break;
        case 'l': lengths = optarg; break;
        default: refuse_option("info", argv);
        }
    }
    if (optind < argc) die("info takes no argument, but there is '%s'", argv[optind]);
    if (lengths) {
        if (!info.struct_size) info = best_device();
        explain(&info, kernel, cut, batch_invariant, longest_unknown, lengths,
                heads ? heads : default_heads(info.device));
        return 0;
    }
    if (heads || kernel || cut_given || batch_invariant || longest_unknown || info.struct_size)
        die("%s needs --lengths, for example --lengths 8192", heads             ? "--heads"
                                                              : kernel          ? "--kernel"
                                                              : cut_given       ? "--cut"
                                                              : batch_invariant ? "--batch-invariant"
                                                              : longest_unknown ? "--longest-unknown"
                                                                                : "--device");
    printf("flash_kda %s\n", flash_kda_version());
    print_devices();
    print_kernels();
    return 0;
}
