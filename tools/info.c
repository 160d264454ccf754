/* flash-kda info */
#include <stdio.h>
#include <stdlib.h>

#include "command.h"
#include "terminal.h"

static const char help[] =
    "flash-kda info\n\n"
    "Prints the version, every device with the kernel that would run there (or why none\n"
    "can), and all kernels of this build. A kernel's name may be given to --kernel.\n";

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
        printf("  %-13s %s: %s\n", infos[i].name, infos[i].archs, infos[i].description);
    }
    if (!cuda) printf("  This build has no CUDA kernels: nvcc did not work, or FLASH_KDA_CUDA was off.\n");
    free(infos);
}

int command_info(int argc, char **argv)
{
    static const struct option options[] = {HELP_OPTION, {0}};
    for (int c; (c = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        if (c != 'h') refuse_option("info", argv);
        fputs(help, stdout);
        return 0;
    }
    if (optind < argc) die("info takes no argument, but there is '%s'", argv[optind]);
    printf("flash_kda %s\n", flash_kda_version());
    print_devices();
    print_kernels();
    return 0;
}
