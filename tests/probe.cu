/*
 * The few instructions of the kernels that PyTorch cannot give exactly, for tests/torch_ref.py: approximate
 * special functions, fused multiply-add, and the tensor core's tf32 product. Each call runs on the default
 * stream of the current device over contiguous fp32 arrays and returns a cudaError_t.
 */
#include "../kernels/common/ptx.cuh"

enum Unary { EX2 = 0, RCP = 1, RSQRT = 2 };

__global__ void unary(int function, const float *x, float *y, long long count)
{
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    y[i] = function == EX2 ? fkda::ex2(x[i]) : function == RCP ? fkda::rcp(x[i]) : fkda::rsqrt_approx(x[i]);
}

__global__ void fused_multiply_add(const float *a, const float *b, const float *c, float *d, long long count)
{
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < count) d[i] = __fmaf_rn(a[i], b[i], c[i]);
}

/* d [batch, m, n] = c [batch, m, n] + a [batch, m, k] b [batch, n, k]^T, in steps of eight columns
 * of k. Each warp computes one tile of 16 x 8 of d. */
__global__ void multiply(const float *a, const float *b, const float *c, float *d, int m, int n, int k)
{
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    long long tile = blockIdx.x;
    int column = tile % (n / 8) * 8;
    tile /= n / 8;
    int row = tile % (m / 16) * 16;
    long long batch = tile / (m / 16);
    a += (batch * m + row + g) * k + t;
    b += (batch * n + column + g) * k + t;
    long long at = (batch * m + row + g) * n + column + 2 * t;
    float x[4] = {c[at], c[at + 1], c[at + 8LL * n], c[at + 8LL * n + 1]};
    for (int i = 0; i < k; i += 8)
        fkda::mma_tf32(x, a[i], a[i + 8LL * k], a[i + 4], a[i + 8LL * k + 4], b[i], b[i + 4]);
    d[at] = x[0], d[at + 1] = x[1], d[at + 8LL * n] = x[2], d[at + 8LL * n + 1] = x[3];
}

static unsigned blocks(long long count)
{
    return (unsigned)((count + 255) / 256);
}

extern "C" int probe_unary(int function, const float *x, float *y, long long count)
{
    unary<<<blocks(count), 256>>>(function, x, y, count);
    return cudaGetLastError();
}

extern "C" int probe_fma(const float *a, const float *b, const float *c, float *d, long long count)
{
    fused_multiply_add<<<blocks(count), 256>>>(a, b, c, d, count);
    return cudaGetLastError();
}

extern "C" int probe_multiply(const float *a, const float *b, const float *c, float *d, long long batch,
                              int m, int n, int k)
{
    multiply<<<(unsigned)(batch * (m / 16) * (n / 8)), 32>>>(a, b, c, d, m, n, k);
    return cudaGetLastError();
}
