// Exact sums: the largest magnitude of a tensor, and f32 matrices added to 64-bit integers at an agreed power of two.
//
// Twins: `exec::statistics::peak`, `exec::fixed_gram` (add_checked, check_f32, merge, to_mean_f32). Integers and maxima are exact
// and rounding is written out as there: the same bits, so that sums of CPU and GPU nodes may meet.
//
// Not here: exponents, who agrees on peaks.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Entries of row `row` that are kept: all, or those up to the diagonal. Where they start.
static __device__ __forceinline__ u32 kept(u32 k, u32 lower, u32 row) {
    return lower ? row + 1 : k;
}

static __device__ __forceinline__ u64 start_of(u32 k, u32 lower, u64 row) {
    return lower ? row * (row + 1) / 2 : row * k;
}

// To the nearest integer, halves away from 0. From 2^53 on a double is an integer already.
static __device__ __forceinline__ i64 nearest(double x) {
    return fabs(x) < 9007199254740992.0 ? (i64)(x + copysign(0.5, x)) : (i64)x;
}

// The largest of a block's values, valid in thread 0. All 256 threads of the block come here.
template <class T>
static __device__ __forceinline__ T block_max(T value, T* shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half && shared[threadIdx.x + half] > shared[threadIdx.x]) {
            shared[threadIdx.x] = shared[threadIdx.x + half];
        }
        __syncthreads();
    }
    return shared[0];
}

// `partial`: [blocks] = each block's largest magnitude in `x`: [len], as bits of an f32 without its sign: their order as
// integers is that of the magnitudes, and NaN is largest. Flat grid of blocks of 256; then `max_u32`.
extern "C" __global__ void __launch_bounds__(256) peak_bits(u64 len, const float* __restrict__ x, u32* __restrict__ partial) {
    __shared__ u32 shared[256];
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 threads = (u64)gridDim.x * blockDim.x;
    const bool wide = ((u64)x & 15) == 0;
    u32 largest = 0;
    // A thread takes the same entries however they are loaded.
    for (u64 i = first; i < (len + 3) / 4; i += threads) {
        if (wide && 4 * i + 4 <= len) {
            const uint4 bits = ((const uint4*)x)[i];
            largest = max(max(largest, bits.x & 0x7fffffffu), bits.y & 0x7fffffffu);
            largest = max(max(largest, bits.z & 0x7fffffffu), bits.w & 0x7fffffffu);
        } else {
            for (u64 at = 4 * i; at < 4 * i + 4 && at < len; at++) largest = max(largest, __float_as_uint(x[at]) & 0x7fffffffu);
        }
    }
    largest = block_max(largest, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = largest;
}

// `out[0]` = the largest of `values`: [count], 0 if there are none. One block of 256 threads.
extern "C" __global__ void __launch_bounds__(256) max_u32(u32 count, const u32* __restrict__ values, u32* __restrict__ out) {
    __shared__ u32 shared[256];
    u32 largest = 0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) largest = max(largest, values[i]);
    largest = block_max(largest, shared);
    if (threadIdx.x == 0) out[0] = largest;
}

// The same of u64.
extern "C" __global__ void __launch_bounds__(256) max_u64(u32 count, const u64* __restrict__ values, u64* __restrict__ out) {
    __shared__ u64 shared[256];
    u64 largest = 0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) largest = values[i] > largest ? values[i] : largest;
    largest = block_max(largest, shared);
    if (threadIdx.x == 0) out[0] = largest;
}

// `partial`: [blocks] = each block's largest |value * factor| among the kept entries of `matrix`: [k, k], as bits of an f64
// without its sign (NaN is largest). `factor`: 2^exponent. May be added if the largest of all is at most 2^62.
//
// Blocks of (256, 1) threads; blocks take rows; then `max_u64`.
extern "C" __global__ void __launch_bounds__(256) fixed_worst(
    u32 k, u32 lower, double factor, const float* __restrict__ matrix, u64* __restrict__ partial) {
    __shared__ u64 shared[256];
    u64 largest = 0;
    for (u32 row = blockIdx.x; row < k; row += gridDim.x) {
        const float* values = matrix + (u64)row * k;
        for (u32 column = threadIdx.x; column < kept(k, lower, row); column += blockDim.x) {
            const double scaled = (double)values[column] * factor;
            const u64 bits = (u64)__double_as_longlong(scaled) & 0x7fffffffffffffffull;
            largest = bits > largest ? bits : largest;
        }
    }
    largest = block_max(largest, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = largest;
}

// `sums` += round(matrix * factor), the kept entries: all `k * k` row by row, or (`lower` 1) the lower triangle's
// `k (k + 1) / 2` row by row. `matrix`: [k, k]; checked with `fixed_worst`. Threads along x share a row, threads along y and
// blocks take rows.
extern "C" __global__ void __launch_bounds__(256) fixed_add(
    u32 k, u32 lower, double factor, const float* __restrict__ matrix, i64* __restrict__ sums) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < k; row += gridDim.x * blockDim.y) {
        const float* values = matrix + (u64)row * k;
        i64* mine = sums + start_of(k, lower, row);
        for (u32 column = threadIdx.x; column < kept(k, lower, row); column += blockDim.x) {
            mine[column] += nearest((double)values[column] * factor);
        }
    }
}

// `sums` += `other`, both [len]. Flat grid.
extern "C" __global__ void __launch_bounds__(256) fixed_merge(u64 len, const i64* __restrict__ other, i64* __restrict__ sums) {
    const u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += threads) sums[i] += other[i];
}

// `out`: [k, k] = sums * factor / count in f32, the kept entries; follow with `mirror_lower` if `lower`. `factor`: 2^-exponent.
// Grid as `fixed_add`.
extern "C" __global__ void __launch_bounds__(256) fixed_mean(
    u32 k, u32 lower, double factor, double count, const i64* __restrict__ sums, float* __restrict__ out) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < k; row += gridDim.x * blockDim.y) {
        const i64* mine = sums + start_of(k, lower, row);
        for (u32 column = threadIdx.x; column < kept(k, lower, row); column += blockDim.x) {
            out[(u64)row * k + column] = (float)((double)mine[column] * factor / count);
        }
    }
}
