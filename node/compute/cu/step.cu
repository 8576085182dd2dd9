// The fused AdaRound iteration: gradient, rounding loss, Adam and the next soft weights in one pass over memory. Its data gradient
// comes as f32, or as a product of half precision: errors and H are brought into its range by powers of two, one for every row
// and every column, which change no digit. So one rounding to 11 bits is lost, wherever a layer's inputs are large or small; what
// is 2^28 times smaller than the largest of its row, or a correlation below 2^-14, has fewer.
//
// Twins: `cpu::step` (cpu/step.rs), whose tolerance against f64 (5e-6) leaves room for the hardware's exponential, logarithm
// and quotient: exp2 and log2 are within 3e-7, the quotient within 2 units in the last place. Square roots are exact. Of halves
// and scales: `cpu::scaled`, the same bits. Weights do not depend on each other: any grid gives the same bits.
//
// Not here: the schedule of `lambda` and `beta`, products.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// Constants of one iteration, as `StepArgs` names them.
struct Step {
    float learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale;
};

// What one weight keeps from iteration to iteration, and its soft value.
struct State {
    float v, m1, m2, soft;
};

static __device__ __forceinline__ float limit(float x, float low, float high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

static __device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// `h(v)`; `slope` receives its derivative, 0 where `h` is clamped.
static __device__ __forceinline__ float rectified(float v, float& slope) {
    const float stretch = 1.2f, low = -0.1f;
    const float sigma = sigmoid(v);
    const float stretched = fmaf(sigma, stretch, low);
    slope = stretched > 0.0f && stretched < 1.0f ? stretch * sigma * (1.0f - sigma) : 0.0f;
    return limit(stretched, 0.0f, 1.0f);
}

// `d/dv (1 - |2h - 1|^beta)`, given `h` and `h'`. The smallest normal number stands for 0, whose logarithm is infinite.
static __device__ __forceinline__ float rounding_slope(float h, float slope, float beta) {
    const float centred = fmaf(2.0f, h, -1.0f);
    const float base = fmaxf(fabsf(centred), 1.17549435e-38f);
    const float magnitude = exp2f((beta - 1.0f) * __log2f(base));
    return -2.0f * beta * copysignf(magnitude, centred) * slope;
}

// A settled weight's moments become 0 instead of decaying for ever.
static __device__ __forceinline__ float flush(float x) {
    return fabsf(x) < 1e-30f ? 0.0f : x;
}

template <bool ROUND>
static __device__ __forceinline__ void update(const Step& step, float data, float lo, float delta, State& state) {
    float slope;
    const float h = rectified(state.v, slope);
    if (delta == 0.0f) slope = 0.0f;
    float g = step.grad_scale * data * delta * slope;
    if (ROUND) g = fmaf(step.lambda, rounding_slope(h, slope, step.beta), g);
    state.m1 = flush(fmaf(step.beta1, state.m1, (1.0f - step.beta1) * g));
    state.m2 = flush(fmaf(step.beta2, state.m2, (1.0f - step.beta2) * g * g));
    const float rate = step.learning_rate * step.bias1;
    state.v -= __fdividef(rate * state.m1, sqrtf(state.m2 * step.bias2) + step.eps);
    state.soft = fmaf(delta, rectified(state.v, slope), lo);
}

// The largest number of half precision; what is larger becomes it, a NaN stays one.
#define LARGEST 0x477fe000u

static __device__ __forceinline__ u16 half_of(float x) {
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
    u32 size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return (u16)(sign | 0x7e00u);
    // Below 2^-14 steps are of 2^-24, as those of f32 above one half.
    if (size < 0x38800000u) return (u16)(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u));
    size = size < LARGEST ? size : LARGEST;
    return (u16)(sign | (((size + 0xfffu + (size >> 13 & 1)) >> 13) - (112u << 10)));
}

static __device__ __forceinline__ uint2 halves_of(float x, float y, float z, float w) {
    return make_uint2((u32)half_of(x) | (u32)half_of(y) << 16, (u32)half_of(z) | (u32)half_of(w) << 16);
}

static __device__ __forceinline__ bool aligned(const void* pointer) {
    return ((u64)pointer & 15) == 0;
}

// `DIFFERENCE`: the data gradient is `gradient - target`; else `target` is not read. `ROUND`: lambda is not 0.
template <bool DIFFERENCE, bool ROUND>
static __device__ __forceinline__ void pass(
    u64 len, const float* __restrict__ gradient, const float* __restrict__ target, const float* __restrict__ lo,
    const float* __restrict__ delta, float* __restrict__ v, float* __restrict__ m1, float* __restrict__ m2,
    float* __restrict__ soft, const Step& step) {
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 threads = (u64)gridDim.x * blockDim.x;
    const bool wide = aligned(gradient) && (!DIFFERENCE || aligned(target)) && aligned(lo) && aligned(delta) && aligned(v)
        && aligned(m1) && aligned(m2) && aligned(soft);
    const u64 quads = wide ? len / 4 : 0;
    for (u64 i = first; i < quads; i += threads) {
        float4 g = ((const float4*)gradient)[i];
        if (DIFFERENCE) {
            const float4 t = ((const float4*)target)[i];
            g.x -= t.x, g.y -= t.y, g.z -= t.z, g.w -= t.w;
        }
        const float4 l = ((const float4*)lo)[i], d = ((const float4*)delta)[i];
        const float4 v4 = ((float4*)v)[i], a = ((float4*)m1)[i], b = ((float4*)m2)[i];
        State x = {v4.x, a.x, b.x, 0.0f}, y = {v4.y, a.y, b.y, 0.0f};
        State z = {v4.z, a.z, b.z, 0.0f}, w = {v4.w, a.w, b.w, 0.0f};
        update<ROUND>(step, g.x, l.x, d.x, x);
        update<ROUND>(step, g.y, l.y, d.y, y);
        update<ROUND>(step, g.z, l.z, d.z, z);
        update<ROUND>(step, g.w, l.w, d.w, w);
        ((float4*)v)[i] = make_float4(x.v, y.v, z.v, w.v);
        ((float4*)m1)[i] = make_float4(x.m1, y.m1, z.m1, w.m1);
        ((float4*)m2)[i] = make_float4(x.m2, y.m2, z.m2, w.m2);
        ((float4*)soft)[i] = make_float4(x.soft, y.soft, z.soft, w.soft);
    }
    for (u64 i = quads * 4 + first; i < len; i += threads) {
        State state = {v[i], m1[i], m2[i], 0.0f};
        update<ROUND>(step, DIFFERENCE ? gradient[i] - target[i] : gradient[i], lo[i], delta[i], state);
        v[i] = state.v, m1[i] = state.m1, m2[i] = state.m2, soft[i] = state.soft;
    }
}

// What the iteration in half precision works on; see `adaround_step_halves`.
struct Halves {
    u32 rows, cols;
    const float *product, *target, *lo, *delta, *by_row, *by_column;
    float *v, *m1, *m2;
    u16* errors;
};

template <bool ROUND>
static __device__ __forceinline__ float renew(
    const Step& step, float data, float lo, float delta, float& v, float& m1, float& m2) {
    State state = {v, m1, m2, 0.0f};
    update<ROUND>(step, data, lo, delta, state);
    v = state.v, m1 = state.m1, m2 = state.m2;
    return state.soft;
}

template <bool ROUND>
static __device__ __forceinline__ void pass_halves(const Halves& on, const Step& step) {
    const bool wide = on.cols % 4 == 0 && aligned(on.product) && aligned(on.target) && aligned(on.lo) && aligned(on.delta)
        && aligned(on.by_column) && aligned(on.v) && aligned(on.m1) && aligned(on.m2) && ((u64)on.errors & 7) == 0;
    const u32 first = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (u32 row = blockIdx.y * blockDim.y + threadIdx.y; row < on.rows; row += gridDim.y * blockDim.y) {
        const float scale = on.by_row[row], back = 1.0f / scale;
        const u64 begin = (u64)row * on.cols;
        for (u32 quad = wide ? first : on.cols; quad < on.cols / 4; quad += threads) {
            const u64 i = begin / 4 + quad;
            const float4 c = ((const float4*)on.by_column)[quad];
            const float4 p = ((const float4*)on.product)[i], t = ((const float4*)on.target)[i];
            const float4 l = ((const float4*)on.lo)[i], d = ((const float4*)on.delta)[i];
            float4 v = ((float4*)on.v)[i], a = ((float4*)on.m1)[i], b = ((float4*)on.m2)[i];
            const float x = renew<ROUND>(step, fmaf(p.x * back, c.x, -t.x), l.x, d.x, v.x, a.x, b.x);
            const float y = renew<ROUND>(step, fmaf(p.y * back, c.y, -t.y), l.y, d.y, v.y, a.y, b.y);
            const float z = renew<ROUND>(step, fmaf(p.z * back, c.z, -t.z), l.z, d.z, v.z, a.z, b.z);
            const float w = renew<ROUND>(step, fmaf(p.w * back, c.w, -t.w), l.w, d.w, v.w, a.w, b.w);
            ((float4*)on.v)[i] = v, ((float4*)on.m1)[i] = a, ((float4*)on.m2)[i] = b;
            // Factor by factor: their product may leave f32's range.
            ((uint2*)on.errors)[i] =
                halves_of(x * scale * c.x, y * scale * c.y, z * scale * c.z, w * scale * c.w);
        }
        for (u32 col = wide ? on.cols : first; col < on.cols; col += threads) {
            const u64 i = begin + col;
            const float c = on.by_column[col], data = fmaf(on.product[i] * back, c, -on.target[i]);
            const float soft = renew<ROUND>(step, data, on.lo[i], on.delta[i], on.v[i], on.m1[i], on.m2[i]);
            on.errors[i] = half_of(soft * scale * c);
        }
    }
}

// One iteration of the gram objective: the data gradient is `grad_scale * (product - target)`.
//
// All arrays: [len] f32. In: `product` (W~ H), `target` (W C), `lo` (dequantized floor), `delta` (scale; 0: the weight is
// fixed). In and out: `v`, `m1`, `m2`. Out: `soft` = lo + delta * h(v). The constants are those of `StepArgs`, in its order.
extern "C" __global__ void __launch_bounds__(256) adaround_step_difference(
    u64 len, const float* __restrict__ product, const float* __restrict__ target, const float* __restrict__ lo,
    const float* __restrict__ delta, float* __restrict__ v, float* __restrict__ m1, float* __restrict__ m2,
    float* __restrict__ soft, float learning_rate, float beta1, float beta2, float eps, float bias1, float bias2,
    float lambda, float beta, float grad_scale) {
    const Step step = {learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale};
    if (lambda != 0.0f) {
        pass<true, true>(len, product, target, lo, delta, v, m1, m2, soft, step);
    } else {
        pass<true, false>(len, product, target, lo, delta, v, m1, m2, soft, step);
    }
}

// One iteration of the samples objective: the data gradient is `grad_scale * gradient`. Else as above.
extern "C" __global__ void __launch_bounds__(256) adaround_step_given(
    u64 len, const float* __restrict__ gradient, const float* __restrict__ lo, const float* __restrict__ delta,
    float* __restrict__ v, float* __restrict__ m1, float* __restrict__ m2, float* __restrict__ soft,
    float learning_rate, float beta1, float beta2, float eps, float bias1, float bias2, float lambda, float beta,
    float grad_scale) {
    const Step step = {learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale};
    if (lambda != 0.0f) {
        pass<false, true>(len, gradient, gradient, lo, delta, v, m1, m2, soft, step);
    } else {
        pass<false, false>(len, gradient, gradient, lo, delta, v, m1, m2, soft, step);
    }
}

// One iteration of the gram objective with errors and product in half precision: `product` is what `errors` times the halves of H
// gave, so that the data gradient is `grad_scale * (product * by_column / by_row - target)`.
//
// Arrays [rows, cols], as above; `by_row`: [rows], `by_column`: [cols], powers of two. Out: `errors` = the halves of
// (lo + delta * h(v)) * by_row * by_column. Threads and blocks along x take columns, along y rows.
extern "C" __global__ void __launch_bounds__(256) adaround_step_halves(
    u32 rows, u32 cols, const float* __restrict__ product, const float* __restrict__ target,
    const float* __restrict__ lo, const float* __restrict__ delta, const float* __restrict__ by_row,
    const float* __restrict__ by_column, float* __restrict__ v, float* __restrict__ m1, float* __restrict__ m2,
    u16* __restrict__ errors, float learning_rate, float beta1, float beta2, float eps, float bias1, float bias2,
    float lambda, float beta, float grad_scale) {
    const Step step = {learning_rate, beta1, beta2, eps, bias1, bias2, lambda, beta, grad_scale};
    const Halves halves = {rows, cols, product, target, lo, delta, by_row, by_column, v, m1, m2, errors};
    if (lambda != 0.0f) {
        pass_halves<true>(halves, step);
    } else {
        pass_halves<false>(halves, step);
    }
}

// `out`: [rows, cols] = x * by_row[row] * by_column[column], `x`: [rows, cols].
//
// Threads along x share rows, threads along y and blocks along x take rows.
extern "C" __global__ void __launch_bounds__(256) scaled_halves(
    u32 rows, u32 cols, const float* __restrict__ x, const float* __restrict__ by_row,
    const float* __restrict__ by_column, u16* __restrict__ out) {
    const bool wide = cols % 4 == 0 && (((u64)x | (u64)by_column) & 15) == 0 && ((u64)out & 7) == 0;
    for (u32 row = blockIdx.x * blockDim.y + threadIdx.y; row < rows; row += gridDim.x * blockDim.y) {
        const float scale = by_row[row];
        const float* from = x + (u64)row * cols;
        u16* to = out + (u64)row * cols;
        if (wide) {
            for (u32 i = threadIdx.x; i < cols / 4; i += blockDim.x) {
                const float4 v = ((const float4*)from)[i], c = ((const float4*)by_column)[i];
                ((uint2*)to)[i] = halves_of(
                    v.x * scale * c.x, v.y * scale * c.y, v.z * scale * c.z, v.w * scale * c.w);
            }
        } else {
            for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = half_of(from[i] * scale * by_column[i]);
        }
    }
}

// `out`: [rows] = the power of two that brings the largest of a row's errors, whatever is chosen, to [2^13, 2^14); 1 if there is none.
//
// `lo`, `delta`: [rows, cols], errors lie between lo and lo + delta; `by_column`: [cols], the errors' other factor.
// Blocks of 256 threads along x; blocks take rows.
extern "C" __global__ void __launch_bounds__(256) row_scales(
    u32 rows, u32 cols, const float* __restrict__ lo, const float* __restrict__ delta,
    const float* __restrict__ by_column, float* __restrict__ out) {
    __shared__ u32 shared[256];
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
        u32 most = 0;
        for (u32 i = threadIdx.x; i < cols; i += blockDim.x) {
            const u64 at = (u64)row * cols + i;
            const float low = lo[at], reach = fmaxf(fabsf(low), fabsf(low + delta[at])) * by_column[i];
            const u32 bits = __float_as_uint(reach);
            most = bits > most ? bits : most;
        }
        shared[threadIdx.x] = most;
        __syncthreads();
        for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
            if (threadIdx.x < half && shared[threadIdx.x + half] > shared[threadIdx.x]) {
                shared[threadIdx.x] = shared[threadIdx.x + half];
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            // Exponents: 2^13 is 140; of a scale and of what it multiplies they add up to 127 + 140.
            const u32 exponent = shared[0] >> 23;
            out[row] = exponent > 13 && exponent < 255 ? __uint_as_float((267 - exponent) << 23) : 1.0f;
        }
        __syncthreads();
    }
}
