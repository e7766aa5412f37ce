// A CUDA driver whose device is this CPU: runs a source's kernels, a thread of the CPU for each thread of a block.
//
// SOURCE is the source's path, KERNELS has an ENTRY(name) for each of its kernels.
//
// It has the calls that kdkit.cuda.driver makes, under the same names, and refuses what a real one would. Shared
// memory is full of NaN when a block begins, and a block that writes past what it asked for is an error.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(most)

using std::isinf;
using std::max;

struct Dim {
    unsigned x, y, z;
};

static thread_local Dim threadIdx, blockIdx;
[[maybe_unused]] static Dim blockDim, gridDim;
static std::unique_ptr<std::barrier<>> block_barrier;
static int any_of_block;

constexpr unsigned SHARED_BYTES = 48 * 1024;
double shared[SHARED_BYTES / sizeof(double)];

[[maybe_unused]] static void __syncthreads() { block_barrier->arrive_and_wait(); }

[[maybe_unused]] static int __syncthreads_or(int mine) {
    if (mine) __atomic_store_n(&any_of_block, 1, __ATOMIC_SEQ_CST);
    __syncthreads();
    const int any = __atomic_load_n(&any_of_block, __ATOMIC_SEQ_CST);
    __syncthreads();
    return any;
}

[[maybe_unused]] static float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

[[maybe_unused]] static int __float_as_int(float value) {
    int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

[[maybe_unused]] static float __fmul_rn(float a, float b) { return a * b; }

[[maybe_unused]] static unsigned atomicOr(unsigned* place, unsigned bits) {
    return __atomic_fetch_or(place, bits, __ATOMIC_SEQ_CST);
}

[[maybe_unused]] static float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

#include SOURCE

using Kernel = void (*)(void**);

template <typename... Arguments, std::size_t... places>
static void call(void (*kernel)(Arguments...), void** values, std::index_sequence<places...>) {
    kernel(*static_cast<Arguments*>(values[places])...);
}

template <auto kernel>
static void launch(void** values) {
    []<typename... Arguments>(void (*function)(Arguments...), void** given) {
        call(function, given, std::index_sequence_for<Arguments...>{});
    }(kernel, values);
}

#define ENTRY(kernel) {#kernel, launch<kernel>},
static const std::map<std::string, Kernel> kernels = {KERNELS};

enum Status { DONE = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL = 700 };

static const char PRIMARY[] = "context", MODULE[] = "module";
static thread_local int contexts = 0;

static bool is_past_the_end_untouched(unsigned shared_bytes) {
    const unsigned char* bytes = reinterpret_cast<unsigned char*>(shared);
    return std::all_of(bytes + shared_bytes, bytes + SHARED_BYTES, [](unsigned char byte) { return byte == 0xFF; });
}

extern "C" {

int cuInit(unsigned flags) { return flags == 0 ? DONE : INVALID_VALUE; }

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? DONE : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(const void** context, int) {
    *context = PRIMARY;
    return DONE;
}

int cuCtxPushCurrent_v2(const void* context) {
    contexts += context == PRIMARY;
    return context == PRIMARY ? DONE : INVALID_CONTEXT;
}

int cuCtxPopCurrent_v2(const void** context) {
    if (contexts == 0) return INVALID_CONTEXT;
    *context = PRIMARY;
    contexts--;
    return DONE;
}

int cuModuleLoadData(const void** module, const char* image) {
    if (contexts == 0) return INVALID_CONTEXT;
    *module = MODULE;
    return std::strcmp(image, "emulated") == 0 ? DONE : INVALID_IMAGE;
}

int cuModuleGetFunction(const void** function, const void* module, const char* name) {
    if (contexts == 0 || module != MODULE) return INVALID_CONTEXT;
    const auto found = kernels.find(name);
    if (found == kernels.end()) return NOT_FOUND;
    *function = &found->second;
    return DONE;
}

int cuGetErrorString(int status, const char** words) {
    *words = status == NOT_FOUND ? "named symbol not found" : status == INVALID_IMAGE ? "device kernel image is invalid"
                                                                                     : "refused";
    return DONE;
}

int cuLaunchKernel(
    const void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads, unsigned block_y,
    unsigned block_z, unsigned shared_bytes, void*, void** arguments, void** extra) {
    if (contexts == 0) return INVALID_CONTEXT;
    if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535) return INVALID_VALUE;
    if (!threads || threads > 1024 || block_y != 1 || block_z != 1) return INVALID_VALUE;
    if (shared_bytes > SHARED_BYTES || extra != nullptr) return INVALID_VALUE;
    const Kernel kernel = *static_cast<const Kernel*>(function);
    blockDim = {threads, 1, 1};
    gridDim = {grid_x, grid_y, grid_z};
    block_barrier = std::make_unique<std::barrier<>>(threads);
    bool whole = true;
    const auto run = [&](unsigned thread) {
        threadIdx = {thread, 0, 0};
        for (unsigned z = 0; z < grid_z; z++)
            for (unsigned y = 0; y < grid_y; y++)
                for (unsigned x = 0; x < grid_x; x++) {
                    if (thread == 0) std::memset(shared, 0xFF, SHARED_BYTES), any_of_block = 0;
                    blockIdx = {x, y, z};
                    __syncthreads();
                    kernel(arguments);
                    __syncthreads();
                    if (thread == 0) whole = whole && is_past_the_end_untouched(shared_bytes);
                }
    };
    std::vector<std::thread> others;
    for (unsigned thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
    return whole ? DONE : ILLEGAL;
}
}
