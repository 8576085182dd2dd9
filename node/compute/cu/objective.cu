// What a rounding's errors are, and the sums over rows that its objective is made of.
//
// Twins: `cpu::rounding_errors`, the same bits; `cpu::row_sums` (cpu/objective.rs), which adds in another order: results agree to the
// last digits of f64. Here a block adds a row: threads take every 256th term, lanes meet pairwise, then warps. The order depends on
// the row's length alone.
//
// Not here: the product of errors with H (cuBLAS), what the sums mean (the solver).

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define THREADS 256
#define SUMS 4

// `out` = up * delta + low, each operation rounded; all [len]. Flat grid.
extern "C" __global__ void __launch_bounds__(256) rounding_errors(
    u64 len, const float* __restrict__ low, const float* __restrict__ delta, const float* __restrict__ up, float* __restrict__ out) {
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = first; i < len; i += threads) out[i] = __fadd_rn(__fmul_rn(up[i], delta[i]), low[i]);
}

// Of every row of `errors`, `product`, `target`: [rows, cols], in f64: sum e (product - 2 target), sum e^2, sum |e| root, sum |e| gap,
// with `roots` and `gaps`: [cols]. `sums`: [rows, 4]. A block of 256 threads per row, any number of blocks.
extern "C" __global__ void __launch_bounds__(THREADS) row_sums(
    u32 rows, u32 cols, const float* __restrict__ errors, const float* __restrict__ product, const float* __restrict__ target,
    const float* __restrict__ roots, const float* __restrict__ gaps, double* __restrict__ sums) {
    __shared__ double of_warps[SUMS][THREADS / WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        const u64 at = (u64)row * cols;
        double sum[SUMS] = {0.0, 0.0, 0.0, 0.0};
        for (u32 i = threadIdx.x; i < cols; i += THREADS) {
            const double e = (double)errors[at + i], size = e < 0.0 ? -e : e;
            sum[0] += e * ((double)product[at + i] - 2.0 * (double)target[at + i]);
            sum[1] += e * e;
            sum[2] += size * (double)roots[i];
            sum[3] += size * (double)gaps[i];
        }
#pragma unroll
        for (u32 k = 0; k < SUMS; k++) {
            for (u32 distance = WARP / 2; distance > 0; distance /= 2) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], distance);
            if (lane == 0) of_warps[k][warp] = sum[k];
        }
        __syncthreads();
        if (threadIdx.x < SUMS) {
            double total = 0.0;
            for (u32 w = 0; w < THREADS / WARP; w++) total += of_warps[threadIdx.x][w];
            sums[(u64)row * SUMS + threadIdx.x] = total;
        }
        __syncthreads();
    }
}
