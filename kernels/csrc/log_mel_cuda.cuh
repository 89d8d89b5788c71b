// Log-mel features on an NVIDIA GPU: one block computes FRAMES frames of one clip, from samples to features.
//
// A frame's DFT has N = R1 * R2 points, sample n = R2 * n1 + n2 and bin k = k1 + R1 * k2:
//   1. A thread takes one n2 of GROUP neighbouring frames: their samples, windowed, and a real FFT over n1 in registers.
//      Rows 0 < k1 < R1 / 2 are turned by exp(-2 pi i k1 n2 / N) and left in shared memory.
//   2. A thread takes one row k1 of a frame: a complex FFT over n2 in registers, and the power of its bins.
//      A real signal has no other rows but 0 and R1 / 2; together these are the DFT of 2 * R2 real numbers, which is a
//      row of R2 complex ones more.
//   3. A thread takes one mel of four frames: the sum over its bins, the logarithm, the affine step.
// Between the steps all frames of a tile lie side by side, so that a warp reads and writes 32 banks wherever it can.
//
// fastclap.kernels.log_mel.cuda_engine makes the tables and gives the constants as LOG_MEL_* macros; it also says what
// each is. emulate_cuda.cpp runs the same code on a CPU and supplies what CUDA has in itself.

#define DEVICE __device__ __forceinline__

struct Complex {
    float re, im;
};
struct BFloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};

#ifdef __CUDACC__
DEVICE float log2_approximate(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE void store(float *to, float x) { *to = x; }
DEVICE void store(BFloat16 *to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
DEVICE void store(Float16 *to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
DEVICE float value_of(float x) { return x; }
DEVICE float value_of(BFloat16 x) { return __int_as_float(x.bits << 16); }
DEVICE float value_of(Float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// What other blocks have written meanwhile: from the L2 cache.
template <class Words>
DEVICE Words load_again(const Words *from) {
    return __ldcg(from);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Constants

constexpr int N = LOG_MEL_N_FFT, R1 = LOG_MEL_R1, R2 = LOG_MEL_R2, WINDOW = LOG_MEL_WIN_LENGTH, HOP = LOG_MEL_HOP_LENGTH;
constexpr int MELS = LOG_MEL_N_MELS, LOW = LOG_MEL_LOW_BIN, HIGH = LOG_MEL_HIGH_BIN, EDGES = LOG_MEL_EDGES;
constexpr int FRAMES = LOG_MEL_FRAMES, GROUP = LOG_MEL_GROUP, THREADS = LOG_MEL_THREADS;
constexpr bool REMOVE_DC = LOG_MEL_REMOVE_DC, PREEMPHASIS = LOG_MEL_PREEMPHASIS, MAGNITUDE = LOG_MEL_MAGNITUDE;
constexpr bool RANGE = LOG_MEL_RANGE, MASKS = LOG_MEL_MASKS;
using Input = LOG_MEL_INPUT;

constexpr int ROWS = R1 / 2;                            // of which the first stands for rows 0 and R1 / 2
constexpr int SLICES = (WINDOW + R2 - 1) / R2;          // of R2 samples of a frame; those after them are zero padding
constexpr int STEP = HOP % R2 || HOP / R2 > SLICES ? 0 : HOP / R2;  // slices that the next frame is later, if whole
constexpr int APART = STEP ? STEP : SLICES;             // numbers of a thread from one frame of its group to the next
constexpr int GROUP_SLICES = SLICES + (GROUP - 1) * APART;
constexpr int SAMPLES = (FRAMES - 1) * HOP + WINDOW;    // of a tile

constexpr int PAD = LOG_MEL_PAD;  // words after every hop of samples: no two frames of a warp start in one bank
constexpr int ROW_STRIDE = LOG_MEL_ROW_STRIDE, FRAME_STRIDE = LOG_MEL_FRAME_STRIDE;  // complex numbers; for the same end

constexpr int position(int sample) { return sample + PAD * (sample / HOP); }

constexpr int SAMPLE_WORDS = (position((FRAMES - 1) * HOP + SLICES * R2) + 3) / 4 * 4;
constexpr int POWER_WORDS = (HIGH - LOW) * FRAMES;
constexpr int FIRST_WORDS = SAMPLE_WORDS > POWER_WORDS ? SAMPLE_WORDS : POWER_WORDS;  // samples, then powers
constexpr int EXCHANGE_WORDS = 2 * FRAMES * FRAME_STRIDE;
constexpr int MEAN_WORDS = REMOVE_DC ? FRAMES : 0;
constexpr int SHARED_BYTES = 4 * (FIRST_WORDS + EXCHANGE_WORDS + MEAN_WORDS);
static_assert(SHARED_BYTES == LOG_MEL_SHARED_BYTES && 4 * (4 + MELS) <= SHARED_BYTES);

constexpr int FIRST_TASKS = R2 * FRAMES / GROUP, SECOND_TASKS = ROWS * FRAMES;
constexpr int WINDOW_VECTORS = (SLICES + 3) / 4, TURN_VECTORS = (2 * (ROWS - 1) + 3) / 4;  // of a column
constexpr int QUARTERS = FRAMES / 4;     // threads of a mel, four frames each
constexpr int TOGETHER = 32 / QUARTERS;  // mels of a warp

static_assert(N == R1 * R2 && R1 % 2 == 0 && FRAMES % GROUP == 0 && THREADS % 32 == 0);
static_assert(FRAMES == 8 || FRAMES == 16 || FRAMES == 32);
static_assert(!REMOVE_DC || FIRST_TASKS <= THREADS);  // a thread keeps its samples while the means are made

struct Arguments {
    const Input *waveform;               // [clips, samples], row_stride apart
    const long long *offsets, *lengths;  // [clips] in [0, samples], or null
    const float4 *columns;               // [WINDOW_VECTORS + TURN_VECTORS, R2]: taps of the slices, then cosines and sines
    const float4 *weights;               // of four bins, for the mels of a warp side by side, then of the next four
    const int2 *runs;                    // [warps of mels]: where its weights are, and how many bins, a multiple of 4
    const int *first_bins;               // [MELS rounded up to a warp's], less LOW
    const float4 *logarithms;            // [MELS]: what log2 becomes a feature with, see `logarithm_of`
    const float2 *affine;                // [MELS]: mean, 1 / std
    const long long *time_masks, *mel_masks;  // [clips, spans, 2]
    LOG_MEL_OUTPUT *features;            // [clips, frames, MELS]
    long long *frame_lengths;            // [clips]
    unsigned *states;                    // [clips, 2] zeros, where RANGE: the bits of the largest energy; finished tiles
    long long row_stride;
    int samples, clips, frames, time_spans, mel_spans;
    int count_add, count_plus, most_frames;  // frames of a clip: (length + count_add) / HOP + count_plus
    float preemphasis, floor, padding, dynamic_range;
    float log_high, log_low, log_scale;  // of a logarithm that is not yet a feature
};

// ---------------------------------------------------------------------------------------------------------------------
// FFTs of a thread, in registers: all indices are constants

// cos(2 pi k / n), to the last bit of a float.
constexpr float turn_cosine(int k, int n) {
    k = (k % n + n) % n;
    if (2 * k > n) k = n - k;
    const bool negative = 4 * k > n;
    if (negative) k = n - 2 * k, n *= 2;  // cos(pi - x) = -cos(x), with x = 2 pi (n - 2k) / (2n)
    const double x = 6.283185307179586476925 * k / n;
    double term = 1, sum = 1;
    for (int i = 1; i < 14; ++i) term *= -x * x / ((2 * i - 1) * (2 * i)), sum += term;
    return static_cast<float>(4 * k == n ? 0 : negative ? -sum : sum);
}
constexpr float turn_sine(int k, int n) { return turn_cosine(4 * k - n, 4 * n); }

template <int I>
struct Constant {
    static constexpr int value = I;
    constexpr operator int() const { return I; }
};

// f(Constant<I>) for I from FIRST to END - 1.
template <int FIRST, int END, class F>
DEVICE void for_each(F &&f) {
    if constexpr (FIRST < END) {
        f(Constant<FIRST>{});
        for_each<FIRST + 1, END>(f);
    }
}

DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
DEVICE Complex twice_less(Complex a, Complex b) { return {fmaf(2.0f, a.re, -b.re), fmaf(2.0f, a.im, -b.im)}; }

// a + b exp(-2 pi i k / n), by its cosine and sine.
DEVICE Complex add_turned(Complex a, Complex b, float cosine, float sine) {
    return {fmaf(cosine, b.re, fmaf(sine, b.im, a.re)), fmaf(cosine, b.im, fmaf(-sine, b.re, a.im))};
}

// Of numbers whose prime factors are 2, 3 and 5.
constexpr int smallest_factor(int n) { return n % 2 == 0 ? 2 : n % 3 == 0 ? 3 : 5; }

// The part of n that is a power of its smallest prime factor.
constexpr int prime_power(int n) {
    const int p = smallest_factor(n);
    int part = 1;
    while (n % p == 0) n /= p, part *= p;
    return part;
}

// The number below a * b that is i modulo a and j modulo b.
constexpr int chinese(int i, int a, int j, int b) {
    while (i % b != j) i += a;
    return i;
}

template <int R>
DEVICE void fft(Complex (&v)[R]) {
    constexpr int A = R == 1 ? 1 : prime_power(R), B = R / A;
    if constexpr (R == 1) {
    } else if constexpr (B > 1) {  // Good-Thomas: no turns between factors that have none in common
        Complex rows[A][B];
        for_each<0, A>([&](auto i) {
            for_each<0, B>([&](auto j) { rows[i][j] = v[(B * i + A * j) % R]; });
            fft<B>(rows[i]);
        });
        for_each<0, B>([&](auto j) {
            Complex column[A];
            for_each<0, A>([&](auto i) { column[i] = rows[i][j]; });
            fft<A>(column);
            for_each<0, A>([&](auto i) { v[chinese(i, A, j, B)] = column[i]; });
        });
    } else if constexpr (R % 2 == 0) {
        Complex even[R / 2], odd[R / 2];
        for_each<0, R / 2>([&](auto i) { even[i] = v[2 * i], odd[i] = v[2 * i + 1]; });
        fft<R / 2>(even);
        fft<R / 2>(odd);
        for_each<0, R / 2>([&](auto k) {
            if constexpr (k.value == 0) {
                v[0] = even[0] + odd[0], v[R / 2] = even[0] - odd[0];
            } else if constexpr (4 * k.value == R) {
                const Complex turned = {odd[k].im, -odd[k].re};
                v[k] = even[k] + turned, v[k + R / 2] = even[k] - turned;
            } else {
                constexpr float cosine = turn_cosine(k.value, R), sine = turn_sine(k.value, R);
                v[k] = add_turned(even[k], odd[k], cosine, sine);
                v[k + R / 2] = twice_less(even[k], v[k]);
            }
        });
    } else if constexpr (smallest_factor(R) != R) {  // 9, 25 and the like
        constexpr int P = smallest_factor(R), Q = R / P;
        Complex parts[P][Q];
        for_each<0, P>([&](auto i) {
            for_each<0, Q>([&](auto j) { parts[i][j] = v[P * j + i]; });
            fft<Q>(parts[i]);
        });
        for_each<0, Q>([&](auto k) {
            Complex column[P];
            for_each<0, P>([&](auto i) {
                const float cosine = turn_cosine(i * k, R), sine = turn_sine(i * k, R);
                column[i] = i * k ? add_turned({0.0f, 0.0f}, parts[i][k], cosine, sine) : parts[i][k];
            });
            fft<P>(column);
            for_each<0, P>([&](auto j) { v[k + Q * j] = column[j]; });
        });
    } else {  // 3 and 5, from the definition; j and R - j go together
        Complex sums[R / 2 + 1], differences[R / 2 + 1], x = v[0];
        for_each<1, R / 2 + 1>([&](auto j) {
            sums[j] = v[j] + v[R - j], differences[j] = v[j] - v[R - j];
            v[0] = v[0] + sums[j];
        });
        for_each<1, R / 2 + 1>([&](auto k) {
            Complex even = x;
            for_each<1, R / 2 + 1>([&](auto j) {
                const float cosine = turn_cosine(j * k, R);
                even = {fmaf(cosine, sums[j].re, even.re), fmaf(cosine, sums[j].im, even.im)};
            });
            Complex y = even;
            for_each<1, R / 2 + 1>([&](auto j) {
                const float sine = turn_sine(j * k, R);
                y = {fmaf(sine, differences[j].im, y.re), fmaf(-sine, differences[j].re, y.im)};
            });
            v[k] = y, v[R - k] = twice_less(even, y);
        });
    }
}

// Bins 0 to R / 2 of real numbers, of which those from LIVE on are zero and are not read.
template <int R, int LIVE = R>
DEVICE void real_fft(const float (&x)[R], Complex (&v)[R / 2 + 1]) {
    constexpr int A = R == 1 ? 1 : prime_power(R), B = R / A;
    float live[R];
    for_each<0, R>([&](auto i) { live[i] = i < LIVE ? x[i] : 0.0f; });
    if constexpr (R == 1) {
        v[0] = {live[0], 0.0f};
    } else if constexpr (B > 1) {
        Complex rows[A][B / 2 + 1];
        for_each<0, A>([&](auto i) {
            float row[B];
            for_each<0, B>([&](auto j) { row[j] = live[(B * i + A * j) % R]; });
            real_fft<B>(row, rows[i]);
        });
        float first[A];
        Complex firsts[A / 2 + 1];
        for_each<0, A>([&](auto i) { first[i] = rows[i][0].re; });
        real_fft<A>(first, firsts);
        auto set = [&](int k, Complex x) {
            if (2 * k <= R) v[k] = x;
            else v[R - k] = {x.re, -x.im};
        };
        for_each<0, A / 2 + 1>([&](auto i) { set(chinese(i, A, 0, B), firsts[i]); });
        for_each<1, B / 2 + 1>([&](auto j) {
            Complex column[A];
            for_each<0, A>([&](auto i) { column[i] = rows[i][j]; });
            fft<A>(column);
            for_each<0, A>([&](auto i) { set(chinese(i, A, j, B), column[i]); });
        });
    } else if constexpr (R == 2) {
        if constexpr (LIVE < 2) v[0] = v[1] = {live[0], 0.0f};
        else v[0] = {x[0] + x[1], 0.0f}, v[1] = {x[0] - x[1], 0.0f};
    } else if constexpr (R % 2 == 0) {
        float evens[R / 2], odds[R / 2];
        Complex even[R / 4 + 1], odd[R / 4 + 1];
        for_each<0, R / 2>([&](auto i) { evens[i] = live[2 * i], odds[i] = live[2 * i + 1]; });
        real_fft<R / 2, (LIVE + 1) / 2>(evens, even);
        real_fft<R / 2, LIVE / 2>(odds, odd);
        v[0] = {even[0].re + odd[0].re, 0.0f}, v[R / 2] = {even[0].re - odd[0].re, 0.0f};
        for_each<1, R / 4>([&](auto k) {
            constexpr float cosine = turn_cosine(k.value, R), sine = turn_sine(k.value, R);
            v[k] = add_turned(even[k], odd[k], cosine, sine);
            const Complex mirror = twice_less(even[k], v[k]);
            v[R / 2 - k] = {mirror.re, -mirror.im};
        });
        v[R / 4] = {even[R / 4].re, -odd[R / 4].re};
    } else {
        float sums[R / 2 + 1], differences[R / 2 + 1], total = live[0];
        for_each<1, R / 2 + 1>([&](auto j) {
            sums[j] = live[j] + live[R - j], differences[j] = live[j] - live[R - j];
            total += sums[j];
        });
        v[0] = {total, 0.0f};
        for_each<1, R / 2 + 1>([&](auto k) {
            Complex y = {live[0], 0.0f};
            for_each<1, R / 2 + 1>([&](auto j) {
                const float cosine = turn_cosine(j * k, R), sine = turn_sine(j * k, R);
                y.re = fmaf(cosine, sums[j], y.re);
                y.im = j == 1 ? -sine * differences[j] : fmaf(-sine, differences[j], y.im);
            });
            v[k] = y;
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A tile of frames

DEVICE float sample_of(float x) { return x; }
DEVICE float sample_of(short x) { return static_cast<float>(x); }

// log2 of a positive number as a feature. Its exponent e is exact and times `high`, which has 12 bits, exact as well:
// e * 2^23 * high + (e * 2^23 * low + log2(mantissa) * scale + bias), with lg2.approx where it is good to 2^-22.
DEVICE float logarithm_of(float x, float4 logarithm) {  // high, low, scale, bias
    const int bits = __float_as_int(x);
    const int exponent = (bits - 0x3f3504f3) & 0xff800000;  // of 2^e <= x * sqrt(2) < 2^(e + 1)
    const float e = static_cast<float>(exponent);
    const float log2 = log2_approximate(__int_as_float(bits - exponent));
    return fmaf(e, logarithm.x, fmaf(log2, logarithm.z, fmaf(e, logarithm.y, logarithm.w)));
}

DEVICE bool in_spans(int at, const long long *spans, int count) {
    bool hit = false;
    for (int i = 0; i < count; ++i) hit |= at >= __ldg(spans + 2 * i) && at < __ldg(spans + 2 * i + 1);
    return hit;
}

struct Clip {
    const Input *samples;
    int length, frames;

    // Offsets and lengths lie in [0, samples], so that half of their bits are enough.
    static DEVICE Clip of(const Arguments &a, int b) {
        const int first = a.offsets ? __ldg(reinterpret_cast<const int *>(a.offsets + b)) : 0;
        int length = a.samples - first;
        if (a.lengths) length = min(__ldg(reinterpret_cast<const int *>(a.lengths + b)), length);
        const int frames = min(max(max(length + a.count_add, 0) / HOP + a.count_plus, 1), a.most_frames);
        return {a.waveform + b * a.row_stride + first, length, length ? frames : 0};
    }

    // The sample at a position, which may lie outside of the clip: what its reflection or its padding has there.
    DEVICE float operator[](int at) const {
        if (at < 0 || at >= length) {
            if (EDGES == 0) return 0.0f;
            constexpr int repeat = EDGES == 2;  // whether the end sample is
            const int period = max(2 * length - (repeat ? 0 : 2), 1);
            at %= period;
            at += at < 0 ? period : 0;
            at = max(min(at, period - repeat - at), 0);
        }
        return sample_of(__ldg(samples + at));
    }
};

// Samples from `begin` on into shared memory, with pre-emphasis x[i] - c x[i-1]: (x[i] - x[i-1]) + (1 - c) x[i-1] is
// nearly exact, where c x[i-1] is not. Those that only frames past the clip's last would read are zero.
DEVICE void load_samples(const Arguments &a, const Clip &clip, int begin, int frames, float *samples) {
    const float rest = 1.0f - a.preemphasis;
    const bool inside = frames == FRAMES && begin >= PREEMPHASIS && begin + SAMPLES <= clip.length;
    const Input *from = clip.samples + begin;
    constexpr int VECTOR = 16 / sizeof(Input), OF_HOP = HOP / VECTOR, HOPS = OF_HOP ? THREADS / OF_HOP : 0;
    if constexpr (HOP % VECTOR == 0 && WINDOW % VECTOR == 0 && PAD % 2 == 0 && HOPS > 0) {
        if (inside && reinterpret_cast<unsigned long long>(from) % 16 == 0) {
            // A thread has one place in every HOPS-th hop, so that all but the first addresses are constants.
            constexpr int TURNS = (SAMPLES + HOPS * HOP - 1) / (HOPS * HOP);
            union Vector {
                uint4 words;
                Input x[VECTOR];
            } loaded[TURNS];
            float before[TURNS];
            const int hop = threadIdx.x / OF_HOP, place = VECTOR * (threadIdx.x % OF_HOP), first = hop * HOP + place;
            const Input *vector = from + first;
            float *to = samples + first + PAD * hop;
            auto has = [&](int turn) { return hop < HOPS && first + turn * HOPS * HOP < SAMPLES; };
            for_each<0, TURNS>([&](auto turn) {
                if (!has(turn)) return;
                const Input *at = vector + turn * HOPS * HOP;
                loaded[turn].words = __ldg(reinterpret_cast<const uint4 *>(at));
                if (PREEMPHASIS) before[turn] = sample_of(__ldg(at - 1));
            });
            for_each<0, TURNS>([&](auto turn) {
                if (!has(turn)) return;
                float x[VECTOR];
                for_each<0, VECTOR>([&](auto j) {
                    const float now = sample_of(loaded[turn].x[j]);
                    x[j] = PREEMPHASIS ? fmaf(rest, before[turn], now - before[turn]) : now;
                    before[turn] = now;
                });
                float2 *pairs = reinterpret_cast<float2 *>(to + turn * HOPS * (HOP + PAD));
                for_each<0, VECTOR / 2>([&](auto j) { pairs[j] = {x[2 * j], x[2 * j + 1]}; });
            });
            return;
        }
    }
    const int needed = (frames - 1) * HOP + WINDOW;
    for (int i = threadIdx.x; i < SAMPLES; i += THREADS) {
        float x = 0.0f;
        if (i < needed) {
            x = inside ? sample_of(__ldg(from + i)) : clip[begin + i];
            if (PREEMPHASIS) {
                const float before = inside ? sample_of(__ldg(from + i - 1)) : clip[begin + i - 1];
                x = fmaf(rest, before, x - before);
            }
        }
        samples[position(i)] = x;
    }
}

// What the slices of a group of frames have at n2. Frames share slices where a hop is a whole number of them.
DEVICE void load_group(const float *samples, int group, int n2, float (&x)[GROUP_SLICES]) {
    const float *from = samples + group * GROUP * (HOP + PAD);
    for_each<0, STEP ? 1 : GROUP>([&](auto frame) {
        for_each<0, STEP ? GROUP_SLICES : SLICES>([&](auto i) {
            const float *at = from + frame * (HOP + PAD);
            // The pads before n2 are known where no slice has the end of a hop in it.
            x[frame * SLICES + i] = HOP % R2 ? at[position(R2 * i + n2)] : at[position(R2 * i.value) + n2];
        });
    });
}

// What counts of a sample of slice I in its frame. With pre-emphasis the first one of all, which would depend on the
// sample before the frame and which the window drops, is zero.
template <int I>
DEVICE float inside_window(float x, int n2) {
    if (PREEMPHASIS && I == 0) x = n2 == 0 ? 0.0f : x;
    if (R2 * (I + 1) > WINDOW) x = R2 * I + n2 < WINDOW ? x : 0.0f;
    return x;
}

// Vectors R2 apart, as four floats each.
template <int VECTORS, int SIZE>
DEVICE void load_vectors(const float4 *vectors, float (&x)[SIZE]) {
    for_each<0, VECTORS>([&](auto i) {
        const float4 v = __ldg(vectors + i * R2);
        x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    });
}

// Real FFTs over the slices of a group of frames, turned, into the exchange.
DEVICE void transform_group(const Arguments &a, int group, int n2, const float (&x)[GROUP_SLICES], const float *means,
                            Complex *exchange) {
    const float4 *column = a.columns + n2;
    float taps[4 * WINDOW_VECTORS], turns[4 * TURN_VECTORS + 1];
    load_vectors<WINDOW_VECTORS>(column, taps);
    load_vectors<TURN_VECTORS>(column + WINDOW_VECTORS * R2, turns);
    for_each<0, GROUP>([&](auto j) {
        const int frame = group * GROUP + j;
        const float mean = REMOVE_DC ? means[frame] : 0.0f;
        float windowed[R1];
        for_each<0, SLICES>([&](auto i) {
            const float value = inside_window<i.value>(x[j * APART + i], n2);
            windowed[i] = (REMOVE_DC ? value - mean : value) * taps[i];
        });
        Complex rows[ROWS + 1];
        real_fft<R1, SLICES>(windowed, rows);
        // Rows 0 and R1 / 2 are the even and the odd bins of 2 R2 real numbers, here twice as large.
        Complex *to = exchange + frame * FRAME_STRIDE + n2;
        float *real = reinterpret_cast<float *>(to - n2) + n2;
        real[0] = rows[0].re + rows[ROWS].re;
        real[R2] = rows[0].re - rows[ROWS].re;
        for_each<1, ROWS>([&](auto k) {
            const float cosine = turns[2 * k - 2], sine = turns[2 * k - 1];
            to[k * ROW_STRIDE] = {fmaf(cosine, rows[k].re, sine * rows[k].im),
                                  fmaf(cosine, rows[k].im, -sine * rows[k].re)};
        });
    });
}

// Step 1.
DEVICE void first_step(const Arguments &a, const Clip &clip, int begin, int frames, const float *samples,
                       Complex *exchange, float *means) {
    constexpr unsigned GROUPS = FRAMES / GROUP;
    float x[GROUP_SLICES];
    if constexpr (!REMOVE_DC) {
        for (unsigned task = threadIdx.x; task < FIRST_TASKS; task += THREADS) {
            load_group(samples, task % GROUPS, task / GROUPS, x);
            transform_group(a, task % GROUPS, task / GROUPS, x, nullptr, exchange);
        }
        return;
    }
    const unsigned group = threadIdx.x % GROUPS, n2 = threadIdx.x / GROUPS;
    float *sums = reinterpret_cast<float *>(exchange);  // of the samples of a frame at n2, before the exchange needs room
    if (threadIdx.x < FIRST_TASKS) {
        load_group(samples, group, n2, x);
        for_each<0, GROUP>([&](auto j) {
            float sum = 0.0f;
            for_each<0, SLICES>([&](auto i) { sum += inside_window<i.value>(x[j * APART + i], n2); });
            sums[n2 * FRAMES + group * GROUP + j] = sum;
        });
    }
    __syncthreads();
    for (int frame = threadIdx.x; frame < FRAMES; frame += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < R2; ++i) sum += sums[i * FRAMES + frame];
        if (PREEMPHASIS && frame < frames) {
            // The sum of x[i] - c x[i-1] over i > 0 lacks this to be (1 - c) times that of x[i].
            const int at = begin + frame * HOP;
            sum += clip[at] - a.preemphasis * clip[at + WINDOW - 1];
        }
        means[frame] = sum * (1.0f / WINDOW);
    }
    __syncthreads();
    if (threadIdx.x < FIRST_TASKS) transform_group(a, group, n2, x, means, exchange);
}

// Whether any of the bins is one that a mel has, and whether all of them are.
constexpr bool any_used(int from, int to) { return from < HIGH && to > LOW; }
constexpr bool all_used(int from, int to) { return from >= LOW && to <= HIGH; }

DEVICE float power_of(Complex x, float factor = 1.0f) {
    float power = fmaf(x.re, x.re, x.im * x.im);
    if (factor != 1.0f) power *= factor;
    return MAGNITUDE ? sqrtf(power) : power;
}

// Step 2: FFTs of rows, and the powers [bin, frame].
DEVICE void second_step(const Complex *exchange, float *powers) {
    constexpr int END = (N / 2 + 1 - LOW) * FRAMES;  // the runs of mels may go on a little
#pragma unroll 1
    for (unsigned i = END + threadIdx.x; i < POWER_WORDS; i += THREADS) powers[i] = 0.0f;
    for (unsigned task = threadIdx.x; task < SECOND_TASKS; task += THREADS) {
        const int frame = task % FRAMES, row = task / FRAMES;
        const Complex *from = exchange + frame * FRAME_STRIDE + row * ROW_STRIDE;
        Complex z[R2];
        for_each<0, R2>([&](auto i) { z[i] = from[i]; });
        fft<R2>(z);
        if (row) {
            for_each<0, R2>([&](auto k) {
                // Rows 1 to ROWS - 1, or their mirror images.
                constexpr bool direct = 2 * k.value < R2;
                constexpr int base = direct ? R1 * k.value : R1 * (R2 - k.value);
                constexpr int from = direct ? base + 1 : base - ROWS + 1, to = direct ? base + ROWS : base;
                const int bin = direct ? base + row : base - row;
                if constexpr (any_used(from, to))
                    if (all_used(from, to) || (bin >= LOW && bin < HIGH))
                        powers[(bin - LOW) * FRAMES + frame] = power_of(z[k]);
            });
        } else {
            // Row 0: z has an even and an odd sample in each number, the spectrum of each is one half of this.
            for_each<0, R2 / 2 + 1>([&](auto j) {
                constexpr int bin = ROWS * j.value, mirror = ROWS * (R2 - j.value), other = (R2 - j.value) % R2;
                constexpr bool wanted = any_used(bin, bin + 1);
                constexpr bool mirror_wanted = bin != mirror && any_used(mirror, mirror + 1);
                if constexpr (wanted || mirror_wanted) {
                    constexpr float cosine = turn_cosine(j.value, 2 * R2), sine = turn_sine(j.value, 2 * R2);
                    const Complex even = {z[j].re + z[other].re, z[j].im - z[other].im};
                    const Complex odd = {z[j].im + z[other].im, z[other].re - z[j].re};
                    const Complex x = add_turned(even, odd, cosine, sine);
                    if constexpr (wanted) powers[(bin - LOW) * FRAMES + frame] = power_of(x, 1.0f / 16);
                    if constexpr (mirror_wanted)
                        powers[(mirror - LOW) * FRAMES + frame] = power_of(twice_less(even, x), 1.0f / 16);
                }
            });
        }
    }
}

constexpr int LARGEST_BITS = 0x7f7fffff;  // of the finite numbers
#define NAN_OF_A_BAD_SAMPLE __int_as_float(0x7fffffff)

// The feature of frames past a clip's last one and of masked ones.
DEVICE float feature_of(float log, float2 affine) { return (log - affine.x) * affine.y; }

// Step 3. Returns the bits of the largest energy; those of NaN are larger than those of any number.
DEVICE unsigned third_step(const Arguments &a, int b, int start, int clip_frames, const float *powers) {
    unsigned largest = 0;
    const bool whole = start + FRAMES <= clip_frames;
    const unsigned quarter = threadIdx.x % QUARTERS, lane = threadIdx.x % 32 / QUARTERS;
    const int frame = start + 4 * quarter;
    LOG_MEL_OUTPUT *features = a.features + (static_cast<long long>(b) * a.frames + frame) * MELS;
    for (unsigned warp = threadIdx.x / 32; warp < (MELS + TOGETHER - 1) / TOGETHER; warp += THREADS / 32) {
        const unsigned mel = warp * TOGETHER + lane;
        const int2 run = __ldg(a.runs + warp);
        const float4 *weight = a.weights + run.x + lane;
        const float4 *power = reinterpret_cast<const float4 *>(powers) + __ldg(a.first_bins + mel) * QUARTERS + quarter;
        float energy[4] = {};
#pragma unroll 1
        for (int bins = run.y; bins > 0; bins -= 4, weight += TOGETHER, power += 4 * QUARTERS) {
            const float4 four = __ldg(weight);
            const float w[4] = {four.x, four.y, four.z, four.w};
            for_each<0, 4>([&](auto i) {
                const float4 x = power[i * QUARTERS];
                energy[0] = fmaf(w[i], x.x, energy[0]), energy[1] = fmaf(w[i], x.y, energy[1]);
                energy[2] = fmaf(w[i], x.z, energy[2]), energy[3] = fmaf(w[i], x.w, energy[3]);
            });
        }
        if (MELS % TOGETHER && mel >= MELS) continue;
        const float4 logarithm = __ldg(a.logarithms + mel);
        LOG_MEL_OUTPUT *to = features + mel;
        auto feature = [&](float x) {
            if (RANGE) largest = max(largest, static_cast<unsigned>(__float_as_int(x)));
            // All bins of a frame with a bad sample are NaN or infinite, and so is each of its mels.
            const float y = logarithm_of(fmaxf(x, a.floor), logarithm);
            return x <= __int_as_float(LARGEST_BITS) ? y : NAN_OF_A_BAD_SAMPLE;
        };
        if (whole && !(MASKS && !RANGE)) {
            for_each<0, 4>([&](auto j) { store(to + j * MELS, feature(energy[j])); });
            continue;
        }
        const float padding = feature_of(a.padding, __ldg(a.affine + mel));
        bool masked = false;
        if (MASKS && !RANGE) masked = in_spans(mel, a.mel_masks + 2ll * b * a.mel_spans, a.mel_spans);
        for_each<0, 4>([&](auto j) {
            float y = frame + j < clip_frames ? feature(energy[j]) : padding;
            if (MASKS && !RANGE)
                if (masked || in_spans(frame + j, a.time_masks + 2ll * b * a.time_spans, a.time_spans)) y = padding;
            if (frame + j < a.frames) store(to + j * MELS, y);
        });
    }
    return largest;
}

template <int BYTES>
struct WordsOf {
    using type = uint4;
};
template <>
struct WordsOf<4> {
    using type = unsigned;
};
template <>
struct WordsOf<2> {
    using type = unsigned short;
};

// All of a clip's features, when its last tile is done and they still lie in the L2 cache: no value is more than
// `dynamic_range` below the largest. What was written is rounded as the limit is, so that it was written but once.
DEVICE void limit_range(const Arguments &a, int b, int clip_frames, unsigned largest, float *lowest) {
    float limit = logarithm_of(fmaxf(__int_as_float(largest), a.floor), {a.log_high, a.log_low, a.log_scale, 0.0f});
    if (clip_frames < a.frames) limit = clip_frames ? fmaxf(limit, a.padding) : a.padding;
    const bool bad = largest > LARGEST_BITS;
    for (int mel = threadIdx.x; mel < MELS; mel += THREADS)
        lowest[mel] = feature_of(limit - a.dynamic_range, __ldg(a.affine + mel));
    __syncthreads();
    const int size = a.frames * MELS;
    LOG_MEL_OUTPUT *values = a.features + static_cast<long long>(b) * size;
    constexpr int VECTOR = MELS * sizeof(LOG_MEL_OUTPUT) % 16 ? 1 : 16 / sizeof(LOG_MEL_OUTPUT), AHEAD = 4;
    using Words = typename WordsOf<VECTOR * sizeof(LOG_MEL_OUTPUT)>::type;
    union Vector {
        Words words;
        LOG_MEL_OUTPUT x[VECTOR];
    };
    for (int first = VECTOR * threadIdx.x; first < size; first += VECTOR * THREADS * AHEAD) {
        Vector vectors[AHEAD];
        for_each<0, AHEAD>([&](auto i) {
            const int at = first + i * VECTOR * THREADS;
            if (at < size) vectors[i].words = load_again(reinterpret_cast<const Words *>(values + at));
        });
        for_each<0, AHEAD>([&](auto i) {
            const int at = first + i * VECTOR * THREADS, mel = at % MELS;
            if (at >= size) return;
            for_each<0, VECTOR>([&](auto j) {
                float y = bad ? NAN_OF_A_BAD_SAMPLE : fmaxf(value_of(vectors[i].x[j]), lowest[mel + j]);
                if (MASKS)
                    if (in_spans(mel + j, a.mel_masks + 2ll * b * a.mel_spans, a.mel_spans) ||
                        in_spans(at / MELS, a.time_masks + 2ll * b * a.time_spans, a.time_spans))
                        y = feature_of(a.padding, __ldg(a.affine + mel + j));
                store(&vectors[i].x[j], y);
            });
            *reinterpret_cast<Words *>(values + at) = vectors[i].words;
        });
    }
}

DEVICE void log_mel_tile(const Arguments &a, float *shared) {
    const int b = blockIdx.z * gridDim.y + blockIdx.y;
    if (b >= a.clips) return;
    const int start = blockIdx.x * FRAMES;
    const Clip clip = Clip::of(a, b);
    if (start == 0 && threadIdx.x == 0) a.frame_lengths[b] = clip.frames;
    float *samples = shared, *powers = shared;  // one after the other
    Complex *exchange = reinterpret_cast<Complex *>(shared + FIRST_WORDS);
    unsigned largest = 0;
    if (start < clip.frames) {
        const int begin = start * HOP - LOG_MEL_OFFSET, frames = min(clip.frames - start, FRAMES);
        load_samples(a, clip, begin, frames, samples);
        __syncthreads();
        first_step(a, clip, begin, frames, samples, exchange, shared + FIRST_WORDS + EXCHANGE_WORDS);
        __syncthreads();
        second_step(exchange, powers);
        __syncthreads();
        largest = third_step(a, b, start, clip.frames, powers);
    } else {
        const int size = min(FRAMES, a.frames - start) * MELS;
        auto *to = a.features + (static_cast<long long>(b) * a.frames + start) * MELS;
        for (int i = threadIdx.x; i < size; i += THREADS) store(to + i, feature_of(a.padding, __ldg(a.affine + i % MELS)));
    }
    if constexpr (RANGE) {
        unsigned *state = a.states + 2ll * b;
        largest = __reduce_max_sync(0xffffffffu, largest);
        if (threadIdx.x % 32 == 0) atomicMax(state, largest);
        __syncthreads();
        unsigned *last = reinterpret_cast<unsigned *>(shared);
        if (threadIdx.x == 0) {
            __threadfence();
            *last = atomicAdd(state + 1, 1u) == gridDim.x - 1;
            __threadfence();
        }
        __syncthreads();
        if (*last) limit_range(a, b, clip.frames, load_again(state), shared + 4);
    }
}

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(THREADS, LOG_MEL_BLOCKS) log_mel(const __grid_constant__ Arguments a) {
    extern __shared__ float4 shared[];
    log_mel_tile(a, reinterpret_cast<float *>(shared));
}
#endif
