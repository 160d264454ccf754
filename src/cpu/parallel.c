#include "cpu.h"
int fkda_cpu_count(void)
{
    return 1;
}
