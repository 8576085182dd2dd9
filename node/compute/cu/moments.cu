// Second moments on the device: what is made of them tile by tile for products, their diagonal, how far two of them are apart.
//
// Twins: `cpu::moments` (cpu/moments.rs). Everything but `column_gaps` is one exact or one rounded operation per entry; that sums
// as its twin does: the same bits.
//
// Not here: the products (cuBLAS), sums over rows of what they give (dots.cu).

typedef unsigned int u32;
typedef unsigned long long u64;

// Entry `[row, column]` of a matrix whose diagonal, if there is another, is kept beside it.
static __device__ __forceinline__ float entry(
    const float* __restrict__ row, const float* __restrict__ diagonal, u32 number, u32 column) {
    return diagonal && number == column ? diagonal[number] : row[column];
}

// `out`: [rows, width], f64 = a tile of `plus` + factor * the same tile of `minus`, each from row `top` and column `left`, rows
// `stride` apart. `minus`: null for nothing. `diagonal`: of `plus`, or null if that has its own. `factor`: 1 or -1, so that
// nothing rounds but the sum.
//
// Threads along x share a row, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256) widen(
    u32 rows, u32 width, u32 top, u32 left, u64 stride, const float* __restrict__ plus, const float* __restrict__ diagonal,
    const float* __restrict__ minus, double factor, double* __restrict__ out) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
        const u64 start = (u64)(top + row) * stride;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            const double value = (double)entry(plus + start, diagonal, top + row, left + i);
            const double other = minus ? (double)minus[start + left + i] : 0.0;
            out[(u64)row * width + i] = value + factor * other;
        }
    }
}

// `out`: [rows, cols] = rows of `plus` - `minus` from row `top`; `minus` and `diagonal` as for `widen`. Grid as there.
extern "C" __global__ void __launch_bounds__(256) subtract_rows(
    u32 rows, u32 cols, u32 top, const float* __restrict__ plus, const float* __restrict__ diagonal,
    const float* __restrict__ minus, float* __restrict__ out) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
        const u64 start = (u64)(top + row) * cols;
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) {
            const float value = entry(plus + start, diagonal, top + row, i);
            out[(u64)row * cols + i] = minus ? value - minus[start + i] : value;
        }
    }
}

// The diagonal of `matrix`: [n, n] = `diagonal`: [n]. Flat grid.
extern "C" __global__ void __launch_bounds__(256) set_diagonal(u32 n, const float* __restrict__ diagonal, float* __restrict__ matrix) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) matrix[i * n + i] = diagonal[i];
}

// `squares`: [cols] = sums of (a - b)^2 down the columns of `a`, `b`: [cols, cols], rows in order, each operation rounded to f32;
// `differing`: [cols] = 1 where a column's entries differ at all (a square may vanish). A thread per column, any grid.
extern "C" __global__ void __launch_bounds__(256) column_gaps(
    u32 cols, const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ squares, u32* __restrict__ differing) {
    for (u32 column = blockIdx.x * blockDim.x + threadIdx.x; column < cols; column += gridDim.x * blockDim.x) {
        float sum = 0.0f;
        u32 differs = 0;
#pragma unroll 8
        for (u32 row = 0; row < cols; row++) {
            const u64 at = (u64)row * cols + column;
            const float gap = a[at] - b[at];
            differs |= gap != 0.0f;
            sum = __fadd_rn(sum, __fmul_rn(gap, gap));
        }
        squares[column] = sum;
        differing[column] = differs;
    }
}
