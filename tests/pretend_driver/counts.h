/* How often the calling thread has called the pretended driver. benchmarks/host_time.c reads the counts. */
#ifndef PRETEND_DRIVER_COUNTS_H
#define PRETEND_DRIVER_COUNTS_H

typedef struct pretended_counts {
    unsigned long calls;    /* of any function that driver.c or calls.c defines */
    unsigned long launches; /* of cuLaunchKernel and cuLaunchKernelEx; also counted as calls */
} pretended_counts;

/* Each thread has counts of its own, so counting needs no lock and one call of the library is counted
 * exactly. */
pretended_counts *pretended_counts_of_thread(void);

#endif
