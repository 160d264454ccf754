/* A driver that could not be opened for want of file descriptors is opened by a later call of the process.
 * The test runs with the pretended driver. */
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#include "harness.h"

static void descriptors(void)
{
    struct rlimit before, none = {0, 0};
    int32_t count;
    const char *no_cuda;
    if (getrlimit(RLIMIT_NOFILE, &before) != 0) die("no limit of file descriptors");
    none.rlim_max = before.rlim_max;
    for (int i = 0; i < 2; i++) {
        if (setrlimit(RLIMIT_NOFILE, &none) != 0) die("file descriptors can't be limited");
        flash_kda_status status = flash_kda_list_devices(NULL, 0, &count, &no_cuda);
        setrlimit(RLIMIT_NOFILE, &before);
        must(status);
        CHECK(count == 1 && strstr(no_cuda, "no NVIDIA driver could be opened: ") == no_cuda &&
                  strstr(no_cuda, "libcuda.so.1") && strstr(no_cuda, "Too many open files"),
              "%d devices, and the reason is: %s", count, no_cuda);
    }
    must(flash_kda_list_devices(NULL, 0, &count, &no_cuda));
    CHECK(count == 2 && !*no_cuda, "%d devices, and the reason is: %s", count, no_cuda);
}

int main(int argc, char **argv)
{
    static const group groups[] = {{"descriptors", descriptors}};
    harness_start(argc, argv);
    return harness_run(groups, sizeof groups / sizeof *groups);
}
