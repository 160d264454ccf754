#include "cpu.h"
size_t fkda_cpu_workspace_size(const fkda_problem *p)
{
    (void)p;
    return 0;
}
flash_kda_status fkda_cpu_fwd(const fkda_problem *p)
{
    (void)p;
    return fkda_fail(FLASH_KDA_UNAVAILABLE, "not yet");
}
