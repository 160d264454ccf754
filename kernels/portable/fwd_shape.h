/* The portable forward kernel's shape, for its launch and its own code. */
#ifndef FKDA_PORTABLE_FWD_SHAPE_H
#define FKDA_PORTABLE_FWD_SHAPE_H

#define FKDA_PORTABLE_PREPARE_WARPS 8    /* 16 channels each */
#define FKDA_PORTABLE_RECURRENCE_WARPS 8 /* 16 rows of V each */
#define FKDA_PORTABLE_THREADS (32 * (FKDA_PORTABLE_PREPARE_WARPS + FKDA_PORTABLE_RECURRENCE_WARPS))

/* sizeof(Shared) in shared.cuh, which asserts it. Under the 99 KB that every GPU from sm_80 on has. */
#define FKDA_PORTABLE_SHARED_BYTES 92736

#endif
