/* A libopenblas.so.0 that computes nothing, so that benchmarks/cpu_sgemm can be started where OpenBLAS is not
 * installed. */
#pragma GCC diagnostic ignored "-Wunused-parameter"

void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
void openblas_set_num_threads(int threads);
const char *openblas_get_corename(void);
const char *openblas_get_config(void);

void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc)
{
}

void openblas_set_num_threads(int threads)
{
}

const char *openblas_get_corename(void)
{
    return "Pretended";
}

const char *openblas_get_config(void)
{
    return "OpenBLAS, pretended";
}
