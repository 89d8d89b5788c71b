// The log-mel kernel, compiled once per SIMD path: one frame per lane, so that the FFT, the mel product and the
// logarithm need no shuffles and every size has the same code. Only the first and the last step transpose: samples
// come in along a frame, features go out along a frame.
//
// All of a block's data stays in one buffer of n_fft vectors (32 KB for n_fft = 512 and 16 lanes): the FFT works in
// place and leaves its digit-reversed order to the tables of the plan, powers overwrite the spectrum. The transform is
// that of n_fft / 2 complex points made of even and odd samples.
#include "log_mel_kernel.h"

#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTCLAP_LANES 16
#define FASTCLAP_KERNEL kernel_avx512
#elif defined(__AVX2__)
#define FASTCLAP_LANES 8
#define FASTCLAP_KERNEL kernel_avx2
#else
#define FASTCLAP_LANES 4
#define FASTCLAP_KERNEL kernel_portable
#endif

#if defined(__FMA__) || defined(__aarch64__)
#define FASTCLAP_FMA true
#else
#define FASTCLAP_FMA false
#endif

#define INLINE inline __attribute__((always_inline))

namespace fastclap {
namespace {

constexpr int W = FASTCLAP_LANES;
constexpr int kCacheLine = 64;
constexpr int kPairsPerPrefetch = 16;
constexpr bool kFusedMultiplyAdd = FASTCLAP_FMA;

typedef float V __attribute__((vector_size(4 * W)));
typedef std::int32_t I __attribute__((vector_size(4 * W)));
typedef std::int16_t S __attribute__((vector_size(2 * W)));
typedef std::uint32_t U __attribute__((vector_size(4 * W)));

INLINE V splat(float x) { return V{} + x; }

INLINE V load(const float *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE V load(const std::int16_t *p) {
    S s;
    __builtin_memcpy(&s, p, sizeof s);
    return __builtin_convertvector(__builtin_convertvector(s, I), V);
}

INLINE void store(float *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

// To an aligned address, past the caches where the processor can.
INLINE void store_streaming(float *p, V v) {
#if FASTCLAP_LANES == 16
    _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif FASTCLAP_LANES == 8
    _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
    _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
    store(p, v);
#endif
}

// ---- transposition ----

using Lanes = std::make_integer_sequence<int, W>;

// Result lane l is lane Index::at(l) of (a, b) laid end to end.
template <class Index, int... L>
INLINE V shuffle(V a, V b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Index::at(L)...);
#else
    return __builtin_shuffle(a, b, I{Index::at(L)...});
#endif
}

// Inside each group of four lanes: the unpack instructions, on single lanes and on pairs.
struct LowLanes {
    static constexpr int at(int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * W; }
};
struct HighLanes {
    static constexpr int at(int l) { return LowLanes::at(l) + 2; }
};
struct LowPairs {
    static constexpr int at(int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * W; }
};
struct HighPairs {
    static constexpr int at(int l) { return LowPairs::at(l) + 2; }
};
// Even (odd) groups of four of a, then those of b.
struct EvenGroups {
    static constexpr int at(int l) { return l / 4 * 2 % (W / 4) * 4 + l % 4 + l / (W / 2) * W; }
};
struct OddGroups {
    static constexpr int at(int l) { return EvenGroups::at(l) + 4; }
};

// All lanes of a but the lowest, then lane At of b.
template <int At>
struct NextLanes {
    static constexpr int at(int l) { return l < W - 1 ? l + 1 : W + At; }
};

template <class Index>
INLINE V shuffle(V a, V b) {
    return shuffle<Index>(a, b, Lanes{});
}

template <int... At>
INLINE void next_lanes(V r[W], V fresh, std::integer_sequence<int, At...>) {
    ((r[At] = shuffle<NextLanes<At>>(r[At], fresh)), ...);
}

INLINE void transpose(V r[W]) {
    V t[W];
    for (int i = 0; i < W; i += 4) {
        const V a = shuffle<LowLanes>(r[i], r[i + 1]), b = shuffle<HighLanes>(r[i], r[i + 1]);
        const V c = shuffle<LowLanes>(r[i + 2], r[i + 3]), d = shuffle<HighLanes>(r[i + 2], r[i + 3]);
        t[i] = shuffle<LowPairs>(a, c), t[i + 1] = shuffle<HighPairs>(a, c);
        t[i + 2] = shuffle<LowPairs>(b, d), t[i + 3] = shuffle<HighPairs>(b, d);
    }
    // t[i + s], group g: element 4 g + s of rows i .. i + 3. Bring equal groups together.
    for (int s = 0; s < 4; ++s) {
#if FASTCLAP_LANES == 4
        r[s] = t[s];
#elif FASTCLAP_LANES == 8
        r[s] = shuffle<EvenGroups>(t[s], t[4 + s]), r[4 + s] = shuffle<OddGroups>(t[s], t[4 + s]);
#else
        const V even0 = shuffle<EvenGroups>(t[s], t[4 + s]), odd0 = shuffle<OddGroups>(t[s], t[4 + s]);
        const V even1 = shuffle<EvenGroups>(t[8 + s], t[12 + s]), odd1 = shuffle<OddGroups>(t[8 + s], t[12 + s]);
        r[s] = shuffle<EvenGroups>(even0, even1), r[8 + s] = shuffle<OddGroups>(even0, even1);
        r[4 + s] = shuffle<EvenGroups>(odd0, odd1), r[12 + s] = shuffle<OddGroups>(odd0, odd1);
#endif
    }
}

// W samples from each of W pointers: r[i] holds the i-th of all.
template <class Sample>
INLINE void load_transposed(const Sample *const p[W], int offset, V r[W]) {
    for (int l = 0; l < W; ++l) r[l] = load(p[l] + offset);
    transpose(r);
}

// ---- FFT ----

struct C {
    V re, im;
};

INLINE C operator+(C a, C b) { return {a.re + b.re, a.im + b.im}; }
INLINE C operator-(C a, C b) { return {a.re - b.re, a.im - b.im}; }
INLINE C operator*(float s, C a) { return {s * a.re, s * a.im}; }
INLINE C over_i(C a) { return {a.im, -a.re}; }
INLINE C twiddle(C a, float c, float s) { return {a.re * c - a.im * s, a.re * s + a.im * c}; }

// DFT of R points in registers, in natural order.
template <int R>
INLINE void dft(C *z);

template <>
INLINE void dft<2>(C *z) {
    const C a = z[0] + z[1], b = z[0] - z[1];
    z[0] = a, z[1] = b;
}

template <>
INLINE void dft<3>(C *z) {
    const C sum = z[1] + z[2], turn = 0.866025403784438647f * over_i(z[1] - z[2]);
    const C mid = z[0] - 0.5f * sum;
    z[0] = z[0] + sum, z[1] = mid + turn, z[2] = mid - turn;
}

template <>
INLINE void dft<4>(C *z) {
    const C a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = over_i(z[1] - z[3]);
    z[0] = a + c, z[1] = b + d, z[2] = a - c, z[3] = b - d;
}

template <>
INLINE void dft<5>(C *z) {
    constexpr float c1 = 0.309016994374947424f, c2 = -0.809016994374947424f;  // cos(2 pi / 5), cos(4 pi / 5)
    constexpr float s1 = 0.951056516295153572f, s2 = 0.587785252292473129f;   // sin(2 pi / 5), sin(4 pi / 5)
    const C a = z[1] + z[4], b = over_i(z[1] - z[4]), c = z[2] + z[3], d = over_i(z[2] - z[3]);
    const C p = z[0] + c1 * a + c2 * c, q = z[0] + c2 * a + c1 * c;
    const C u = s1 * b + s2 * d, v = s2 * b - s1 * d;
    z[0] = z[0] + a + c;
    z[1] = p + u, z[4] = p - u, z[2] = q + v, z[3] = q - v;
}

template <>
INLINE void dft<8>(C *z) {
    constexpr float h = 0.707106781186547524f;
    C even[4] = {z[0] + z[4], z[1] + z[5], z[2] + z[6], z[3] + z[7]};
    dft<4>(even);
    // The odd half: its factors h go into fused multiply-adds, which cost no rounding and no operation of their own.
    const C first = z[0] - z[4], third = over_i(z[2] - z[6]), b = z[1] - z[5], d = z[3] - z[7];
    const C second = b + over_i(b), fourth = over_i(d) - d;
    const C p = first + third, q = first - third, u = h * (second + fourth), v = h * over_i(second - fourth);
    for (int k = 0; k < 4; ++k) z[2 * k] = even[k];
    z[1] = p + u, z[3] = q + v, z[5] = p - u, z[7] = q - v;
}

// One pass over `blocks` blocks of radix * stride complex points at z, in place.
template <int R>
INLINE void radix_pass(V *z, int blocks, int stride, const float *twiddles) {
    C leg[R];
    for (int block = 0; block < blocks; ++block, z += 2 * R * stride) {
        const float *w = twiddles;
        for (int p = 0; p < stride; ++p, w += 2 * (R - 1)) {
            for (int q = 0; q < R; ++q) leg[q] = {z[2 * (p + q * stride)], z[2 * (p + q * stride) + 1]};
            dft<R>(leg);
            if (stride > 1)
                for (int q = 1; q < R; ++q) leg[q] = twiddle(leg[q], w[2 * q - 2], w[2 * q - 1]);
            for (int q = 0; q < R; ++q) z[2 * (p + q * stride)] = leg[q].re, z[2 * (p + q * stride) + 1] = leg[q].im;
        }
    }
}

template <int R>
void run_stage(V *z, int blocks, const Stage &stage) {
    if (stage.length == R)
        radix_pass<R>(z, blocks, 1, stage.twiddles);
    else
        radix_pass<R>(z, blocks, stage.length / R, stage.twiddles);
}

void run_stage(V *z, int blocks, const Stage &stage) {
    switch (stage.radix) {
        case 2: return run_stage<2>(z, blocks, stage);
        case 3: return run_stage<3>(z, blocks, stage);
        case 4: return run_stage<4>(z, blocks, stage);
        case 5: return run_stage<5>(z, blocks, stage);
        default: return run_stage<8>(z, blocks, stage);
    }
}

// The passes after the first over one of the parts that it leaves, which is small enough for the first-level cache.
INLINE void finish_part(const Tables &t, V *z, int part) {
    const int length = t.stage_count ? t.stages[0].length / t.stages[0].radix : 1;
    for (int s = 1; s < t.stage_count; ++s)
        run_stage(z + 2 * part * length, length / t.stages[s].length, t.stages[s]);
}

// ---- logarithm ----

// log_scale * ln(x) for x > 0 normal; infinities and NaNs are passed on. Polynomial of Cephes' logf (S. Moshier), its
// terms paired as by Estrin: a chain of nine would keep the processor waiting.
INLINE V scaled_log(V x, float log_scale, float log2_high, float log2_low) {
    const U bits = reinterpret_cast<U>(x);
    const I exponent = reinterpret_cast<I>(bits - 0x3f3504f3u) >> 23;  // the mantissa lies in [sqrt(1/2), sqrt(2))
    const V f = reinterpret_cast<V>(bits - (reinterpret_cast<U>(exponent) << 23)) - 1.0f;
    const V e = __builtin_convertvector(exponent, V);
    const V square = f * f, fourth = square * square;
    const V low = (f * -1.6668057665e-1f + 2.0000714765e-1f) * square + (f * -2.4999993993e-1f + 3.3333331174e-1f);
    const V high = (f * -1.1514610310e-1f + 1.1676998740e-1f) * square + (f * -1.2420140846e-1f + 1.4249322787e-1f);
    const V p = (fourth * 7.0376836292e-2f + high) * fourth + low;
    const V mantissa = f + (p * f - 0.5f) * square;
    const V value = (mantissa * log_scale + e * log2_low) + e * log2_high;
    return x <= 3.402823466e38f ? value : x;
}

INLINE V root(V x) {
    for (int l = 0; l < W; ++l) x[l] = __builtin_sqrtf(x[l]);
    return x;
}

// ---- one block of frames ----

// The sample of a clip that stands at `position`, before its begin or after its end, or -1 for a zero.
std::int64_t source(std::int64_t position, std::int64_t length, int edge) {
    if (edge == 0) return -1;
    const bool repeat = edge == 2;
    const std::int64_t mirrored = (position < 0 ? 0 : 2 * (length - 1)) - position;
    const std::int64_t near = mirrored + (position < 0 ? -repeat : repeat);
    if (near >= 0 && near < length) return near;  // as a rule, and without a division
    std::int64_t period = 2 * length - (repeat ? 0 : 2);
    if (period < 1) return 0;
    position %= period;
    if (position < 0) position += period;
    return position < length ? position : period - repeat - position;
}

// The samples of a frame that is not all within the clip, zeros up to `padded`.
template <class Sample>
INLINE void copy_frame(const Tables &t, const Sample *clip, std::int64_t length, std::int64_t start, Sample *copy,
                       int padded) {
    const auto within = [&](std::int64_t i) { return i < 0 ? 0 : i < t.win_length ? static_cast<int>(i) : t.win_length; };
    const int begin = within(-start), end = within(length - start);
    const auto fill = [&](int from, int to) {
        for (int i = from; i < to; ++i) {
            const std::int64_t at = source(start + i, length, t.edge);
            copy[i] = at < 0 ? Sample{} : clip[at];
        }
    };
    fill(0, begin);
    if (begin < end) __builtin_memcpy(copy + begin, clip + start + begin, (end - begin) * sizeof(Sample));
    fill(begin < end ? end : begin, t.win_length);
    for (int i = t.win_length; i < padded; ++i) copy[i] = Sample{};
}

constexpr int round_up(int n) { return (n + W - 1) / W * W; }

std::size_t scratch_size(const Tables &t) {
    return static_cast<std::size_t>(W) * (round_up(t.n_fft) + round_up(t.n_mels) + round_up(t.win_length));
}

// Samples of W frames, one frame a lane, times the window. `in_place`: the frames lie in the clip, a hop apart.
template <class Sample>
INLINE void load_windowed(const Tables &t, const Sample *const frame[W], bool in_place, const float *window, V *z) {
    V r[W];
    int begin = 0;
    // Where frames overlap, their samples a hop further on are those of the lane above, and the last lane's are new: one
    // shuffle, where a row of a transposition takes four of 16 lanes (of fewer lanes, fewer).
    if (W == 16 && in_place && t.hop_length < t.win_length && t.hop_length % W == 0 && t.win_length % W == 0) {
        const int hop = static_cast<int>(t.hop_length);
        for (; begin < hop; begin += W) {
            load_transposed(frame, begin, r);
            for (int i = 0; i < W; ++i) z[begin + i] = r[i] * window[begin + i];
            for (int at = begin + hop; at < t.win_length; at += hop) {
                next_lanes(r, load(frame[W - 1] + at), Lanes{});
                for (int i = 0; i < W; ++i) z[at + i] = r[i] * window[at + i];
            }
        }
        return;
    }
    for (; begin + W <= t.win_length; begin += W) {
        load_transposed(frame, begin, r);
        for (int i = 0; i < W; ++i) z[begin + i] = r[i] * window[begin + i];
    }
    if (begin == t.win_length) return;
    load_transposed(frame, begin, r);
    for (int i = 0; begin + i < t.win_length; ++i) z[begin + i] = r[i] * window[begin + i];
}

// Kahan's summation: a constant offset far above the signal must not leave its rounding error in the low bins.
INLINE void add_compensated(V &sum, V &lost, V x) {
    const V y = x - lost, total = sum + y;
    lost = (total - sum) - y;
    sum = total;
}

// The same with the frames' means removed and pre-emphasis before the window.
template <class Sample>
INLINE void load_filtered(const Tables &t, const Sample *const frame[W], const float *window, V *z) {
    V r[W], sum = {}, lost = {};
    int begin = 0;
    for (; begin + W <= t.win_length; begin += W) {
        load_transposed(frame, begin, r);
        V part[4] = {};
        for (int i = 0; i < W; ++i) z[begin + i] = r[i], part[i % 4] += r[i];
        add_compensated(sum, lost, (part[0] + part[1]) + (part[2] + part[3]));
    }
    if (begin < t.win_length) load_transposed(frame, begin, r);
    for (int i = 0; begin + i < t.win_length; ++i) {
        z[begin + i] = r[i];
        add_compensated(sum, lost, r[i]);
    }
    const V mean = t.remove_dc ? sum / static_cast<float>(t.win_length) : V{};
    // Without a fused multiply-add, x[i] - c x[i - 1] for a c near 1 is a difference of neighbours, exact for a slow
    // signal, and a small rest.
    const float whole = !kFusedMultiplyAdd && t.preemphasis >= 0.5 ? 1.0f : 0.0f;
    const float rest = static_cast<float>(whole - t.preemphasis);
    V previous = z[0] - mean;
    for (int i = 0; i < t.win_length; ++i) {
        const V current = z[i] - mean;
        z[i] = (rest * previous + (current - whole * previous)) * window[i];
        previous = current;
    }
}

template <class Sample>
INLINE void load_frames(const Tables &t, const Sample *const frame[W], bool in_place, V *z) {
    const float *window = t.window[sizeof(Sample) == sizeof(std::int16_t)];
    if (t.remove_dc || t.preemphasis != 0.0)
        load_filtered(t, frame, window, z);
    else
        load_windowed(t, frame, in_place, window, z);
    for (int i = t.win_length; i < t.n_fft; ++i) z[i] = V{};
}

// Fetches a range of memory into the cache bit by bit: more than a few lines at once would wait for one another.
// Addresses, as the last line may end past what a pointer may point to.
struct Prefetch {
    std::uintptr_t at, end, step;
    void operator()() {
        for (const std::uintptr_t stop = at + step; at < stop && at < end; at += kCacheLine)
            __builtin_prefetch(reinterpret_cast<const void *>(at), 0, 3);
    }
};

// Spectra of the even and of the odd samples, this times the turn of a bin, both times two: the bin is their sum, its
// mirror the conjugate of their difference.
struct Halves {
    C e, o;
};

INLINE Halves halves(const V *z, Pair pair) {
    const C a = {z[pair.slot], z[pair.slot + 1]}, b = {z[pair.mirror], z[pair.mirror + 1]};
    return {{a.re + b.re, a.im - b.im}, twiddle({a.im + b.im, b.re - a.re}, pair.cosine, pair.sine)};
}

INLINE V power(C a) { return a.re * a.re + a.im * a.im; }

// The rest of the transform and the powers (or magnitudes) of the bins that the mel bank uses, a pair of parts at a
// time. Returns the constant bin: it is not finite if any sample is not.
INLINE V spectrum(const Tables &t, V *z, Prefetch prefetch) {
    V constant = {};
    for (int g = 0; g < t.group_count; ++g) {
        const Group group = t.groups[g];
        prefetch();
        finish_part(t, z, group.part);
        prefetch();
        if (group.mirror_part != group.part) finish_part(t, z, group.mirror_part);
        for (int i = group.pair_begin; i < group.single_begin; ++i) {
            if (i % kPairsPerPrefetch == 0) prefetch();
            const Pair pair = t.pairs[i];
            const Halves h = halves(z, pair);
            z[pair.slot] = power(h.e + h.o);
            z[pair.mirror] = power(h.e - h.o);
        }
        for (int i = group.single_begin; i < group.pair_end; ++i) {
            if (i % kPairsPerPrefetch == 0) prefetch();
            const Halves h = halves(z, t.pairs[i]);
            z[t.pairs[i].slot] = power(h.e + h.o);
        }
        if (group.part == 0) {
            const V nyquist = 2.0f * (z[0] - z[1]);
            constant = 2.0f * (z[0] + z[1]);
            z[0] = constant * constant, z[1] = nyquist * nyquist;
        }
        if (!t.magnitude) continue;
        if (group.part == 0) z[0] = root(z[0]), z[1] = root(z[1]);
        for (int i = group.pair_begin; i < group.pair_end; ++i) {
            const Pair pair = t.pairs[i];
            z[pair.slot] = root(z[pair.slot]);
            if (i < group.single_begin) z[pair.mirror] = root(z[pair.mirror]);
        }
    }
    return constant;
}

INLINE void mel_energies(const Tables &t, const V *z, V *mels) {
    for (int m = 0; m < t.n_mels; ++m) {
        V even = {}, odd = {};
        const Weight *w = t.weights + t.mel_begin[m], *end = t.weights + t.mel_begin[m + 1];
        for (; end - w > 1; w += 2) even += z[w[0].slot] * w[0].value, odd += z[w[1].slot] * w[1].value;
        if (w < end) even += z[w->slot] * w->value;
        mels[m] = even + odd;
    }
}

template <class Sample>
Range frames(const Tables &t, const Sample *clip, std::int64_t length, std::int64_t first, std::int64_t count,
             float *rows, bool stream, float *scratch) {
    V *z = reinterpret_cast<V *>(scratch);
    V *mels = z + round_up(t.n_fft);
    Sample *edges = reinterpret_cast<Sample *>(mels + round_up(t.n_mels));
    const int padded = round_up(t.win_length);
    const float nan = __builtin_nanf("");
    // Copies, which no store to memory can change.
    const float floor = t.floor, log_scale = t.log_scale, log2_high = t.log2_high, log2_low = t.log2_low;
    const float mean = t.mean, inverse_std = t.inverse_std;
    const bool clamp = t.clamp;
    stream &= !clamp && t.n_mels % W == 0 && reinterpret_cast<std::uintptr_t>(rows) % sizeof(V) == 0;
    V maximum = splat(-__builtin_inff());
    I nans = {};
    for (std::int64_t done = 0; done < count; done += W) {
        const int valid = static_cast<int>(count - done < W ? count - done : W);
        const Sample *frame[W];
        bool in_place = valid == W;
        for (int l = 0; l < W; ++l) {
            if (l >= valid) {
                frame[l] = frame[valid - 1];
                continue;
            }
            const std::int64_t start = (first + done + l) * t.hop_length - t.offset;
            if (start >= 0 && start + padded <= length) {
                frame[l] = clip + start;
                continue;
            }
            in_place = false;
            copy_frame(t, clip, length, start, edges + l * padded, padded);
            frame[l] = edges + l * padded;
        }
        for (std::int64_t i = 0; i < (stream ? 0 : valid * t.n_mels); i += kCacheLine / sizeof(float))
            __builtin_prefetch(rows + done * t.n_mels + i, 1, 2);
        load_frames(t, frame, in_place, z);
        if (t.stage_count) run_stage(z, 1, t.stages[0]);
        // The samples that the next block adds.
        const std::int64_t next = (first + done + W - 1) * t.hop_length - t.offset + t.win_length;
        Prefetch prefetch = {};
        if (next >= 0 && next + W * t.hop_length <= length) {
            const std::uintptr_t bytes = static_cast<std::uintptr_t>(W * t.hop_length) * sizeof(Sample);
            const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(clip + next);
            const int calls = 2 * t.group_count + t.groups[t.group_count - 1].pair_end / kPairsPerPrefetch;
            prefetch = {begin, begin + bytes, bytes / calls + kCacheLine};
        }
        const V constant = spectrum(t, z, prefetch);
        const I finite = (constant < 0.0f ? -constant : constant) <= 3.402823466e38f;
        mel_energies(t, z, mels);
        for (int m = 0; m < t.n_mels; ++m) {
            V value = scaled_log(mels[m] < floor ? splat(floor) : mels[m], log_scale, log2_high, log2_low);
            value = finite ? value : splat(nan);
            mels[m] = clamp ? value : (value - mean) * inverse_std;
        }
        if (clamp)
            for (int m = 0; m < t.n_mels; ++m) {
                maximum = mels[m] > maximum ? mels[m] : maximum;
                nans |= mels[m] != mels[m];
            }
        for (int m = 0; m < t.n_mels; m += W) {
            V r[W];
            for (int i = 0; i < W; ++i) r[i] = mels[m + i];
            transpose(r);
            float *out = rows + done * t.n_mels + m;
            if (stream) {
                for (int l = 0; l < valid; ++l) store_streaming(out + l * t.n_mels, r[l]);
            } else if (valid == W && m + W <= t.n_mels) {
                for (int l = 0; l < W; ++l) store(out + l * t.n_mels, r[l]);
            } else {
                const int width = t.n_mels - m < W ? t.n_mels - m : W;
                for (int l = 0; l < valid; ++l) __builtin_memcpy(out + l * t.n_mels, &r[l], width * sizeof(float));
            }
        }
    }
#if defined(__SSE2__)
    if (stream) _mm_sfence();  // other threads see these rows as soon as they see that the task is done
#endif
    Range range = {maximum[0], nans[0] != 0};
    for (int l = 1; l < W; ++l) {
        range.maximum = maximum[l] > range.maximum ? maximum[l] : range.maximum;
        range.has_nan |= nans[l] != 0;
    }
    return range;
}

Range frames(const Tables &t, const void *clip, bool is_int16, std::int64_t length, std::int64_t first,
             std::int64_t count, float *rows, bool stream, float *scratch) {
    if (is_int16)
        return frames(t, static_cast<const std::int16_t *>(clip), length, first, count, rows, stream, scratch);
    return frames(t, static_cast<const float *>(clip), length, first, count, rows, stream, scratch);
}

void finish(const Tables &t, float *values, std::int64_t count, float low) {
    std::int64_t i = 0;
    for (; i + W <= count; i += W) {
        V value = load(values + i);
        value = value > low ? value : splat(low);
        store(values + i, (value - t.mean) * t.inverse_std);
    }
    for (; i < count; ++i) values[i] = ((values[i] > low ? values[i] : low) - t.mean) * t.inverse_std;
}

}  // namespace

extern const Kernel FASTCLAP_KERNEL = {scratch_size, frames, finish};

}  // namespace fastclap
