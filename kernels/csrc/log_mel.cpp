// Plans, validation, threads and the choice of the SIMD path: all of the native log-mel engine but the arithmetic.
//
// A plan holds what depends on the front-end only (window, twiddles, sparse mel bank). A run cuts the batch into tasks
// of some frames of one clip, which threads take from a shared counter. They are those of the caller's OpenMP runtime:
// its threads spin for some milliseconds after their last work, and another thread would wait for their core. Without
// one they live for one call: starting one costs some 20 us, against 120 us of work or more for every 10 s of audio, and
// a process that forked (as PyTorch's data workers do) has no pool whose threads are gone.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "fastclap_native.h"
#include "log_mel_kernel.h"

using namespace fastclap;

struct fastclap_log_mel_plan {
    Tables tables;
    const Kernel *kernel;
    float dynamic_range;
    float padding;  // what the rows past a clip's last frame are filled with
    std::vector<float> window[2];
    std::vector<std::vector<float>> twiddles;
    std::vector<Pair> pairs;
    std::vector<Weight> weights;
    std::vector<std::int32_t> mel_begin;
};

namespace {

constexpr std::int64_t kTaskFrames = 128;  // a multiple of every lane count
constexpr std::int64_t kTasksPerThread = 8;   // at least: 120 us of work or more
constexpr int kMaxThreads = 256;
#if !defined(FASTCLAP_STREAMED)
#define FASTCLAP_STREAMED (1 << 20)
#endif
constexpr std::int64_t kStreamed = FASTCLAP_STREAMED;  // so many features are not worth their place in the caches
constexpr double pi = 3.14159265358979323846;

__attribute__((format(printf, 4, 5))) int fail(int code, char *message, std::int64_t size, const char *format, ...) {
    if (message && size > 0) {
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(message, static_cast<std::size_t>(size), format, arguments);
        va_end(arguments);
    }
    return code;
}

// Radices of an FFT of `length` points, largest first; empty if it has a prime factor above 5.
std::vector<int> radices(int length) {
    int twos = 0;
    for (; length % 2 == 0; length /= 2) ++twos;
    std::vector<int> result(static_cast<std::size_t>(twos / 3), 8);
    if (twos % 3 == 2) result.push_back(4);
    if (twos % 3 == 1) {
        if (result.empty()) {
            result.push_back(2);
        } else {  // 8 * 2 = 4 * 4
            result.back() = 4;
            result.push_back(4);
        }
    }
    for (; length % 5 == 0; length /= 5) result.push_back(5);
    for (; length % 3 == 0; length /= 3) result.push_back(3);
    return length == 1 ? result : std::vector<int>{};
}

void build_fft(fastclap_log_mel_plan &plan, const std::vector<int> &radix, std::vector<std::int32_t> &slot) {
    const int points = plan.tables.n_fft / 2;
    int length = points;
    for (std::size_t s = 0; s < radix.size(); ++s) {
        const int r = radix[s], stride = length / r;
        std::vector<float> &twiddles = plan.twiddles.emplace_back();
        for (int p = 0; p < stride; ++p)
            for (int q = 1; q < r; ++q) {
                const double angle = -2.0 * pi * (p * q % length) / length;
                twiddles.push_back(static_cast<float>(std::cos(angle)));
                twiddles.push_back(static_cast<float>(std::sin(angle)));
            }
        plan.tables.stages[s] = {r, length, twiddles.data()};
        length = stride;
    }
    plan.tables.stage_count = static_cast<int>(radix.size());
    // The first pass leaves frequencies q, q + r, q + 2r, ... in its q-th part, and so on inside the parts.
    slot.resize(static_cast<std::size_t>(points));
    for (int k = 0; k < points; ++k) {
        int position = 0, rest = k, part = points;
        for (int r : radix) {
            part /= r;
            position += rest % r * part;
            rest /= r;
        }
        slot[static_cast<std::size_t>(k)] = 2 * position;
    }
}

void build_mel(fastclap_log_mel_plan &plan, const double *bank, const std::vector<std::int32_t> &slot) {
    const int n_fft = plan.tables.n_fft, points = n_fft / 2, n_mels = plan.tables.n_mels;
    std::vector<bool> used(static_cast<std::size_t>(points) + 1, false);
    plan.mel_begin.push_back(0);
    for (int m = 0; m < n_mels; ++m) {
        for (int k = 0; k <= points; ++k) {
            const float value = static_cast<float>(bank[static_cast<std::size_t>(k) * n_mels + m]);
            if (value == 0.0f) continue;
            used[k] = true;
            plan.weights.push_back({k == points ? 1 : slot[k], value});  // the last bin stands next to the first
        }
        plan.mel_begin.push_back(static_cast<std::int32_t>(plan.weights.size()));
    }
    const int radix = plan.tables.stage_count ? plan.tables.stages[0].radix : 1;
    for (int part = 0; part <= radix - part; ++part) {
        const int mirror_part = (radix - part) % radix, begin = static_cast<int>(plan.pairs.size());
        int ends[2];
        for (bool single : {false, true}) {
            for (int k = 1; k <= points - k; ++k) {
                if (k % radix != part && k % radix != mirror_part) continue;
                const int mirror = points - k, bin = used[k] ? k : mirror, other = points - bin;
                if (!used[bin] || (k == mirror || !used[other]) != single) continue;
                const double angle = -2.0 * pi * bin / n_fft;
                plan.pairs.push_back({slot[bin], slot[other], static_cast<float>(std::cos(angle)),
                                      static_cast<float>(std::sin(angle))});
            }
            ends[single] = static_cast<int>(plan.pairs.size());
        }
        plan.tables.groups[plan.tables.group_count++] = {part, mirror_part, begin, ends[0], ends[1]};
    }
}

const Kernel *select_kernel(int simd) {
    for (int path : {FASTCLAP_SIMD_AVX512, FASTCLAP_SIMD_AVX2, FASTCLAP_SIMD_PORTABLE}) {
        if ((simd != FASTCLAP_SIMD_AUTO && simd != path) || !fastclap_simd_supported(path)) continue;
#if defined(FASTCLAP_X86)
        if (path == FASTCLAP_SIMD_AVX512) return &kernel_avx512;
        if (path == FASTCLAP_SIMD_AVX2) return &kernel_avx2;
#endif
        return &kernel_portable;
    }
    return nullptr;
}

int create(const fastclap_log_mel_config &c, const double *window, const double *bank, int simd,
           fastclap_log_mel_plan **result, char *message, std::int64_t size) {
    constexpr std::int64_t far = std::numeric_limits<std::int32_t>::max();
    if (c.n_fft < 2 || c.n_fft % 2 || c.win_length < 1 || c.win_length > c.n_fft || c.hop_length < 1 || c.n_mels < 1)
        return fail(FASTCLAP_INVALID, message, size,
                    "n_fft must be even, win_length within [1, n_fft], hop_length and n_mels at least 1");
    if (c.edge < FASTCLAP_EDGE_ZERO || c.edge > FASTCLAP_EDGE_SYMMETRIC || (c.power != 1 && c.power != 2))
        return fail(FASTCLAP_INVALID, message, size, "edge must be 0, 1 or 2, power 1 or 2");
    for (double value :
         {c.preemphasis, c.input_scale, c.log_scale, c.floor, c.log_padding, c.dynamic_range, c.mean, c.std})
        if (!std::isfinite(value)) return fail(FASTCLAP_INVALID, message, size, "every number must be finite");
    if (c.input_scale <= 0 || c.log_scale <= 0 || c.floor <= 0 || c.std <= 0)
        return fail(FASTCLAP_INVALID, message, size, "input_scale, log_scale, floor and std must be above 0");
    if (c.n_fft > kMaxFft || c.n_mels > kMaxMels || c.hop_length > far || c.offset > far || c.offset < -far)
        return fail(FASTCLAP_UNSUPPORTED, message, size, "n_fft is above %d, n_mels above %d or hop_length above 2^31",
                    kMaxFft, kMaxMels);
    // A subnormal float is beyond the logarithm.
    if (c.floor < std::numeric_limits<float>::min() || c.floor > std::numeric_limits<float>::max())
        return fail(FASTCLAP_UNSUPPORTED, message, size, "floor %g is outside the normal range of float32", c.floor);
    const std::vector<int> radix = radices(static_cast<int>(c.n_fft / 2));
    if (radix.empty() && c.n_fft != 2)
        return fail(FASTCLAP_UNSUPPORTED, message, size, "n_fft %d has a prime factor above 5",
                    static_cast<int>(c.n_fft));
    const std::int64_t weights = (c.n_fft / 2 + 1) * c.n_mels;
    for (std::int64_t i = 0; i < c.win_length; ++i)
        if (!std::isfinite(window[i])) return fail(FASTCLAP_INVALID, message, size, "the window must be finite");
    for (std::int64_t i = 0; i < weights; ++i)
        if (!std::isfinite(bank[i])) return fail(FASTCLAP_INVALID, message, size, "the mel bank must be finite");
    const Kernel *kernel = select_kernel(simd);
    if (!kernel) return fail(FASTCLAP_UNSUPPORTED, message, size, "this processor has no SIMD path %d", simd);

    auto plan = std::make_unique<fastclap_log_mel_plan>();
    plan->kernel = kernel;
    Tables &t = plan->tables;
    t = {};
    t.n_fft = static_cast<int>(c.n_fft);
    t.win_length = static_cast<int>(c.win_length);
    t.n_mels = static_cast<int>(c.n_mels);
    t.hop_length = c.hop_length;
    t.offset = c.offset;
    t.edge = static_cast<int>(c.edge);
    t.remove_dc = c.remove_dc != 0;
    t.magnitude = c.power == 1;
    t.clamp = c.dynamic_range >= 0;
    plan->padding = static_cast<float>(t.clamp ? c.log_padding : (c.log_padding - c.mean) / c.std);
    plan->dynamic_range = static_cast<float>(c.dynamic_range);
    t.preemphasis = c.preemphasis;
    t.log_scale = static_cast<float>(c.log_scale);
    int exponent;
    const double log2 = std::log(2.0) * c.log_scale, fraction = std::frexp(log2, &exponent);
    t.log2_high = static_cast<float>(std::ldexp(std::round(std::ldexp(fraction, 16)), exponent - 16));
    t.log2_low = static_cast<float>(log2 - t.log2_high);
    t.floor = static_cast<float>(c.floor);
    t.mean = static_cast<float>(c.mean);
    t.inverse_std = static_cast<float>(1.0 / c.std);
    for (int int16 = 0; int16 < 2; ++int16) {
        // One half: the even and odd parts of the packed transform's spectrum are sums of two.
        const double scale = 0.5 * c.input_scale / (int16 ? 32768.0 : 1.0);
        for (std::int64_t i = 0; i < c.win_length; ++i)
            plan->window[int16].push_back(static_cast<float>(window[i] * scale));
        t.window[int16] = plan->window[int16].data();
    }
    std::vector<std::int32_t> slot;
    build_fft(*plan, radix, slot);
    build_mel(*plan, bank, slot);
    t.pairs = plan->pairs.data();
    t.weights = plan->weights.data();
    t.mel_begin = plan->mel_begin.data();
    *result = plan.release();
    return FASTCLAP_OK;
}

struct Batch {
    const char *waveform;
    bool is_int16;
    std::int64_t clips, stride, frames;
    const std::int64_t *lengths, *frame_lengths;
    float *features;
};

// Features of rows [first, first + rows) of one clip, those past its last frame filled.
Range make_rows(const fastclap_log_mel_plan &plan, const Batch &batch, std::int64_t clip, std::int64_t first,
                std::int64_t rows, float *scratch) {
    const Tables &t = plan.tables;
    const std::int64_t sample_size = batch.is_int16 ? 2 : 4;
    const std::int64_t valid = std::max<std::int64_t>(0, std::min(rows, batch.frame_lengths[clip] - first));
    float *out = batch.features + (clip * batch.frames + first) * t.n_mels;
    Range range = {-std::numeric_limits<float>::infinity(), false};
    if (valid > 0)
        range = plan.kernel->frames(t, batch.waveform + clip * batch.stride * sample_size, batch.is_int16,
                                    batch.lengths[clip], first, valid, out,
                                    batch.clips * batch.frames * t.n_mels >= kStreamed, scratch);
    if (valid < rows) {
        std::fill(out + valid * t.n_mels, out + rows * t.n_mels, plan.padding);
        range.maximum = std::max(range.maximum, plan.padding);
    }
    return range;
}

int run(const fastclap_log_mel_plan &plan, const Batch &batch, int threads, fastclap_team team, char *message,
        std::int64_t size) {
    const std::int64_t tasks_per_clip = (batch.frames + kTaskFrames - 1) / kTaskFrames;
    const std::int64_t tasks = batch.clips * tasks_per_clip;
    if (tasks == 0) return FASTCLAP_OK;
    threads = static_cast<int>(
        std::max<std::int64_t>(1, std::min<std::int64_t>({threads, kMaxThreads, tasks / kTasksPerThread})));

    const std::size_t scratch_size = plan.kernel->scratch_size(plan.tables);
    const std::align_val_t cache_line{64};
    const std::size_t bytes = threads * scratch_size * sizeof(float);
    float *scratch = static_cast<float *>(::operator new(bytes, cache_line, std::nothrow));
    if (!scratch) return fail(FASTCLAP_NO_MEMORY, message, size, "out of memory");
    const auto release = [=](float *p) { ::operator delete(p, cache_line); };
    const std::unique_ptr<float, decltype(release)> owner(scratch, release);

    const bool clamp = plan.tables.clamp;
    std::vector<Range> ranges(static_cast<std::size_t>(clamp ? tasks : 0));
    std::vector<std::atomic<std::int64_t>> unfinished(static_cast<std::size_t>(clamp ? batch.clips : 0));
    for (auto &count : unfinished) count = tasks_per_clip;
    std::atomic<std::int64_t> next{0};

    const auto work = [&](int thread) {
        for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            const std::int64_t clip = task / tasks_per_clip, first = task % tasks_per_clip * kTaskFrames;
            const std::int64_t rows = std::min(kTaskFrames, batch.frames - first);
            const Range range = make_rows(plan, batch, clip, first, rows, scratch + thread * scratch_size);
            if (!clamp) continue;
            ranges[task] = range;
            if (unfinished[clip].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
            Range whole = range;  // the last task of a clip knows its maximum
            for (std::int64_t i = clip * tasks_per_clip; i < (clip + 1) * tasks_per_clip; ++i) {
                whole.maximum = std::max(whole.maximum, ranges[i].maximum);
                whole.has_nan |= ranges[i].has_nan;
            }
            const std::int64_t values = batch.frames * plan.tables.n_mels;
            plan.kernel->finish(plan.tables, batch.features + clip * values, values,
                                whole.has_nan ? std::numeric_limits<float>::quiet_NaN()
                                              : whole.maximum - plan.dynamic_range);
        }
    };
    if (team && threads > 1) {
        std::atomic<int> members{0};
        auto join = [&] { work(members.fetch_add(1, std::memory_order_relaxed)); };
        team([](void *member) { (*static_cast<decltype(join) *>(member))(); }, &join, static_cast<unsigned>(threads), 0);
        return FASTCLAP_OK;
    }
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(threads));
    try {
        while (static_cast<int>(helpers.size()) + 1 < threads) helpers.emplace_back(work, helpers.size() + 1);
    } catch (const std::exception &) {
        // No more threads to be had: those that run do the work.
    }
    work(0);
    for (auto &helper : helpers) helper.join();
    return FASTCLAP_OK;
}

}  // namespace

int fastclap_interface(void) { return FASTCLAP_INTERFACE; }

int fastclap_simd_supported(int simd) {
    switch (simd) {
        case FASTCLAP_SIMD_AUTO:
        case FASTCLAP_SIMD_PORTABLE: return 1;
#if defined(FASTCLAP_X86)
        case FASTCLAP_SIMD_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case FASTCLAP_SIMD_AVX512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
        default: return 0;
    }
}

int fastclap_log_mel_create(const fastclap_log_mel_config *config, const double *window, const double *mel_bank,
                            int simd, fastclap_log_mel_plan **plan, char *message, int64_t message_size) {
    if (!plan) return fail(FASTCLAP_INVALID, message, message_size, "plan is null");
    *plan = nullptr;
    if (!config || !window || !mel_bank) return fail(FASTCLAP_INVALID, message, message_size, "an argument is null");
    try {
        return create(*config, window, mel_bank, simd, plan, message, message_size);
    } catch (const std::bad_alloc &) {
        return fail(FASTCLAP_NO_MEMORY, message, message_size, "out of memory");
    }
}

void fastclap_log_mel_destroy(fastclap_log_mel_plan *plan) { delete plan; }

int fastclap_log_mel_run(const fastclap_log_mel_plan *plan, const void *waveform, int dtype, int64_t batch,
                         int64_t samples, int64_t stride, const int64_t *lengths, const int64_t *frame_lengths,
                         int64_t frames, float *features, int threads, fastclap_team team, char *message,
                         int64_t message_size) {
    const auto invalid = [&](const char *why) { return fail(FASTCLAP_INVALID, message, message_size, "%s", why); };
    if (!plan) return invalid("plan is null");
    if (dtype != FASTCLAP_FLOAT32 && dtype != FASTCLAP_INT16) return invalid("dtype must be float32 or int16");
    if (batch < 0 || samples < 0 || stride < 0 || frames < 0) return invalid("a size is negative");
    std::int64_t total;
    if (__builtin_mul_overflow(batch, frames, &total) ||
        __builtin_mul_overflow(total, 4 * plan->tables.n_mels, &total) ||
        __builtin_mul_overflow(batch, stride, &total) || __builtin_add_overflow(total, samples, &total) ||
        __builtin_mul_overflow(total, 8, &total) ||  // also the period of a reflection
        __builtin_mul_overflow(frames, plan->tables.hop_length, &total))
        return invalid("the sizes overflow");
    if (total > std::numeric_limits<std::int64_t>::max() / 2) return invalid("the sizes overflow");
    if (batch == 0 || frames == 0) return FASTCLAP_OK;
    if (!lengths || !frame_lengths || !features || (!waveform && samples)) return invalid("an argument is null");
    for (std::int64_t clip = 0; clip < batch; ++clip) {
        if (lengths[clip] < 0 || lengths[clip] > samples)
            return fail(FASTCLAP_INVALID, message, message_size, "lengths[%lld] lies outside of the waveform",
                        static_cast<long long>(clip));
        if (frame_lengths[clip] < 0 || frame_lengths[clip] > frames || (frame_lengths[clip] && !lengths[clip]))
            return fail(FASTCLAP_INVALID, message, message_size, "frame_lengths[%lld] lies outside of the features",
                        static_cast<long long>(clip));
    }
    const char *const bytes = static_cast<const char *>(waveform);
    const bool is_int16 = dtype == FASTCLAP_INT16;
    const Batch arguments = {bytes, is_int16, batch, stride, frames, lengths, frame_lengths, features};
    try {
        return run(*plan, arguments, threads, team, message, message_size);
    } catch (const std::bad_alloc &) {
        return fail(FASTCLAP_NO_MEMORY, message, message_size, "out of memory");
    }
}
