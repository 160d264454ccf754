/* What every CPU of its family has: NEON on aarch64, SSE2 on x86-64, and whatever the compiler makes of
 * vectors of four floats elsewhere. */
#define FKDA_LANES 4
#define FKDA_VARIANT fkda_cpu_portable
#define FKDA_KERNEL "cpu-portable"
#if defined(__aarch64__)
#define FKDA_ROWS 8 /* 32 vector registers */
#define FKDA_ARCH "aarch64 neon"
#elif defined(__x86_64__)
#define FKDA_ROWS 4 /* 16 */
#define FKDA_ARCH "x86-64"
#else
#define FKDA_ROWS 4
#define FKDA_ARCH "portable"
#endif
#include "head.h"
