#include "cpu.h"
const char *fkda_cpu_arch(void)
{
    return "any";
}
