/* Reads a file of tensors in the safetensors format: 8 bytes of header length, a JSON header, the data. */
#ifndef SUPPORT_SAFETENSORS_H
#define SUPPORT_SAFETENSORS_H

#include "problem.h"

typedef struct safetensors safetensors;

/* NULL, with a sentence in `why`, if the file can't be read or is not such a file. */
safetensors *safetensors_open(const char *path, char why[256]);
void safetensors_close(safetensors *file);

/* The tensor called name, whose data lies inside the file's memory; data == NULL, with a sentence in `why`,
 * if there is none, or if its dtype, shape or offsets are wrong. */
flash_kda_tensor safetensors_get(const safetensors *file, const char *name, char why[256]);

/* The name of a dtype in such files: "BF16". */
const char *safetensors_dtype(int32_t dtype);

#endif
