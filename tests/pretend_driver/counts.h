/* What the calling thread has asked of the pretended driver (support/pretended.h finds it for a program). */
#ifndef PRETEND_DRIVER_COUNTS_H
#define PRETEND_DRIVER_COUNTS_H

#include <stddef.h>

enum { PRETENDED_LAUNCHES = 16 };

typedef struct pretended_launch {
    unsigned ctas;    /* of the grid */
    unsigned threads; /* of a CTA */
    unsigned shared_bytes;
    int cooperative; /* 1: all CTAs must run together */
    int early;       /* 1: the kernel may start before the one before it is over */
} pretended_launch;

typedef struct pretended_counts {
    unsigned long calls;                         /* of any function that driver.c or calls.c defines */
    unsigned long launches;                      /* kernel launches, which count as calls too */
    size_t memset_words;                         /* that memsets were asked to clear */
    pretended_launch launch[PRETENDED_LAUNCHES]; /* launch number n is at n % PRETENDED_LAUNCHES */
} pretended_counts;

/* Each thread has counts of its own, so counting needs no lock. */
pretended_counts *pretended_counts_of_thread(void);

#endif
