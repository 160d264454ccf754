#include "cpu.h"
void fkda_cpu_reference(const fkda_problem *p, double *out, double *final_state)
{
    (void)p;
    (void)out;
    (void)final_state;
}
