// Rotary positions: pairs of numbers turned by an angle that grows with the position.
//
// Twin: `cpu::RotaryTable::turn`, with its tables; each result is two products and a sum, unfused as there: the same bits.
//
// Not here: frequencies, attention.

typedef unsigned int u32;
typedef unsigned long long u64;

// Turns `heads` heads of `head_dim` numbers in each of `tokens` rows; entry `i < pairs` turns with entry `i + pairs`, entries
// from `2 pairs` on are copied.
//
// `positions`: [tokens]. `cos`, `sin`: [_, pairs], a row per position. `x`: rows `stride` apart; `out`: rows `out_stride` apart,
// may be `x` itself with its stride. Threads along x share a head, threads along y and blocks take (token, head).
extern "C" __global__ void __launch_bounds__(256) rotate(
    u32 tokens, u32 heads, u32 head_dim, u32 pairs, const u32* __restrict__ positions, const float* __restrict__ cos,
    const float* __restrict__ sin, const float* x, u32 stride, float* out, u32 out_stride) {
    const u64 rows = (u64)tokens * heads;
    for (u64 row = (u64)blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += (u64)gridDim.x * blockDim.y) {
        const u64 token = row / heads;
        const u32 head = (u32)(row - token * heads);
        const float* from = x + token * stride + (u64)head * head_dim;
        float* to = out + token * out_stride + (u64)head * head_dim;
        const u64 angle = (u64)positions[token] * pairs;
        for (u32 i = threadIdx.x; i < head_dim - pairs; i += blockDim.x) {
            if (i >= pairs) {
                to[i + pairs] = from[i + pairs];
                continue;
            }
            const float a = from[i], b = from[i + pairs], c = cos[angle + i], s = sin[angle + i];
            to[i] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
            to[i + pairs] = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
        }
    }
}
