/* What the parts of the benchmark of host time share. */
#ifndef HOST_TIME_H
#define HOST_TIME_H

#include "pretended.h"

/* A repeated call of one launch should take at most this long. */
#define MOST_AGAIN_US 2.0

/* "within" or "above" */
const char *verdict(double us, double most);

/* host_time_decode.c: prints a line for each kind of call of decode, decode_layer and apply. */
void time_decode_calls(int repeats, const pretended_counts *counts);

#endif
