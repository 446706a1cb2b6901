// Attention of both kinds over the cache: softmax attention to pages of keys and values, and the lightning recurrence.
//
// Called like compiled.cpp. A row's result is summed in an order that its place in its sequence alone decides, so it has
// the same bits alone and in a batch, with any number of threads, and however a prompt was cut into chunks (for lightning
// attention: at multiples of 64 tokens).

#include <algorithm>
#include <memory>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "rows.h"

namespace {

// The widest registers of this machine: tiles of sums must fit into them, which vectors of W lanes do not everywhere.
#if defined(__AVX512F__)
constexpr int L = 16, WIDE = 4, STEP = 8;  // lanes; vectors side by side in a tile of products; and in a decay step
#elif defined(__AVX__)
constexpr int L = 8, WIDE = 2, STEP = 4;
#else
constexpr int L = 4, WIDE = 2, STEP = 4;
#endif
constexpr int HIGH = 6;  // rows of a tile

typedef float reg __attribute__((vector_size(4 * L)));
typedef int32_t ireg __attribute__((vector_size(4 * L)));

inline reg get(const float* p) { reg v; std::memcpy(&v, p, sizeof v); return v; }
inline void put(float* p, reg v) { std::memcpy(p, &v, sizeof v); }
inline reg all(float x) { const reg zero = {}; return x - zero; }  // 0 + x would cost an addition: it changes -0
inline reg larger(reg a, reg b) {  // b where either is NaN
#if defined(__AVX512F__)
    return (reg)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (reg)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline bool any_above(reg v, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_GT_OQ));
#else
    bool any = false;
    for (int i = 0; i < L; i++) any |= v[i] > limit;
    return any;
#endif
}

inline float largest(reg v) {
    float t = v[0];
    for (int i = 1; i < L; i++) t = v[i] > t ? v[i] : t;
    return t;
}

inline float total(reg v) {
    float t = v[0];
    for (int i = 1; i < L; i++) t += v[i];
    return t;
}

// 2^x for x <= 0; below -100 it is 2^-100, which is nothing beside a sum of at least 1/2. 1e-7 relative; NaN stays.
inline reg power_of_two(reg x) {
    x = larger(all(-100.0f), x);
    reg t = x + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number, kept in the lowest bits
    reg r = x - (t - 12582912.0f);
    reg p = r * 0.0013276472454890609f + 0.009675540961325169f;  // minimax for |r| <= 1/2
    p = p * r + 0.05550713092088699f;
    p = p * r + 0.24022120237350464f;
    p = p * r + 0.6931469440460205f;
    p = p * r + 1.0000001192092896f;
    return (reg)((ireg)p + ((ireg)t << 23));
}

// Memory for the length of a call.
class Scratch {
public:
    explicit Scratch(int64_t floats) : memory_(new float[floats + 16]) {
        next_ = (float*)((uintptr_t(memory_.get()) + 63) & ~uintptr_t(63));
    }
    float* take(int64_t floats) {  // a multiple of 16 each time: every part begins on a cache line of its own
        float* p = next_;
        next_ += floats;
        return p;
    }

private:
    std::unique_ptr<float[]> memory_;
    float* next_;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// out [R][C * L] = keep * out + a [R][K] b [K][C * L]; rows lie lda, ldb and ldo floats apart; keep 0: out is not read.
// Summed in the order of k whatever R and C are.
template <int R, int C>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t K, float* out, int64_t ldo,
                 float keep) {
    reg acc[R][C];
    if (keep != 0) {
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) acc[r][c] = get(out + r * ldo + c * L) * keep;
    } else {
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) acc[r][c] = all(0);
    }
    for (int64_t k = 0; k < K; k++) {
        reg v[C];
        for (int c = 0; c < C; c++) v[c] = get(b + k * ldb + c * L);
        for (int r = 0; r < R; r++) {
            const reg x = all(a[r * lda + k]);
            for (int c = 0; c < C; c++) acc[r][c] += x * v[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) put(out + r * ldo + c * L, acc[r][c]);
}

template <int R>
inline void tiles(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t K, float* out, int64_t ldo,
                  float keep, int64_t columns) {
    int64_t c = 0;
    for (; c + WIDE * L <= columns; c += WIDE * L) tile<R, WIDE>(a, lda, b + c, ldb, K, out + c, ldo, keep);
    if (WIDE == 4 && c + 2 * L <= columns) {
        tile<R, 2>(a, lda, b + c, ldb, K, out + c, ldo, keep);
        c += 2 * L;
    }
    if (c < columns) tile<R, 1>(a, lda, b + c, ldb, K, out + c, ldo, keep);
}

// The same for `rows` <= HIGH rows and `columns`, a multiple of L.
inline void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t K, float* out,
                     int64_t ldo, float keep, int64_t columns) {
    switch (rows) {
        case 6: return tiles<6>(a, lda, b, ldb, K, out, ldo, keep, columns);
        case 5: return tiles<5>(a, lda, b, ldb, K, out, ldo, keep, columns);
        case 4: return tiles<4>(a, lda, b, ldb, K, out, ldo, keep, columns);
        case 3: return tiles<3>(a, lda, b, ldb, K, out, ldo, keep, columns);
        case 2: return tiles<2>(a, lda, b, ldb, K, out, ldo, keep, columns);
        default: return tiles<1>(a, lda, b, ldb, K, out, ldo, keep, columns);
    }
}

#ifdef __AVX__
inline void transpose_8x8(const float* x, int64_t ldx, float* out, int64_t ldo) {
    __m256 r[8], s[8];
    for (int i = 0; i < 4; i++) {  // rows i and i + 4, half by half: only shuffles inside halves are left
        const float *low = x + i * ldx, *high = x + (i + 4) * ldx;
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
    }
    for (int h = 0; h < 8; h += 4) {
        s[h] = _mm256_unpacklo_ps(r[h], r[h + 1]);
        s[h + 1] = _mm256_unpackhi_ps(r[h], r[h + 1]);
        s[h + 2] = _mm256_unpacklo_ps(r[h + 2], r[h + 3]);
        s[h + 3] = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
        _mm256_storeu_ps(out + h * ldo, _mm256_shuffle_ps(s[h], s[h + 2], 0x44));
        _mm256_storeu_ps(out + (h + 1) * ldo, _mm256_shuffle_ps(s[h], s[h + 2], 0xEE));
        _mm256_storeu_ps(out + (h + 2) * ldo, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0x44));
        _mm256_storeu_ps(out + (h + 3) * ldo, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0xEE));
    }
}
#endif

constexpr int64_t PAGE = 64;  // tokens; also the block of lightning attention

// Asks for memory [from, to) that will be read soon. Little at a time: a core waits for few lines at once, and what
// comes after too many requests waits with them.
inline void fetch(const float* from, const float* to) {
    for (; from < to; from += 16) __builtin_prefetch(from, 0, 2);
}

// out [D][PAGE] = the transpose of x [count][D], count <= PAGE; its columns are filled up with 0 to whole vectors. On
// the way it fetches what lies `ahead` floats behind x, where rows follow each other like those of x.
inline void transpose(const float* x, int64_t ldx, int64_t count, int64_t D, float* out, int64_t ahead) {
    int64_t j = 0;
#ifdef __AVX__
    for (; j + 8 <= count; j += 8) {
        for (int64_t i = j; i < j + 8; i++) fetch(x + ahead + i * ldx, x + ahead + i * ldx + D);
        int64_t d = 0;
        for (; d + 8 <= D; d += 8) transpose_8x8(x + j * ldx + d, ldx, out + d * PAGE + j, PAGE);
        for (; d < D; d++)
            for (int64_t i = j; i < j + 8; i++) out[d * PAGE + i] = x[i * ldx + d];
    }
#endif
    for (; j < count; j++)
        for (int64_t d = 0; d < D; d++) out[d * PAGE + j] = x[j * ldx + d];
    for (; j % L; j++)
        for (int64_t d = 0; d < D; d++) out[d * PAGE + j] = 0;
}

// ---------------------------------------------------------------------------------------------- softmax attention

constexpr int64_t ROWS = 192;  // most query rows of a task: what they share is reading and transposing a page of keys
constexpr int64_t PART = 8;    // pages of a task in decoding, where a long context keeps all threads busy

struct Attention {
    const float *q, *keys, *values;  // keys and values [groups][pages][PAGE][dim]
    const int64_t* slots;            // [count]
    const int32_t* tables;           // [slots][table]: the page of each PAGE tokens
    const int32_t* starts;           // [count + 1]: rows of q, from starts[0]
    const int64_t* lens;             // [count]: tokens of each sequence, the new ones included
    float* out;
    int64_t count, heads, groups, dim, pages, table, row, head, window;  // row, head: strides of q; window 0: all
};

// Some new tokens of one sequence, all heads of one group, and a range of pages.
struct Task {
    int64_t sequence, group, first, tokens;  // row = token * (heads of a group) + head
    int64_t page, end_page;
};

// Query rows of a task and what has been summed for them. Sums are relative to 2^top, top a whole number: when it
// rises, what is there is multiplied by a power of two, which rounds nothing.
struct Work {
    float *q, *sums, *lanes, *tops;     // [rows][dim], [rows][padded], [rows][L], [rows]
    float *keys, *values, *scores;      // [dim][PAGE], [PAGE][padded] where padded > dim, [HIGH][PAGE]
};

// Turns one row of scores (in powers of two) into weights 2^(score - top); MASKED: 0 outside [from, to).
template <bool MASKED>
inline void weigh(float* scores, float* top, float* lanes, float* sums, int64_t padded, int64_t from, int64_t to) {
    constexpr int C = PAGE / L;
    reg x[C];
    ireg seen[C];
    for (int c = 0; c < C; c++) {
        x[c] = get(scores + c * L);
        if (MASKED) {
            ireg j;
            for (int i = 0; i < L; i++) j[i] = c * L + i;
            seen[c] = (j >= int32_t(from)) & (j < int32_t(to));
            x[c] = seen[c] ? x[c] : all(-INFINITY);
        }
    }
    reg most = x[0];
    for (int c = 1; c < C; c++) most = larger(x[c], most);
    if (any_above(most, *top)) {
        const float t = std::ceil(largest(most)), factor = std::exp2(*top - t);
        for (int64_t d = 0; d < padded; d += L) put(sums + d, get(sums + d) * factor);
        put(lanes, get(lanes) * factor);
        *top = t;
    }
    const reg relative = all(*top);
    reg sum = get(lanes);
    for (int c = 0; c < C; c++) {
        x[c] = power_of_two(x[c] - relative);
        if (MASKED) x[c] = (reg)((ireg)x[c] & seen[c]);
        put(scores + c * L, x[c]);
        sum += x[c];
    }
    put(lanes, sum);
}

void attend(const Attention& a, const Task& t, const Work& w, int64_t padded) {
    const int64_t D = a.dim, R = a.heads / a.groups, rows = t.tokens * R;
    const int64_t new_tokens = a.starts[t.sequence + 1] - a.starts[t.sequence];
    const int64_t end = a.lens[t.sequence] - new_tokens + t.first + 1;  // the first token sees [end - window, end)
    const int32_t* table = a.tables + a.slots[t.sequence] * a.table;
    const float scale = 1.44269504f / std::sqrt(float(D));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = a.starts[t.sequence] - a.starts[0] + t.first + r / R;
        const float* q = a.q + at * a.row + (t.group * R + r % R) * a.head;
        for (int64_t d = 0; d < D; d++) w.q[r * D + d] = q[d] * scale;
        w.tops[r] = -INFINITY;
    }
    std::memset(w.sums, 0, sizeof(float) * rows * padded);
    std::memset(w.lanes, 0, sizeof(float) * rows * L);

    for (int64_t page = t.page; page < t.end_page; page++) {
        const int64_t start = page * PAGE;
        const int64_t at = (t.group * a.pages + table[page]) * PAGE * D;
        const float *keys = a.keys + at, *values = a.values + at;
        const int64_t filled = std::min(PAGE, end + t.tokens - 1 - start);
        const int64_t next = page + 1 < t.end_page ? (t.group * a.pages + table[page + 1]) * PAGE * D : at;
        transpose(keys, D, filled, D, w.keys, next - at);
        if (padded != D) {
            for (int64_t j = 0; j < filled; j++) std::memcpy(w.values + j * padded, values + j * D, sizeof(float) * D);
            values = w.values;
        }
        const float* values_next = a.values + next;
        for (int64_t r = 0; r < rows; r += HIGH) {
            const int64_t n = std::min<int64_t>(HIGH, rows - r);
            const int64_t first = end + r / R, last = end + (r + n - 1) / R;  // ends of the first and of the last row
            const int64_t count = std::min(PAGE, last - start);
            if (count <= 0 || (a.window && first - a.window >= start + PAGE)) continue;
            fetch(values_next + r * PAGE * D / rows, values_next + (r + n / 2) * PAGE * D / rows);
            multiply(n, w.q + r * D, D, w.keys, PAGE, D, w.scores, PAGE, 0, round_up(count, L));
            fetch(values_next + (r + n / 2) * PAGE * D / rows, values_next + (r + n) * PAGE * D / rows);
            const bool whole = first - start >= PAGE && (!a.window || last - a.window <= start);
            for (int64_t i = 0; i < n; i++) {
                float *scores = w.scores + i * PAGE, *top = w.tops + r + i;
                float *lanes = w.lanes + (r + i) * L, *sums = w.sums + (r + i) * padded;
                if (whole) {
                    weigh<false>(scores, top, lanes, sums, padded, 0, PAGE);
                    continue;
                }
                const int64_t to = end + (r + i) / R - start, from = a.window ? std::max<int64_t>(0, to - a.window) : 0;
                if (from < to && from < PAGE && to > 0)
                    weigh<true>(scores, top, lanes, sums, padded, from, to);
                else
                    std::memset(scores, 0, sizeof(float) * PAGE);
            }
            multiply(n, w.scores, PAGE, values, padded, count, w.sums + r * padded, padded, 1, padded);
        }
    }
}

// What a task found for its rows: sums and weights relative to 2^top.
struct Result {
    float *sums, *weights, *tops;  // [rows][padded], [rows], [rows]
};

// Writes the rows of out: the sums over `parts` tasks that differ in their pages alone, divided by those of the weights.
// w is the first task's result, the others lie `size` floats apart.
void write(const Attention& a, const Task& t, const Result& w, int64_t parts, int64_t size, int64_t padded) {
    const int64_t D = a.dim, R = a.heads / a.groups;
    for (int64_t r = 0; r < t.tokens * R; r++) {
        const int64_t token = a.starts[t.sequence] - a.starts[0] + t.first + r / R;
        float* out = a.out + (token * a.heads + t.group * R + r % R) * D;
        float top = w.tops[r], weight = 0;
        for (int64_t p = 1; p < parts; p++) top = std::fmax(top, w.tops[p * size + r]);
        for (int64_t p = 0; p < parts; p++) weight += std::exp2(w.tops[p * size + r] - top) * w.weights[p * size + r];
        for (int64_t p = 0; p < parts; p++) {
            const float factor = std::exp2(w.tops[p * size + r] - top), *sums = w.sums + p * size + r * padded;
            for (int64_t d = 0; d < D; d++) out[d] = (p ? out[d] : 0) + factor * sums[d];
        }
        for (int64_t d = 0; d < D; d++) out[d] /= weight;
    }
}

// Attention of new tokens to the pages of their sequences; a task takes at most `part` pages (0: all there are).
void attention(const Attention& a, int64_t part) {
    const int64_t R = a.heads / a.groups, D = a.dim, padded = round_up(D, L);
    int64_t share = ROWS;
    if (!part) {  // some tasks for every thread; what a task takes changes no bit
        const int64_t rows = int64_t(a.starts[a.count] - a.starts[0]) * a.heads;
        share = std::max<int64_t>(4 * HIGH, std::min(ROWS, rows / (4 * omp_get_max_threads())));
    }
    const int64_t block = std::max<int64_t>(1, share / R);  // tokens of a task
    int64_t pairs = 0, most = 0;                            // of queries and keys; rows of a task
    std::vector<Task> tasks;
    std::vector<size_t> firsts;  // the first task of each set of rows
    for (int64_t i = 0; i < a.count; i++) {
        const int64_t n = a.starts[i + 1] - a.starts[i];
        for (int64_t first = 0; first < n; first += block) {
            const int64_t tokens = std::min(block, n - first), end = a.lens[i] - n + first + 1;
            const int64_t low = a.window ? std::max<int64_t>(0, end - a.window) / PAGE : 0;
            const int64_t high = (end + tokens - 2) / PAGE + 1;
            pairs += (high - low) * PAGE * tokens * a.heads;
            most = std::max(most, tokens * R);
            for (int64_t g = 0; g < a.groups; g++) {
                firsts.push_back(tasks.size());
                for (int64_t p = low, stop; p < high; p = stop) {
                    stop = part ? std::min(high, (p / part + 1) * part) : high;
                    tasks.push_back({i, g, first, tokens, p, stop});
                }
            }
        }
    }
    if (!part)  // the longest first, so that no thread is left with one at the end
        std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) {
            return x.tokens * (x.end_page - x.page) > y.tokens * (y.end_page - y.page);
        });
    firsts.push_back(tasks.size());
    const bool joined = tasks.size() + 1 > firsts.size();  // some rows have several parts
    const int64_t padded_rows = round_up(most, 16), size = padded_rows * (padded + 2);
    Scratch results(joined ? tasks.size() * size : 0);
    float* base = results.take(0);
    const auto result = [=](float* at) {
        return Result{at, at + padded_rows * padded, at + padded_rows * (padded + 1)};
    };
#pragma omp parallel if (pairs * D * 2 > PARALLEL)
    {
        Scratch scratch(padded_rows * (D + L) + size + PAGE * (D + padded + HIGH));
        Work w;
        w.q = scratch.take(padded_rows * D);
        w.lanes = scratch.take(padded_rows * L);
        w.keys = scratch.take(PAGE * D);
        w.values = scratch.take(PAGE * padded);
        w.scores = scratch.take(PAGE * HIGH);
        float* own = scratch.take(size);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) {
            const Task& t = tasks[i];
            const Result to = result(joined ? base + i * size : own);
            w.sums = to.sums;
            w.tops = to.tops;
            attend(a, t, w, padded);
            for (int64_t r = 0; r < t.tokens * R; r++) to.weights[r] = total(get(w.lanes + r * L));
            if (!joined) write(a, t, to, 1, size, padded);
        }
        if (joined) {
#pragma omp for schedule(static)
            for (size_t i = 0; i < firsts.size() - 1; i++)
                write(a, tasks[firsts[i]], result(base + firsts[i] * size), firsts[i + 1] - firsts[i], size, padded);
        }
    }
}

// ------------------------------------------------------------------------------------------- lightning attention

struct Lightning {
    const float *q, *k, *v, *slope;  // [tokens][heads][dim] with strides row and head; [heads]
    float* states;                   // [slots][heads][dim][dim]
    const int64_t* slots;            // [count]
    const int32_t* starts;           // [count + 1]: rows of q, from starts[0]; null: a row each
    float* out;
    int64_t count, heads, dim, row, head;
};

// C vectors of columns of one step: state = decay * state + k^T v, out = q state.
template <int C>
inline void advance(float* state, const float* q, const float* k, const float* v, float decay, int64_t D, float* out) {
    reg o[C] = {}, b[C];
    for (int c = 0; c < C; c++) b[c] = get(v + c * L);
    for (int64_t d = 0; d < D; d++, state += D)
        for (int c = 0; c < C; c++) {
            const reg s = get(state + c * L) * decay + k[d] * b[c];
            put(state + c * L, s);
            o[c] += q[d] * s;
        }
    for (int c = 0; c < C; c++) put(out + c * L, o[c]);
}

void lightning_decode(const Lightning& a) {
    const int64_t D = a.dim;
    const int64_t tokens = a.starts ? a.starts[a.count] - a.starts[0] : a.count;
#pragma omp parallel for schedule(dynamic, 1) if (tokens * a.heads * D * D > PARALLEL / 4)
    for (int64_t i = 0; i < a.count * a.heads; i++) {
        const int64_t n = i / a.heads, h = i % a.heads;
        const int64_t first = a.starts ? a.starts[n] - a.starts[0] : n;
        const int64_t end = a.starts ? a.starts[n + 1] - a.starts[0] : n + 1;
        float* state = a.states + (a.slots[n] * a.heads + h) * D * D;
        const float decay = std::exp(-a.slope[h]);
        for (int64_t t = first; t < end; t++) {
            const int64_t at = t * a.row + h * a.head;
            const float *q = a.q + at, *k = a.k + at, *v = a.v + at;
            float* out = a.out + (t * a.heads + h) * D;
            int64_t c = 0;
            for (; c + STEP * L <= D; c += STEP * L) advance<STEP>(state + c, q, k, v + c, decay, D, out + c);
            for (; c + 2 * L <= D; c += 2 * L) advance<2>(state + c, q, k, v + c, decay, D, out + c);
            for (; c + L <= D; c += L) advance<1>(state + c, q, k, v + c, decay, D, out + c);
            for (; c < D; c++) {
                float o = 0;
                for (int64_t d = 0; d < D; d++) {
                    float& s = state[d * D + c];
                    s = decay * s + k[d] * v[c];
                    o += q[d] * s;
                }
                out[c] = o;
            }
        }
    }
}

// With p the place in a block of n tokens and w the decay: O = (w^(p+1) Q) S + (Q K^T * M) V, M_ij = w^(i-j), i >= j;
// then S = w^n S + (w^(n-1-p) K)^T V. No power of w is negative, so nothing overflows, whatever the slope.
void lightning_prefill(const Lightning& a) {
    const int64_t D = a.dim, padded = round_up(D, L);
    const int64_t tokens = a.starts[a.count] - a.starts[0];
#pragma omp parallel if (tokens * a.heads * D * (2 * D + PAGE) > PARALLEL)
    {
        Scratch scratch(D * padded + PAGE * (3 * padded + D) + 2 * PAGE * D + PAGE * HIGH + 4 * PAGE);
        float *state = scratch.take(D * padded), *out = scratch.take(PAGE * padded);
        float* values = scratch.take(PAGE * padded);
        float *q = scratch.take(PAGE * D), *decayed = scratch.take(PAGE * D), *keys = scratch.take(D * PAGE);
        float *scores = scratch.take(HIGH * PAGE), *powers = scratch.take(2 * PAGE), *mask = scratch.take(2 * PAGE);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a.count * a.heads; i++) {
            const int64_t n = i / a.heads, h = i % a.heads, base = a.starts[0];
            float* pool = a.states + (a.slots[n] * a.heads + h) * D * D;
            std::memset(state, 0, sizeof(float) * D * padded);
            std::memset(values, 0, sizeof(float) * PAGE * padded);
            for (int64_t d = 0; d < D; d++) std::memcpy(state + d * padded, pool + d * D, sizeof(float) * D);
            for (int64_t p = 0; p <= PAGE; p++) powers[p] = float(std::exp(-double(a.slope[h]) * p));
            for (int64_t p = 0; p < 2 * PAGE; p++) mask[p] = p < PAGE ? powers[PAGE - 1 - p] : 0;  // w^(63 - p)
            for (int64_t t = a.starts[n] - base; t < a.starts[n + 1] - base; t += PAGE) {
                const int64_t count = std::min<int64_t>(PAGE, a.starts[n + 1] - base - t);
                const int64_t at = t * a.row + h * a.head;
                transpose(a.k + at, a.row, count, D, keys, PAGE * a.row);
                for (int64_t p = 0; p < count; p++) {
                    const float* from = a.q + at + p * a.row;
                    std::memcpy(values + p * padded, a.v + at + p * a.row, sizeof(float) * D);
                    std::memcpy(q + p * D, from, sizeof(float) * D);
                    for (int64_t d = 0; d < D; d++) decayed[p * D + d] = from[d] * powers[p + 1];
                }
                for (int64_t r = 0; r < count; r += HIGH) {
                    const int64_t rows = std::min<int64_t>(HIGH, count - r), seen = r + rows;
                    multiply(rows, decayed + r * D, D, state, padded, D, out + r * padded, padded, 0, padded);
                    multiply(rows, q + r * D, D, keys, PAGE, D, scores, PAGE, 0, round_up(seen, L));
                    for (int64_t p = 0; p < rows; p++)
                        for (int64_t j = 0; j < seen; j += L)
                            put(scores + p * PAGE + j, get(scores + p * PAGE + j) * get(mask + PAGE - 1 - (r + p) + j));
                    multiply(rows, scores, PAGE, values, padded, seen, out + r * padded, padded, 1, padded);
                }
                for (int64_t d = 0; d < D; d++)
                    for (int64_t p = 0; p < count; p++) keys[d * PAGE + p] *= powers[count - 1 - p];
                for (int64_t d = 0; d < D; d += HIGH)
                    multiply(std::min<int64_t>(HIGH, D - d), keys + d * PAGE, PAGE, values, padded, count,
                             state + d * padded, padded, powers[count], padded);
                for (int64_t p = 0; p < count; p++)
                    std::memcpy(a.out + ((t + p) * a.heads + h) * D, out + p * padded, sizeof(float) * D);
            }
            for (int64_t d = 0; d < D; d++) std::memcpy(pool + d * D, state + d * padded, sizeof(float) * D);
        }
    }
}

}  // namespace

extern "C" {

// Attention of new tokens to their sequences' pages; row and head are the strides of q; window 0: every key. The two
// differ in how work is divided alone: decoding cuts the keys of few rows into parts at fixed places and joins them.
void attention_decode_f32(const float* q, const float* keys, const float* values, const int64_t* slots,
                          const int32_t* tables, const int32_t* starts, const int64_t* lens, float* out, int64_t count,
                          int64_t heads, int64_t groups, int64_t dim, int64_t pages, int64_t table, int64_t row,
                          int64_t head, int64_t window) {
    attention({q,     keys, values, slots, tables, starts, lens, out,   count,
               heads, groups, dim,  pages, table,  row,    head, window}, PART);
}

void attention_prefill_f32(const float* q, const float* keys, const float* values, const int64_t* slots,
                           const int32_t* tables, const int32_t* starts, const int64_t* lens, float* out, int64_t count,
                           int64_t heads, int64_t groups, int64_t dim, int64_t pages, int64_t table, int64_t row,
                           int64_t head, int64_t window) {
    attention({q,     keys, values, slots, tables, starts, lens, out,   count,
               heads, groups, dim,  pages, table,  row,    head, window}, 0);
}

// Lightning attention token by token, and in blocks of PAGE tokens from each sequence's first row; states in place.
void lightning_decode_f32(const float* q, const float* k, const float* v, const float* slope, float* states,
                          const int64_t* slots, const int32_t* starts, float* out, int64_t count, int64_t heads,
                          int64_t dim, int64_t row, int64_t head) {
    lightning_decode({q, k, v, slope, states, slots, starts, out, count, heads, dim, row, head});
}

void lightning_prefill_f32(const float* q, const float* k, const float* v, const float* slope, float* states,
                           const int64_t* slots, const int32_t* starts, float* out, int64_t count, int64_t heads,
                           int64_t dim, int64_t row, int64_t head) {
    lightning_prefill({q, k, v, slope, states, slots, starts, out, count, heads, dim, row, head});
}

}  // extern "C"
