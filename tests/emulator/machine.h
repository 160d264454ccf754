/*
 * Multiprocessors in software: they run CUDA blocks, or clusters of two, on a CPU, to test kernels where there is no GPU. Every thread is a fiber.
 * Threads of a warp meet at its collective instructions; between those, warps, the threads in them and asynchronous copies and
 * products take turns at random, some warps only one in up to 32, or all of one block of a cluster one in eight of theirs, so that an order
 * which nothing enforces comes out differently from seed to seed. A block that can't go on ends the program with what each warp waits for.
 *
 * It checks what a kernel computes, how its threads wait for each other and kernels for the one before, and how warps share out registers. It knows nothing of time, of memory
 * orders weaker than program order (it does find an mbarrier that was overwritten, even if nobody needed it any more), and of a missing fence.proxy.async only after stmatrix, not after plain
 * stores; and a collective instruction is done as one, by the last thread that comes to it.
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

/* What the running thread sees. */
struct Thread {
    Dim3 thread, block, block_dim, grid_dim;
    unsigned char *shared; /* the block's memory */
    int rank;              /* of the block in its cluster */
    ptrdiff_t to_other;    /* from the block's memory to that of the other one of a cluster of two */
};
const Thread &thread();

/* Ends the program with a message. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* All 32 threads of a warp meet here, each with `mine`; the last one does act(all of these). They must have come for the same
 * `what`. */
void *const *come_last(const char *what, void *mine); /* null in all but one, once that has let them go */
void let_go();
template <class Act> void gather(const char *what, void *mine, Act act)
{
    if (void *const *all = come_last(what, mine)) {
        act(all);
        let_go();
    }
}

/* Waits until `threads` threads are at the named barrier, or adds one without waiting. */
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void block_sync();
void cluster_sync();

/* setmaxnreg: threads of the warp have so many registers from now on, more or fewer. More are waited for, until other warps of its
 * quarter of the multiprocessor have given enough. Warps of a warpgroup ask for the same, and meet before they ask again. */
void set_registers(int registers, bool more);

/* Ends the program if the other block of the cluster has ended: its memory is no longer there. */
void check_other_cta();

/* mbarriers, in 64 bits of shared memory. */
void mbarrier_init(uint64_t *barrier, int count);
void mbarrier_arrive(uint64_t *barrier, int expected_bytes);
void mbarrier_wait(uint64_t *barrier, int parity);
bool mbarrier_test(const uint64_t *barrier, int parity);
void mbarrier_complete_bytes(uint64_t *barrier, int bytes);

/* Of 16 bytes of shared memory: a thread of this warp has written there; all threads of this warp have fenced,
 * once each has called; copies and products may be there now, or the program ends. */
void mark_written(const unsigned char *at);
void fence_async_proxy();
void check_fenced(const unsigned char *at, const char *who);

/* Is done at some time later, by nobody. */
void later(std::function<void()> act);

/* Products of a warp that may be done now or when they are waited for. */
void issue_product(std::function<void()> act);
void commit_products();
void wait_for_products(int pending);

/* While another block has to do something: others of this one go on, then other blocks. */
void yield_to_blocks();

/* Runs a grid, at most `multiprocessors` blocks at a time, of which `cluster` neighbours run together; beside the kernel before, if it was
 * launched early: `before` is set once that is over. */
void launch(const std::function<void()> &kernel, Dim3 grid, Dim3 block, int cluster, size_t shared_bytes,
            int multiprocessors, uint64_t seed, const std::atomic<bool> *before = nullptr);
void wait_for_previous_kernel();

} // namespace emulator

#endif
