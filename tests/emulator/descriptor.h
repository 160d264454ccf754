/* TMA descriptors of the emulator, and the copies of boxes that they describe. */
#ifndef FKDA_EMULATOR_DESCRIPTOR_H
#define FKDA_EMULATOR_DESCRIPTOR_H

#include <stdint.h>
#include <string.h>

#include "machine.h"

namespace emulator
{

/* What the emulator keeps in the 128 bytes of a TMA descriptor. Elements have 16 bits and tensors four
 * dimensions; rows of 128 bytes are swizzled in shared memory, and zeros stand for elements outside of the
 * tensor. */
struct Descriptor {
    const unsigned char *tensor;
    uint64_t sizes[4], strides[3]; /* elements; bytes, from the second dimension on */
    uint32_t box[4];
};

inline Descriptor descriptor_of(const unsigned long long *opaque)
{
    Descriptor descriptor;
    memcpy(&descriptor, opaque, sizeof descriptor);
    return descriptor;
}

/* Copies the box that begins at the coordinates `first`. Returns the number of bytes written. */
inline int copy_box(const Descriptor &descriptor, const int32_t (&first)[4], unsigned char *shared,
                    uint32_t to)
{
    if (to % 1024) fail("a swizzled box is copied to %u, which 1024 does not divide", to);
    uint32_t at = to;
    for (uint32_t d = 0; d < descriptor.box[3]; d++)
        for (uint32_t c = 0; c < descriptor.box[2]; c++)
            for (uint32_t b = 0; b < descriptor.box[1]; b++)
                for (uint32_t a = 0; a < descriptor.box[0]; a += 8, at += 16) {
                    const int64_t x[] = {first[0] + int64_t{a}, first[1] + int64_t{b}, first[2] + int64_t{c},
                                         first[3] + int64_t{d}};
                    bool inside = true;
                    int64_t offset = 2 * x[0];
                    for (int i = 0; i < 4; i++)
                        inside &= x[i] >= 0 && x[i] < static_cast<int64_t>(descriptor.sizes[i]);
                    for (int i = 1; i < 4; i++)
                        offset += x[i] * static_cast<int64_t>(descriptor.strides[i - 1]);
                    check_fenced(shared + at, "a copy");
                    unsigned char *unit = shared + (at ^ (at >> 3 & 0x70));
                    if (inside)
                        memcpy(unit, descriptor.tensor + offset, 16);
                    else
                        memset(unit, 0, 16);
                }
    return static_cast<int>(at - to);
}

} // namespace emulator

#endif
