// What a layer does to each row besides products and attention. Called like compiled.cpp; a row's result depends on that
// row alone.

#include "rows.h"

namespace {

constexpr int64_t MANY = 65536;  // numbers from which other threads are worth waking

// out = x / sqrt(mean(x^2) + eps) * weight, and times sigmoid(gate) where there is a gate.
template <typename T>
void rms_norm(const float* x, const T* weight, const float* gate, float* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > MANY)
    for (int64_t r = 0; r < rows; r++) {
        const float *a = x + r * size, *g = gate + r * size;
        float* b = out + r * size;
        vec squares = {};
        int64_t i = 0;
        for (; i + W <= size; i += W) squares += load(a + i) * load(a + i);
        float s = sum(squares);
        for (; i < size; i++) s += a[i] * a[i];
        const float scale = 1 / std::sqrt(s / size + eps);
        for (i = 0; i + W <= size; i += W) {
            const vec v = load(a + i) * scale * load(weight + i);
            store(b + i, gate ? v / (exp(-load(g + i)) + 1.0f) : v);
        }
        for (; i < size; i++) {
            const float v = a[i] * scale * scalar(weight[i]);
            b[i] = gate ? v / (std::exp(-g[i]) + 1.0f) : v;
        }
    }
}

// to = from with the pairs (i, i + half) of its first 2 half numbers turned; to may be from.
inline void turn(const float* from, const float* cos, const float* sin, float* to, int64_t half, int64_t dim) {
    for (int64_t i = 0; i < half; i++) {
        const float a = from[i], b = from[i + half];
        to[i] = a * cos[i] - b * sin[i];
        to[i + half] = b * cos[i] + a * sin[i];
    }
    if (to != from) std::memcpy(to + 2 * half, from + 2 * half, sizeof(float) * (dim - 2 * half));
}

}  // namespace

extern "C" {

// x = x * sigmoid(x), in place; the same for a number wherever it stands.
void silu_f32(float* x, int64_t count) {
#pragma omp parallel for if (count > MANY)
    for (int64_t i = 0; i < count / W; i++) {
        const vec v = load(x + i * W);
        store(x + i * W, v / (exp(-v) + 1.0f));
    }
    float rest[W] = {};
    const int64_t done = count / W * W;
    std::memcpy(rest, x + done, sizeof(float) * (count - done));
    const vec v = load(rest);
    store(rest, v / (exp(-v) + 1.0f));
    std::memcpy(x + done, rest, sizeof(float) * (count - done));
}

void rms_norm_f32(const float* x, const float* weight, const float* gate, float* out, int64_t rows, int64_t size,
                  float eps) {
    rms_norm(x, weight, gate, out, rows, size, eps);
}
void rms_norm_bf16(const float* x, const bf16* weight, const float* gate, float* out, int64_t rows, int64_t size,
                   float eps) {
    rms_norm(x, weight, gate, out, rows, size, eps);
}

// Rotary embedding of q [count][heads][dim] in place, of k on its way into the cache, and v beside it. k and v are
// [count][groups][dim], cos and sin [count][half]; token t goes to place token_rows[t] of keys and values
// [groups][places][dim].
void rotate_append_f32(float* q, const float* k, const float* v, const float* cos, const float* sin,
                       const int64_t* token_rows, float* keys, float* values, int64_t count, int64_t heads,
                       int64_t groups, int64_t dim, int64_t half, int64_t places) {
#pragma omp parallel for if (count * heads * dim > MANY)
    for (int64_t t = 0; t < count; t++) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (int64_t h = 0; h < heads; h++) {
            float* row = q + (t * heads + h) * dim;
            turn(row, c, s, row, half, dim);
        }
        for (int64_t g = 0; g < groups; g++) {
            const int64_t from = (t * groups + g) * dim, to = (g * places + token_rows[t]) * dim;
            turn(k + from, c, s, keys + to, half, dim);
            std::memcpy(values + to, v + from, sizeof(float) * dim);
        }
    }
}

// probs [count][experts] = softmax(logits); ids, weights [count][top_k]: the most probable, the lower id first where two
// are equal, and their probabilities divided by their sum.
void route_f32(const float* logits, float* probs, int64_t* ids, float* weights, int64_t count, int64_t experts,
               int64_t top_k) {
#pragma omp parallel for if (count * experts * top_k > MANY)
    for (int64_t t = 0; t < count; t++) {
        const float* x = logits + t * experts;
        float *p = probs + t * experts, *w = weights + t * top_k, top = x[0], total = 0, kept = 0;
        int64_t* chosen = ids + t * top_k;
        for (int64_t e = 1; e < experts; e++) top = x[e] > top ? x[e] : top;
        for (int64_t e = 0; e < experts; e++) total += p[e] = std::exp(x[e] - top);
        for (int64_t e = 0; e < experts; e++) p[e] /= total;
        for (int64_t j = 0; j < top_k; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; e++) {
                bool taken = false;
                for (int64_t i = 0; i < j; i++) taken |= chosen[i] == e;
                if (!taken && (best < 0 || p[e] > p[best])) best = e;
            }
            chosen[j] = best;
            kept += w[j] = p[best];
        }
        for (int64_t j = 0; j < top_k; j++) w[j] /= kept;
    }
}

}  // extern "C"
