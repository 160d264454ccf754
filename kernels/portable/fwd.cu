#include "fwd_args.h"
extern "C" __global__ void fkda_portable_fwd(const __grid_constant__ fkda_portable_args args) {}
