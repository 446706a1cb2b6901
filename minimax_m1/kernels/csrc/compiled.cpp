// Kernels for few rows on a CPU, where time is memory traffic: each weight is read once, in the type it is stored in.
//
// Plain C interface, no PyTorch headers, called through ctypes by kernels/compiled.py. OpenMP is the one that PyTorch has
// loaded (same soname), so both share one thread pool. Every row's result is summed in the same order whatever the other
// rows are: a token decodes to the same bits alone and in a batch.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"

namespace {

// out[m][r] = x[m] . w[r] for R rows of weights and M rows of x, all K long.
template <int R, int M, typename T>
inline void dot_tile(const T* w, const float* const* x, int64_t K, float (*out)[R]) {
    vec acc[M][R] = {};
    int64_t k = 0;
    for (; k + W <= K; k += W) {
        vec a[R];
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + (2 * R + r) * K + k);  // two tiles ahead; past the end it does nothing
            a[r] = load(w + r * K + k);
        }
        for (int m = 0; m < M; m++) {
            vec b = load(x[m] + k);
            for (int r = 0; r < R; r++) acc[m][r] += a[r] * b;
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            float s = sum(acc[m][r]);
            for (int64_t j = k; j < K; j++) s = std::fma(scalar(w[r * K + j]), x[m][j], s);  // fma: the same in every tile
            out[m][r] = s;
        }
}

// Calls store(m, n, value) for n in [begin, end) and every row m of x: value = x[m] . w[n].
template <typename T, typename Store>
inline void dot_rows(const T* w, const float* const* x, int64_t M, int64_t K, int64_t begin, int64_t end, Store store) {
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
        int64_t m = 0;
        for (; m + 4 <= M; m += 4) {
            float t[4][4];
            dot_tile<4, 4>(w + n * K, x + m, K, t);
            for (int i = 0; i < 4; i++) for (int r = 0; r < 4; r++) store(m + i, n + r, t[i][r]);
        }
        for (; m + 2 <= M; m += 2) {
            float t[2][4];
            dot_tile<4, 2>(w + n * K, x + m, K, t);
            for (int i = 0; i < 2; i++) for (int r = 0; r < 4; r++) store(m + i, n + r, t[i][r]);
        }
        for (; m < M; m++) {
            float t[1][4];
            dot_tile<4, 1>(w + n * K, x + m, K, t);
            for (int r = 0; r < 4; r++) store(m, n + r, t[0][r]);
        }
    }
    for (; n < end; n++)
        for (int64_t m = 0; m < M; m++) {
            float t[1][1];
            dot_tile<1, 1>(w + n * K, x + m, K, t);
            store(m, n, t[0][0]);
        }
}

template <typename T>
void linear(const float* x, const T* w, float* out, int64_t M, int64_t N, int64_t K) {
    std::vector<const float*> rows(M);
    for (int64_t m = 0; m < M; m++) rows[m] = x + m * K;
#pragma omp parallel if (M * N * K > PARALLEL)
    {
        int64_t begin, end;
        share(N, &begin, &end);
        dot_rows(w, rows.data(), M, K, begin, end, [&](int64_t m, int64_t n, float v) { out[m * N + n] = v; });
    }
}

// y[t] = sum_k weight[t][k] w2_e silu(w1_e x[t]) * (w3_e x[t]), e = ids[t][k]; experts in ascending order for every token.
template <typename T>
void experts(const float* x, const T* w13, const T* w2, const int64_t* ids, const float* weights, float* y, int64_t tokens,
             int64_t top_k, int64_t num_experts, int64_t width, int64_t hidden) {
    std::vector<std::vector<int64_t>> chosen(num_experts);  // expert -> the flat (token, k) that chose it
    for (int64_t i = 0; i < tokens * top_k; i++)
        if (weights[i] != 0) chosen[ids[i]].push_back(i);
    std::vector<float> h(tokens * top_k * 2 * width);
    std::memset(y, 0, sizeof(float) * tokens * hidden);
#pragma omp parallel if (tokens * top_k * 3 * width * hidden > PARALLEL)
    {
        std::vector<const float*> rows(tokens * top_k);
        int64_t begin, end;
        share(width, &begin, &end);
        for (int64_t e = 0; e < num_experts; e++) {
            const auto& flat = chosen[e];
            if (flat.empty()) continue;
            for (size_t i = 0; i < flat.size(); i++) rows[i] = x + flat[i] / top_k * hidden;
            for (int part = 0; part < 2; part++) {  // gate rows, then up rows
                const T* w = w13 + (e * 2 + part) * width * hidden;
                dot_rows(w, rows.data(), flat.size(), hidden, begin, end,
                         [&](int64_t m, int64_t n, float v) { h[(flat[m] * 2 + part) * width + n] = v; });
            }
            for (int64_t i : flat) silu_times(&h[i * 2 * width], &h[(i * 2 + 1) * width], begin, end);
        }
#pragma omp barrier
        share(hidden, &begin, &end);
        for (int64_t e = 0; e < num_experts; e++) {
            const auto& flat = chosen[e];
            if (flat.empty()) continue;
            for (size_t i = 0; i < flat.size(); i++) rows[i] = &h[flat[i] * 2 * width];
            dot_rows(w2 + e * hidden * width, rows.data(), flat.size(), width, begin, end,
                     [&](int64_t m, int64_t n, float v) { y[flat[m] / top_k * hidden + n] += weights[flat[m]] * v; });
        }
    }
}

}  // namespace

extern "C" {

void linear_f32(const float* x, const float* w, float* out, int64_t M, int64_t N, int64_t K) {
    linear(x, w, out, M, N, K);
}
void linear_bf16(const float* x, const bf16* w, float* out, int64_t M, int64_t N, int64_t K) {
    linear(x, w, out, M, N, K);
}
void experts_f32(const float* x, const float* w13, const float* w2, const int64_t* ids, const float* weights, float* y,
                 int64_t tokens, int64_t top_k, int64_t num_experts, int64_t width, int64_t hidden) {
    experts(x, w13, w2, ids, weights, y, tokens, top_k, num_experts, width, hidden);
}
void experts_bf16(const float* x, const bf16* w13, const bf16* w2, const int64_t* ids, const float* weights, float* y,
                  int64_t tokens, int64_t top_k, int64_t num_experts, int64_t width, int64_t hidden) {
    experts(x, w13, w2, ids, weights, y, tokens, top_k, num_experts, width, hidden);
}

}  // extern "C"
