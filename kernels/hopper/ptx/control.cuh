/* Registers, lanes and the order of kernels, as named functions. */
#ifndef FKDA_HOPPER_PTX_CONTROL_CUH
#define FKDA_HOPPER_PTX_CONTROL_CUH

#include "../../common/ptx.cuh"

namespace fkda
{

/* All warps of a warpgroup ask for one number of registers, and meet at a barrier before they ask again.
 * take_registers waits until other warps of the SM quarter have given enough registers back. */
template <int registers> __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers> __device__ __forceinline__ void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

/* True in one lane of the warp, always the same one if all lanes are active. */
__device__ __forceinline__ bool elect_lane()
{
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

/* Moves a number that is equal in all lanes to a uniform register of the warp. wgmma's descriptors need
 * uniform registers: from a lane's register the compiler moves each descriptor to one, in front of each
 * product. */
__device__ __forceinline__ int uniform(int x)
{
    return static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(x)));
}

/* Makes the compiler keep x in a register. Otherwise it would compute x again wherever x is used. */
__device__ __forceinline__ void keep_in_register(int &x)
{
    x = __shfl_xor_sync(~0u, x, 0);
}

/* The larger ones of two pairs of unsigned 16-bit integers. */
__device__ __forceinline__ uint32_t max_of_pairs(uint32_t x, uint32_t y)
{
    uint32_t most;
    asm("max.u16x2 %0, %1, %2;" : "=r"(most) : "r"(x), "r"(y));
    return most;
}

/* The nearest number that tf32 has. The tensor core takes all bits of it. */
__device__ __forceinline__ float nearest_tf32(float x)
{
    uint32_t y;
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}

/* Lets the next kernel in the stream start, if it was launched to start early (programmatic dependent
 * launch). */
__device__ __forceinline__ void let_next_kernel_start()
{
    asm volatile("griddepcontrol.launch_dependents;");
}

/* Waits until the previous kernel in the stream is over and its writes are visible, if this kernel started
 * early. */
__device__ __forceinline__ void wait_for_previous_kernel()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

} // namespace fkda

#endif
