// Sums over parts of rows, in f64.
//
// Twins: `cpu::exact_differences`, `cpu::normal_equations` (cpu/moments.rs), `cpu::run_dots` (cpu/objective.rs), which add in
// another order: results agree to the last digits of f64. Here a warp adds a sum: lanes take every 32nd term, then lanes meet pairwise. The order depends on the shape alone.
//
// Not here: the products that are summed (cuBLAS), where rows come from (moments.cu).

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32

// The lanes' sum, in all lanes.
static __device__ __forceinline__ double warp_sum(double x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// `sums`: [rows] += (first - second) . slope over columns `left..left + width` of `first`, `second`: [rows, stride]; `slope`:
// [rows, width]. A warp per row: blockDim.x is a multiple of 32; any grid.
extern "C" __global__ void __launch_bounds__(256) difference_dots(
    u32 rows, u32 width, u32 left, u64 stride, const float* __restrict__ first, const float* __restrict__ second,
    const double* __restrict__ slope, double* __restrict__ sums) {
    const u32 lane = threadIdx.x % WARP;
    const u32 warps = gridDim.x * (blockDim.x / WARP);
    for (u32 row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; row < rows; row += warps) {
        const u64 at = (u64)row * stride + left;
        const double* mine = slope + (u64)row * width;
        double sum = 0.0;
        for (u32 i = lane; i < width; i += WARP) sum += ((double)first[at + i] - (double)second[at + i]) * mine[i];
        sum = warp_sum(sum);
        if (lane == 0) sums[row] += sum;
    }
}

// Row `group` of each row's normal equations, `normal`: [rows, groups, groups], up to the diagonal: entry `g` = product . levels
// over the columns of group `g`, which are `width` (the last may have fewer). `product`: [rows, end], where `end` is where `group`
// ends; `levels`: [rows, cols]. A warp per entry: blockDim.x is a multiple of 32; any grid.
extern "C" __global__ void __launch_bounds__(256) group_dots(
    u32 rows, u32 cols, u32 width, u32 groups, u32 group, u32 end, const float* __restrict__ product,
    const float* __restrict__ levels, double* __restrict__ normal) {
    const u32 lane = threadIdx.x % WARP;
    const u64 warps = (u64)gridDim.x * (blockDim.x / WARP), entries = (u64)rows * (group + 1);
    for (u64 at = (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; at < entries; at += warps) {
        const u64 row = at / (group + 1), other = at % (group + 1);
        const u32 from = (u32)other * width, to = end - from < width ? end : from + width;
        double sum = 0.0;
        for (u32 i = from + lane; i < to; i += WARP) sum += (double)product[row * end + i] * (double)levels[row * cols + i];
        sum = warp_sum(sum);
        if (lane == 0) normal[(row * groups + group) * groups + other] = sum;
    }
}

// `sums`: [rows, groups] = a . b over each run of `width` columns (a row's last may have fewer) of `a`, `b`: [rows, cols].
// A warp per run: blockDim.x is a multiple of 32; any grid.
extern "C" __global__ void __launch_bounds__(256) run_dots(
    u32 rows, u32 cols, u32 width, u32 groups, const float* __restrict__ a, const float* __restrict__ b,
    double* __restrict__ sums) {
    const u32 lane = threadIdx.x % WARP;
    const u64 warps = (u64)gridDim.x * (blockDim.x / WARP), runs = (u64)rows * groups;
    for (u64 run = (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; run < runs; run += warps) {
        const u32 from = (u32)(run % groups) * width, to = cols - from < width ? cols : from + width;
        const u64 row = run / groups * cols;
        double sum = 0.0;
        for (u32 i = from + lane; i < to; i += WARP) sum += (double)a[row + i] * (double)b[row + i];
        sum = warp_sum(sum);
        if (lane == 0) sums[run] = sum;
    }
}
