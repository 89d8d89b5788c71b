/* C interface of the native log-mel engine. No C++ type, no exception and no torch header crosses it, so one binary
 * serves every torch and every Python. All functions are thread-safe; a plan is immutable and survives fork().
 *
 * A call returns 0, or FASTCLAP_INVALID (an argument is out of range), FASTCLAP_UNSUPPORTED (a valid request that this
 * engine does not cover: use another one) or FASTCLAP_NO_MEMORY, with the reason in `message`. */
#ifndef FASTCLAP_NATIVE_H
#define FASTCLAP_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define FASTCLAP_API __attribute__((visibility("default")))
#else
#define FASTCLAP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { FASTCLAP_OK = 0, FASTCLAP_INVALID = 1, FASTCLAP_UNSUPPORTED = 2, FASTCLAP_NO_MEMORY = 3 };
enum { FASTCLAP_SIMD_AUTO = 0, FASTCLAP_SIMD_PORTABLE = 1, FASTCLAP_SIMD_AVX2 = 2, FASTCLAP_SIMD_AVX512 = 3 };
enum { FASTCLAP_FLOAT32 = 0, FASTCLAP_INT16 = 1 };
/* What stands before and after a clip: zeros, x[-i] = x[i], or x[-1 - i] = x[i]. */
enum { FASTCLAP_EDGE_ZERO = 0, FASTCLAP_EDGE_REFLECT = 1, FASTCLAP_EDGE_SYMMETRIC = 2 };

typedef struct {
    int64_t n_fft, win_length, hop_length, n_mels;
    int64_t offset;         /* frame t starts at sample t * hop_length - offset */
    int64_t edge;           /* FASTCLAP_EDGE_* */
    int64_t remove_dc;      /* subtract each frame's mean */
    int64_t power;          /* 1: magnitude, 2: power */
    double preemphasis;     /* x[i] - preemphasis * x[i - 1] inside a frame */
    double input_scale;     /* of a full-scale sample: 1.0 in float32, 32768 in int16 */
    double log_scale;       /* 1 for ln, 1 / ln(10) for log10, 10 / ln(10) for dB */
    double floor;           /* of the mel energies */
    double log_padding;     /* log-mel of the frames past a clip's end */
    double dynamic_range;   /* per clip, in log units; negative: none */
    double mean, std;       /* features = (log-mel - mean) / std */
} fastclap_log_mel_config;

typedef struct fastclap_log_mel_plan fastclap_log_mel_plan;

/* Changes with this file, so that a caller can tell a library that was built from another one. */
enum { FASTCLAP_INTERFACE = 2 };
FASTCLAP_API int fastclap_interface(void);

/* Whether this processor and operating system run a FASTCLAP_SIMD_* path (1 or 0). */
FASTCLAP_API int fastclap_simd_supported(int simd);

/* window: [win_length]; mel_bank: [n_fft / 2 + 1, n_mels] row-major, finite. Both are copied. */
FASTCLAP_API int fastclap_log_mel_create(const fastclap_log_mel_config *config, const double *window,
                                         const double *mel_bank, int simd, fastclap_log_mel_plan **plan,
                                         char *message, int64_t message_size);

FASTCLAP_API void fastclap_log_mel_destroy(fastclap_log_mel_plan *plan);

/* Runs work(data) on up to `threads` threads at once, the caller's among them, and returns when all have. This is the
 * form of GOMP_parallel, the entry of an OpenMP runtime. */
typedef void (*fastclap_team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* waveform: [batch, samples] with `stride` elements from clip to clip. lengths, frame_lengths: [batch], within
 * [0, samples] and [0, frames], a clip without samples has no frames. features: [batch, frames, n_mels], written
 * whole. Samples at and past a clip's length are never read. team: whose threads to run on; null: the call's own. */
FASTCLAP_API int fastclap_log_mel_run(const fastclap_log_mel_plan *plan, const void *waveform, int dtype, int64_t batch,
                                      int64_t samples, int64_t stride, const int64_t *lengths,
                                      const int64_t *frame_lengths, int64_t frames, float *features, int threads,
                                      fastclap_team team, char *message, int64_t message_size);

#ifdef __cplusplus
}
#endif
#endif
