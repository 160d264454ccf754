/* Chooses the instruction set of the forward pass by asking the CPU at run time. */
#include <string.h>

#include "cpu.h"
#include "variant.h"

static bool always(void)
{
    return true;
}

#if defined(__x86_64__)
/* The compiler's builtins also check that the operating system saves the wider registers. */
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static const struct {
    const fkda_cpu_variant *variant;
    bool (*runs_here)(void);
} variants[] = {
#if defined(__x86_64__)
    {&fkda_cpu_avx512, has_avx512},
    {&fkda_cpu_avx2, has_avx2},
#endif
    {&fkda_cpu_portable, always},
};
enum { VARIANT_COUNT = sizeof variants / sizeof *variants };

const fkda_cpu_variant *fkda_cpu_find_variant(const char *kernel)
{
    bool any = strcmp(kernel, "cpu") == 0;
    for (int i = 0; i < VARIANT_COUNT; i++)
        if ((any || strcmp(kernel, variants[i].variant->kernel) == 0) && variants[i].runs_here())
            return variants[i].variant;
    return NULL;
}

bool fkda_cpu_runs(const char *kernel)
{
    return fkda_cpu_find_variant(kernel) != NULL;
}

const char *fkda_cpu_arch(void)
{
    return fkda_cpu_find_variant("cpu")->arch;
}
