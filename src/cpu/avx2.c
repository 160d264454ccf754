/* x86-64 with AVX2 and FMA: 16 registers of 8 floats. */
#define FKDA_LANES 8
#define FKDA_ROWS 4
#define FKDA_VARIANT fkda_cpu_avx2
#define FKDA_KERNEL "cpu-avx2"
#define FKDA_ARCH "x86-64 avx2"
#include "head.h"
