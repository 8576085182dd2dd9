// Runs CUDA kernels on the host, one CUDA thread at a time.
//
// A CUDA thread is a fiber with a stack of its own. It runs until it ends or comes to a barrier or a warp collective, where it
// waits until every thread that must come has come. Blocks, warps between barriers and lanes between collectives run in an
// order drawn from a seed; shared memory is filled with one of two poisons before each block. So a missing barrier, memory
// read before it is written, or a result that depends on the order of blocks shows as different bytes under different
// seeds; threads that miss a barrier, or call different collectives, end the launch with a sentence.
//
// What cannot show here: the hardware's rounding of its quick functions, races inside one stretch of code between barriers that
// no order of whole stretches exposes, coalescing, speed.
//
// Not here: which kernels there are (the test writes that table).

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One section, so that all of it can be poisoned. The shim's own entry makes sure that it exists.
#define __shared__ static __attribute__((section("shared_memory")))

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

// ---- The hardware's functions. Quick ones are macros, since the C library declares some of these names.
#define __expf(x) expf(x)
#define __log2f(x) log2f(x)
#define __fdividef(x, y) ((x) / (y))
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline long long __double_as_longlong(double x) { long long bits; memcpy(&bits, &x, 8); return bits; }
template <class T>
static inline T max(T a, T b) { return a > b ? a : b; }

// ---- Fibers.
namespace shim {

enum class Wait { Ready, Barrier, Collective, Done };

// A fiber outlives its CUDA thread: it takes the next block's. Switching by `_longjmp` asks the system for nothing.
struct Fiber {
    jmp_buf resume;
    bool begun;
    Index index;
    Wait wait;
    int collective;      // which one it waits for
    unsigned phase;      // collectives passed
    uint64_t slot[2];    // what it gives to the collective; two, since a fast lane may be one ahead of a slow one
};

static const size_t STACK = 64 * 1024, FIBERS_MAX = 1024;
static const unsigned LANES = 32;

static Fiber fibers[FIBERS_MAX];
static size_t threads;
static char* stacks;
static jmp_buf scheduler;
static size_t running;
static const char* fault;
static void (*entry)(void**);
static void** parameters;
static uint64_t state;

static uint64_t draw() {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// A permutation of 0..n: the identity for seed 0.
static void permute(std::vector<size_t>& order, size_t n, bool shuffled) {
    order.resize(n);
    for (size_t i = 0; i < n; i++) order[i] = i;
    if (shuffled) {
        for (size_t i = n; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
    }
}

static void pause(Wait wait) {
    Fiber& fiber = fibers[running];
    fiber.wait = wait;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

// All lanes of the warp meet; afterwards each may read what any lane gave.
static const Fiber* meet(unsigned mask, int collective, uint64_t value, unsigned& parity) {
    Fiber& fiber = fibers[running];
    if (mask != 0xffffffffu) fault = "a collective with a partial mask: the shim has whole warps only";
    parity = fiber.phase++ % 2;
    fiber.slot[parity] = value;
    fiber.collective = collective;
    pause(Wait::Collective);
    return &fibers[running - running % LANES];
}

template <class T>
static uint64_t give(T value) {
    static_assert(sizeof(T) <= 8, "a collective carries at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
static T take(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

static void body() {
    for (;;) {
        entry(parameters);
        pause(Wait::Done);
    }
}

// Goes on with a fiber until it waits.
static __attribute__((noinline)) void resume(size_t number) {
    Fiber& fiber = fibers[number];
    running = number;
    threadIdx = fiber.index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.resume, 1);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + number * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    setcontext(&context);
}

static void start() {
    for (size_t i = 0; i < threads; i++) {
        const unsigned linear = (unsigned)i;
        fibers[i].index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
        fibers[i].wait = Wait::Ready;
        fibers[i].phase = 0;
    }
}

// Whether every lane of a warp has come to the same collective.
static bool warp_has_met(size_t first, size_t end) {
    size_t met = 0, done = 0;
    for (size_t i = first; i < end; i++) {
        met += fibers[i].wait == Wait::Collective && fibers[i].collective == fibers[first].collective;
        done += fibers[i].wait == Wait::Done;
    }
    if (met == LANES) return true;
    for (size_t i = first; i < end; i++) {
        if (fibers[i].wait == Wait::Collective && done > 0) fault = "a collective that some lanes have passed by";
        if (fibers[i].wait == Wait::Collective && end - first < LANES) fault = "a collective in a warp that is not whole";
    }
    return false;
}

// Runs a warp until each lane has ended or waits for lanes that do not come before the next barrier.
static void run_warp(size_t first, std::vector<size_t>& order, bool shuffled) {
    const size_t end = first + LANES < threads ? first + LANES : threads;
    while (!fault) {
        permute(order, end - first, shuffled);
        for (size_t i : order) {
            if (fibers[first + i].wait == Wait::Ready) resume(first + i);
        }
        if (!warp_has_met(first, end)) return;
        for (size_t i = first; i < end; i++) fibers[i].wait = Wait::Ready;
    }
}

// Opens the barrier if all wait there who have not ended; false if not, or if nobody waits.
static bool open_barrier() {
    size_t waiting = 0, done = 0;
    for (size_t i = 0; i < threads; i++) {
        waiting += fibers[i].wait == Wait::Barrier;
        done += fibers[i].wait == Wait::Done;
    }
    if (waiting == 0 || waiting + done < threads) return false;
    for (size_t i = 0; i < threads; i++) {
        if (fibers[i].wait == Wait::Barrier) fibers[i].wait = Wait::Ready;
    }
    return true;
}

static bool all_done() {
    for (size_t i = 0; i < threads; i++) {
        if (fibers[i].wait != Wait::Done) return false;
    }
    return true;
}

// Warp after warp from barrier to barrier, so that each is as far ahead of the others as it can be.
static void run_block(bool shuffled) {
    std::vector<size_t> warps, lanes;
    start();
    while (!fault) {
        permute(warps, (threads + LANES - 1) / LANES, shuffled);
        for (size_t warp : warps) run_warp(warp * LANES, lanes, shuffled);
        if (all_done()) return;
        if (!open_barrier() && !fault) fault = "a barrier or collective that some threads never reach";
    }
}

static char own_entry[16] __attribute__((section("shared_memory"), used));
extern "C" char __start_shared_memory[] __attribute__((visibility("hidden")));
extern "C" char __stop_shared_memory[] __attribute__((visibility("hidden")));

// What the kernel table holds.
struct Kernel {
    const char* name;
    void (*entry)(void**);
    const size_t* sizes;
    size_t count;
};

template <auto FUNCTION, class Type = decltype(FUNCTION)>
struct Entry;

// A kernel's arguments, taken from pointers to them, as the driver does.
template <auto FUNCTION, class... Arguments>
struct Entry<FUNCTION, void (*)(Arguments...)> {
    static constexpr size_t sizes[] = {sizeof(Arguments)...};

    template <size_t... I>
    static void call(void** from, std::index_sequence<I...>) {
        FUNCTION(*(std::remove_const_t<Arguments>*)from[I]...);
    }
    static void unpack(void** from) { call(from, std::index_sequence_for<Arguments...>()); }
    static constexpr Kernel kernel(const char* name) { return {name, unpack, sizes, sizeof...(Arguments)}; }
};

// Launches a kernel; null, or what went wrong. `sizes`: of the arguments given, in bytes. Seed 0 is the natural order.
static const char* launch(const Kernel& kernel, const unsigned* grid, const unsigned* block, void** arguments,
                          const size_t* sizes, size_t count, uint64_t seed) {
    if (count != kernel.count) return "the number of arguments differs from the kernel's";
    for (size_t i = 0; i < count; i++) {
        if (sizes[i] != kernel.sizes[i]) return "an argument's size differs from the kernel's";
    }
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    threads = (size_t)block[0] * block[1] * block[2];
    if (threads == 0 || threads > FIBERS_MAX) return "a block of no threads, or of more than 1024";
    if (!stacks) stacks = (char*)malloc(FIBERS_MAX * STACK);
    entry = kernel.entry, parameters = arguments, state = seed, fault = nullptr;
    std::vector<size_t> order;
    permute(order, (size_t)grid[0] * grid[1] * grid[2], seed != 0);
    for (size_t i : order) {
        const unsigned linear = (unsigned)i;
        blockIdx = {linear % grid[0], linear / grid[0] % grid[1], linear / grid[0] / grid[1]};
        // NaN, or a huge number: what is read before it is written differs from order to order.
        memset(__start_shared_memory, seed % 2 ? 0xff : 0x7f, (size_t)(__stop_shared_memory - __start_shared_memory));
        run_block(seed != 0);
        if (!fault) continue;
        // Fibers wait in the middle of a kernel: they are given up.
        for (Fiber& fiber : fibers) fiber.begun = false;
        return fault;
    }
    return nullptr;
}

}  // namespace shim

// ---- Barriers and collectives, as kernels call them. Numbers tell collectives apart.
static inline void __syncthreads() { shim::pause(shim::Wait::Barrier); }

static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    unsigned parity;
    shim::meet(mask, 0, 0, parity);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned parity, bits = 0;
    const shim::Fiber* lanes = shim::meet(mask, 1, predicate != 0, parity);
    for (unsigned lane = 0; lane < shim::LANES; lane++) bits |= (unsigned)(lanes[lane].slot[parity] & 1) << lane;
    return bits;
}

template <class T>
static T __shfl_sync(unsigned mask, T value, int from) {
    unsigned parity;
    const shim::Fiber* lanes = shim::meet(mask, 2, shim::give(value), parity);
    return shim::take<T>(lanes[(unsigned)from % shim::LANES].slot[parity]);
}

template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int distance) {
    unsigned parity;
    const unsigned lane = (unsigned)(shim::running % shim::LANES);
    const shim::Fiber* lanes = shim::meet(mask, 3, shim::give(value), parity);
    return shim::take<T>(lanes[(lane ^ (unsigned)distance) % shim::LANES].slot[parity]);
}

template <class T>
static T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
    unsigned parity;
    const unsigned lane = (unsigned)(shim::running % shim::LANES);
    const shim::Fiber* lanes = shim::meet(mask, 4, shim::give(value), parity);
    return shim::take<T>(lanes[lane + distance < shim::LANES ? lane + distance : lane].slot[parity]);
}
