// Mixtures of experts: the choice, each expert's tokens, the weighted sum.
//
// Twins: `cpu::{route, chosen, combine}` (cpu/experts.rs). The choice is made among the same numbers in the same order; the
// softmax may differ in its last bits (CUDA's own `expf`).
//
// Not here: the experts, which are products; gathering their tokens (`gather_rows` in rows.cu).

typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define ALL 0xffffffffu

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, distance));
    return x;
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
    return x;
}

static __device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const u64 other = __shfl_xor_sync(ALL, x, distance);
        x = other > x ? other : x;
    }
    return x;
}

// `weights`: [tokens, experts] = the softmax of each row of `logits`, 0 but for the largest `top_k` (the lower index where
// equal), divided by their sum if `normalise`; a chosen weight is never 0. At most 1024 experts, `top_k` in 1..=experts.
// A row that is not finite becomes NaN. A warp per row: blockDim.x is a multiple of 32, any number of blocks.
extern "C" __global__ void __launch_bounds__(256) route(
    u32 tokens, u32 experts, u32 top_k, u32 normalise, const float* __restrict__ logits, float* __restrict__ weights) {
    const u32 lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (u32 token = blockIdx.x * warps + threadIdx.x / WARP; token < tokens; token += gridDim.x * warps) {
        const float* x = logits + (u64)token * experts;
        float* out = weights + (u64)token * experts;
        // A lane reads and writes every 32nd expert only.
        float largest = -3.402823466e38f, spoilt = 0.0f, sum = 0.0f;
        for (u32 e = lane; e < experts; e += WARP) largest = fmaxf(largest, x[e]), spoilt += x[e] * 0.0f;
        largest = warp_max(largest), spoilt = warp_sum(spoilt);
        for (u32 e = lane; e < experts; e += WARP) {
            out[e] = spoilt == 0.0f ? expf(x[e] - largest) : __uint_as_float(0x7fc00000u);
            sum += out[e];
        }
        sum = warp_sum(sum);
        for (u32 e = lane; e < experts; e += WARP) out[e] /= sum;
        // Softmax weights are not negative, so their bits order them; below the bits, a lower index is larger.
        u32 chosen = 0;
        float kept = 0.0f;
        for (u32 n = 0; n < top_k; n++) {
            u64 best = 0;
            for (u32 e = lane, i = 0; e < experts; e += WARP, i++) {
                const u64 key = (u64)(__float_as_uint(out[e]) & 0x7fffffffu) << 32 | (ALL - e);
                if (!(chosen >> i & 1) && key > best) best = key;
            }
            best = warp_max(best);
            const u32 e = ALL - (u32)best;
            if (e % WARP == lane) chosen |= 1u << e / WARP;
            kept += __uint_as_float((u32)(best >> 32));
        }
        if (!normalise) kept = 1.0f;
        for (u32 e = lane, i = 0; e < experts; e += WARP, i++) {
            const float weight = out[e] / kept;
            const float least = weight < 1.17549435e-38f ? 1.17549435e-38f : weight;
            out[e] = chosen >> i & 1 ? least : 0.0f;
        }
    }
}

// Tokens of every expert, ascending: those whose weight is not 0, or (`all_tokens` 1) all. `weights`: [tokens, experts].
// `lists`: [experts, tokens], of which row `e` receives `counts[e]` tokens. Blocks of 256 threads, one per expert.
extern "C" __global__ void __launch_bounds__(256) chosen(
    u32 tokens, u32 experts, u32 all_tokens, const float* __restrict__ weights, u32* __restrict__ lists, u32* __restrict__ counts) {
    __shared__ u32 found[256 / WARP];
    const u32 expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32* list = lists + (u64)expert * tokens;
    u32 count = 0;
    for (u32 start = 0; start < tokens; start += blockDim.x) {
        const u32 token = start + threadIdx.x;
        const bool mine = token < tokens && (all_tokens || weights[(u64)token * experts + expert] != 0.0f);
        const u32 bits = __ballot_sync(ALL, mine);
        if (lane == 0) found[warp] = __popc(bits);
        __syncthreads();
        u32 before = 0, total = 0;
        for (u32 other = 0; other < blockDim.x / WARP; other++) {
            if (other < warp) before += found[other];
            total += found[other];
        }
        if (mine) list[count + before + __popc(bits & ((1u << lane) - 1))] = token;
        count += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) counts[expert] = count;
}

// `out[tokens[i]]` += weight of `expert` for that token * x[i]; `x`: [count, width], `tokens`: [count] from `chosen`, `weights`:
// [_, experts], `out`: [_, width]. An expert that was not chosen adds nothing, whatever it computed. Threads along x share a
// row, threads along y and blocks take rows.
extern "C" __global__ void __launch_bounds__(256) combine(
    u32 count, u32 width, u32 experts, u32 expert, const float* __restrict__ weights, const u32* __restrict__ tokens,
    const float* __restrict__ x, float* __restrict__ out) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < count; row += gridDim.x * blockDim.y) {
        const u64 token = tokens[row];
        const float weight = weights[token * experts + expert];
        if (weight == 0.0f) continue;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            out[token * width + i] = __fadd_rn(out[token * width + i], __fmul_rn(weight, x[(u64)row * width + i]));
        }
    }
}
