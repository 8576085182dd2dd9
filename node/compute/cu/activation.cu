// Element-wise activations: in place, as the residual of the samples objective, and as gates of MLPs.
//
// Twin: `activation.rs`, errors of at most 1e-6 relative to max(1, |x|). Within that, sigmoids take the hardware's exponential
// and quotient; `tanhf` and `erff` are CUDA's own (2 units in the last place), where the CPU has polynomials.
//
// Not here: which activation a model has.

typedef unsigned int u32;
typedef unsigned long long u64;

// A function's value and derivative at `x`.
struct Point {
    float y, slope;
};

// Kinds, as the host writes them; LeakyRelu and PRelu are one.
enum Kind { IDENTITY, RELU, CLIP, LEAKY, SIGMOID, TANH, HARD_SWISH, SILU, GELU, GELU_TANH };

static __device__ __forceinline__ float limit(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

static __device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

static __device__ __forceinline__ Point hard_swish(float x) {
    const float slope = x < 3.0f ? x * (1.0f / 3.0f) + 0.5f : 1.0f;
    return {x * limit(x * (1.0f / 6.0f) + 0.5f, 0.0f, 1.0f), x > -3.0f ? slope : 0.0f};
}

static __device__ __forceinline__ Point silu(float x) {
    const float y = sigmoid(x);
    return {x * y, y * fmaf(x, 1.0f - y, 1.0f)};
}

static __device__ __forceinline__ Point gelu(float x) {
    const float below = fmaf(0.5f, erff(x * 0.70710678f), 0.5f);
    const float density = 0.3989423f * __expf(-0.5f * x * x);
    return {x * below, fmaf(x, density, below)};
}

static __device__ __forceinline__ Point gelu_tanh(float x) {
    const float scale = 0.7978846f, cubic = 0.044715f;
    const float square = x * x;
    const float t = tanhf(scale * x * fmaf(cubic, square, 1.0f));
    const float inner = scale * fmaf(3.0f * cubic, square, 1.0f);
    const float half = fmaf(0.5f, t, 0.5f);
    return {x * half, fmaf(0.5f * x * (1.0f - t * t), inner, half)};
}

// `a`, `b`: the bounds of a clip; `a`: the slope of a leaky one. At a kink the derivative is the one of the flat side.
template <int KIND>
static __device__ __forceinline__ Point at(float x, float a, float b) {
    switch (KIND) {
        case IDENTITY: return {x, 1.0f};
        case RELU: return x > 0.0f ? Point{x, 1.0f} : Point{0.0f, 0.0f};
        case CLIP: return {limit(x, a, b), x > a && x < b ? 1.0f : 0.0f};
        case LEAKY: return x > 0.0f ? Point{x, 1.0f} : Point{a * x, a};
        case SIGMOID: {
            const float y = sigmoid(x);
            return {y, y * (1.0f - y)};
        }
        case TANH: {
            const float y = tanhf(x);
            return {y, 1.0f - y * y};
        }
        case HARD_SWISH: return hard_swish(x);
        case SILU: return silu(x);
        case GELU: return gelu(x);
        default: return gelu_tanh(x);
    }
}

// What is done with a row: `z = (f(z + bias) - other) * f'(z + bias)`, or `z = f(z) * other`, or `z = f(z)`.
enum Job { RESIDUAL, GATE, APPLY };

template <int KIND, int JOB>
static __device__ __forceinline__ float one(float z, float other, float a, float b, float bias) {
    const Point point = at<KIND>(JOB == RESIDUAL ? z + bias : z, a, b);
    if (JOB == RESIDUAL) return (point.y - other) * point.slope;
    return JOB == GATE ? point.y * other : point.y;
}

template <int KIND, int JOB>
static __device__ __forceinline__ void row_of(
    u32 width, bool wide, const float* z, const float* other, float* out, float a, float b, float bias) {
    if (wide) {
        for (u32 i = threadIdx.x; i < width / 4; i += blockDim.x) {
            const float4 x = ((const float4*)z)[i];
            const float4 o = JOB == APPLY ? x : ((const float4*)other)[i];
            ((float4*)out)[i] = make_float4(one<KIND, JOB>(x.x, o.x, a, b, bias), one<KIND, JOB>(x.y, o.y, a, b, bias),
                                            one<KIND, JOB>(x.z, o.z, a, b, bias), one<KIND, JOB>(x.w, o.w, a, b, bias));
        }
        return;
    }
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        out[i] = one<KIND, JOB>(z[i], JOB == APPLY ? z[i] : other[i], a, b, bias);
    }
}

template <int JOB>
static __device__ __forceinline__ void row(
    u32 kind, u32 width, bool wide, const float* z, const float* other, float* out, float a, float b, float bias) {
    switch (kind) {
        case IDENTITY: return row_of<IDENTITY, JOB>(width, wide, z, other, out, a, b, bias);
        case RELU: return row_of<RELU, JOB>(width, wide, z, other, out, a, b, bias);
        case CLIP: return row_of<CLIP, JOB>(width, wide, z, other, out, a, b, bias);
        case LEAKY: return row_of<LEAKY, JOB>(width, wide, z, other, out, a, b, bias);
        case SIGMOID: return row_of<SIGMOID, JOB>(width, wide, z, other, out, a, b, bias);
        case TANH: return row_of<TANH, JOB>(width, wide, z, other, out, a, b, bias);
        case HARD_SWISH: return row_of<HARD_SWISH, JOB>(width, wide, z, other, out, a, b, bias);
        case SILU: return row_of<SILU, JOB>(width, wide, z, other, out, a, b, bias);
        case GELU: return row_of<GELU, JOB>(width, wide, z, other, out, a, b, bias);
        default: return row_of<GELU_TANH, JOB>(width, wide, z, other, out, a, b, bias);
    }
}

// In place `z = (f(z + bias) - target) * f'(z + bias)`; `z`, `target`: [rows, cols].
//
// `table`: [entries, 4], `entries` is 1 (for all rows) or `rows`: kind (0 identity, 1 relu, 2 clip, 3 leaky relu and prelu,
// 4 sigmoid, 5 tanh, 6 hard swish, 7 silu, 8 gelu, 9 gelu by tanh), `a` (a clip's lower bound, a slope), `b` (a clip's upper
// bound), bias. Threads along x share a row, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256, 4) activation_residual(
    u32 rows, u32 cols, u32 entries, const float* __restrict__ table, float* __restrict__ z,
    const float* __restrict__ target) {
    const bool wide = cols % 4 == 0 && (((u64)z | (u64)target) & 15) == 0;
    for (u32 r = blockIdx.x * blockDim.y + threadIdx.y; r < rows; r += gridDim.x * blockDim.y) {
        const float* entry = table + 4 * (u64)(entries == 1 ? 0 : r);
        float* mine = z + (u64)r * cols;
        row<RESIDUAL>((u32)entry[0], cols, wide, mine, target + (u64)r * cols, mine, entry[1], entry[2], entry[3]);
    }
}

// `out` = f(x); `x`, `out`: [rows, width], may be the same. `kind`, `a`, `b`: as above. Grid as above.
extern "C" __global__ void __launch_bounds__(256, 4) activate(
    u32 rows, u32 width, u32 kind, float a, float b, const float* x, float* out) {
    const bool wide = width % 4 == 0 && (((u64)x | (u64)out) & 15) == 0;
    for (u32 r = blockIdx.x * blockDim.y + threadIdx.y; r < rows; r += gridDim.x * blockDim.y) {
        const u64 start = (u64)r * width;
        row<APPLY>(kind, width, wide, x + start, x + start, out + start, a, b, 0.0f);
    }
}

// `out` = f(gate) * up; `out`: [rows, width]; `gate`, `up`: rows of `width` numbers, `gate_stride` and `up_stride` apart (two
// halves of one matrix have its width as stride). `kind`, `a`, `b`: as above. Grid as above.
extern "C" __global__ void __launch_bounds__(256, 4) gate(
    u32 rows, u32 width, u32 kind, float a, float b, const float* __restrict__ gate, u32 gate_stride,
    const float* __restrict__ up, u32 up_stride, float* __restrict__ out) {
    const bool wide = (width | gate_stride | up_stride) % 4 == 0 && (((u64)gate | (u64)up | (u64)out) & 15) == 0;
    for (u32 r = blockIdx.x * blockDim.y + threadIdx.y; r < rows; r += gridDim.x * blockDim.y) {
        row<GATE>(kind, width, wide, gate + (u64)r * gate_stride, up + (u64)r * up_stride, out + (u64)r * width, a, b, 0.0f);
    }
}
