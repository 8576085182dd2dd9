// The fused AdaRound iteration: gradient, rounding loss, Adam and the next soft weights in one pass over memory.
//
// Twin: `cpu::step` (cpu/step.rs), whose tolerance against f64 (5e-6) leaves room for the hardware's exponential, logarithm
// and quotient: exp2 and log2 are within 3e-7, the quotient within 2 units in the last place. Square roots are exact.
// Weights do not depend on each other: any grid gives the same bits.
//
// Not here: the schedule of `lambda` and `beta`, products.

typedef unsigned long long u64;

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
