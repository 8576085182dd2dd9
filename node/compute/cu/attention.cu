// Causal attention with grouped queries, sequence by sequence, without a matrix of all scores.
//
// Twin: `cpu::attend` (cpu/attention.rs; 1e-5 for numbers of order 1), its queries and keys turned beforehand (rotary.cu).
// Method: online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over tiles, as in FlashAttention (Dao et al. 2022,
// arXiv:2205.14135). A row is a query of one head; the heads that share a key head lie side by side, so a tile of 64 rows reads each
// key once for all of them. Per tile of 64 keys: scores by chunks of 32 entries of a head, then their exponentials times the
// values by chunks of 64 columns. Tiles lie where the sequence and the window put them: the order of sums is fixed.
//
// Products are f32 multiply-adds, not tensor cores: attention is a small part of a calibration pass, and scores keep f32's
// accuracy. Exponentials are the hardware's: their error is that of the argument, at most 1.2 units per unit of it.
//
// Not here: projections, rotation.

typedef unsigned int u32;
typedef unsigned long long u64;

#define TILE 64    // rows of queries, and keys, of a tile
#define DEPTH 32   // entries of a head staged at once for scores
#define PITCH 36   // of a staged row of DEPTH: quads of neighbouring rows lie in different banks
#define WIDE 68    // of a staged row of TILE
#define SIDE 4     // a thread's scores are SIDE by SIDE, of 16 by 16 threads
#define NOWHERE (~0ull)

// Shared memory of a block.
struct Stage {
    float chunk[2 * TILE * PITCH];  // queries and keys, later values
    float weights[TILE * WIDE];     // exponentials of one tile of scores
    u64 query[TILE];                // where each row's query begins, or NOWHERE
    u32 position[TILE];             // of each row; what is not a row sees nothing
};

struct Attention {
    u32 heads, kv_heads, head_dim, window;
    float scale, cap;
};

// A matrix of tokens.
struct Tokens {
    const float* data;
    u32 stride;
    bool wide;  // rows and pointer allow loads of four
};

static __device__ __forceinline__ Tokens tokens(const float* data, u32 stride, u32 head_dim) {
    return {data, stride, ((u64)data & 15) == 0 && (stride | head_dim) % 4 == 0};
}

// Four entries from `at`; those from `left` on are 0.
static __device__ __forceinline__ float4 four(const Tokens& from, u64 at, int left) {
    if (left <= 0) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (from.wide) return *(const float4*)(from.data + at);
    const float* x = from.data + at;
    return make_float4(x[0], left > 1 ? x[1] : 0.0f, left > 2 ? x[2] : 0.0f, left > 3 ? x[3] : 0.0f);
}

static __device__ __forceinline__ void add_product(float& sum, float4 a, float4 b) {
    sum = fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

static __device__ __forceinline__ void add_scaled(float4& sum, float a, float4 b) {
    sum = make_float4(fmaf(a, b.x, sum.x), fmaf(a, b.y, sum.y), fmaf(a, b.z, sum.z), fmaf(a, b.w, sum.w));
}

// Largest, or sum, of the 16 threads that share rows.
static __device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

static __device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// Products of the tile's queries with the keys from `key` on (the first `keys` of them); thread (x, y) has rows
// `4 y + i`, keys `x + 16 j`.
static __device__ __forceinline__ void score(
    Stage& stage, const Tokens& q, const Tokens& k, u64 key, u32 keys, u32 head_dim, float (&scores)[SIDE][SIDE]) {
    const u32 x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (u32 i = 0; i < SIDE; i++) {
#pragma unroll
        for (u32 j = 0; j < SIDE; j++) scores[i][j] = 0.0f;
    }
    for (u32 depth = 0; depth < head_dim; depth += DEPTH) {
        // What was staged before has been used.
        __syncthreads();
        for (u32 n = threadIdx.x; n < TILE * DEPTH / 4; n += blockDim.x) {
            const u32 row = n / (DEPTH / 4), column = n % (DEPTH / 4) * 4;
            const int left = (int)head_dim - (int)(depth + column);
            const u64 from = stage.query[row];
            *(float4*)&stage.chunk[row * PITCH + column] = four(q, from + depth + column, from == NOWHERE ? 0 : left);
            *(float4*)&stage.chunk[(TILE + row) * PITCH + column] =
                four(k, key + (u64)row * k.stride + depth + column, row < keys ? left : 0);
        }
        __syncthreads();
#pragma unroll 1
        for (u32 column = 0; column < DEPTH; column += 4) {
            float4 a[SIDE], b[SIDE];
#pragma unroll
            for (u32 i = 0; i < SIDE; i++) {
                a[i] = *(const float4*)&stage.chunk[(y * SIDE + i) * PITCH + column];
                b[i] = *(const float4*)&stage.chunk[(TILE + x + 16 * i) * PITCH + column];
            }
#pragma unroll
            for (u32 i = 0; i < SIDE; i++) {
#pragma unroll
                for (u32 j = 0; j < SIDE; j++) add_product(scores[i][j], a[i], b[j]);
            }
        }
    }
}

// Adds exponentials times values, the columns `64 chunk + 4 x ..` of rows `4 y + i`.
static __device__ __forceinline__ void mix(
    Stage& stage, const Tokens& v, u64 value, u32 keys, u32 head_dim, u32 chunk, float4 (&mixed)[SIDE]) {
    const u32 x = threadIdx.x % 16, y = threadIdx.x / 16;
    __syncthreads();
    for (u32 n = threadIdx.x; n < TILE * TILE / 4; n += blockDim.x) {
        const u32 row = n / (TILE / 4), column = chunk * TILE + n % (TILE / 4) * 4;
        const int left = row < keys ? (int)head_dim - (int)column : 0;
        *(float4*)&stage.chunk[row * WIDE + n % (TILE / 4) * 4] = four(v, value + (u64)row * v.stride + column, left);
    }
    __syncthreads();
#pragma unroll 4
    for (u32 key = 0; key < TILE; key += 4) {
        float4 b[4];
#pragma unroll
        for (u32 n = 0; n < 4; n++) b[n] = *(const float4*)&stage.chunk[(key + n) * WIDE + 4 * x];
#pragma unroll
        for (u32 i = 0; i < SIDE; i++) {
            const float4 a = *(const float4*)&stage.weights[(y * SIDE + i) * WIDE + key];
            add_scaled(mixed[i], a.x, b[0]);
            add_scaled(mixed[i], a.y, b[1]);
            add_scaled(mixed[i], a.z, b[2]);
            add_scaled(mixed[i], a.w, b[3]);
        }
    }
}

// `CHUNKS`: columns of 64 that a head has at most.
template <int CHUNKS>
static __device__ __forceinline__ void attend(
    Stage& stage, const u32* starts, const Attention& attention, const Tokens& q, const Tokens& k, const Tokens& v, float* out) {
    const u32 x = threadIdx.x % 16, y = threadIdx.x / 16;
    const u32 head_dim = attention.head_dim, group = attention.heads / attention.kv_heads;
    const u32 begin = starts[blockIdx.z], length = starts[blockIdx.z + 1] - begin;
    const u64 rows = (u64)length * group;
    // Late rows see most keys: they go first.
    const u64 top = (u64)(gridDim.x - 1 - blockIdx.x) * TILE;
    if (top >= rows) return;
    const u64 bottom = top + TILE < rows ? top + TILE : rows;
    const u32 last_position = (u32)((bottom - 1) / group), first_position = (u32)(top / group);
    const u32 window = attention.window == 0 ? 0xffffffffu : attention.window;
    const u32 first_key = first_position >= window ? first_position - window + 1 : 0;
    const u64 key_head = (u64)blockIdx.y * head_dim;

    if (threadIdx.x < TILE) {
        const u64 row = top + threadIdx.x;
        const u64 head = (u64)blockIdx.y * group + row % group;
        stage.query[threadIdx.x] = row < rows ? (begin + row / group) * q.stride + head * head_dim : NOWHERE;
        stage.position[threadIdx.x] = row < rows ? (u32)(row / group) : (u32)NOWHERE;
    }
    float most[SIDE], sum[SIDE];
    float4 mixed[CHUNKS][SIDE];
#pragma unroll
    for (u32 i = 0; i < SIDE; i++) {
        most[i] = -3.402823466e38f, sum[i] = 0.0f;
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) mixed[chunk][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    for (u32 key = first_key; key <= last_position; key += TILE) {
        const u32 keys = last_position - key + 1 < TILE ? last_position - key + 1 : TILE;
        float scores[SIDE][SIDE];
        score(stage, q, k, (u64)(begin + key) * k.stride + key_head, keys, head_dim, scores);
#pragma unroll
        for (u32 i = 0; i < SIDE; i++) {
            // One more than the last key it sees; 0 for what is not a row.
            const u32 end = stage.position[y * SIDE + i] + 1;
            float largest = most[i], added = 0.0f;
#pragma unroll
            for (u32 j = 0; j < SIDE; j++) {
                const u32 at = key + x + 16 * j;
                float value = scores[i][j] * attention.scale;
                if (attention.cap != 0.0f) value = attention.cap * tanhf(value / attention.cap);
                const bool seen = at < end && end - at <= window;
                // `x * 0` is NaN unless `x` is finite: such a row's sum, and all of it, becomes NaN.
                if (seen) added += value * 0.0f;
                scores[i][j] = seen ? value : __uint_as_float(0xff800000u);
                largest = fmaxf(largest, scores[i][j]);
            }
            largest = row_max(largest);
            const float shrink = __expf(most[i] - largest);
            most[i] = largest;
#pragma unroll
            for (u32 j = 0; j < SIDE; j++) {
                const float weight = __expf(scores[i][j] - largest);
                stage.weights[(y * SIDE + i) * WIDE + x + 16 * j] = weight;
                added += weight;
            }
            sum[i] = fmaf(sum[i], shrink, row_sum(added));
#pragma unroll
            for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
                float4& m = mixed[chunk][i];
                m.x *= shrink, m.y *= shrink, m.z *= shrink, m.w *= shrink;
            }
        }
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
            if (chunk * TILE >= head_dim) continue;
            mix(stage, v, (u64)(begin + key) * v.stride + key_head, keys, head_dim, chunk, mixed[chunk]);
        }
    }

#pragma unroll
    for (u32 i = 0; i < SIDE; i++) {
        const u64 row = top + y * SIDE + i;
        if (row >= rows) continue;
        const float factor = 1.0f / sum[i];
        float* to_row = out + ((begin + row / group) * attention.heads + (u64)blockIdx.y * group + row % group) * head_dim;
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
            const u32 column = chunk * TILE + 4 * x;
            const float4 m = mixed[chunk][i];
            if (column < head_dim) to_row[column] = m.x * factor;
            if (column + 1 < head_dim) to_row[column + 1] = m.y * factor;
            if (column + 2 < head_dim) to_row[column + 2] = m.z * factor;
            if (column + 3 < head_dim) to_row[column + 3] = m.w * factor;
        }
    }
}

// Attention of sequences that lie one after the other, heads of at most 64 numbers.
//
// A row of scores that is not finite becomes NaN.
//
// `starts`: [sequences + 1], the first token of each sequence and the end. `heads` is a multiple of `kv_heads`; query head `h`
// reads key head `h / (heads / kv_heads)`. `scale`: factor of the scores; then `softcap * tanh(score / softcap)` unless 0.
// `window`: position `t` sees `t - window + 1 ..= t`; 0: all before it. `q`: [tokens, heads * head_dim], `k`, `v`:
// [tokens, kv_heads * head_dim], rows their strides apart. `out`: [tokens, heads * head_dim].
//
// Blocks of 256 threads; a grid of ceil(longest * heads / kv_heads / 64) along x, `kv_heads` along y, sequences along z.
extern "C" __global__ void __launch_bounds__(256) attention_64(
    const u32* __restrict__ starts, u32 heads, u32 kv_heads, u32 head_dim, float scale, float softcap, u32 window,
    const float* __restrict__ q, u32 q_stride, const float* __restrict__ k, u32 k_stride, const float* __restrict__ v,
    u32 v_stride, float* __restrict__ out) {
    __shared__ __align__(16) Stage stage;
    attend<1>(stage, starts, {heads, kv_heads, head_dim, window, scale, softcap}, tokens(q, q_stride, head_dim),
              tokens(k, k_stride, head_dim), tokens(v, v_stride, head_dim), out);
}

// The same, heads of at most 128 numbers.
extern "C" __global__ void __launch_bounds__(256) attention_128(
    const u32* __restrict__ starts, u32 heads, u32 kv_heads, u32 head_dim, float scale, float softcap, u32 window,
    const float* __restrict__ q, u32 q_stride, const float* __restrict__ k, u32 k_stride, const float* __restrict__ v,
    u32 v_stride, float* __restrict__ out) {
    __shared__ __align__(16) Stage stage;
    attend<2>(stage, starts, {heads, kv_heads, head_dim, window, scale, softcap}, tokens(q, q_stride, head_dim),
              tokens(k, k_stride, head_dim), tokens(v, v_stride, head_dim), out);
}

// The same, heads of at most 256 numbers. One block a multiprocessor, so that no sum is spilled.
extern "C" __global__ void __launch_bounds__(256, 1) attention_256(
    const u32* __restrict__ starts, u32 heads, u32 kv_heads, u32 head_dim, float scale, float softcap, u32 window,
    const float* __restrict__ q, u32 q_stride, const float* __restrict__ k, u32 k_stride, const float* __restrict__ v,
    u32 v_stride, float* __restrict__ out) {
    __shared__ __align__(16) Stage stage;
    attend<4>(stage, starts, {heads, kv_heads, head_dim, window, scale, softcap}, tokens(q, q_stride, head_dim),
              tokens(k, k_stride, head_dim), tokens(v, v_stride, head_dim), out);
}
