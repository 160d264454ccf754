/* The instruction set that every CPU of a family has: NEON on aarch64 and SSE2 on x86-64. On other CPUs the
 * compiler translates vectors of four floats as it can. */
#define FKDA_LANES 4
#define FKDA_VARIANT fkda_cpu_portable
#define FKDA_KERNEL "cpu-portable"
#if defined(__aarch64__)
#define FKDA_ROWS 8 /* 32 vector registers */
#define FKDA_ARCH "aarch64 neon"
#elif defined(__x86_64__)
#define FKDA_ROWS 4 /* 16 vector registers */
#define FKDA_ARCH "x86-64"
#else
#define FKDA_ROWS 4
#define FKDA_ARCH "portable"
#endif
#include "head.h"
