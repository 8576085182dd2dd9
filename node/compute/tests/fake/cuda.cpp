// A CUDA driver, cuBLAS and NVRTC of one device that is the host: what the product calls of them, and nothing more.
//
// Every stream is a queue. Work waits until somebody waits for it, as late as the rules of CUDA allow: a host that reads before
// it has waited, reuses page-locked memory that is still to be copied, frees what another stream still uses, or lets two
// streams go unordered, finds wrong bytes. Memory is NaN when it is allocated, gone when it is freed, and lies between pages that nobody may touch. Kernels run
// under shim.h (`SHIM`); NVRTC is the host's C++ compiler, and what it makes lies in `FOLDER`. Handles and addresses
// that nobody gave out end in an error, copies and launches are checked against the allocations they touch.
//
// Not here: speed, the hardware's rounding, races inside a kernel, functions that the product does not call (cudarc panics).

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmath>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

static size_t total() {
    const char* asked = getenv("FAKE_CUDA_MEMORY");
    return asked ? strtoull(asked, nullptr, 10) : 3ull << 30;
}

// FAKE_CUDA_MEMORY: bytes of a device that has less.
static const size_t MEMORY = total();

struct Event;
struct Stream {
    std::deque<std::function<void()>> queue;
};
// How often it was recorded, and how often those records were reached.
struct Event {
    Stream* stream = nullptr;
    uint64_t recorded = 0, reached = 0;
};

static std::recursive_mutex turn;
static std::set<Stream*> streams;
static std::set<Event*> events;
static std::map<uintptr_t, size_t> memory, pinned;
static size_t used;
static int failure = OK;  // of work that was queued: sticky, as CUDA's
static thread_local void* current;

typedef std::lock_guard<std::recursive_mutex> Turn;

static int fail(int code, const char* what) {
    fprintf(stderr, "fake CUDA: %s\n", what);
    return code;
}

static void broken(const char* what) { failure = fail(ILLEGAL_ADDRESS, what); }

// Whether `bytes` from `address` lie within one array of the device.
static bool holds(const std::map<uintptr_t, size_t>& arrays, uint64_t address, size_t bytes) {
    auto next = arrays.upper_bound(address);
    if (next == arrays.begin()) return false;
    auto array = std::prev(next);
    return address - array->first <= array->second && bytes <= array->second - (address - array->first);
}

static bool step(Stream* stream) {
    if (stream->queue.empty()) return false;
    auto work = std::move(stream->queue.front());
    stream->queue.pop_front();
    work();
    return true;
}

static void drain(Stream* stream) {
    while (step(stream)) {}
}

static void reach(Event* event, uint64_t record) {
    while (events.count(event) && event->reached < record && step(event->stream)) {}
}

static int queue(void* handle, std::function<void()> work) {
    if (!current) return fail(NO_CONTEXT, "a call from a thread without a context");
    auto stream = (Stream*)handle;
    if (!streams.count(stream)) return fail(INVALID_HANDLE, "a stream that nobody made");
    stream->queue.push_back(std::move(work));
    return failure;
}

// ---- Driver: device and context.

API int cuInit(unsigned) { return OK; }
API int cuDriverGetVersion(int* version) { return *version = 13000, OK; }
API int cuDeviceGetCount(int* count) { return *count = 1, OK; }
API int cuDeviceGet(int* device, int ordinal) { return ordinal == 0 ? (*device = 0, OK) : INVALID_VALUE; }
API int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = MEMORY, OK; }
API int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &turn, OK; }
API int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API int cuCtxGetCurrent(void** context) { return *context = current, OK; }
API int cuCtxSetCurrent(void* context) { return current = context, OK; }
API int cuCtxSetFlags(unsigned) { return OK; }

API int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, (size_t)length, "Host pretending to be a GPU");
    return OK;
}

API int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 3; return OK;    // multiprocessors: few, so that grids are shorter than arrays
        case 75: *value = 9; return OK;    // compute capability
        case 76: *value = 0; return OK;
        case 115: *value = 1; return OK;   // memory pools
        default: return fail(INVALID_VALUE, "an attribute that the fake does not know");
    }
}

API int cuCtxSynchronize() {
    Turn mine(turn);
    for (Stream* stream : std::set<Stream*>(streams)) drain(stream);
    return failure;
}

API int cuMemGetInfo_v2(size_t* free, size_t* total) {
    Turn mine(turn);
    return *free = MEMORY - used, *total = MEMORY, OK;
}

// The pool of memory that is freed: here it goes back at once, whatever it may keep.
API int cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &used, OK; }
API int cuMemPoolTrimTo(void*, size_t) { return OK; }

API int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    const bool known = pool == &used && attribute == 4 && *(uint64_t*)value <= MEMORY;
    return known ? OK : fail(INVALID_VALUE, "an attribute of a pool that the fake does not know");
}

API int cuGetErrorName(int code, const char** name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_FAKE";
    return OK;
}

API int cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "the fake's error";
    return OK;
}

// ---- Driver: streams and events.

API int cuStreamCreate(void** stream, unsigned) {
    Turn mine(turn);
    auto made = new Stream;
    streams.insert(made), *stream = made;
    return OK;
}

API int cuStreamDestroy_v2(void* handle) {
    Turn mine(turn);
    auto stream = (Stream*)handle;
    if (!streams.count(stream)) return fail(INVALID_HANDLE, "a stream destroyed twice");
    drain(stream);
    streams.erase(stream);
    delete stream;
    return OK;
}

API int cuStreamSynchronize(void* handle) {
    Turn mine(turn);
    if (!streams.count((Stream*)handle)) return fail(INVALID_HANDLE, "a stream that nobody made");
    drain((Stream*)handle);
    return failure;
}

API int cuEventCreate(void** event, unsigned) {
    Turn mine(turn);
    auto made = new Event;
    events.insert(made), *event = made;
    return OK;
}

API int cuEventDestroy_v2(void* handle) {
    Turn mine(turn);
    if (!events.erase((Event*)handle)) return fail(INVALID_HANDLE, "an event destroyed twice");
    delete (Event*)handle;
    return OK;
}

API int cuEventRecord(void* handle, void* stream) {
    Turn mine(turn);
    auto event = (Event*)handle;
    if (!events.count(event)) return fail(INVALID_HANDLE, "an event that nobody made");
    event->stream = (Stream*)stream;
    const uint64_t record = ++event->recorded;
    return queue(stream, [event, record] { if (events.count(event)) event->reached = record; });
}

API int cuEventSynchronize(void* handle) {
    Turn mine(turn);
    auto event = (Event*)handle;
    if (!events.count(event)) return fail(INVALID_HANDLE, "an event that nobody made");
    reach(event, event->recorded);
    return failure;
}

API int cuEventQuery(void* event) { return cuEventSynchronize(event); }

API int cuStreamWaitEvent(void* stream, void* handle, unsigned) {
    Turn mine(turn);
    auto event = (Event*)handle;
    if (!events.count(event)) return fail(INVALID_HANDLE, "an event that nobody made");
    return queue(stream, [event, record = event->recorded] { reach(event, record); });
}

// ---- Driver: memory.

static const size_t PAGE = 4096;

static size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Memory that ends at (or, for lengths that are no multiple of 16 bytes, a few bytes before) a page that nobody may touch, behind
// another: whoever leaves it ends the process there and then. 0 if there is none.
static uintptr_t between_pages(size_t bytes) {
    const size_t inside = whole_pages(bytes);
    void* start = mmap(nullptr, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return 0;
    char* first = (char*)start + PAGE;
    if (mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) return munmap(start, inside + 2 * PAGE), 0;
    return (uintptr_t)(first + inside - (bytes + 15) / 16 * 16);
}

static void unmap(uintptr_t address, size_t bytes) {
    const size_t inside = whole_pages(bytes);
    const uintptr_t first = address + (bytes + 15) / 16 * 16 - inside;
    munmap((void*)(first - PAGE), inside + 2 * PAGE);
}

API int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
    Turn mine(turn);
    if (!current) return fail(NO_CONTEXT, "a call from a thread without a context");
    if (!streams.count((Stream*)stream)) return fail(INVALID_HANDLE, "a stream that nobody made");
    if (bytes > MEMORY - used) return OUT_OF_MEMORY;
    const uintptr_t made = between_pages(bytes);
    if (!made) return OUT_OF_MEMORY;
    memset((void*)made, 0xff, bytes);
    memory[made] = bytes, used += bytes;
    *address = made;
    return OK;
}

API int cuMemFreeAsync(uint64_t address, void* stream) {
    Turn mine(turn);
    return queue(stream, [address] {
        auto array = memory.find(address);
        if (array == memory.end()) return broken("memory freed twice");
        used -= array->second;
        unmap(array->first, array->second);
        memory.erase(array);
    });
}

API int cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    Turn mine(turn);
    *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*address) return OUT_OF_MEMORY;
    memset(*address, 0xff, bytes);
    pinned[(uintptr_t)*address] = bytes;
    return OK;
}

API int cuMemFreeHost(void* address) {
    Turn mine(turn);
    auto array = pinned.find((uintptr_t)address);
    if (array == pinned.end()) return fail(INVALID_VALUE, "page-locked memory freed twice");
    memset(address, 0xff, array->second);
    pinned.erase(array);
    free(address);
    return OK;
}

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    Turn mine(turn);
    auto copy = [to, bytes](const void* from) {
        if (!holds(memory, to, bytes)) return broken("a copy to outside of an array");
        memcpy((void*)to, from, bytes);
    };
    if (holds(pinned, (uintptr_t)from, bytes)) {
        return queue(stream, [=] {
            if (!holds(pinned, (uintptr_t)from, bytes)) return broken("a copy out of page-locked memory that is gone");
            copy(from);
        });
    }
    // Other memory has been read when the call returns.
    std::vector<char> staged((const char*)from, (const char*)from + bytes);
    return queue(stream, [copy, staged = std::move(staged)] { copy(staged.data()); });
}

API int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    Turn mine(turn);
    const int queued = queue(stream, [=] {
        if (!holds(memory, from, bytes)) return broken("a copy from outside of an array");
        memcpy(to, (const void*)from, bytes);
    });
    // Memory that is not page-locked has been written when the call returns.
    if (queued == OK && !holds(pinned, (uintptr_t)to, bytes)) drain((Stream*)stream);
    return queued == OK ? failure : queued;
}

API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    Turn mine(turn);
    return queue(stream, [=] {
        if (!holds(memory, from, bytes) || !holds(memory, to, bytes)) return broken("a copy outside of an array");
        memmove((void*)to, (const void*)from, bytes);
    });
}

API int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    Turn mine(turn);
    return queue(stream, [=] {
        if (!holds(memory, to, bytes)) return broken("memory set outside of an array");
        memset((void*)to, value, bytes);
    });
}

// ---- NVRTC and modules: kernels compiled for the host.

struct Function {
    const char* (*launch)(size_t, const unsigned*, const unsigned*, void**, const size_t*, size_t, uint64_t);
    size_t number;
    std::vector<size_t> sizes;
};
struct Module {
    void* library;
    std::map<std::string, Function> functions;
};
struct Program {
    std::string source, library, log;
};

// Names of the kernels in a source, in order.
static std::vector<std::string> kernels(const std::string& source) {
    const std::string mark = "__global__ void ";
    std::vector<std::string> names;
    for (size_t at = source.find(mark); at != std::string::npos; at = source.find(mark, at)) {
        at += mark.size();
        if (source.compare(at, 2, "__") == 0) at = source.find(") ", at) + 2;
        names.push_back(source.substr(at, source.find('(', at) - at));
    }
    return names;
}

API int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, OK; }
API int nvrtcGetNumSupportedArchs(int* count) { return *count = 1, OK; }
API int nvrtcGetSupportedArchs(int* all) { return all[0] = 90, OK; }

API int nvrtcCreateProgram(void** program, const char* source, const char*, int, const char* const*, const char* const*) {
    auto made = new Program;
    made->source = source;
    *program = made;
    return OK;
}

API int nvrtcDestroyProgram(void** program) {
    delete (Program*)*program;
    return *program = nullptr, OK;
}

API int nvrtcCompileProgram(void* handle, int, const char* const*) {
    Turn mine(turn);
    static int number = 0;
    auto program = (Program*)handle;
    const std::string base = FOLDER "/kernels" + std::to_string(number++);
    std::ofstream out(base + ".cpp");
    out << "#include \"" SHIM "\"\n" << program->source << "\nstatic const shim::Kernel kernels[] = {\n";
    for (const std::string& name : kernels(program->source)) {
        out << "    shim::Entry<&" << name << ">::kernel(\"" << name << "\"),\n";
    }
    out << "};\n"
           "extern \"C\" const shim::Kernel* kernel(size_t number) {\n"
           "    return number < sizeof(kernels) / sizeof(kernels[0]) ? &kernels[number] : nullptr;\n}\n"
           "extern \"C\" const char* launch(size_t number, const unsigned* grid, const unsigned* block, void** arguments,\n"
           "    const size_t* sizes, size_t count, uint64_t seed) {\n"
           "    return shim::launch(kernels[number], grid, block, arguments, sizes, count, seed);\n}\n";
    out.close();
    const char* compiler = getenv("CXX");
    const std::string command = std::string(compiler ? compiler : "g++") + " -std=c++17 -O1 -ffp-contract=off -U_FORTIFY_SOURCE -fPIC -shared -o " +
                                base + ".so " + base + ".cpp 2> " + base + ".log";
    const int result = system(command.c_str());
    std::ifstream log(base + ".log");
    program->log.assign(std::istreambuf_iterator<char>(log), {});
    program->library = base + ".so";
    return result == 0 ? OK : 6;
}

static int give(const std::string& text, char* to) { return memcpy(to, text.c_str(), text.size() + 1), OK; }

API int nvrtcGetCUBINSize(void* program, size_t* bytes) { return *bytes = ((Program*)program)->library.size() + 1, OK; }
API int nvrtcGetCUBIN(void* program, char* to) { return give(((Program*)program)->library, to); }
API int nvrtcGetProgramLogSize(void* program, size_t* bytes) { return *bytes = ((Program*)program)->log.size() + 1, OK; }
API int nvrtcGetProgramLog(void* program, char* to) { return give(((Program*)program)->log, to); }

// As shim.h has it.
struct ShimKernel {
    const char* name;
    void (*entry)(void**);
    const size_t* sizes;
    size_t count;
};

API int cuModuleLoadData(void** module, const void* image) {
    Turn mine(turn);
    auto made = new Module;
    made->library = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (!made->library) return fail(INVALID_VALUE, dlerror());
    auto kernel = (const ShimKernel* (*)(size_t))dlsym(made->library, "kernel");
    auto launch = (decltype(Function::launch))dlsym(made->library, "launch");
    for (size_t number = 0; const ShimKernel* found = kernel(number); number++) {
        made->functions[found->name] = {launch, number, {found->sizes, found->sizes + found->count}};
    }
    return *module = made, OK;
}

API int cuModuleUnload(void* module) {
    cuCtxSynchronize();
    return delete (Module*)module, OK;
}

API int cuModuleGetFunction(void** function, void* module, const char* name) {
    auto& all = ((Module*)module)->functions;
    auto found = all.find(name);
    return found == all.end() ? NOT_FOUND : (*function = &found->second, OK);
}

API int cuLaunchKernel(void* handle, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned,
                       void* stream, void** arguments, void**) {
    Turn mine(turn);
    auto function = *(Function*)handle;
    if (bx * by * bz > 1024 || x == 0 || y == 0 || z == 0) return fail(INVALID_VALUE, "a grid that no device has");
    // Arguments are read before the call returns.
    std::vector<std::vector<char>> copies;
    for (size_t i = 0; i < function.sizes.size(); i++) {
        copies.emplace_back((char*)arguments[i], (char*)arguments[i] + function.sizes[i]);
    }
    return queue(stream, [=]() mutable {
        const unsigned grid[] = {x, y, z}, block[] = {bx, by, bz};
        std::vector<void*> pointers;
        for (auto& copy : copies) pointers.push_back(copy.data());
        // Another order of blocks and threads for every launch.
        static uint64_t seed = 0;
        const char* message = function.launch(function.number, grid, block, pointers.data(), function.sizes.data(),
                                              function.sizes.size(), seed++);
        if (message) broken(message);
    });
}

// ---- cuBLAS. Column-major; sums in a fixed order.

struct Blas {
    void* stream = nullptr;
};
enum { BLAS_INVALID = 7, BLAS_FAILED = 13, F32 = 0, F64 = 1, F16 = 2, BF16 = 14, COMPUTE_F32 = 68, COMPUTE_F64 = 70, COMPUTE_TF32 = 77 };

static int blas_queue(void* handle, std::function<void()> work) {
    return queue(((Blas*)handle)->stream, std::move(work)) == OK ? 0 : (int)BLAS_FAILED;
}

API int cublasCreate_v2(void** handle) { return *handle = new Blas, OK; }
API int cublasDestroy_v2(void* handle) { return delete (Blas*)handle, OK; }
API int cublasSetStream_v2(void* handle, void* stream) { return ((Blas*)handle)->stream = stream, OK; }
API int cublasGetProperty(int part, int* value) { return *value = part == 0 ? 13 : 0, OK; }

// One matrix as a product reads it.
// Bits of the f32 that is a number in half precision.
static uint32_t of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
    if (size >= 0x7c00) return sign | 0x7f800000u | size << 13;
    float value = std::ldexp((float)(size < 0x400 ? size : (size & 0x3ff) | 0x400), size < 0x400 ? -24 : (int)(size >> 10) - 25);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return sign | bits;
}

struct Factor {
    uint64_t address;
    int type, leading;
    bool transposed;

    size_t bytes() const { return type == BF16 || type == F16 ? 2 : 4; }

    // Row-major copy [rows, cols] of the operand.
    bool read(int rows, int cols, bool rough, std::vector<float>& out) const {
        const int height = transposed ? cols : rows, width = transposed ? rows : cols;
        if (leading < height) return false;
        if (!holds(memory, address, ((size_t)(width - 1) * leading + height) * bytes())) return false;
        out.resize((size_t)rows * cols);
        for (int row = 0; row < rows; row++) {
            for (int col = 0; col < cols; col++) {
                const size_t at = transposed ? (size_t)row * leading + col : (size_t)col * leading + row;
                uint32_t bits;
                if (type == BF16) bits = (uint32_t)((const uint16_t*)address)[at] << 16;
                else if (type == F16) bits = of_half(((const uint16_t*)address)[at]);
                else bits = ((const uint32_t*)address)[at] & (rough ? 0xffffe000u : 0xffffffffu);
                memcpy(&out[(size_t)row * cols + col], &bits, 4);
            }
        }
        return true;
    }
};

static void multiply(Factor a, Factor b, int m, int n, int k, float alpha, float beta, uint64_t to, int leading, bool rough) {
    std::vector<float> left, right, sums((size_t)n);
    const bool fits = a.read(m, k, rough, left) && b.read(k, n, rough, right) && leading >= m &&
                      holds(memory, to, ((size_t)(n - 1) * leading + m) * 4);
    if (!fits) return broken("a product outside of its arrays");
    auto out = (float*)to;
    for (int row = 0; row < m; row++) {
        for (float& sum : sums) sum = 0;
        for (int i = 0; i < k; i++) {
            const float x = left[(size_t)row * k + i];
            const float* y = &right[(size_t)i * n];
            for (int col = 0; col < n; col++) sums[col] += x * y[col];
        }
        for (int col = 0; col < n; col++) {
            float& value = out[(size_t)col * leading + row];
            value = alpha * sums[col] + (beta == 0 ? 0 : beta * value);
        }
    }
}

API int cublasGemmStridedBatchedEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type,
                                   int lda, long long a_step, const void* b, int b_type, int ldb, long long b_step,
                                   const void* beta, void* c, int c_type, int ldc, long long c_step, int count, int compute, int) {
    Turn mine(turn);
    const bool known = (a_type == F32 || a_type == F16 || a_type == BF16) && a_type == b_type && c_type == F32 && m > 0 && n > 0 && k > 0 &&
                       (compute == COMPUTE_F32 || (compute == COMPUTE_TF32 && a_type == F32));
    if (!known) return fail(BLAS_INVALID, "a product that the fake does not know");
    const float scale = *(const float*)alpha, keep = *(const float*)beta;
    return blas_queue(handle, [=] {
        for (int i = 0; i < count; i++) {
            Factor left{(uint64_t)a, a_type, lda, ta != 0}, right{(uint64_t)b, b_type, ldb, tb != 0};
            left.address += (uint64_t)(i * a_step) * left.bytes();
            right.address += (uint64_t)(i * b_step) * right.bytes();
            multiply(left, right, m, n, k, scale, keep, (uint64_t)c + (uint64_t)(i * c_step) * 4, ldc, compute == COMPUTE_TF32);
        }
    });
}

// f64 throughout.
static void multiply_f64(const double* a, int lda, bool ta, const double* b, int ldb, bool tb, int m, int n, int k, double alpha,
                         double beta, double* c, int ldc) {
    const size_t left = (size_t)((ta ? m : k) - 1) * lda + (ta ? k : m), right = (size_t)((tb ? k : n) - 1) * ldb + (tb ? n : k);
    const bool fits = lda >= (ta ? k : m) && ldb >= (tb ? n : k) && ldc >= m && holds(memory, (uint64_t)a, left * 8) &&
                      holds(memory, (uint64_t)b, right * 8) && holds(memory, (uint64_t)c, ((size_t)(n - 1) * ldc + m) * 8);
    if (!fits) return broken("a product of f64 outside of its arrays");
    for (int col = 0; col < n; col++) {
        for (int row = 0; row < m; row++) {
            double sum = 0;
            for (int i = 0; i < k; i++) {
                sum += a[ta ? (size_t)row * lda + i : (size_t)i * lda + row] * b[tb ? (size_t)i * ldb + col : (size_t)col * ldb + i];
            }
            double& value = c[(size_t)col * ldc + row];
            value = alpha * sum + (beta == 0 ? 0 : beta * value);
        }
    }
}

API int cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                     const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algo) {
    if (c_type == F64) {
        Turn mine(turn);
        if (a_type != F64 || b_type != F64 || compute != COMPUTE_F64 || m <= 0 || n <= 0 || k <= 0) {
            return fail(BLAS_INVALID, "a product that the fake does not know");
        }
        const double scale = *(const double*)alpha, keep = *(const double*)beta;
        return blas_queue(handle, [=] {
            multiply_f64((const double*)a, lda, ta != 0, (const double*)b, ldb, tb != 0, m, n, k, scale, keep, (double*)c, ldc);
        });
    }
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c, c_type, ldc, 0, 1,
                                      compute, algo);
}

API int cublasSsyrk_v2(void* handle, int fill, int transposed, int n, int k, const float* alpha, const float* a, int lda,
                       const float* beta, float* c, int ldc) {
    Turn mine(turn);
    if (fill != 1 || transposed != 0) return fail(BLAS_INVALID, "a triangle that the fake does not know");
    const float scale = *alpha, keep = *beta;
    return blas_queue(handle, [=] {
        std::vector<float> rows;
        const Factor factor{(uint64_t)a, F32, lda, false};
        if (!factor.read(n, k, false, rows) || !holds(memory, (uint64_t)c, ((size_t)(n - 1) * ldc + n) * 4)) {
            return broken("a triangle outside of its arrays");
        }
        for (int col = 0; col < n; col++) {
            for (int row = 0; row <= col; row++) {
                float sum = 0;
                for (int i = 0; i < k; i++) sum += rows[(size_t)row * k + i] * rows[(size_t)col * k + i];
                float& value = c[(size_t)col * ldc + row];
                value = scale * sum + (keep == 0 ? 0 : keep * value);
            }
        }
    });
}

API int cublasSgeam(void* handle, int ta, int tb, int m, int n, const float* alpha, const float* a, int lda, const float* beta,
                    const float* b, int ldb, float* c, int ldc) {
    Turn mine(turn);
    if (ta || tb || *beta != 0 || a != c || lda != ldc || b != c || ldb != ldc) return fail(BLAS_INVALID, "a sum that the fake does not know");
    const float scale = *alpha;
    return blas_queue(handle, [=] {
        if (!holds(memory, (uint64_t)c, ((size_t)(n - 1) * ldc + m) * 4)) return broken("a sum outside of its array");
        for (int col = 0; col < n; col++) {
            for (int row = 0; row < m; row++) c[(size_t)col * ldc + row] = scale == 0 ? 0 : scale * c[(size_t)col * ldc + row];
        }
    });
}

API int cublasSaxpy_v2(void* handle, int n, const float* alpha, const float* x, int, float* y, int) {
    Turn mine(turn);
    const float scale = *alpha;
    return blas_queue(handle, [=] {
        if (!holds(memory, (uint64_t)x, (size_t)n * 4) || !holds(memory, (uint64_t)y, (size_t)n * 4)) return broken("a sum outside of its arrays");
        for (int i = 0; i < n; i++) y[i] += scale * x[i];
    });
}
