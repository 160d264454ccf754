/*
 * SMs in software: they run CTAs, or clusters of two CTAs, on a CPU, to test kernels where there is no GPU.
 *
 * How it works. Every thread is a fiber. The threads of a warp meet at the warp's collective instructions.
 * Between these, warps, the threads of a warp, copies and asynchronous products take turns at random. Some
 * warps get only one turn in up to 32, and sometimes all warps of one CTA of a cluster get one turn in eight.
 * So an order that nothing enforces comes out differently from seed to seed. If no warp of a CTA can go on,
 * the program ends with a list of what each warp waits for. Some waits of the kernels are bounded: they end
 * in a trap. If nothing moves any more and there is such a wait, its time is over: the kernel traps, and
 * launch() says so.
 *
 * What it checks: what a kernel computes, how threads wait for each other, how a kernel waits for the
 * previous kernel, and how warps share out registers. It finds an mbarrier that was overwritten, even one
 * that nobody needs any more.
 *
 * What it does not check: time; memory orders weaker than program order; a missing fence.proxy.async after
 * plain stores (it finds one that is missing after stmatrix). A collective instruction is done in one piece,
 * by the last thread that comes to it.
 */
#ifndef FKDA_EMULATOR_MACHINE_H
#define FKDA_EMULATOR_MACHINE_H

#include <atomic>
#include <functional>
#include <stddef.h>
#include <stdint.h>

namespace emulator
{

constexpr int LANES = 32;

struct Dim3 {
    unsigned x, y, z;
};

/* What the running thread sees. The first four are threadIdx, blockIdx, blockDim and gridDim. */
struct Thread {
    Dim3 thread, block, block_dim, grid_dim;
    unsigned char *shared; /* the CTA's shared memory */
    int rank;              /* of the CTA in its cluster */
    ptrdiff_t to_other;    /* from the CTA's shared memory to that of the other CTA of a cluster of two */
};
const Thread &thread();

/* Ends the launch as the instruction `trap` does: no thread of any kernel that runs takes another step. */
[[noreturn]] void trap();
/* To be asked in every round of a wait that ends in a trap: whether the wait has lasted too long, because
 * nothing moves any more on the whole machine. */
bool out_of_patience();

/* Counts a step that lets others go on: the end of a round of a barrier, or a flag in global memory. */
void count_step();

/* Ends the program with a message. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* All 32 threads of a warp meet here, each with its `mine`. The last thread to come calls act with all 32 of
 * them. All must have come for one `what`. */
void *const *come_last(const char *what, void *mine); /* null in all other threads, once they may go on */
void let_go();
template <class Act> void gather(const char *what, void *mine, Act act)
{
    if (void *const *all = come_last(what, mine)) {
        act(all);
        let_go();
    }
}

/* barrier_sync waits until `threads` threads have come to the named barrier, barrier_arrive counts as one and
 * does not wait. */
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void cta_sync();
void cluster_arrive();
void cluster_wait();

/* setmaxnreg: each thread of the warp has `registers` registers from now on. If these are more than before,
 * the warp waits until other warps of its SM quarter have given enough of them back. All warps of a warpgroup
 * must ask for one number, and must meet at a barrier before they ask again. */
void set_registers(int registers, bool more);

/* Ends the program if the other CTA of the cluster has ended, because its shared memory is no longer
 * there. */
void check_other_cta();

/* mbarriers, in 64 bits of shared memory. */
void mbarrier_init(uint64_t *barrier, int count);
void mbarrier_arrive(uint64_t *barrier, int expected_bytes);
void mbarrier_wait(uint64_t *barrier, int parity);
bool mbarrier_test(const uint64_t *barrier, int parity);
void mbarrier_complete_bytes(uint64_t *barrier, int bytes);

/* The async proxy. mark_written: a thread of this warp has written the 16 bytes at `at`. fence_async_proxy:
 * once all threads of the warp have called it, copies and products may touch what the warp has written.
 * check_fenced: ends the program if a copy or product touches bytes that were written and not fenced. */
void mark_written(const unsigned char *at);
void fence_async_proxy();
void check_fenced(const unsigned char *at, const char *who);

/* Does act at some later time, on behalf of no thread. */
void later(std::function<void()> act);

/* Products of a warp, each of which is done when it is issued or when it is waited for. */
void issue_product(std::function<void()> act);
void commit_products();
void wait_for_products(int pending);

/* For a thread that polls for another CTA, or in a wait that ends in a trap: other threads of its CTA go on,
 * then other CTAs. */
void yield_to_ctas();

/* Runs a grid with at most `sms` CTAs at a time, of which `cluster` neighbours form a cluster and run
 * together. If the kernel was launched early, it runs beside the previous kernel, and *before is true once
 * that one is over. Returns false if a trap ended the kernel, or another one that ran beside it. */
bool launch(const std::function<void()> &kernel, Dim3 grid, Dim3 block, int cluster, size_t shared_bytes,
            int sms, uint64_t seed, const std::atomic<bool> *before = nullptr);
void wait_for_previous_kernel();

} // namespace emulator

#endif
