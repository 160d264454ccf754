/*
 * Copies that run in the background (TMA and bulk copies), as named functions. A copy into shared memory
 * reports its bytes to an mbarrier, to which they must have been announced with mbarrier_arrive_expecting.
 *
 * Copies and wgmma reach shared memory by another path, the async proxy, than loads and stores of threads do.
 * Between a thread's access and an access by that path a fence is needed.
 */
#ifndef FKDA_HOPPER_PTX_COPIES_CUH
#define FKDA_HOPPER_PTX_COPIES_CUH

#include "../fwd_args.h"
#include "cluster.cuh"

namespace fkda
{

/* Puts this thread's stores to shared memory in front of copies and wgmma that follow it in order. */
__device__ __forceinline__ void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* As fence_async_proxy, for all memory: also for writes of other CTAs to global memory that this thread knows
 * of. */
__device__ __forceinline__ void fence_async_proxy_of_all_memory()
{
    asm volatile("fence.proxy.async;" ::: "memory");
}

/* Copies a box to shared memory: half of the 128 channels of a head, of a chunk of tokens from `token` on, in
 * a row of the batch. fkda_hopper_fwd_args has the descriptors. */
__device__ __forceinline__ void copy_box(void *to, const fkda_tma_descriptor *descriptor, int half, int token,
                                         int head, int row, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
                 "l"(descriptor), "r"(64 * half), "r"(token), "r"(head), "r"(row),
                 "r"(shared_address(barrier))
                 : "memory");
}

/* Fetches a TMA descriptor ahead of the first copy_box that needs it. */
__device__ __forceinline__ void prefetch_descriptor(const fkda_tma_descriptor *descriptor)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(descriptor) : "memory");
}

/* Copies `bytes` bytes, a multiple of 16, from global to shared memory. */
__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

/* Copies `bytes` bytes, a multiple of 16, from global memory to one place in the shared memory of both CTAs
 * of a pair. In each CTA the barrier at the place of `barrier` counts the bytes that have come there. */
__device__ __forceinline__ void copy_bulk_to_pair(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
                 : "memory");
}

/* Copies `bytes` bytes, a multiple of 16, to the place of `to` in the other CTA of the pair, where the
 * barrier at the place of `barrier` counts them. */
__device__ __forceinline__ void copy_to_other_cta(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            in_other_cta(shared_address(to))),
        "r"(shared_address(from)), "r"(bytes), "r"(in_other_cta(shared_address(barrier)))
        : "memory");
}

/* Starts a copy of `bytes` bytes, a multiple of 16, from shared to global memory. The thread that starts
 * copies is the one that can wait for them. */
__device__ __forceinline__ void start_copy_to_global(void *to, const void *from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                 "cp.async.bulk.commit_group;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

/* Waits until all copies to global memory that this thread has started have read shared memory, which may
 * then be overwritten. */
__device__ __forceinline__ void wait_until_copies_have_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* Waits until they are in global memory. */
__device__ __forceinline__ void wait_for_copies_to_global()
{
    asm volatile("cp.async.bulk.wait_group 0;\nfence.proxy.async;" ::: "memory");
}

/* Copies `bytes` bytes, a multiple of 16, from shared to global memory, and waits until they are there. */
__device__ __forceinline__ void copy_bulk_to_global(void *to, const void *from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                 "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nfence.proxy.async;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

} // namespace fkda

#endif
