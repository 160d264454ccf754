/*
 * Bulk copies of a chunk's rows of q, k and g to the chunk ring, by one warp. A row has 256 bytes, or 512 for
 * g in fp32, and any strides. Rows past the sequence's end are zeros.
 */
#ifndef FKDA_HOPPER_BWD_LOADER_CUH
#define FKDA_HOPPER_BWD_LOADER_CUH

#include "shared.cuh"

namespace fkda
{

template <Way way>
__device__ __forceinline__ void load_chunk(HopperRaw &raw, uint64_t &loaded, const fkda_fwd_args &f,
                                           const Piece &piece, int chunk, int lane)
{
    constexpr int ROW = 2 * DIM;
    const int row = lane % CHUNK, g_bytes = f.g_is_f32 ? 2 * ROW : ROW,
              rows = min(piece.task.length - chunk * CHUNK, CHUNK);
    const long long token = static_cast<long long>(chunk) * CHUNK + row;
    const bool is_q = lane >= CHUNK, copies = row < rows && (way == BACKWARDS || !is_q);
    void *const to = is_q ? raw.q[row] : raw.k[row], *const g = f.g_is_f32
                                                                    ? static_cast<void *>(raw.g.f32[row])
                                                                    : raw.g.bf16[row];
    if (rows < CHUNK && row >= rows) {
        uint4 *const zeros = static_cast<uint4 *>(to), *const g_zeros = static_cast<uint4 *>(g);
        for (int i = 0; i < ROW / 16; i++) zeros[i] = make_uint4(0, 0, 0, 0);
        for (int i = 0; !is_q && i < g_bytes / 16; i++) g_zeros[i] = make_uint4(0, 0, 0, 0);
        fence_async_proxy();
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive_expecting(&loaded, rows * ((way == BACKWARDS ? 2 : 1) * ROW + g_bytes));
    __syncwarp();
    if (!copies) return;
    copy_bulk(to, is_q ? piece.q + 2 * token * f.q_strides.token : piece.k + 2 * token * f.k_strides.token,
              ROW, &loaded);
    if (!is_q) copy_bulk(g, piece.g + token * f.g_strides.token * (f.g_is_f32 ? 4 : 2), g_bytes, &loaded);
}

} // namespace fkda

#endif
