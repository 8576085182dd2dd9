// Moving rows: fill, gather, copy, scale, the mirrored triangle of a symmetric matrix.
//
// Twins: `Cpu::zeros`, `Cpu::gather_rows`, `Cpu::copy_rows`, `Cpu::scale_rows`, `cpu::mirror_lower`. At most a product is computed:
// the same bits.

typedef unsigned int u32;
typedef unsigned long long u64;

#define TILE 32

// `out`: [len] = value. Any one-dimensional grid.
extern "C" __global__ void __launch_bounds__(256) fill(u64 len, float value, float* __restrict__ out) {
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 threads = (u64)gridDim.x * blockDim.x;
    const u64 quads = ((u64)out & 15) == 0 ? len / 4 : 0;
    for (u64 i = first; i < quads; i += threads) ((float4*)out)[i] = make_float4(value, value, value, value);
    for (u64 i = quads * 4 + first; i < len; i += threads) out[i] = value;
}

// `out`: [count, width] = rows `indices`: [count] of `source`: [_, width]. The caller has checked the indices.
//
// Threads along x share a row, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256) gather_rows(
    u32 count, u32 width, const float* __restrict__ source, const u32* __restrict__ indices, float* __restrict__ out) {
    const bool wide = width % 4 == 0 && (((u64)source | (u64)out) & 15) == 0;
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < count; row += gridDim.x * blockDim.y) {
        const float* from = source + (u64)indices[row] * width;
        float* to = out + (u64)row * width;
        if (wide) {
            for (u32 i = threadIdx.x; i < width / 4; i += blockDim.x) ((float4*)to)[i] = ((const float4*)from)[i];
        } else {
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
        }
    }
}

// Rows `indices`: [count] of `out`: [_, width] = the same rows of `source`. The caller has checked the indices.
//
// Threads along x share a row, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256) copy_rows(
    u32 count, u32 width, const float* __restrict__ source, const u32* __restrict__ indices, float* __restrict__ out) {
    const bool wide = width % 4 == 0 && (((u64)source | (u64)out) & 15) == 0;
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < count; row += gridDim.x * blockDim.y) {
        const u64 at = (u64)indices[row] * width;
        if (wide) {
            const float4* from = (const float4*)(source + at);
            for (u32 i = threadIdx.x; i < width / 4; i += blockDim.x) ((float4*)(out + at))[i] = from[i];
        } else {
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[at + i] = source[at + i];
        }
    }
}

// `out`: [rows, width] = source * by[row]. Threads along x share a row, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256) scale_rows(
    u32 rows, u32 width, const float* __restrict__ source, const float* __restrict__ by, float* __restrict__ out) {
    const bool wide = width % 4 == 0 && (((u64)source | (u64)out) & 15) == 0;
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
        const u64 at = (u64)row * width;
        const float scale = by[row];
        if (wide) {
            const float4* from = (const float4*)(source + at);
            for (u32 i = threadIdx.x; i < width / 4; i += blockDim.x) {
                const float4 x = from[i];
                ((float4*)(out + at))[i] = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
            }
        } else {
            for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[at + i] = source[at + i] * scale;
        }
    }
}

// `g`: [k, k]; the lower triangle (row >= column) is copied to the upper, in tiles turned in shared memory.
//
// Blocks of (32, 8) threads; a grid of ceil(k / 32) along x (tiles of columns) and y (tiles of rows).
extern "C" __global__ void __launch_bounds__(256) mirror_lower(u32 k, float* __restrict__ g) {
    // One column more than a tile, so that a column lies in different banks.
    __shared__ float tile[TILE][TILE + 1];
    const u32 top = blockIdx.y * TILE, left = blockIdx.x * TILE;
    if (left > top) return;
    const u32 column = left + threadIdx.x;
    for (u32 i = threadIdx.y; i < TILE; i += blockDim.y) {
        if (top + i < k && column < k) tile[i][threadIdx.x] = g[(u64)(top + i) * k + column];
    }
    __syncthreads();
    const u32 turned = top + threadIdx.x;
    for (u32 i = threadIdx.y; i < TILE; i += blockDim.y) {
        const u32 row = left + i;
        if (row < turned && turned < k) g[(u64)row * k + turned] = tile[threadIdx.x][i];
    }
}
