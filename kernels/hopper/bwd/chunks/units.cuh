/* Powers of two that fp32 numbers are divided by to become fp16 operands. */
#ifndef FKDA_HOPPER_CHUNKS_UNITS_CUH
#define FKDA_HOPPER_CHUNKS_UNITS_CUH

#include "../../../common/elements.cuh"

namespace fkda
{

/* A power of two that numbers are divided by before they become fp16. The largest of them becomes 2^13 to
 * 2^14, so that numbers 2^27 times smaller still have all bits of fp16. If one of them is infinite, all of
 * them become NaN: divided by a huge unit the others would be 0, and what depends on them would look
 * right. */
struct Unit {
    float size, inverse;

    /* `largest`: the bits of the largest magnitude. */
    __device__ __forceinline__ explicit Unit(uint32_t largest)
    {
        const bool finite = largest < 0x7f800000u;
        const float above = power_above(__uint_as_float(largest)), power = above < 0x1p-100f  ? 0x1p-100f
                                                                           : above > 0x1p126f ? 0x1p126f
                                                                                              : above;
        size = finite ? power * 0x1p-14f : NAN;
        inverse = finite ? inverse_power(power * 0x1p-14f) : NAN;
    }
};

} // namespace fkda

#endif
