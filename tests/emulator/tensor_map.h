/* Tensor maps, and the boxes that copies bring to shared memory by them. */
#ifndef FKDA_EMULATOR_TENSOR_MAP_H
#define FKDA_EMULATOR_TENSOR_MAP_H

#include <stdint.h>
#include <string.h>

#include "machine.h"

namespace emulator
{

/* What is kept in the 128 bytes: elements of 16 bits, four dimensions, rows of 128 bytes swizzled, zeros outside. */
struct TensorMap {
    const unsigned char *tensor;
    uint64_t sizes[4], strides[3]; /* elements; bytes, from the second dimension on */
    uint32_t box[4];
};

inline TensorMap tensor_map(const unsigned long long *opaque)
{
    TensorMap map;
    memcpy(&map, opaque, sizeof map);
    return map;
}

/* Returns the bytes written. */
inline int copy_box(const TensorMap &map, const int32_t (&first)[4], unsigned char *shared, uint32_t to)
{
    if (to % 1024) fail("a swizzled box is copied to %u, which 1024 does not divide", to);
    uint32_t at = to;
    for (uint32_t d = 0; d < map.box[3]; d++)
        for (uint32_t c = 0; c < map.box[2]; c++)
            for (uint32_t b = 0; b < map.box[1]; b++)
                for (uint32_t a = 0; a < map.box[0]; a += 8, at += 16) {
                    const int64_t x[] = {first[0] + int64_t{a}, first[1] + int64_t{b}, first[2] + int64_t{c},
                                         first[3] + int64_t{d}};
                    bool inside = true;
                    int64_t offset = 2 * x[0];
                    for (int i = 0; i < 4; i++)
                        inside &= x[i] >= 0 && x[i] < static_cast<int64_t>(map.sizes[i]);
                    for (int i = 1; i < 4; i++) offset += x[i] * static_cast<int64_t>(map.strides[i - 1]);
                    check_fenced(shared + at, "a copy");
                    unsigned char *unit = shared + (at ^ (at >> 3 & 0x70));
                    if (inside)
                        memcpy(unit, map.tensor + offset, 16);
                    else
                        memset(unit, 0, 16);
                }
    return static_cast<int>(at - to);
}

} // namespace emulator

#endif
