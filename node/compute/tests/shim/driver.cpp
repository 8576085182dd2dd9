// A CUDA device that is this host: the functions of the driver, cuBLAS and NVRTC that Halfstep calls, by their documentation.
//
// NVRTC's part compiles a kernel file with the host's compiler under `shim.h`; the driver's part loads that, and runs launches
// there and then; cuBLAS's part is written-out loops. So everything from looking for a device to the last kernel can run
// where there is none. Streams are empty: whatever is queued is done when the call returns.
//
// Every array ends at (or, for lengths that are no multiple of 16 bytes, a few bytes before) a page that nobody may touch and
// begins behind another; it holds NaN until it is written, and is unmapped when it is freed. A kernel or copy that leaves its
// array, or uses one that is gone, ends the process there and then.
//
// What cannot show here: order between streams, speed, TF32's rounding (products take all bits), a driver's own limits.
//
// Built three times, as three libraries (`host.rs`). HALFSTEP_SHIM: path of shim.h; HALFSTEP_CACHE: folder for compiled kernels;
// HALFSTEP_CXX: the compiler.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <vector>

typedef int Code;
typedef unsigned long long Address;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

#ifdef HALFSTEP_DRIVER

namespace {

const size_t MEMORY = (size_t)1 << 30, PAGE = 4096;

struct Mapping {
    void* start;
    size_t bytes, length;
};

std::mutex turn;
std::map<Address, Mapping> mappings;
size_t used;

size_t up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

Code allocate(Address* address, size_t length) {
    std::lock_guard<std::mutex> hold(turn);
    if (length == 0) return INVALID_VALUE;
    if (length > MEMORY - used) return OUT_OF_MEMORY;
    const size_t inside = up(length, PAGE), bytes = inside + 2 * PAGE;
    char* start = (char*)mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    if (mprotect(start + PAGE, inside, PROT_READ | PROT_WRITE) != 0) return OUT_OF_MEMORY;
    memset(start + PAGE, 0xff, inside);
    *address = (Address)(start + PAGE + inside - up(length, 16));
    mappings[*address] = {start, bytes, length};
    used += length;
    return OK;
}

Code release(Address address) {
    std::lock_guard<std::mutex> hold(turn);
    const auto found = mappings.find(address);
    if (found == mappings.end()) return INVALID_VALUE;
    munmap(found->second.start, found->second.bytes);
    used -= found->second.length;
    mappings.erase(found);
    return OK;
}

// A compiled kernel file.
struct Module {
    void* library;
};

struct Function {
    const Module* module;
    size_t kernel;
};

std::vector<Function*> functions;

template <class T>
T symbol(const Module* module, const char* name) {
    return (T)dlsym(module->library, name);
}

}  // namespace

extern "C" {

Code cuInit(unsigned) { return OK; }
Code cuDriverGetVersion(int* version) { return *version = 13000, OK; }
Code cuGetErrorString(Code code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == NOT_FOUND ? "named symbol not found" : "invalid argument";
    return OK;
}
Code cuGetErrorName(Code, const char** text) { return *text = "HOST", OK; }

Code cuDeviceGetCount(int* count) { return *count = 1, OK; }
Code cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? OK : INVALID_VALUE; }
Code cuDeviceGetName(char* name, int length, int) { return snprintf(name, (size_t)length, "host"), OK; }
Code cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = MEMORY, OK; }
Code cuDeviceGetAttribute(int* value, int attribute, int) {
    // Multiprocessors; compute capability 9.0; memory pools.
    *value = attribute == 16 ? 2 : attribute == 75 ? 9 : attribute == 115 ? 1 : 0;
    return OK;
}
Code cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &used, OK; }
Code cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    return pool == &used && attribute == 4 && *(uint64_t*)value <= MEMORY ? OK : INVALID_VALUE;
}

Code cuDevicePrimaryCtxRetain(void** context, int) { return *context = &mappings, OK; }
Code cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Code cuCtxSetCurrent(void*) { return OK; }
Code cuCtxGetCurrent(void** context) { return *context = &mappings, OK; }
Code cuCtxSetFlags(unsigned) { return OK; }
Code cuCtxSynchronize() { return OK; }

Code cuStreamCreate(void** stream, unsigned) { return *stream = malloc(1), OK; }
Code cuStreamDestroy_v2(void* stream) { return free(stream), OK; }
Code cuStreamSynchronize(void*) { return OK; }
Code cuStreamWaitEvent(void*, void*, unsigned) { return OK; }
Code cuEventCreate(void** event, unsigned) { return *event = malloc(1), OK; }
Code cuEventDestroy_v2(void* event) { return free(event), OK; }
Code cuEventRecord(void*, void*) { return OK; }
Code cuEventSynchronize(void*) { return OK; }

Code cuMemGetInfo_v2(size_t* left, size_t* total) {
    std::lock_guard<std::mutex> hold(turn);
    return *left = MEMORY - used, *total = MEMORY, OK;
}
Code cuMemAlloc_v2(Address* address, size_t length) { return allocate(address, length); }
Code cuMemAllocAsync(Address* address, size_t length, void*) { return allocate(address, length); }
Code cuMemFree_v2(Address address) { return release(address); }
Code cuMemFreeAsync(Address address, void*) { return release(address); }
Code cuMemHostAlloc(void** memory, size_t length, unsigned) {
    *memory = aligned_alloc(PAGE, up(length, PAGE));
    if (*memory) memset(*memory, 0xff, up(length, PAGE));
    return *memory ? OK : OUT_OF_MEMORY;
}
Code cuMemFreeHost(void* memory) { return free(memory), OK; }
Code cuMemsetD8Async(Address to, unsigned char value, size_t length, void*) { return memset((void*)to, value, length), OK; }
Code cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t length, void*) {
    return memcpy((void*)to, from, length), OK;
}
Code cuMemcpyDtoHAsync_v2(void* to, Address from, size_t length, void*) {
    return memcpy(to, (const void*)from, length), OK;
}
Code cuMemcpyDtoDAsync_v2(Address to, Address from, size_t length, void*) {
    return memcpy((void*)to, (const void*)from, length), OK;
}

Code cuModuleLoadData(void** module, const void* image) {
    void* library = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), INVALID_VALUE;
    return *module = new Module{library}, OK;
}
Code cuModuleUnload(void* module) {
    // Its functions may still be known to the shim's fibers: the library stays.
    return delete (Module*)module, OK;
}
Code cuModuleGetFunction(void** function, void* module, const char* name) {
    const auto kernel = symbol<long (*)(const char*)>((Module*)module, "halfstep_kernel")(name);
    if (kernel < 0) return NOT_FOUND;
    std::lock_guard<std::mutex> hold(turn);
    functions.push_back(new Function{new Module(*(Module*)module), (size_t)kernel});
    return *function = functions.back(), OK;
}
Code cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned shared,
                    void*, void** arguments, void**) {
    static std::mutex one_launch;
    std::lock_guard<std::mutex> hold(one_launch);
    // The hardware's limits.
    if (x == 0 || x > 0x7fffffffu || y - 1 > 65534 || z - 1 > 65534 || a * b * c - 1 > 1023 || shared != 0) return INVALID_VALUE;
    const auto run = symbol<const char* (*)(size_t, const unsigned*, const unsigned*, void**)>(
        ((Function*)function)->module, "halfstep_launch");
    const unsigned grid[3] = {x, y, z}, block[3] = {a, b, c};
    const char* fault = run(((Function*)function)->kernel, grid, block, arguments);
    return fault ? fprintf(stderr, "%s\n", fault), INVALID_VALUE : OK;
}

}  // extern "C"

#endif

#ifdef HALFSTEP_NVRTC

namespace {

struct Program {
    std::string source, name, file, log;
};

// Names of the kernels that a source declares.
std::vector<std::string> kernels(const std::string& source) {
    std::vector<std::string> names;
    const std::string head = "extern \"C\" __global__ void ";
    for (size_t at = source.find(head); at != std::string::npos; at = source.find(head, at + 1)) {
        size_t start = at + head.size();
        // Launch bounds stand before the name.
        if (source.compare(start, 2, "__") == 0) start = source.find(") ", start) + 2;
        names.push_back(source.substr(start, source.find('(', start) - start));
    }
    return names;
}

std::string wrapper(const Program& program, const std::string& source_file) {
    std::string text = "#include \"" HALFSTEP_SHIM "\"\n#include \"" + source_file + "\"\nstatic const shim::Kernel kernels[] = {\n";
    for (const std::string& name : kernels(program.source)) {
        text += "    shim::Entry<&" + name + ">::kernel(\"" + name + "\"),\n";
    }
    text += "};\nextern \"C\" long halfstep_kernel(const char* name) {\n"
            "    long at = 0;\n"
            "    for (const shim::Kernel& kernel : kernels) {\n"
            "        if (strcmp(kernel.name, name) == 0) return at;\n"
            "        at++;\n"
            "    }\n"
            "    return -1;\n}\n"
            "extern \"C\" const char* halfstep_launch(size_t at, const unsigned* grid, const unsigned* block, void** arguments) {\n"
            "    const shim::Kernel& kernel = kernels[at];\n"
            "    return shim::launch(kernel, grid, block, arguments, kernel.sizes, kernel.count, 0);\n}\n";
    return text;
}

uint64_t hash(const std::string& text, uint64_t seed) {
    for (const unsigned char byte : text) seed = (seed ^ byte) * 0x100000001b3ull;
    return seed;
}

std::string read(const std::string& file) {
    std::ifstream in(file);
    return std::string(std::istreambuf_iterator<char>(in), {});
}

// Under a name that says what it is of, so that it is compiled once for all processes.
Code compile(Program& program) {
    static std::mutex one;
    std::lock_guard<std::mutex> hold(one);
    const std::string shim = read(HALFSTEP_SHIM);
    const uint64_t key = hash(program.source, hash(shim, hash(wrapper(program, ""), 0xcbf29ce484222325ull)));
    char hex[32];
    snprintf(hex, sizeof hex, "-%016llx", (unsigned long long)key);
    const std::string base = std::string(HALFSTEP_CACHE "/") + program.name + hex;
    program.file = base + ".so";
    if (access(program.file.c_str(), R_OK) == 0) return 0;
    const std::string own = base + "-" + std::to_string(getpid());
    std::ofstream(own + ".cu") << program.source;
    std::ofstream(own + ".cpp") << wrapper(program, own + ".cu");
    const std::string command = HALFSTEP_CXX " -std=c++17 -O2 -ffp-contract=off -Wno-unknown-pragmas -U_FORTIFY_SOURCE -fPIC -shared "
                                "-Wl,-Bsymbolic -o '" + own + ".so' '" + own + ".cpp' 2> '" + own + ".log'";
    const int status = system(command.c_str());
    program.log = read(own + ".log");
    for (const char* end : {".cu", ".cpp", ".log"}) unlink((own + end).c_str());
    return status == 0 && rename((own + ".so").c_str(), program.file.c_str()) == 0 ? 0 : 6;
}

}  // namespace

extern "C" {

Code nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 0, 0; }
Code nvrtcGetNumSupportedArchs(int* count) { return *count = 1, 0; }
Code nvrtcGetSupportedArchs(int* all) { return *all = 90, 0; }
const char* nvrtcGetErrorString(Code) { return "host"; }
Code nvrtcCreateProgram(void** program, const char* source, const char* name, int, const char* const*, const char* const*) {
    return *program = new Program{source, name, "", ""}, 0;
}
Code nvrtcDestroyProgram(void** program) { return delete (Program*)*program, 0; }
Code nvrtcCompileProgram(void* program, int, const char* const*) { return compile(*(Program*)program); }
Code nvrtcGetProgramLogSize(void* program, size_t* bytes) { return *bytes = ((Program*)program)->log.size() + 1, 0; }
Code nvrtcGetProgramLog(void* program, char* log) { return strcpy(log, ((Program*)program)->log.c_str()), 0; }
Code nvrtcGetCUBINSize(void* program, size_t* bytes) { return *bytes = ((Program*)program)->file.size() + 1, 0; }
Code nvrtcGetCUBIN(void* program, char* image) { return strcpy(image, ((Program*)program)->file.c_str()), 0; }

}  // extern "C"

#endif

#ifdef HALFSTEP_BLAS

namespace {

// An element of a column-major matrix, or of its transpose.
template <class T>
T& at(T* matrix, int leading, bool transposed, int row, int column) {
    return transposed ? matrix[column + (size_t)row * leading] : matrix[row + (size_t)column * leading];
}

}  // namespace

extern "C" {

Code cublasCreate_v2(void** handle) { return *handle = malloc(1), 0; }
Code cublasDestroy_v2(void* handle) { return free(handle), 0; }
Code cublasSetStream_v2(void*, void*) { return 0; }
Code cublasGetProperty(int which, int* value) { return *value = which == 0 ? 13 : 0, 0; }

}  // extern "C"

namespace {

template <class T>
void gemm(int first_operation, int second_operation, int m, int n, int k, T alpha, const T* first, int first_leading, const T* second,
          int second_leading, T beta, T* out, int leading) {
    for (int column = 0; column < n; column++) {
        for (int row = 0; row < m; row++) {
            T sum = 0;
            for (int i = 0; i < k; i++) {
                sum += at(first, first_leading, first_operation != 0, row, i) *
                       at(second, second_leading, second_operation != 0, i, column);
            }
            T& value = out[row + (size_t)column * leading];
            value = alpha * sum + (beta == 0 ? 0 : beta * value);
        }
    }
}

}  // namespace

extern "C" {

// All three matrices f32 (0), or all three f64 (1).
Code cublasGemmEx(void*, int first_operation, int second_operation, int m, int n, int k, const void* alpha, const void* first,
                  int first_kind, int first_leading, const void* second, int second_kind, int second_leading, const void* beta,
                  void* out, int kind, int leading, int compute, int) {
    if (first_kind != kind || second_kind != kind || kind > 1 || (kind == 1) != (compute == 70)) return 7;
    if (kind == 1) {
        gemm(first_operation, second_operation, m, n, k, *(const double*)alpha, (const double*)first, first_leading,
             (const double*)second, second_leading, *(const double*)beta, (double*)out, leading);
    } else {
        gemm(first_operation, second_operation, m, n, k, *(const float*)alpha, (const float*)first, first_leading,
             (const float*)second, second_leading, *(const float*)beta, (float*)out, leading);
    }
    return 0;
}

Code cublasSgeam(void*, int, int, int m, int n, const float* alpha, const float* a, int a_leading, const float* beta, const float* b,
                 int b_leading, float* out, int leading) {
    for (int column = 0; column < n; column++) {
        for (int row = 0; row < m; row++) {
            const float left = *alpha == 0 ? 0 : *alpha * a[row + (size_t)column * a_leading];
            const float right = *beta == 0 ? 0 : *beta * b[row + (size_t)column * b_leading];
            out[row + (size_t)column * leading] = left + right;
        }
    }
    return 0;
}

Code cublasSaxpy_v2(void*, int n, const float* alpha, const float* x, int, float* y, int) {
    for (int i = 0; i < n; i++) y[i] += *alpha * x[i];
    return 0;
}

// Upper triangles of plain matrices only, as Halfstep asks.
Code cublasSsyrk_v2(void*, int uplo, int operation, int n, int k, const float* alpha, const float* a, int a_leading, const float* beta,
                    float* out, int leading) {
    if (uplo != 1 || operation != 0) return 7;
    for (int column = 0; column < n; column++) {
        for (int row = 0; row <= column; row++) {
            float sum = 0;
            for (int i = 0; i < k; i++) sum += a[row + (size_t)i * a_leading] * a[column + (size_t)i * a_leading];
            float& value = out[row + (size_t)column * leading];
            value = *alpha * sum + (*beta == 0 ? 0 : *beta * value);
        }
    }
    return 0;
}

}  // extern "C"

#endif
