/* Memory on a device that shows when somebody writes beside it. */
#ifndef SUPPORT_BUFFER_H
#define SUPPORT_BUFFER_H

#include "util.h"

/* A byte that is a NaN in bf16 and in f32 when it is repeated (0xffff...), and the byte in the bands of
 * outputs. The bands around an input are NaN, so that a result shows if a kernel read them as data. */
enum { NAN_BYTE = 0xff, OUTPUT_BAND_BYTE = 0xa5 };

/* Memory on a device with a band on either side. */
typedef struct buffer {
    flash_kda_device device;
    unsigned char *base;
    size_t bytes;       /* between the bands; 0 with base NULL: there is no buffer */
    unsigned char band; /* the byte that the bands hold */
} buffer;

/* Allocates the memory of a buffer whose other fields are set. */
void buffer_create(buffer *b);
void buffer_free(buffer *b);

/* The memory between the bands; NULL if there is no buffer. */
void *buffer_start(const buffer *b);

void buffer_write(const buffer *b, const void *contents);
unsigned char *buffer_read(const buffer *b); /* The caller frees what it returns. */

bool buffer_is_intact(const buffer *b); /* whether the bands are as they were */

#endif
