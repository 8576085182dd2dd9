// Normalisation of runs of numbers: root mean square, and mean with variance.
//
// Twins: `cpu::rms_norm`, `cpu::layer_norm` (cpu/norm.rs; errors of at most 2e-6 for numbers of order 1). A run is one warp's. Lane
// `l` sums entries `128 i + 4 l + c` into four sums by `c`, however they are loaded; then sums are added pairwise: a run's
// bits depend on its width alone.
//
// Not here: which weights a family stores.

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32

// Entries `4 i ..` of a run; 0 behind its end.
static __device__ __forceinline__ float4 four(const float* x, u32 i, u32 width, bool wide) {
    if (wide) return ((const float4*)x)[i];
    const u32 at = 4 * i;
    return make_float4(x[at], at + 1 < width ? x[at + 1] : 0.0f, at + 2 < width ? x[at + 2] : 0.0f,
                       at + 3 < width ? x[at + 3] : 0.0f);
}

static __device__ __forceinline__ void put(float* out, u32 i, u32 width, bool wide, float4 y) {
    if (wide) {
        ((float4*)out)[i] = y;
        return;
    }
    const u32 at = 4 * i;
    out[at] = y.x;
    if (at + 1 < width) out[at + 1] = y.y;
    if (at + 2 < width) out[at + 2] = y.z;
    if (at + 3 < width) out[at + 3] = y.w;
}

// The warp's sum, in every lane: lanes are added in pairs, the same pairs everywhere.
static __device__ __forceinline__ float all(float4 sums) {
    float sum = (sums.x + sums.y) + (sums.z + sums.w);
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
}

static __device__ __forceinline__ bool aligned(const void* a, const void* b, const void* c, const void* d) {
    return (((u64)a | (u64)b | (u64)c | (u64)d) & 15) == 0;
}

// `out` = x / sqrt(mean(x^2) + epsilon) * weight for each of `rows` runs; `x`, `out`: [rows, width], may be the same;
// `weight`: [width]. A warp per row: blockDim.x is a multiple of 32, any number of blocks.
extern "C" __global__ void __launch_bounds__(256) rms_norm(
    u32 rows, u32 width, float epsilon, const float* x, const float* __restrict__ weight, float* out) {
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const u32 quads = (width + 3) / 4;
    const bool wide = width % 4 == 0 && aligned(x, weight, out, out);
    for (u32 row = blockIdx.x * warps + threadIdx.x / WARP; row < rows; row += gridDim.x * warps) {
        const float* run = x + (u64)row * width;
        float* to = out + (u64)row * width;
        float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 i = lane; i < quads; i += WARP) {
            const float4 v = four(run, i, width, wide);
            sums.x = fmaf(v.x, v.x, sums.x), sums.y = fmaf(v.y, v.y, sums.y);
            sums.z = fmaf(v.z, v.z, sums.z), sums.w = fmaf(v.w, v.w, sums.w);
        }
        const float factor = 1.0f / sqrtf(all(sums) / (float)width + epsilon);
        for (u32 i = lane; i < quads; i += WARP) {
            const float4 v = four(run, i, width, wide), w = four(weight, i, width, wide);
            put(to, i, width, wide,
                make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w));
        }
    }
}

// Squares of what differs from the mean; entries behind the end count nothing.
static __device__ __forceinline__ float4 spread(float4 v, float mean, u32 i, u32 width, float4 sums) {
    const u32 at = 4 * i;
    const float a = v.x - mean, b = at + 1 < width ? v.y - mean : 0.0f;
    const float c = at + 2 < width ? v.z - mean : 0.0f, d = at + 3 < width ? v.w - mean : 0.0f;
    return make_float4(fmaf(a, a, sums.x), fmaf(b, b, sums.y), fmaf(c, c, sums.z), fmaf(d, d, sums.w));
}

// `out` = (x - mean) / sqrt(variance + epsilon) * weight + bias for each of `rows` runs; `weight`, `bias`: [width]. Else as
// `rms_norm`.
extern "C" __global__ void __launch_bounds__(256) layer_norm(
    u32 rows, u32 width, float epsilon, const float* x, const float* __restrict__ weight, const float* __restrict__ bias,
    float* out) {
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const u32 quads = (width + 3) / 4;
    const bool wide = width % 4 == 0 && aligned(x, weight, bias, out);
    for (u32 row = blockIdx.x * warps + threadIdx.x / WARP; row < rows; row += gridDim.x * warps) {
        const float* run = x + (u64)row * width;
        float* to = out + (u64)row * width;
        float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 i = lane; i < quads; i += WARP) {
            const float4 v = four(run, i, width, wide);
            sums.x += v.x, sums.y += v.y, sums.z += v.z, sums.w += v.w;
        }
        const float mean = all(sums) / (float)width;
        sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 i = lane; i < quads; i += WARP) sums = spread(four(run, i, width, wide), mean, i, width, sums);
        const float factor = 1.0f / sqrtf(all(sums) / (float)width + epsilon);
        for (u32 i = lane; i < quads; i += WARP) {
            const float4 v = four(run, i, width, wide), w = four(weight, i, width, wide), b = four(bias, i, width, wide);
            put(to, i, width, wide,
                make_float4(fmaf((v.x - mean) * factor, w.x, b.x), fmaf((v.y - mean) * factor, w.y, b.y),
                            fmaf((v.z - mean) * factor, w.z, b.z), fmaf((v.w - mean) * factor, w.w, b.w)));
        }
    }
}
