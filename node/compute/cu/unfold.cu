// A convolution's input as the rows of its matrix form: im2col for one to three spatial dimensions, and planes turned to rows.
//
// Twins: `exec::unfold::{windows, planes}`. Nothing is computed: the same bits. Padding, strides, dilations and the holes of a
// transposed convolution are in tables of the host's: per dimension, which input cell each (output cell, kernel cell) reads.
//
// Not here: geometry.

typedef unsigned int u32;
typedef unsigned long long u64;

#define TILE 32
#define ROWS 16  // rows of a block of `unfold_windows`: a column's place is worked out once for so many

// Rows `first..first + count` of `group`: `out`: [count, cols], from `x`: [_, groups * cols, cells].
//
// Row `p` is cell `p % cells` of image `p / cells`. Blocks of (32, 8) threads; a grid of ceil(count / 32) along x and
// ceil(cols / 32) along y.
extern "C" __global__ void __launch_bounds__(256) unfold_planes(
    u64 first, u32 count, u32 cols, u32 cells, u32 groups, u32 group, const float* __restrict__ x, float* __restrict__ out) {
    // One column more than a tile, so that a column lies in different banks.
    __shared__ float tile[TILE][TILE + 1];
    const u32 top = blockIdx.x * TILE, left = blockIdx.y * TILE;
    const u32 row = top + threadIdx.x;
    if (row < count) {
        const u64 image = (first + row) / cells;
        const u64 cell = (first + row) % cells;
        for (u32 i = threadIdx.y; i < TILE && left + i < cols; i += blockDim.y) {
            tile[i][threadIdx.x] = x[((image * groups + group) * cols + left + i) * cells + cell];
        }
    }
    __syncthreads();
    const u32 column = left + threadIdx.x;
    for (u32 i = threadIdx.y; i < TILE && top + i < count; i += blockDim.y) {
        if (column < cols) out[(u64)(top + i) * cols + column] = tile[threadIdx.x][i];
    }
}

// Rows `first..first + count` of `group`: `out`: [count, channels_per_group * kernel_z * kernel_y * kernel_x], from
// `x`: [_, channels, input_z, input_y, input_x].
//
// `source_z`: [output_z, kernel_z] and likewise `source_y`, `source_x`: the input cell, or 2^32 - 1 for none (0 is written).
// Fewer dimensions than three: ones in front. Blocks of 256 threads along columns; a grid of ceil(columns / 256) along x and
// ceil(count / 16) along y (at most 65535, the kernel walks on from there).
extern "C" __global__ void __launch_bounds__(256) unfold_windows(
    u64 first, u32 count, u32 group, u32 channels, u32 channels_per_group, u32 input_z, u32 input_y, u32 input_x,
    u32 output_z, u32 output_y, u32 output_x, u32 kernel_z, u32 kernel_y, u32 kernel_x, const u32* __restrict__ source_z,
    const u32* __restrict__ source_y, const u32* __restrict__ source_x, const float* __restrict__ x, float* __restrict__ out) {
    const u32 none = 0xffffffffu;
    const u32 cols = channels_per_group * kernel_z * kernel_y * kernel_x;
    const u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= cols) return;
    const u32 kx = column % kernel_x, ky = column / kernel_x % kernel_y;
    const u32 kz = column / kernel_x / kernel_y % kernel_z, channel = column / kernel_x / kernel_y / kernel_z;
    const u64 plane = (u64)input_z * input_y * input_x;
    for (u64 start = (u64)blockIdx.y * ROWS; start < count; start += (u64)gridDim.y * ROWS) {
        const u64 position = first + start;
        u32 ox = (u32)(position % output_x), oy = (u32)(position / output_x % output_y);
        u32 oz = (u32)(position / output_x / output_y % output_z);
        u64 image = position / output_x / output_y / output_z;
        for (u64 row = start; row < start + ROWS && row < count; row++) {
            const u32 z = source_z[oz * kernel_z + kz], y = source_y[oy * kernel_y + ky], c = source_x[ox * kernel_x + kx];
            const bool inside = z != none && y != none && c != none;
            const u64 from = (image * channels + (u64)group * channels_per_group + channel) * plane;
            out[row * cols + column] = inside ? x[from + ((u64)z * input_y + y) * input_x + c] : 0.0f;
            if (++ox < output_x) continue;
            ox = 0;
            if (++oy < output_y) continue;
            oy = 0;
            if (++oz < output_z) continue;
            oz = 0;
            image++;
        }
    }
}
