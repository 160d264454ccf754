/*
 * CTA pairs, clusters of two CTAs, as named functions: their barrier, and addresses in the shared memory of
 * the other CTA.
 *
 * In a cluster a shared memory address holds the rank of its CTA above bit 24.
 */
#ifndef FKDA_HOPPER_PTX_CLUSTER_CUH
#define FKDA_HOPPER_PTX_CLUSTER_CUH

#include "mbarrier.cuh"

namespace fkda
{

__device__ __forceinline__ int cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

/* A barrier of all threads of the cluster, and its two halves: all threads of a warp arrive, and later wait
 * until all threads of the cluster have arrived. */
__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_arrive_relaxed() /* orders no memory */
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

/* A barrier of all threads of the cluster that orders no memory: only mbarriers that were initialised before
 * it and followed by fence_mbarrier_init are visible after it. */
__device__ __forceinline__ void cluster_sync_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/* Where the other CTA of the pair has what this CTA has at a shared memory address. */
__device__ __forceinline__ uint32_t in_other_cta(uint32_t address)
{
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(cluster_rank() ^ 1));
    return there;
}

__device__ __forceinline__ void store_in_other_cta(int *to, int x)
{
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(in_other_cta(shared_address(to))), "r"(x)
                 : "memory");
}

/* One arrival for the whole warp at the other CTA's barrier. With .release.cluster this arrival would become
 * a fence of all memory. */
__device__ __forceinline__ void mbarrier_arrive_warp_in_other_cta(uint64_t *barrier)
{
    __syncwarp();
    if (WARP_ARRIVALS == 32 || threadIdx.x % 32 == 0)
        asm volatile(
            "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_other_cta(shared_address(barrier)))
            : "memory");
}

} // namespace fkda

#endif
