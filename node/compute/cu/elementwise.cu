// The decoder's small change: embeddings, residual sums, capped scores, bfloat16.
//
// Twins: `exec::decoder::operators` (embed, add), `cpu::softcap`; conversions round to nearest, ties to even, as the `half` crate.
//
// Not here: activations and gates (activation.cu), normalisation (norm.cu).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static __device__ __forceinline__ float widened(u16 x) {
    return __uint_as_float((u32)x << 16);
}

static __device__ __forceinline__ float widened(float x) {
    return x;
}

// To the nearest bfloat16, ties to even; a NaN stays one (its first mantissa bit is set, so that cutting it cannot make it infinite).
static __device__ __forceinline__ u16 narrowed(float x) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
static __device__ __forceinline__ void embed_rows(
    u32 count, u32 width, float scale, const u32* ids, const T* weight, const u32* places, const float* learned, float* out) {
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < count; row += gridDim.x * blockDim.y) {
        const T* from = weight + (u64)ids[row] * width;
        const float* place = learned ? learned + (u64)places[row] * width : nullptr;
        float* to = out + (u64)row * width;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            // Two roundings, as the CPU's.
            const float scaled = __fmul_rn(widened(from[i]), scale);
            to[i] = place ? __fadd_rn(scaled, place[i]) : scaled;
        }
    }
}

// `out`: [count, width] = rows `ids`: [count] of `weight`: [_, width], times `scale`, plus rows `places`: [count] of
// `learned`: [_, width] unless that is null. The caller has checked ids and places. Threads along x share a row, threads
// along y and blocks take rows.
extern "C" __global__ void __launch_bounds__(256) embed(
    u32 count, u32 width, float scale, const u32* __restrict__ ids, const float* __restrict__ weight,
    const u32* __restrict__ places, const float* __restrict__ learned, float* __restrict__ out) {
    embed_rows(count, width, scale, ids, weight, places, learned, out);
}

// The same with a table of bfloat16.
extern "C" __global__ void __launch_bounds__(256) embed_bf16(
    u32 count, u32 width, float scale, const u32* __restrict__ ids, const u16* __restrict__ weight,
    const u32* __restrict__ places, const float* __restrict__ learned, float* __restrict__ out) {
    embed_rows(count, width, scale, ids, weight, places, learned, out);
}

// `out` = a + b, all [len]; `out` may be one of them. Flat grid.
extern "C" __global__ void __launch_bounds__(256) add(u64 len, const float* a, const float* b, float* out) {
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    const u64 quads = (((u64)a | (u64)b | (u64)out) & 15) == 0 ? len / 4 : 0;
    for (u64 i = first; i < quads; i += threads) {
        const float4 x = ((const float4*)a)[i], y = ((const float4*)b)[i];
        ((float4*)out)[i] = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }
    for (u64 i = quads * 4 + first; i < len; i += threads) out[i] = a[i] + b[i];
}

// In place `x` = cap * tanh(x / cap), [len]. Flat grid.
extern "C" __global__ void __launch_bounds__(256) softcap(u64 len, float cap, float* __restrict__ x) {
    const u64 threads = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += threads) x[i] = cap * tanhf(x[i] / cap);
}

// `out`: [len] bfloat16 of `x`: [len]. Flat grid.
extern "C" __global__ void __launch_bounds__(256) to_bf16(u64 len, const float* __restrict__ x, u16* __restrict__ out) {
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    const u64 quads = (((u64)x | (u64)out) & 15) == 0 ? len / 4 : 0;
    for (u64 i = first; i < quads; i += threads) {
        const float4 v = ((const float4*)x)[i];
        ((uint2*)out)[i] = make_uint2((u32)narrowed(v.x) | (u32)narrowed(v.y) << 16, (u32)narrowed(v.z) | (u32)narrowed(v.w) << 16);
    }
    for (u64 i = quads * 4 + first; i < len; i += threads) out[i] = narrowed(x[i]);
}

// `out`: [len] of `x`: [len] bfloat16; exact. Flat grid.
extern "C" __global__ void __launch_bounds__(256) from_bf16(u64 len, const u16* __restrict__ x, float* __restrict__ out) {
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
    const u64 quads = (((u64)x | (u64)out) & 15) == 0 ? len / 4 : 0;
    for (u64 i = first; i < quads; i += threads) {
        const uint2 v = ((const uint2*)x)[i];
        ((float4*)out)[i] = make_float4(widened((u16)v.x), widened((u16)(v.x >> 16)), widened((u16)v.y), widened((u16)(v.y >> 16)));
    }
    for (u64 i = quads * 4 + first; i < len; i += threads) out[i] = widened(x[i]);
}
