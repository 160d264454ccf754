/* Recorded activations: one layer of a trained model, from a safetensors file. */
#ifndef SUPPORT_RECORDED_H
#define SUPPORT_RECORDED_H

#include "problem.h"

/* Returns NULL, with a sentence in `why`, if the file does not hold q, k, v, g, beta, A_log and dt_bias. */
problem *recorded_load(const char *path, char why[256]);

/* Finds a file of data/ by its name: below the working folder, beside the folder of the program, or where it
 * is installed. False if it is in none of these places. */
bool recorded_find(const char *file, char path[1024]);

#endif
