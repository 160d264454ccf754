/* Which devices there are, and the one that a command uses. */
#include <stdio.h>
#include <stdlib.h>

#include "command.h"
#include "terminal.h"

flash_kda_device_info *list_devices(int *count, const char **no_cuda)
{
    int32_t total;
    must(flash_kda_list_devices(NULL, 0, &total, NULL));
    flash_kda_device_info *infos = allocate((size_t)total, sizeof *infos);
    for (int i = 0; i < total; i++) infos[i].struct_size = sizeof *infos;
    must(flash_kda_list_devices(infos, total, &total, no_cuda));
    *count = total;
    return infos;
}

flash_kda_device_info find_device(flash_kda_device device)
{
    int count;
    const char *no_cuda;
    char name[16];
    flash_kda_device_info *infos = list_devices(&count, &no_cuda), found = {0};
    for (int i = 0; i < count; i++)
        if (infos[i].device.type == device.type && infos[i].device.index == device.index) found = infos[i];
    free(infos);
    if (!found.struct_size && *no_cuda)
        die("--device %s can't be used: %s", device_text(device, name), no_cuda);
    if (!found.struct_size)
        die("--device is %s; there are CUDA devices 0 to %d", device_text(device, name), count - 2);
    if (!found.kernel[0]) die("--device %s can't be used: %s", device_text(device, name), found.reason);
    return found;
}

void say_what_is_left_out(const flash_kda_device_info *infos, int count)
{
    char words[600], name[16];
    for (int i = 0; i < count; i++) {
        if (infos[i].kernel[0]) continue;
        snprintf(words, sizeof words, "%s, %s, is left out: %s.\n", device_text(infos[i].device, name),
                 infos[i].name, infos[i].reason);
        print_wrapped(words, 0, 0);
    }
}

flash_kda_device_info best_device(void)
{
    int count;
    flash_kda_device_info *infos = list_devices(&count, NULL), best = infos[0];
    if (count > 1 && infos[1].kernel[0])
        best = infos[1];
    else
        say_what_is_left_out(infos, count);
    free(infos);
    return best;
}

void print_device(const flash_kda_device_info *info)
{
    char name[16];
    printf("%s: %s, %s, %d %s, %.0f GB", device_text(info->device, name), info->name, info->arch, info->units,
           info->device.type == FLASH_KDA_CPU ? "threads" : "SMs", 1e-9 * (double)info->memory);
}

void require_kernel(flash_kda_device device, const char *kernel)
{
    const int64_t one_token = 1;
    size_t bytes;
    flash_kda_fwd_params p = shape_params(&one_token, 1, 1);
    p.device = device;
    p.kernel = kernel;
    must(flash_kda_fwd_workspace_size(&p, &bytes));
}
