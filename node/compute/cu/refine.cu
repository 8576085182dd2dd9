// Coordinate descent on {floor, ceil} in one block of columns, and the number of flips.
//
// Twin: `cpu::refine_block` (cpu/refine.rs): the same order, the same rule, every multiply-add fused as there, so the same
// flips bit for bit. A row is one warp's; a lane keeps every 32nd column's residual in a register. Columns are decided in
// order, but only those that flip cost time: until the next flip residuals stay as they are, so the first column that would
// flip now is the next one that does.
//
// Not here: what a flip does outside the block (one product, the caller's), sweeps.

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define LANE_COLUMNS 4  // columns of a lane; a block of columns has at most 128

// What flipping a weight changes it by, or 0 if it should stay.
//
// `up`: 0 or 1; `curvature`: the diagonal entry of `h`. A flip must win more than 1e-5 of its own curvature.
static __device__ __forceinline__ float flip_of(float residual, float delta, float up, float curvature) {
    const float d = fmaf(up, -2.0f, 1.0f) * delta;
    const float cost = d * d * curvature;
    const float change = fmaf(d * 2.0f, residual, cost);
    return change < cost * -1e-5f ? d : 0.0f;
}

// One pass over the columns `start..start + width` of `rows` independent rows.
//
// `h`: [cols, cols], symmetric. `residual`, `delta`: [rows, cols], read. `up`: [rows, cols], 0 or 1, updated inside the
// block. `flips`: [rows, width], receives what each weight changed by. `counts`: [rows], receives flips per row.
// `width` <= 128. A warp per row: blockDim.x is a multiple of 32; any grid.
extern "C" __global__ void __launch_bounds__(256) refine_block(
    u32 rows, u32 cols, u32 start, u32 width, const float* __restrict__ h, const float* __restrict__ residual,
    const float* __restrict__ delta, float* __restrict__ up, float* __restrict__ flips, u32* __restrict__ counts) {
    const u32 lane = threadIdx.x % WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    const float* block = h + (u64)start * cols + start;
    for (u32 row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; row < rows; row += warps) {
        const u64 at = (u64)row * cols + start;
        float r[LANE_COLUMNS], scale[LANE_COLUMNS], was[LANE_COLUMNS], curvature[LANE_COLUMNS], flipped[LANE_COLUMNS];
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 column = i * WARP + lane;
            const bool inside = column < width;
            r[i] = inside ? residual[at + column] : 0.0f;
            // A scale of 0 never flips.
            scale[i] = inside ? delta[at + column] : 0.0f;
            was[i] = inside ? up[at + column] : 0.0f;
            curvature[i] = inside ? block[(u64)column * cols + column] : 0.0f;
            flipped[i] = 0.0f;
        }
        u32 count = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            // Lanes from here on are undecided.
            u32 next = 0;
            while (next < WARP) {
                const float mine = lane >= next ? flip_of(r[i], scale[i], was[i], curvature[i]) : 0.0f;
                const u32 wanting = __ballot_sync(0xffffffffu, mine != 0.0f);
                if (wanting == 0) break;
                const u32 chosen = __ffs(wanting) - 1;
                const float d = __shfl_sync(0xffffffffu, mine, chosen);
                if (lane == chosen) flipped[i] = d;
                count++;
                next = chosen + 1;
                const float* row_of_h = block + (u64)(i * WARP + chosen) * cols;
#pragma unroll
                for (u32 k = i; k < LANE_COLUMNS; k++) {
                    const u32 column = k * WARP + lane;
                    if (column < width) r[k] = fmaf(d, row_of_h[column], r[k]);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < LANE_COLUMNS; i++) {
            const u32 column = i * WARP + lane;
            if (column >= width) continue;
            flips[(u64)row * width + column] = flipped[i];
            if (flipped[i] != 0.0f) up[at + column] = 1.0f - was[i];
        }
        if (lane == 0) counts[row] = count;
    }
}

// `total[0]` = sum of `counts`: [rows]. Adding integers is exact, so the order is of no account. One block of 256 threads.
extern "C" __global__ void __launch_bounds__(256) sum_counts(u32 rows, const u32* __restrict__ counts, u64* __restrict__ total) {
    __shared__ u64 partial[256];
    u64 sum = 0;
    for (u32 row = threadIdx.x; row < rows; row += blockDim.x) sum += counts[row];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) total[0] = partial[0];
}
