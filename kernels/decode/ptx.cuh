/* PTX instructions of the decode kernels alone, as named functions. */
#ifndef FKDA_DECODE_PTX_CUH
#define FKDA_DECODE_PTX_CUH

#include "../common/ptx.cuh"

namespace fkda
{

/* Lets the next kernel in the stream start, if it was launched to start early (programmatic dependent
 * launch). GPUs before compute capability 9.0 start kernels in order. */
__device__ __forceinline__ void let_next_kernel_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Waits until the previous kernel in the stream is over and its writes are visible, if this kernel started
 * early. */
__device__ __forceinline__ void wait_for_previous_kernel()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Loads integer number i of a tensor without a branch, or returns `otherwise` if !valid. */
__device__ __forceinline__ long long load_index_if(const void *tensor, long long i, bool is_i32, bool valid,
                                                   long long otherwise)
{
    int narrow = static_cast<int>(otherwise);
    long long wide = otherwise;
    asm volatile("{\n.reg .pred load;\nsetp.ne.b32 load, %2, 0;\n@load ld.global.b32 %0, [%1];\n}"
                 : "+r"(narrow)
                 : "l"(static_cast<const int *>(tensor) + i), "r"(static_cast<int>(valid && is_i32)));
    asm volatile("{\n.reg .pred load;\nsetp.ne.b32 load, %2, 0;\n@load ld.global.b64 %0, [%1];\n}"
                 : "+l"(wide)
                 : "l"(static_cast<const long long *>(tensor) + i), "r"(static_cast<int>(valid && !is_i32)));
    return is_i32 ? narrow : wide;
}

/* Copies 16 bytes from global to shared memory in the background, past the L1 cache, or does nothing if
 * !valid. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid)
{
    asm volatile("{\n.reg .pred valid;\nsetp.ne.b32 valid, %2, 0;\n"
                 "@valid cp.async.cg.shared.global [%0], [%1], 16;\n}" ::"r"(shared_address(to)),
                 "l"(from), "r"(static_cast<int>(valid))
                 : "memory");
}

/* Copies 16, 8 or 4 bytes in the background, or does nothing if !valid. 16 bytes go past the L1 cache, and
 * their whole line comes to the L2 cache, for copies of the rest of it that follow. */
template <int bytes> __device__ __forceinline__ void copy_part_async(void *to, const void *from, bool valid)
{
    if constexpr (bytes == 16)
        asm volatile("{\n.reg .pred valid;\nsetp.ne.b32 valid, %2, 0;\n"
                     "@valid cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n}" ::"r"(shared_address(to)),
                     "l"(from), "r"(static_cast<int>(valid))
                     : "memory");
    else
        asm volatile("{\n.reg .pred valid;\nsetp.ne.b32 valid, %2, 0;\n"
                     "@valid cp.async.ca.shared.global [%0], [%1], %3;\n}" ::"r"(shared_address(to)),
                     "l"(from), "r"(static_cast<int>(valid)), "n"(bytes)
                     : "memory");
}

/* Waits until all copies of this thread are done. */
__device__ __forceinline__ void wait_for_copies()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

} // namespace fkda

#endif
