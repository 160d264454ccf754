/* The launch of a decode kernel. */
#ifndef FKDA_DECODE_LAUNCH_H
#define FKDA_DECODE_LAUNCH_H

#include "modules.h"

typedef struct fkda_decode_launch {
    int kernel;                /* of the module */
    int split;                 /* log2 of the CTAs of a head */
    int threads, shared_bytes; /* of a CTA */
    int64_t heads;             /* of all sequences */
    void *args;
} fkda_decode_launch;

flash_kda_status fkda_launch_decode(flash_kda_device device, void *stream, fkda_module *module,
                                    const fkda_decode_launch *launch);

/* Says what the launch is: the kernel's name in the module, what it does, and its CTAs. */
void fkda_explain_launch(const char *name, const char *what, const fkda_decode_launch *launch, char *text,
                         size_t size);

#endif
