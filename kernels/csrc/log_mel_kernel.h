// What the dispatcher (log_mel.cpp) and the three builds of the kernel (log_mel_kernel.cpp) share: the plan's tables
// and one table of entry points per SIMD path. Plain data only: a function template or an inline standard-library
// function used on both sides could be emitted with AVX-512 code and then be chosen by the linker for a processor
// without it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastclap {

constexpr int kMaxStages = 12;  // 2^11 = 2048 >= n_fft
constexpr int kMaxFft = 2048;
constexpr int kMaxMels = 4096;

// One pass of the decimation-in-frequency FFT over blocks of `length` complex points.
struct Stage {
    int radix;
    int length;
    const float *twiddles;  // [length / radix, radix - 1, 2]: exp(-2 pi i p q / length), q = 1 .. radix - 1
};

// Bins k and N - k of the real spectrum from Z[k] and Z[N - k] of the packed one, N = n_fft / 2.
struct Pair {
    std::int32_t slot, mirror;  // where Z[k] and Z[N - k] stand, and where the two powers go
    float cosine, sine;         // exp(-2 pi i k / n_fft)
};

// The first pass, of radix r, leaves frequencies q, q + r, ... in its q-th part and their mirrors in the (r - q)-th.
struct Group {
    int part, mirror_part;
    int pair_begin, single_begin, pair_end;  // from single_begin on, only the first bin of a pair is used
};

struct Weight {
    std::int32_t slot;  // of the bin's power
    float value;
};

struct Tables {
    int n_fft, win_length, n_mels;
    std::int64_t hop_length, offset;
    int edge;
    bool remove_dc, magnitude, clamp;
    double preemphasis;
    float log_scale, log2_high, log2_low;  // log_scale * ln(2) in two parts, the first exact times any exponent
    float floor, mean, inverse_std;
    int stage_count;
    Stage stages[kMaxStages];
    const float *window[2];  // [win_length] for float32 and int16 samples: window * input scale / 2
    const Pair *pairs;
    int group_count;
    Group groups[8];
    const Weight *weights;
    const std::int32_t *mel_begin;  // [n_mels + 1] into weights
};

struct Range {
    float maximum;
    bool has_nan;
};

struct Kernel {
    // Floats of 64-byte-aligned scratch memory that one call of `frames` needs.
    std::size_t (*scratch_size)(const Tables &);
    // Log-mel of frames [first, first + count) of a clip of `length` >= 1 samples into rows of n_mels; normalised,
    // unless `clamp` is set: then it is left to `finish`. `stream`: past the caches where alignment allows it, which
    // spares reading what will be overwritten. Returns the range of the log-mel values.
    Range (*frames)(const Tables &, const void *clip, bool is_int16, std::int64_t length, std::int64_t first,
                    std::int64_t count, float *rows, bool stream, float *scratch);
    // max(value, low), then normalise. A NaN `low` makes all values NaN.
    void (*finish)(const Tables &, float *values, std::int64_t count, float low);
};

extern const Kernel kernel_portable;
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;

}  // namespace fastclap
