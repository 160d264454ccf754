/* The calling thread's last error, and the names of statuses and versions. */
#include "errors.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

flash_kda_status fkda_fail(flash_kda_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

flash_kda_status fkda_interruption(void)
{
    return fkda_fail(FLASH_KDA_INTERRUPTED,
                     "*interrupt became nonzero, so the call was given up; its results are undefined");
}

const char *flash_kda_last_error(void)
{
    return last_error;
}

const char *flash_kda_status_string(flash_kda_status status)
{
    switch (status) {
    case FLASH_KDA_OK: return "FLASH_KDA_OK";
    case FLASH_KDA_INVALID_VALUE: return "FLASH_KDA_INVALID_VALUE";
    case FLASH_KDA_INVALID_DTYPE: return "FLASH_KDA_INVALID_DTYPE";
    case FLASH_KDA_UNAVAILABLE: return "FLASH_KDA_UNAVAILABLE";
    case FLASH_KDA_DEVICE_ERROR: return "FLASH_KDA_DEVICE_ERROR";
    case FLASH_KDA_INTERRUPTED: return "FLASH_KDA_INTERRUPTED";
    }
    return "unknown flash_kda_status";
}

#define STRINGIFY(x) #x
#define VERSION(a, b, c) STRINGIFY(a) "." STRINGIFY(b) "." STRINGIFY(c)

const char *flash_kda_version(void)
{
    return VERSION(FLASH_KDA_VERSION_MAJOR, FLASH_KDA_VERSION_MINOR, FLASH_KDA_VERSION_PATCH);
}
