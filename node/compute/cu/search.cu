// The grid with the smallest weighted squared rounding error, for every run of `width` weights of a row.
//
// Twin: `quant::mse_search`, the same bits: sums go in sixteen lanes of f32 over blocks of 1,024 weights, halves onto halves in f64,
// and nothing is fused. What the twin tries one after the other, sixteen candidates try here side by side; the first of the best wins.
// Not here: which weights and importances there are to search (`quant`).

typedef unsigned int u32;
typedef unsigned long long u64;

#define ALL 0xffffffffu
#define LANES 16
// Candidates side by side, each by sixteen threads.
#define SIDE 16
#define BLOCK 1024
// Clip fractions are multiples of 1 / COARSE; steps on either side of the best one; rounds of least squares.
#define COARSE 80
#define FRACTION_MIN 4
#define FINE 4
#define FITS_MAX 6
// 1.5 * 2^23 rounds half to even; the smallest scale is four times the smallest normal number.
#define ROUND 12582912.0f
#define SCALE_MIN (4.0f * 1.17549435e-38f)
#define SCALE_MAX 3.40282347e38f

// A run's weights, their importance, and the integers there are.
struct Cell {
    const float *w, *importance;
    u32 count;
    int qmin, qmax;
    bool symmetric;
};

struct Entry {
    float scale;
    int zero_point;
};

struct Best {
    Entry entry;
    double error;
};

static __device__ __forceinline__ float usable(double scale) {
    const float x = (float)scale;
    return x < SCALE_MIN ? SCALE_MIN : x > SCALE_MAX ? SCALE_MAX : x;
}

static __device__ __forceinline__ Entry covering(const Cell& cell, double lo, double hi) {
    lo = lo < 0.0 ? lo : 0.0, hi = hi > 0.0 ? hi : 0.0;
    if (lo == 0.0 && hi == 0.0) return {1.0f, 0};
    if (cell.symmetric) return {usable((hi > -lo ? hi : -lo) / (double)cell.qmax), 0};
    const float scale = usable((hi - lo) / (double)(cell.qmax - cell.qmin));
    const int zero_point = (int)rint(-lo / (double)scale) + cell.qmin;
    return {scale, zero_point < cell.qmin ? cell.qmin : zero_point > cell.qmax ? cell.qmax : zero_point};
}

static __device__ __forceinline__ float nearest(float t, float lo, float hi) {
    t = t > lo ? t : lo;
    t = t < hi ? t : hi;
    return __fsub_rn(__fadd_rn(t, ROUND), ROUND);
}

// The sum of sixteen threads' numbers, the same in all of them.
static __device__ __forceinline__ double sum(float x) {
    double wide = (double)x;
    for (int distance = LANES / 2; distance > 0; distance /= 2) wide += __shfl_xor_sync(ALL, wide, distance);
    return wide;
}

// With `FIT`, `[sum t k, sum k^2]` of weights `t` in units of the scale and their levels `k`; else the squared error in `out[0]`.
template <bool FIT>
static __device__ __forceinline__ void accumulate(const Cell& cell, Entry entry, double* out) {
    const float reciprocal = 1.0f / entry.scale;
    const float lo = (float)(cell.qmin - entry.zero_point), hi = (float)(cell.qmax - entry.zero_point);
    double first = 0.0, second = 0.0;
    for (u32 from = 0; from < cell.count; from += BLOCK) {
        const u32 end = cell.count - from < BLOCK ? cell.count : from + BLOCK;
        float a = 0.0f, b = 0.0f;
        for (u32 i = from + threadIdx.x % LANES; i < end; i += LANES) {
            const float t = __fmul_rn(cell.w[i], reciprocal), k = nearest(t, lo, hi), weight = cell.importance[i];
            if (FIT) {
                a = __fadd_rn(a, __fmul_rn(__fmul_rn(weight, t), k));
                b = __fadd_rn(b, __fmul_rn(__fmul_rn(weight, k), k));
            } else {
                const float e = __fsub_rn(k, t);
                a = __fadd_rn(a, __fmul_rn(__fmul_rn(weight, e), e));
            }
        }
        first += sum(a);
        if (FIT) second += sum(b);
    }
    out[0] = first, out[1] = second;
}

static __device__ __forceinline__ double error(const Cell& cell, Entry entry) {
    double sums[2];
    accumulate<false>(cell, entry, sums);
    return sums[0] * ((double)entry.scale * (double)entry.scale);
}

static __device__ __forceinline__ bool offer(Best& best, Entry entry, double error) {
    const bool better = error < best.error;
    if (better) best = {entry, error};
    return better;
}

// Which ends of the range are moved.
enum Ends { BOTH, LOW, HIGH };

// Fractions of the range: coarse ones from `first` on, or fine ones around `centre`.
struct Fractions {
    int count, first, step;
    bool fine;
    double centre, fine_step;

    __device__ __forceinline__ double at(int k) const {
        if (!fine) return (double)(first + k * step) / (double)COARSE;
        return __dadd_rn(centre, __dmul_rn((double)(k < FINE ? k - FINE : k - FINE + 1), fine_step));
    }
};

// Tries all fractions; returns the best one, or `fraction`.
static __device__ __forceinline__ double scan(
    const Cell& cell, double lo, double hi, Ends moving, const Fractions& fractions, double fraction, Best& best) {
    __shared__ double errors[SIDE];
    __shared__ Entry entries[SIDE];
    const int mine = (int)threadIdx.x / LANES;
    for (int base = 0; base < fractions.count; base += SIDE) {
        // Those beyond the last repeat it: every thread takes part in the sums.
        const int k = base + mine < fractions.count ? base + mine : fractions.count - 1;
        const double f = fractions.at(k);
        const Entry entry = covering(
            cell, moving == HIGH ? lo : __dmul_rn(lo, f), moving == LOW ? hi : __dmul_rn(hi, f));
        const double found = error(cell, entry);
        __syncthreads();
        if (threadIdx.x % LANES == 0) errors[mine] = found, entries[mine] = entry;
        __syncthreads();
        for (int c = 0; c < SIDE && base + c < fractions.count; c++) {
            if (offer(best, entries[c], errors[c])) fraction = fractions.at(base + c);
        }
    }
    return fraction;
}

static __device__ __forceinline__ void shrink(const Cell& cell, double& lo, double& hi, Ends moving, Best& best) {
    // One end alone moves little once both were searched together.
    const int first = moving == BOTH ? FRACTION_MIN : COARSE / 2, step = moving == BOTH ? 1 : 3;
    Fractions fractions = {(COARSE - first + step - 1) / step, first, step, false, 1.0, 0.0};
    double fraction = scan(cell, lo, hi, moving, fractions, 1.0, best);
    fractions.fine = true, fractions.count = 2 * FINE, fractions.centre = fraction;
    fractions.fine_step = (double)step / ((double)COARSE * (double)(FINE + 1));
    fraction = scan(cell, lo, hi, moving, fractions, fraction, best);
    if (moving != HIGH) lo = __dmul_rn(lo, fraction);
    if (moving != LOW) hi = __dmul_rn(hi, fraction);
}

static __device__ __forceinline__ Entry search(const Cell& cell) {
    float low = 0.0f, high = 0.0f;
    for (u32 i = threadIdx.x % LANES; i < cell.count; i += LANES) {
        low = cell.w[i] < low ? cell.w[i] : low, high = cell.w[i] > high ? cell.w[i] : high;
    }
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        const float other_low = __shfl_xor_sync(ALL, low, distance), other_high = __shfl_xor_sync(ALL, high, distance);
        low = other_low < low ? other_low : low, high = other_high > high ? other_high : high;
    }
    if (low == 0.0f && high == 0.0f) return {1.0f, 0};
    double lo = (double)low, hi = (double)high;
    Best best;
    best.entry = covering(cell, lo, hi);
    best.error = error(cell, best.entry);
    shrink(cell, lo, hi, BOTH, best);
    if (!cell.symmetric) {
        shrink(cell, lo, hi, LOW, best);
        shrink(cell, lo, hi, HIGH, best);
    }
    for (int round = 0; round < FITS_MAX; round++) {
        double sums[2];
        accumulate<true>(cell, best.entry, sums);
        if (!(sums[0] > 0.0 && sums[1] > 0.0)) break;
        const Entry entry = {usable((double)best.entry.scale * sums[0] / sums[1]), best.entry.zero_point};
        if (!offer(best, entry, error(cell, entry))) break;
    }
    return best.entry;
}

// `w`: [rows, cols], finite; `importance`: [cols], not negative, each run's with one that is not 0. Out, one for every run of a row,
// [rows, ceil(cols / width)]: `scale`, and `zero_point` as the bits of a signed integer.
//
// Blocks of 256 threads along x, which take runs. `symmetric`: 0 or 1; then zero points are 0. `qmin`: the bits of a signed integer.
extern "C" __global__ void __launch_bounds__(256, 3) search_grids(
    u32 rows, u32 cols, u32 width, u32 qmin, u32 qmax, u32 symmetric, const float* __restrict__ w,
    const float* __restrict__ importance, float* __restrict__ scale, u32* __restrict__ zero_point) {
    const u32 groups = (cols + width - 1) / width;
    for (u64 run = blockIdx.x; run < (u64)rows * groups; run += gridDim.x) {
        const u32 start = (u32)(run % groups) * width;
        const Cell cell = {
            w + run / groups * cols + start, importance + start, cols - start < width ? cols - start : width,
            (int)qmin, (int)qmax, symmetric != 0};
        const Entry found = search(cell);
        if (threadIdx.x == 0) scale[run] = found.scale, zero_point[run] = (u32)found.zero_point;
    }
}
