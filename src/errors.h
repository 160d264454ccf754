/* The calling thread's last error. */
#ifndef FKDA_ERRORS_H
#define FKDA_ERRORS_H

#include "flash_kda.h"

/* Stores a sentence for flash_kda_last_error() and returns `status`, so that a refusal is one statement. */
flash_kda_status fkda_fail(flash_kda_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The failure of a call that stopped because the caller's *interrupt became nonzero. */
flash_kda_status fkda_interruption(void);

#endif
