// Coordinate descent on {floor, ceil}: all sweeps of whole rows, or one pass over a block of columns; and the number of flips.
//
// Twins: `cpu::refine_rows`, `cpu::refine_block` (cpu/refine.rs): the same order, the same rule, every multiply-add fused as
// there, so the same flips bit for bit. Columns are decided in order, but only those that flip cost time: until the next flip
// residuals stay as they are, so the first column that would flip now is the next one that does. Residuals are in registers:
// a whole row's in those of a block of threads, a block's in those of a warp.
//
// Few weights flip, and rows are independent: a flip costs a row of `h`, read from the cache it shares with the other rows, and a
// chunk's sweeps need neither products nor anybody's wait. Rows too wide for the registers go block by block, and what a flip
// does outside its block is a product, the caller's.

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define LANE_COLUMNS 4  // columns of a lane; a block of columns has at most 128
#define SPAN 512        // threads that share a row, and columns that are asked at once
#define WARPS (SPAN / WARP)

// What flipping a weight changes it by, or 0 if it should stay.
//
// `up`: 0 or 1; `curvature`: the diagonal entry of `h`. A flip must win more than 1e-5 of its own curvature.
static __device__ __forceinline__ float flip_of(float residual, float delta, float up, float curvature) {
    const float d = fmaf(up, -2.0f, 1.0f) * delta;
    const float cost = d * d * curvature;
    const float change = fmaf(d * 2.0f, residual, cost);
    return change < cost * -1e-5f ? d : 0.0f;
}

// The first flip of each warp: two sets, since a warp may be one question ahead of another.
struct First {
    float change[2][WARPS];
    u32 thread[2][WARPS];
};

// Columns from `start` on.
static __device__ __forceinline__ u32 left(u32 cols, u32 start) { return cols > start ? cols - start : 0; }

// At most `sweeps` passes over all columns of rows, each row until a pass flips nothing.
//
// A thread has every SPAN-th column; `r[0]` is that of the columns being decided, the others follow in their order round the row.
template <u32 TILES>
static __device__ __forceinline__ void refine_all(
    u32 rows, u32 cols, u32 sweeps, const float* __restrict__ h, float* __restrict__ residual, const float* __restrict__ delta,
    float* __restrict__ up, u32* __restrict__ counts, u32* __restrict__ ran, First& first) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 set = 0;
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        const u64 at = (u64)row * cols;
        float r[TILES];
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
            r[i] = threadIdx.x < left(cols, i * SPAN) ? residual[at + i * SPAN + threadIdx.x] : 0.0f;
        }
        u32 flips = 0, passes = 0;
        for (u32 before = 1; passes < sweeps && flips != before; passes++) {
            before = flips;
#pragma unroll 1
            for (u32 tile = 0; tile < TILES; tile++) {
                const u32 column = tile * SPAN + threadIdx.x;
                if (tile * SPAN < cols) {
                    const bool inside = column < cols;
                    // A scale of 0 never flips.
                    const float scale = inside ? delta[at + column] : 0.0f;
                    const float was = inside ? up[at + column] : 0.0f;
                    const float curvature = inside ? h[(u64)column * cols + column] : 0.0f;
                    // Threads from here on are undecided.
                    u32 next = 0;
                    for (;;) {
                        const float mine = threadIdx.x >= next ? flip_of(r[0], scale, was, curvature) : 0.0f;
                        const u32 lanes = __ballot_sync(0xffffffffu, mine != 0.0f);
                        if (lanes != 0 ? lane == (u32)__ffs(lanes) - 1 : lane == 0) {
                            first.change[set][warp] = mine;
                            first.thread[set][warp] = threadIdx.x;
                        }
                        __syncthreads();
                        const u32 warps = __ballot_sync(0xffffffffu, first.change[set][lane % WARPS] != 0.0f);
                        if (warps == 0) {
                            set ^= 1;
                            break;
                        }
                        const u32 winner = __ffs(warps) - 1;
                        const float d = first.change[set][winner];
                        const u32 chosen = first.thread[set][winner];
                        set ^= 1;
                        next = chosen + 1;
                        flips++;
                        if (threadIdx.x == chosen) up[at + column] = 1.0f - was;
                        // Along the row of `h` from here round to here: places that depend on the flip take no registers.
                        const float* from = h + (u64)(tile * SPAN + chosen) * cols;
                        const float* end = from + cols;
                        from += column;
#pragma unroll
                        for (u32 i = 0; i < TILES; i++) {
                            if (from < end) r[i] = fmaf(d, *from, r[i]);
                            from += SPAN;
                            if (tile + i + 1 == TILES) from -= TILES * SPAN;
                        }
                    }
                }
                const float decided = r[0];
#pragma unroll
                for (u32 i = 0; i + 1 < TILES; i++) r[i] = r[i + 1];
                r[TILES - 1] = decided;
            }
        }
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
            if (threadIdx.x < left(cols, i * SPAN)) residual[at + i * SPAN + threadIdx.x] = r[i];
        }
        if (threadIdx.x == 0) {
            counts[row] = flips;
            ran[row] = passes;
        }
    }
}

// `h`: [cols, cols], symmetric. `residual`, `delta`, `up` (0 or 1): [rows, cols]; residuals and choices are updated. `counts`, `ran`:
// [rows], receive flips and passes. `cols` <= 4096, 8192, 14336, 29696. A block of 512 threads per row, any number of blocks.
extern "C" __global__ void __launch_bounds__(SPAN, 1) refine_rows_4096(
    u32 rows, u32 cols, u32 sweeps, const float* __restrict__ h, float* __restrict__ residual, const float* __restrict__ delta,
    float* __restrict__ up, u32* __restrict__ counts, u32* __restrict__ ran) {
    __shared__ First first;
    refine_all<8>(rows, cols, sweeps, h, residual, delta, up, counts, ran, first);
}

extern "C" __global__ void __launch_bounds__(SPAN, 1) refine_rows_8192(
    u32 rows, u32 cols, u32 sweeps, const float* __restrict__ h, float* __restrict__ residual, const float* __restrict__ delta,
    float* __restrict__ up, u32* __restrict__ counts, u32* __restrict__ ran) {
    __shared__ First first;
    refine_all<16>(rows, cols, sweeps, h, residual, delta, up, counts, ran, first);
}

extern "C" __global__ void __launch_bounds__(SPAN, 1) refine_rows_14336(
    u32 rows, u32 cols, u32 sweeps, const float* __restrict__ h, float* __restrict__ residual, const float* __restrict__ delta,
    float* __restrict__ up, u32* __restrict__ counts, u32* __restrict__ ran) {
    __shared__ First first;
    refine_all<28>(rows, cols, sweeps, h, residual, delta, up, counts, ran, first);
}

extern "C" __global__ void __launch_bounds__(SPAN, 1) refine_rows_29696(
    u32 rows, u32 cols, u32 sweeps, const float* __restrict__ h, float* __restrict__ residual, const float* __restrict__ delta,
    float* __restrict__ up, u32* __restrict__ counts, u32* __restrict__ ran) {
    __shared__ First first;
    refine_all<58>(rows, cols, sweeps, h, residual, delta, up, counts, ran, first);
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
