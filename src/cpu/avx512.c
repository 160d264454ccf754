/* x86-64 with AVX-512 F, BW, DQ, VL: 32 registers of 16 floats. */
#define FKDA_LANES 16
#define FKDA_ROWS 8
#define FKDA_VARIANT fkda_cpu_avx512
#define FKDA_KERNEL "cpu-avx512"
#define FKDA_ARCH "x86-64 avx512"
#include "head.h"
