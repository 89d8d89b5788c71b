// log_mel_cuda.cuh on a CPU: what it computes is what a GPU would, instruction for instruction as far as C++ tells.
//
//   emulate_cuda INPUT OUTPUT
//
// compiled with the same LOG_MEL_* macros. A block is so many threads of the processor, a barrier is one, and blocks run
// one after the other in a random order, each on shared memory that holds NaN; hence AddressSanitizer sees accesses
// outside of any array and ThreadSanitizer those that only a missing barrier would order. INPUT, of
// bench/cuda_on_cpu.py: a grid, `Arguments` as the launcher would pass them, then for each pointer how many bytes from a
// multiple of 16 its array begins, how many bytes it has, -1 for null, and these. OUTPUT: the arrays that are written.

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x, y, z;
};

thread_local Index threadIdx;
Index blockIdx, gridDim;

class Barrier {
public:
    explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
    void wait() { pthread_barrier_wait(&barrier_); }

private:
    pthread_barrier_t barrier_;
};

template <class T>
T __ldg(const T *from) {
    return *from;
}
template <class T>
T load_again(const T *from) {
    return *from;
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline unsigned atomicMax(unsigned *at, unsigned x) {
    unsigned old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}
inline unsigned atomicAdd(unsigned *at, unsigned x) { return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST); }
inline void __threadfence() {}  // blocks run one after the other
void __syncthreads();
unsigned __reduce_max_sync(unsigned mask, unsigned x);
using std::max;
using std::min;

// lg2.approx is documented to be within 2^-22 between 0.5 and 2; here it is off by anything up to that.
inline float log2_approximate(float x) {
    const std::uint32_t hash = static_cast<std::uint32_t>(__float_as_int(x)) * 2654435761u >> 8;
    return static_cast<float>(std::log2(static_cast<double>(x)) + std::ldexp(hash / 8388608.0 - 1.0, -22));
}

struct BFloat16;
struct Float16;
inline void store(float *to, float x) { *to = x; }
void store(BFloat16 *to, float x);
void store(Float16 *to, float x);
inline float value_of(float x) { return x; }
float value_of(BFloat16 x);
float value_of(Float16 x);

#include "log_mel_cuda.cuh"

void store(BFloat16 *to, float x) {
    const unsigned bits = static_cast<unsigned>(__float_as_int(x));
    to->bits = static_cast<unsigned short>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void store(Float16 *to, float x) {
    const _Float16 rounded = static_cast<_Float16>(x);
    std::memcpy(to, &rounded, 2);
}
float value_of(BFloat16 x) { return __int_as_float(x.bits << 16); }
float value_of(Float16 x) {
    _Float16 value;
    std::memcpy(&value, &x, 2);
    return static_cast<float>(value);
}

static Barrier block_barrier(THREADS);
static std::unique_ptr<Barrier> warp_barriers[THREADS / 32];
static unsigned exchanged[THREADS];

void __syncthreads() { block_barrier.wait(); }

unsigned __reduce_max_sync(unsigned, unsigned x) {
    Barrier &warp = *warp_barriers[threadIdx.x / 32];
    exchanged[threadIdx.x] = x;
    warp.wait();
    const unsigned *first = exchanged + threadIdx.x / 32 * 32;
    const unsigned largest = *std::max_element(first, first + 32);
    warp.wait();
    return largest;
}

[[noreturn]] static void fail(const char *what) {
    std::fprintf(stderr, "emulate_cuda: %s\n", what);
    std::exit(2);
}

template <class T>
T read(std::FILE *file) {
    T value;
    if (std::fread(&value, sizeof value, 1, file) != 1) fail("the input ends early");
    return value;
}

struct Array {
    std::unique_ptr<char[]> memory;
    char *begin = nullptr;
    std::int64_t size = 0;
};

template <class T>
Array read_array(std::FILE *file, T *&pointer) {
    Array array;
    const auto shift = read<std::int64_t>(file);
    array.size = read<std::int64_t>(file);
    pointer = nullptr;
    if (array.size < 0) return array;
    array.memory.reset(new char[shift + array.size]);  // no byte more, so that a sanitizer knows where it ends
    array.begin = array.memory.get() + shift;
    if (array.size && std::fread(array.begin, array.size, 1, file) != 1) fail("the input ends early");
    pointer = reinterpret_cast<T *>(array.begin);
    return array;
}

int main(int argc, char **argv) {
    std::FILE *file = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
    if (!file) fail("usage: emulate_cuda INPUT OUTPUT");
    gridDim = read<Index>(file);
    if (read<std::int64_t>(file) != sizeof(Arguments)) fail("the launcher's arguments have another size");
    Arguments a = read<Arguments>(file);
    const Array arrays[] = {
        read_array(file, a.waveform),   read_array(file, a.offsets),       read_array(file, a.lengths),
        read_array(file, a.columns),    read_array(file, a.weights),       read_array(file, a.runs),
        read_array(file, a.first_bins), read_array(file, a.logarithms),    read_array(file, a.affine),
        read_array(file, a.time_masks), read_array(file, a.mel_masks),     read_array(file, a.features),
        read_array(file, a.frame_lengths), read_array(file, a.states),
    };
    std::fclose(file);

    std::vector<unsigned> order(gridDim.x * gridDim.y * gridDim.z);
    std::iota(order.begin(), order.end(), 0u);
    // <random> would double the time of a compilation.
    for (std::size_t left = order.size(); left > 1; --left) std::swap(order[left - 1], order[std::rand() % left]);
    std::vector<float4> shared(SHARED_BYTES / sizeof(float4) + 1);
    for (auto &barrier : warp_barriers) barrier = std::make_unique<Barrier>(32);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < THREADS; ++t)
        threads.emplace_back([&, t] {
            threadIdx = {t, 0, 0};
            for (const unsigned block : order) {
                if (t == 0) {
                    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
                    std::memset(shared.data(), 0xff, SHARED_BYTES);
                }
                block_barrier.wait();
                log_mel_tile(a, reinterpret_cast<float *>(shared.data()));
                block_barrier.wait();
            }
        });
    for (auto &thread : threads) thread.join();

    file = std::fopen(argv[2], "wb");
    if (!file) fail("the output cannot be written");
    for (int i = 11; i < 14; ++i)
        if (arrays[i].size > 0) std::fwrite(arrays[i].begin, arrays[i].size, 1, file);
    return std::fclose(file) ? 2 : 0;
}
