/* Which devices there are, and the one that a command uses. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "json.h"
#include "nearest.h"
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

flash_kda_device_info best_device(void)
{
    int count;
    flash_kda_device_info *infos = list_devices(&count, NULL), best = infos[0];
    if (count > 1 && infos[1].kernel[0]) best = infos[1];
    free(infos);
    return best;
}

void print_device(const flash_kda_device_info *info, const char *more, int column)
{
    char name[16], text[512];
    snprintf(text, sizeof text, "%s: %s, %s, %d %s, %.0f GB%s", device_text(info->device, name), info->name,
             info->arch, info->units, info->device.type == FLASH_KDA_CPU ? "threads" : "SMs",
             1e-9 * (double)info->memory, more);
    print_wrapped(text, column, column + 4);
}

void json_device(const flash_kda_device_info *info)
{
    char name[16];
    json_text("device", device_text(info->device, name));
    json_text("name", info->name);
    json_text("arch", info->arch);
    json_integer("units", info->units);
    json_integer("memory_bytes", (int64_t)info->memory);
}

static bool is_among(const flash_kda_device_info *info, const flash_kda_device_info *used, int count)
{
    for (int i = 0; i < count; i++)
        if (used[i].device.type == info->device.type && used[i].device.index == info->device.index)
            return true;
    return false;
}

/* Calls `say` for each CUDA device that is left out, or with NULL if CUDA cannot be used at all. */
static void each_left_out(const flash_kda_device_info *used, int count, bool is_asked,
                          void (*say)(const flash_kda_device_info *info, const char *reason))
{
    int all_count;
    const char *no_cuda;
    bool uses_cuda = false;
    flash_kda_device_info *all = list_devices(&all_count, &no_cuda);
    for (int i = 0; i < count; i++) uses_cuda |= used[i].device.type == FLASH_KDA_CUDA;
    for (int i = 1; i < all_count; i++) {
        if (is_among(&all[i], used, count)) continue;
        if (!all[i].kernel[0])
            say(&all[i], all[i].reason);
        else if (!uses_cuda)
            say(&all[i], is_asked ? "--device asks for another device" : "only CUDA device 0 is a default");
    }
    if (*no_cuda && !is_asked) say(NULL, no_cuda);
    free(all);
}

static void print_one_left_out(const flash_kda_device_info *info, const char *reason)
{
    char name[16], text[800];
    if (info)
        snprintf(text, sizeof text, "%s (%s) was left out: %s\n", device_text(info->device, name), info->name,
                 reason);
    else
        snprintf(text, sizeof text, "No CUDA device was used: %s\n", reason);
    print_wrapped(text, 0, 2);
}

static void json_one_left_out(const flash_kda_device_info *info, const char *reason)
{
    char name[16];
    json_open_object(NULL);
    json_text("device", info ? device_text(info->device, name) : "cuda");
    json_text("name", info ? info->name : NULL);
    json_text("reason", reason);
    json_close_object();
}

void print_left_out(const flash_kda_device_info *used, int count, bool is_asked)
{
    each_left_out(used, count, is_asked, print_one_left_out);
}

void json_left_out(const flash_kda_device_info *used, int count, bool is_asked)
{
    json_open_array("left_out");
    each_left_out(used, count, is_asked, json_one_left_out);
    json_close_array();
}

/* Refuses a name that no kernel has. */
static void require_name(const char *kernel)
{
    enum { MOST = 32 };
    flash_kda_kernel_info infos[MOST] = {{0}};
    const char *names[MOST];
    char all[400] = "", hint[HINT_BYTES];
    int32_t count;
    for (int i = 0; i < MOST; i++) infos[i].struct_size = sizeof infos[i];
    must(flash_kda_list_kernels(infos, MOST, &count));
    if (count > MOST) count = MOST;
    for (int i = 0, used = 0; i < count && used < (int)sizeof all; i++) {
        if (strcmp(infos[i].name, kernel) == 0) return;
        names[i] = infos[i].name;
        used += snprintf(all + used, sizeof all - (size_t)used, "%s%s", i ? ", " : "", names[i]);
    }
    die("--kernel is '%s'; it must be one of %s%s", kernel, all, nearest_hint(kernel, names, count, hint));
}

void require_kernel(flash_kda_device device, const char *kernel)
{
    if (kernel) require_name(kernel);
    const int64_t one_token = 1;
    size_t bytes;
    flash_kda_fwd_params p = shape_params(&one_token, 1, 1);
    p.device = device;
    p.kernel = kernel;
    must(flash_kda_fwd_workspace_size(&p, &bytes));
}
