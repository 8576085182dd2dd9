// Scores of some queries become weights: what attention by two products does between them.
//
// Twin: `cpu::attend` (cpu/attention.rs), together with the products around it. Sums are taken in an order that the shape fixes.
//
// Not here: the products, which queries and keys meet (`cuda/attention.rs`); attention without a matrix of scores (attention.cu).

typedef unsigned int u32;
typedef unsigned long long u64;

// Largest, or sum, over the 256 threads of a block; all of them get it.
template <bool SUM>
static __device__ __forceinline__ float of_block(float x, float* shared) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = SUM ? x + other : fmaxf(x, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float all = shared[0];
    for (u32 warp = 1; warp < 8; warp++) all = SUM ? all + shared[warp] : fmaxf(all, shared[warp]);
    return all;
}

static __device__ __forceinline__ float capped(float score, float scale, float softcap) {
    const float value = score * scale;
    return softcap != 0.0f ? softcap * tanhf(value / softcap) : value;
}

// `scores`: [heads, rows, pitch], of which `keys` columns count: row `i` becomes the softmax of `scale` times its entries, then
// `softcap * tanh(score / softcap)` unless that is 0, over the keys it sees, and 0 at the others. Row `i` is the query at position
// `first_row + i`, column `j` the key at `first_key + j`; a query sees itself and those before it, the last `window` of them unless
// that is 0: at least one. A row with a score that is not finite becomes NaN.
//
// Blocks of 256 threads, one for each row (x) and head (y).
extern "C" __global__ void __launch_bounds__(256) softmax_rows(
    u32 keys, u32 pitch, u32 first_row, u32 first_key, float scale, float softcap, u32 window, float* __restrict__ scores) {
    __shared__ float shared[8];
    float* row = scores + ((u64)blockIdx.y * gridDim.x + blockIdx.x) * pitch;
    const u32 behind = first_row + blockIdx.x + 1;
    const u32 end = behind - first_key < keys ? behind - first_key : keys;
    const u32 begin = window != 0 && behind > window && behind - window > first_key ? behind - window - first_key : 0;
    float most = -3.402823466e38f, sum = 0.0f;
    for (u32 i = begin + threadIdx.x; i < end; i += 256) {
        const float value = capped(row[i], scale, softcap);
        // `x * 0` is NaN unless `x` is finite: such a row's sum, and all of it, becomes NaN.
        sum += value * 0.0f;
        most = fmaxf(most, value);
    }
    most = of_block<false>(most, shared);
    for (u32 i = begin + threadIdx.x; i < end; i += 256) sum += __expf(capped(row[i], scale, softcap) - most);
    const float factor = 1.0f / of_block<true>(sum, shared);
    for (u32 i = threadIdx.x; i < keys; i += 256) {
        const bool seen = i >= begin && i < end;
        row[i] = seen ? __expf(capped(row[i], scale, softcap) - most) * factor : 0.0f;
    }
}
