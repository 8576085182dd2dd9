// Triangular factors in blocks, and Babai's nearest plane on them: what a GPTQ start is made of besides products.
//
// Twins: `cpu::factor_block`, `cpu::plane_block` (cpu/plane.rs), `Cpu::gather_columns`. Multiply-adds are fused where the twin
// fuses them. Factors are found in f64: a block is a small part of the work, and all later columns rest on it.
//
// Not here: the products between blocks, the order of columns (the caller's).

typedef unsigned int u32;
typedef unsigned long long u64;

#define BLOCK 64  // columns of a block, at most
#define WARP 32

// The lower factor L of a diagonal block, `L L' = block + extra I`, and its inverse.
//
// `a`, `lower`: [n, n]; of both only rows and columns `start..start + width` and there only the lower triangle. `inverses`: [n, 64],
// rows `start..start + width`, `width` columns of each: the inverse, with its zeros. `width` <= 64. A block that is not positive
// definite gives NaN from the column where that shows. One block of 64 threads.
extern "C" __global__ void __launch_bounds__(BLOCK) factor_block(
    u32 n, u32 start, u32 width, float extra, const float* __restrict__ a, float* __restrict__ lower,
    float* __restrict__ inverses) {
    // The factor stands on and below the diagonal; its inverse, turned, one column to the right of it.
    __shared__ double tile[BLOCK][BLOCK + 1];
    const u32 mine = threadIdx.x;
    const u64 corner = (u64)start * n + start;
    for (u32 row = 0; row < width; row++) {
        if (mine <= row) tile[row][mine] = (double)a[corner + (u64)row * n + mine] + (row == mine ? (double)extra : 0.0);
    }
    __syncthreads();
    for (u32 column = 0; column < width; column++) {
        double value = 0.0;
        if (mine >= column && mine < width) {
            value = tile[mine][column];
            for (u32 k = 0; k < column; k++) value = fma(-tile[mine][k], tile[column][k], value);
        }
        // Everybody has read the column's row before its diagonal changes.
        __syncthreads();
        if (mine == column) tile[column][column] = sqrt(value > 0.0 && value < 1.0e300 ? value : -1.0);
        __syncthreads();
        if (mine > column && mine < width) tile[mine][column] = value / tile[column][column];
        __syncthreads();
    }
    if (mine < width) {
        for (u32 row = mine; row < width; row++) {
            double value = row == mine ? 1.0 : 0.0;
            for (u32 k = mine; k < row; k++) value = fma(-tile[row][k], tile[mine][k + 1], value);
            tile[mine][row + 1] = value / tile[row][row];
        }
    }
    __syncthreads();
    for (u32 row = 0; row < width; row++) {
        if (mine >= width) continue;
        if (mine <= row) lower[corner + (u64)row * n + mine] = (float)tile[row][mine];
        inverses[((u64)start + row) * BLOCK + mine] = mine <= row ? (float)tile[mine][row + 1] : 0.0f;
    }
}

// The choices of one block of columns, last column first.
//
// Column j of a row takes the neighbour, `low` or `low + delta`, whose error makes `offset[j] + factor[j, j] error` smallest, and
// adds its error times the factor's row to the offsets of the block's earlier columns. `factor`: [n, n], lower triangle. `low`,
// `delta`, `offset`: [rows, n]; `up`, `errors`: [rows, n], written inside the block: 0 or 1, and the error taken. `width` <= 64. A warp
// per row: blocks of 256 threads, any number.
extern "C" __global__ void __launch_bounds__(256) plane_block(
    u32 rows, u32 n, u32 start, u32 width, const float* __restrict__ factor, const float* __restrict__ low,
    const float* __restrict__ delta, const float* __restrict__ offset, float* __restrict__ up, float* __restrict__ errors) {
    __shared__ float tile[BLOCK][BLOCK + 1];
    const u64 corner = (u64)start * n + start;
    for (u32 i = threadIdx.x; i < width * BLOCK; i += blockDim.x) {
        const u32 row = i / BLOCK, column = i % BLOCK;
        if (column <= row) tile[row][column] = factor[corner + (u64)row * n + column];
    }
    __syncthreads();
    const u32 lane = threadIdx.x % WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    for (u32 row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; row < rows; row += warps) {
        const u64 at = (u64)row * n + start;
        float floor_error[2], step[2], sum[2], diagonal[2], choice[2], error[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 column = i * WARP + lane;
            const bool inside = column < width;
            floor_error[i] = inside ? low[at + column] : 0.0f;
            step[i] = inside ? delta[at + column] : 0.0f;
            sum[i] = inside ? offset[at + column] : 0.0f;
            diagonal[i] = inside ? tile[column][column] : 1.0f;
            choice[i] = error[i] = 0.0f;
        }
#pragma unroll
        for (u32 back = 0; back < 2; back++) {
            const u32 i = 1 - back;
            for (u32 owner = WARP; owner-- > 0;) {
                const u32 column = i * WARP + owner;
                if (column >= width) continue;
                // Only the owner's counts.
                const float wanted = -sum[i] / diagonal[i];
                const bool above = wanted - floor_error[i] >= 0.5f * step[i] && step[i] != 0.0f;
                const float taken = above ? floor_error[i] + step[i] : floor_error[i];
                const float told = __shfl_sync(0xffffffffu, taken, owner);
                if (lane == owner) {
                    choice[i] = above ? 1.0f : 0.0f;
                    error[i] = taken;
                }
#pragma unroll
                for (u32 k = 0; k < 2; k++) {
                    const u32 other = k * WARP + lane;
                    if (k <= i && other < column) sum[k] = fmaf(tile[column][other], told, sum[k]);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 column = i * WARP + lane;
            if (column >= width) continue;
            up[at + column] = choice[i];
            errors[at + column] = error[i];
        }
    }
}

// `out`: [rows, width], column j = column `order[j]` of `source`: [rows, width]. The caller has checked the order.
//
// Threads along x share a row, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256) gather_columns(
    u32 rows, u32 width, const float* __restrict__ source, const u32* __restrict__ order, float* __restrict__ out) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
        const float* from = source + (u64)row * width;
        float* to = out + (u64)row * width;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[order[i]];
    }
}
