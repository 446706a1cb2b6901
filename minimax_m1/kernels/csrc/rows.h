// What the kernels of this folder share: vectors of W floats, e^x, sums, and how work is divided among threads.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <omp.h>

namespace {

constexpr int W = 16;  // lanes; the compiler splits a vector where the machine's registers are narrower
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

// Below so many multiplications (about 20 microseconds) one thread does it: waking others costs as much, and a thread
// that the system has put aside on a busy machine would hold up every call.
constexpr int64_t PARALLEL = 1 << 18;

struct bf16 { uint16_t bits; };

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline vec load(const bf16* p) {
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
inline float scalar(float x) { return x; }
inline float scalar(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// e^x for x in [-87, 88], clamped outside: 2^n e^r with |r| <= ln 2 / 2 and a polynomial for e^r (Cephes); 1e-7 relative.
inline vec exp(vec x) {
    const vec zero = {}, lowest = zero - 87.0f, highest = zero + 88.0f;
    x = x < lowest ? lowest : x > highest ? highest : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the lowest bits
    vec t = x * 1.44269504f + shift, n = t - shift;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (vec)(((ivec)t - 0x4B400000 + 127) << 23);
}

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

inline float sum(vec v) {  // by halves: four steps instead of sixteen
    vec8 a[2];
    std::memcpy(a, &v, sizeof v);
    a[0] += a[1];
    vec4 b[2];
    std::memcpy(b, &a[0], sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

// This thread's share of [0, count), in whole groups of 4.
inline void share(int64_t count, int64_t* begin, int64_t* end) {
    int64_t groups = (count + 3) / 4, threads = omp_get_num_threads(), id = omp_get_thread_num();
    *begin = groups * id / threads * 4;
    *end = groups * (id + 1) / threads * 4;
    if (*end > count) *end = count;
}

// gate[n] = silu(gate[n]) * up[n] for n in [begin, end).
inline void silu_times(float* gate, const float* up, int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + W <= end; n += W) {
        vec g = load(gate + n);
        store(gate + n, g / (exp(-g) + 1.0f) * load(up + n));
    }
    for (; n < end; n++) gate[n] = gate[n] / (1 + std::exp(-gate[n])) * up[n];
}

}  // namespace
