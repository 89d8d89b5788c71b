// Feeds the C interface of the native engine with random front-ends, shapes and samples, valid or not, and aborts when
// a promise of fastclap_native.h is broken. Built with sanitizers, which see what the promises do not. With libFuzzer
// the bytes come from it; without, from a generator: check_native [iterations] [seed].
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "fastclap_native.h"

namespace {

#define REQUIRE(condition)                                                        \
    do {                                                                          \
        if (!(condition)) {                                                       \
            std::fprintf(stderr, "line %d: not %s\n", __LINE__, #condition);      \
            std::abort();                                                         \
        }                                                                         \
    } while (false)

// Reads an input front to back; zeros after its end.
class Input {
public:
    Input(const std::uint8_t *data, std::size_t size) : data_(data), size_(size) {}
    template <class T>
    T value() {
        T result{};
        const std::size_t count = std::min(sizeof(T), size_);
        std::memcpy(&result, data_, count);
        data_ += count, size_ -= count;
        return result;
    }
    int below(int bound) { return value<std::uint16_t>() % bound; }
    bool one_in(int n) { return below(n) == n - 1; }

private:
    const std::uint8_t *data_;
    std::size_t size_;
};

std::int64_t odd_integer(Input &in) {
    static const std::int64_t values[] = {-1, 0, 1, 3, 1 << 12, 1ll << 31, std::numeric_limits<std::int64_t>::max(),
                                          std::numeric_limits<std::int64_t>::min()};
    return values[in.below(8)];
}

double odd_double(Input &in) {
    static const double values[] = {0.0, -1.0, 1e-320, 1e300, INFINITY, NAN};
    return in.one_in(2) ? in.value<double>() : values[in.below(6)];
}

// Teams as an OpenMP runtime may give them: all the threads that were asked for, or the caller's alone.
void whole_team(void (*work)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    while (others.size() + 1 < threads) others.emplace_back(work, data);
    work(data);
    for (std::thread &other : others) other.join();
}

void lone_team(void (*work)(void *), void *data, unsigned, unsigned) { work(data); }

void check(Input in) {
    static const std::int64_t sizes[] = {2, 4, 6, 8, 16, 30, 50, 160, 256, 400, 512, 600, 1024, 1200, 2048};
    fastclap_log_mel_config c;
    c.n_fft = in.one_in(3) ? 2 * (1 + in.below(1100)) : sizes[in.below(15)];
    c.win_length = in.one_in(2) ? c.n_fft : 1 + in.below(static_cast<int>(c.n_fft));
    c.hop_length = in.one_in(2) ? 16 * (1 + in.below(12)) : 1 + in.below(700);
    c.n_mels = 1 + in.below(in.one_in(8) ? 200 : 20);
    c.offset = in.below(5000) - 2500;
    c.edge = in.below(3);
    c.remove_dc = in.below(2);
    c.power = 1 + in.below(2);
    c.preemphasis = in.one_in(2) ? 0.97 : 0.0;
    c.input_scale = in.one_in(2) ? 32768.0 : 1.0;
    c.log_scale = in.one_in(2) ? 1.0 : 10.0 / std::log(10.0);
    c.floor = 1e-10;
    c.log_padding = -5.0;
    c.dynamic_range = in.one_in(2) ? 8.0 : -1.0;
    c.mean = -4.0, c.std = 4.0;
    const bool strange = in.one_in(8);
    if (strange) {
        std::int64_t *const integers = &c.n_fft;
        double *const doubles = &c.preemphasis;
        for (int changes = in.below(3); changes >= 0; --changes) {
            if (in.one_in(2))
                integers[in.below(8)] = odd_integer(in);
            else
                doubles[in.below(8)] = odd_double(in);
        }
    }
    // The engine must refuse a size it does not take before it reads that many numbers.
    const bool readable = c.n_fft > 0 && c.n_fft <= 2048 && c.win_length > 0 && c.win_length <= c.n_fft &&
                          c.n_mels > 0 && c.n_mels <= 4096;
    std::vector<double> window(readable ? c.win_length : 0), bank(readable ? (c.n_fft / 2 + 1) * c.n_mels : 0, 0.0);
    for (double &w : window) w = 0.5 + 0.5 * in.value<std::int8_t>() / 128.0;
    for (int i = in.below(400); i > 0 && !bank.empty(); --i)
        bank[in.value<std::uint32_t>() % bank.size()] = in.value<std::uint8_t>() / 64.0;
    const bool bad_bank = in.one_in(50) && !bank.empty();
    if (bad_bank) bank[in.value<std::uint32_t>() % bank.size()] = in.one_in(2) ? NAN : INFINITY;

    char message[40];
    message[39] = 1;
    fastclap_log_mel_plan *plan = nullptr;
    const int code = fastclap_log_mel_create(&c, window.data(), bank.data(), in.below(5), &plan, message, 39);
    REQUIRE((code == FASTCLAP_OK) == (plan != nullptr));
    REQUIRE(message[39] == 1);
    if (!plan) return;
    REQUIRE(readable && !bad_bank);
    const std::unique_ptr<fastclap_log_mel_plan, decltype(&fastclap_log_mel_destroy)> owner(plan,
                                                                                            fastclap_log_mel_destroy);

    const int dtype = in.below(2);
    const std::int64_t batch = in.below(4), samples = in.below(in.one_in(4) ? 6000 : 900);
    const std::int64_t frames = in.below(in.one_in(8) ? 1000 : 40), stride = samples + in.below(20);
    std::vector<std::int64_t> lengths(batch), frame_lengths(batch);
    for (int b = 0; b < batch; ++b) {
        lengths[b] = in.one_in(2) ? samples : in.below(static_cast<int>(samples) + 1);
        frame_lengths[b] = lengths[b] == 0 ? 0 : in.one_in(2) ? frames : in.below(static_cast<int>(frames) + 1);
    }
    // Exactly as large as the call says, so that a read past it is seen. NaN wherever nothing may be read.
    const std::int64_t total = batch ? (batch - 1) * stride + samples : 0;
    std::unique_ptr<float[]> floats(dtype ? nullptr : new float[total]);
    std::unique_ptr<std::int16_t[]> shorts(dtype ? new std::int16_t[total] : nullptr);
    std::mt19937 noise(in.value<std::uint32_t>());
    std::fill(floats.get(), floats.get() + (dtype ? 0 : total), NAN);
    std::vector<bool> finite(batch, true);
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = 0; i < lengths[b]; ++i)
            if (dtype)
                shorts[b * stride + i] = static_cast<std::int16_t>(noise());
            else
                floats[b * stride + i] = static_cast<float>(static_cast<std::int32_t>(noise())) / 2147483648.0f;
        if (!dtype && lengths[b] && in.one_in(3)) {
            const float value = in.value<float>();
            floats[b * stride + in.below(static_cast<int>(lengths[b]))] = value;
            finite[b] = std::fabs(value) < 1e10f;
        }
    }
    const void *waveform = dtype ? static_cast<const void *>(shorts.get()) : floats.get();
    const std::size_t count = static_cast<std::size_t>(batch * frames * c.n_mels);
    const float unwritten = 1234567.0f;
    std::vector<float> features(count, unwritten), again(count, unwritten);
    const auto run = [&](float *out, int threads, fastclap_team team = nullptr) {
        return fastclap_log_mel_run(plan, waveform, dtype, batch, samples, stride, lengths.data(), frame_lengths.data(),
                                    frames, out, threads, team, message, 39);
    };

    if (in.one_in(20)) {  // calls that must be refused
        std::int64_t sizes_given[] = {batch, samples, stride, frames};
        sizes_given[in.below(4)] = in.one_in(2) ? -1 : std::numeric_limits<std::int64_t>::min();
        REQUIRE(fastclap_log_mel_run(plan, waveform, dtype, sizes_given[0], sizes_given[1], sizes_given[2],
                                     lengths.data(), frame_lengths.data(), sizes_given[3], features.data(), 1, nullptr,
                                     message, 39) == FASTCLAP_INVALID);
        REQUIRE(fastclap_log_mel_run(plan, waveform, 7, batch, samples, stride, lengths.data(), frame_lengths.data(),
                                     frames, features.data(), 1, nullptr, nullptr, 0) == FASTCLAP_INVALID);
        if (batch && frames) {
            lengths[in.below(static_cast<int>(batch))] = in.one_in(2) ? -1 : samples + 1;
            REQUIRE(run(features.data(), 1) == FASTCLAP_INVALID);
        }
        return;
    }
    REQUIRE(run(features.data(), 1) == FASTCLAP_OK);
    const fastclap_team teams[] = {nullptr, whole_team, lone_team};
    REQUIRE(run(again.data(), 1 + in.below(4), teams[in.below(3)]) == FASTCLAP_OK);
    REQUIRE(count == 0 || std::memcmp(features.data(), again.data(), count * sizeof(float)) == 0);
    for (std::int64_t b = 0; b < batch; ++b)
        for (std::int64_t i = 0; i < frames * c.n_mels; ++i) {
            const float value = features[b * frames * c.n_mels + i];
            REQUIRE(value != unwritten);
            if (strange) continue;
            if (finite[b]) REQUIRE(std::isfinite(value));
            if (i >= frame_lengths[b] * c.n_mels && c.dynamic_range < 0)
                REQUIRE(value == static_cast<float>((c.log_padding - c.mean) / c.std));
        }
}

}  // namespace

#if defined(FASTCLAP_FUZZ)
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    check(Input(data, size));
    return 0;
}
#else
int main(int argc, char **argv) {
    const long iterations = argc > 1 ? std::atol(argv[1]) : 1000;
    std::mt19937 generator(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0u);
    std::vector<std::uint8_t> bytes(8192);
    for (long i = 0; i < iterations; ++i) {
        for (std::uint8_t &byte : bytes) byte = static_cast<std::uint8_t>(generator());
        check(Input(bytes.data(), bytes.size()));
    }
    std::printf("%ld random calls kept every promise\n", iterations);
}
#endif
