// Products with weights of 8 and 4 bits on a CPU: each weight is read once, as it is stored, for any number of rows.
//
// The rows of x are rounded to 16 bits in groups along K, each group with a scale of its own (about 1e-5 of its largest
// value, a hundredth of what 8 bits did to the weights), and multiplied in whole numbers: exact sums, so a row's result is
// the same to the bit alone, in a batch of any size, and with any number of threads. A group's sum then becomes a float
// and is added up in the order of the groups.
//
// Weights lie in tiles: 16 rows of N by 4 columns of K are 64 bytes, row by row (8 bits; value + 128), or 16 by 8, a byte
// with column b below column 4 + b (4 bits; value + 8). N and K are filled up to whole tiles. Tiles go along K first.
// kernels/quantized.py makes them. The scales: of 8 bits one float32 a row; of 4 bits a bfloat16 for each group, as
// [N / 16][groups][16].
//
// Overflow: a group has at most 512 columns, and 512 * 128 * 32512 < 2^31; what passes the limit on the way there wraps
// around and comes back, as addition modulo 2^32 does.

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rows.h"

namespace {

constexpr int TILE = 16;             // rows of N that lie together
constexpr float LARGEST = 32512.0f;  // of a rounded x: its upper byte, rounded to nearest, is then at most 127
constexpr int64_t PANEL = 512;       // columns that are taken at a time where many rows pass over them (they stay in L1)
constexpr int64_t MANY = 192;        // rows of x that pass over a panel (they stay in L2)
constexpr int64_t FEW = 1 << 13;     // values whose rounding is not divided among threads: waiting for all costs as much

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr int ROWS = 6, BLOCKS = 2;  // rows of x by tiles of N whose sums are kept in registers
#else
constexpr int ROWS = 4, BLOCKS = 1;
#endif

// A matrix [N, K] in tiles, and how its columns are grouped.
struct Matrix {
    const uint8_t* tiles;
    const float* row_scales;    // 8 bits
    const bf16* group_scales;   // 4 bits
    int64_t N, K, group;        // group: columns; a multiple of 8, at most 512

    int64_t groups() const { return (K + group - 1) / group; }
    int64_t blocks() const { return (N + TILE - 1) / TILE; }
};

// A row of x, rounded: for each 4 columns 8 bytes in the order that the product wants (with VNNI the 4 upper bytes, then
// the 4 lower, both signed; else 16 bits each of columns 0 2 1 3); then each group's scale; then what each group's
// sum starts from: minus the sum of x times what was added to the weights.
struct Row {
    const char* x;
    const float* scales;
    const int32_t* starts;
};
inline int64_t values_size(int64_t K) { return (K + 15) / 16 * 32; }
inline int64_t row_size(int64_t K, int64_t groups) { return (values_size(K) + 8 * groups + 63) / 64 * 64; }
inline Row row_at(const char* memory, int64_t K, int64_t groups) {
    const char* scales = memory + values_size(K);
    return {memory, (const float*)scales, (const int32_t*)(scales + 4 * groups)};
}

inline void put(char* to, ivec q) {  // 16 rounded values
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    const ivec upper = (q + 128) >> 8;
    const __m128i u = _mm512_cvtepi32_epi8((__m512i)upper), l = _mm512_cvtepi32_epi8((__m512i)q);  // the lowest byte
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi32(u, l));
    _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi32(u, l));
#elif defined(__AVX2__)
    __m256i half[2];
    std::memcpy(half, &q, sizeof q);
    const __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xD8);
    const int64_t low = 0x0706030205040100, high = low + 0x0808080808080808;
    const __m256i order = _mm256_set_epi64x(high, low, high, low);
    _mm256_storeu_si256((__m256i*)to, _mm256_shuffle_epi8(all, order));
#else
    int16_t out[16];
    for (int i = 0; i < 16; i += 4) {
        out[i] = int16_t(q[i]);
        out[i + 1] = int16_t(q[i + 2]);
        out[i + 2] = int16_t(q[i + 1]);
        out[i + 3] = int16_t(q[i + 3]);
    }
    std::memcpy(to, out, sizeof out);
#endif
}

// Rounds x [K] into `memory`. A group that holds what is not finite gets a scale that is not either.
void round_row(const float* x, int64_t K, int64_t group, int32_t added, char* memory) {
    const int64_t groups = (K + group - 1) / group;
    float* scales = (float*)(memory + values_size(K));
    int32_t* starts = (int32_t*)(scales + groups);
    float rest[W] = {};  // the last columns, filled up with zeros
    std::memcpy(rest, x + K / W * W, sizeof(float) * (K % W));
    for (int64_t g = 0; g < groups; g++) {
        const int64_t begin = g * group, end = std::min(K, begin + group);
        vec largest = {}, odd = {};
        for (int64_t k = begin; k < end; k += W) {
            const vec v = load(k + W <= K ? x + k : rest), a = v < 0 ? -v : v;
            largest = a > largest ? a : largest;
            odd += v * 0.0f;
        }
        float top = 0;
        for (int i = 0; i < W; i++) top = std::max(top, largest[i]);
        if (!(top > 1e-30f)) top = 0;
        const float inverse = top > 0 ? LARGEST / top : 0.0f;
        const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the lowest bits
        ivec total = {};
        for (int64_t k = begin; k < end; k += W) {
            const vec t = load(k + W <= K ? x + k : rest) * inverse + shift;
            const ivec q = (ivec)t - 0x4B400000;
            total += q;
            put(memory + 2 * k, q);
        }
        int32_t s = 0;
        for (int i = 0; i < W; i++) s += total[i];
        scales[g] = top / LARGEST + sum(odd);
        starts[g] = int32_t(uint32_t(-s) * uint32_t(added));
    }
}

// out[r][b][n]: the sum over `quads` * 4 columns of row r of x and row n of tile b; `starts` included.
// w: first tile, its neighbours along N lie `stride` bytes apart; x: each row's values from these columns on.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)

template <int BITS, int R, int B>
inline void multiply(const uint8_t* w, int64_t stride, const char* const* x, int64_t quads, const int32_t* starts,
                     ivec (*out)[B]) {
    __m512i upper[R][B], lower[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) upper[r][b] = _mm512_setzero_si512(), lower[r][b] = _mm512_set1_epi32(starts[r]);
    const __m512i low_nibbles = _mm512_set1_epi8(15);
    for (int64_t q = 0; q < quads; q += BITS == 8 ? 1 : 2) {
        __m512i v[B];
        for (int b = 0; b < B; b++) {
            const uint8_t* p = w + b * stride;
            __builtin_prefetch(p + 1024);
            v[b] = _mm512_loadu_si512(p);
        }
        w += 64;
        for (int part = 0; part < (BITS == 8 ? 1 : 2); part++)
            for (int r = 0; r < R; r++) {
                int32_t xu, xl;
                std::memcpy(&xu, x[r] + 8 * (q + part), 4);
                std::memcpy(&xl, x[r] + 8 * (q + part) + 4, 4);
                const __m512i u = _mm512_set1_epi32(xu), l = _mm512_set1_epi32(xl);
                for (int b = 0; b < B; b++) {
                    const __m512i c = BITS == 8 ? v[b] : _mm512_and_si512(part ? _mm512_srli_epi16(v[b], 4) : v[b], low_nibbles);
                    upper[r][b] = _mm512_dpbusd_epi32(upper[r][b], c, u);
                    lower[r][b] = _mm512_dpbusd_epi32(lower[r][b], c, l);
                }
            }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            out[r][b] = (ivec)_mm512_add_epi32(_mm512_slli_epi32(upper[r][b], 8), lower[r][b]);
}

#elif defined(__AVX2__)

template <int BITS, int R, int B>
inline void multiply(const uint8_t* w, int64_t stride, const char* const* x, int64_t quads, const int32_t* starts,
                     ivec (*out)[B]) {
    __m256i total[R][B][2];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b][0] = total[r][b][1] = _mm256_set1_epi32(starts[r]);
    const __m256i mask = _mm256_set1_epi16(BITS == 8 ? 255 : 15);
    for (int64_t q = 0; q < quads; q += BITS == 8 ? 1 : 2) {
        for (int part = 0; part < (BITS == 8 ? 1 : 2); part++)
            for (int b = 0; b < B; b++) {
                const uint8_t* p = w + b * stride;
                if (part == 0) __builtin_prefetch(p + 1024);
                __m256i even[2], odd[2];  // columns 0 and 2 of a row of N, then 1 and 3, as 16 bits each
                for (int half = 0; half < 2; half++) {
                    const __m256i v = _mm256_loadu_si256((const __m256i*)(p + 32 * half));
                    even[half] = _mm256_and_si256(part ? _mm256_srli_epi16(v, 4) : v, mask);
                    odd[half] = _mm256_srli_epi16(v, BITS == 8 || part == 0 ? 8 : 12);
                    if (BITS == 4 && part == 0) odd[half] = _mm256_and_si256(odd[half], mask);
                }
                for (int r = 0; r < R; r++) {
                    int32_t x02, x13;
                    std::memcpy(&x02, x[r] + 8 * (q + part), 4);
                    std::memcpy(&x13, x[r] + 8 * (q + part) + 4, 4);
                    const __m256i e = _mm256_set1_epi32(x02), o = _mm256_set1_epi32(x13);
                    for (int half = 0; half < 2; half++) {
                        __m256i& t = total[r][b][half];
                        t = _mm256_add_epi32(t, _mm256_madd_epi16(even[half], e));
                        t = _mm256_add_epi32(t, _mm256_madd_epi16(odd[half], o));
                    }
                }
            }
        w += 64;
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) std::memcpy(&out[r][b], total[r][b], 64);
}

#else

template <int BITS, int R, int B>
inline void multiply(const uint8_t* w, int64_t stride, const char* const* x, int64_t quads, const int32_t* starts,
                     ivec (*out)[B]) {
    uint32_t total[R][B][TILE];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            for (int n = 0; n < TILE; n++) total[r][b][n] = uint32_t(starts[r]);
    for (int64_t q = 0; q < quads; q += BITS == 8 ? 1 : 2, w += 64)
        for (int part = 0; part < (BITS == 8 ? 1 : 2); part++)
            for (int r = 0; r < R; r++) {
                int16_t v[4];  // columns 0 2 1 3
                std::memcpy(v, x[r] + 8 * (q + part), 8);
                for (int b = 0; b < B; b++)
                    for (int n = 0; n < TILE; n++) {
                        const uint8_t* p = w + b * stride + 4 * n;
                        int32_t c[4];
                        for (int j = 0; j < 4; j++) c[j] = BITS == 8 ? p[j] : p[j] >> 4 * part & 15;
                        total[r][b][n] += uint32_t(c[0] * v[0]) + uint32_t(c[1] * v[2]) + uint32_t(c[2] * v[1]) + uint32_t(c[3] * v[3]);
                    }
            }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) std::memcpy(&out[r][b], total[r][b], 64);
}

#endif

// Where the 16 results of row r from n on go. A kernel asks for the place first, long before it writes: the rows lie far
// apart, so no hardware fetches them in time.
struct Plain {
    float* out;
    int64_t N, stride;  // from row to row

    float* place(int64_t r, int64_t n) const { return out + r * stride + n; }
    void store(int64_t r, int64_t n, vec v) const {
        if (n + W <= N)
            ::store(place(r, n), v);
        else
            std::memcpy(place(r, n), &v, sizeof(float) * (N - n));
    }
};
struct Weighted {  // added to the row of the token, times the weight, of pair r
    float* y;
    int64_t N, top_k;
    const int64_t* pairs;
    const float* weights;

    float* place(int64_t r, int64_t n) const { return y + pairs[r] / top_k * N + n; }
    void store(int64_t r, int64_t n, vec v) const {
        float* to = place(r, n);
        const float weight = weights[pairs[r]];
        if (n + W <= N)
            ::store(to, load(to) + v * weight);
        else
            for (int64_t i = 0; n + i < N; i++) to[i] = std::fma(v[i], weight, to[i]);
    }
};

// Groups [begin, end) of R rows of x by B tiles of N from tile `block` on. `carried` [R][B * TILE]: what earlier groups
// gave, read unless begin is 0; what these and earlier groups give is written there, or to `out` after the last group.
template <int BITS, int R, int B, typename Out>
inline void micro(const Matrix& m, const Row* x, int64_t block, int64_t begin, int64_t end, float* carried, int64_t row,
                  const Out& out) {
    const int64_t groups = m.groups(), columns = BITS == 8 ? 4 : 8;  // columns of a tile
    const int64_t per_block = (m.K + columns - 1) / columns * 64;
    const uint8_t* w = m.tiles + block * per_block + begin * m.group / columns * 64;
    const char* values[R];
    int32_t starts[R];
    vec total[R][B] = {};
    if (end == groups)
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) __builtin_prefetch(out.place(row + r, (block + b) * TILE), 1);
    for (int r = 0; r < R; r++) {
        values[r] = x[r].x + begin * m.group * 2;
        if (begin > 0)
            for (int b = 0; b < B; b++) total[r][b] = load(carried + (r * B + b) * TILE);
    }
    for (int64_t g = begin; g < end; g++) {
        const int64_t left = std::min(m.K - g * m.group, m.group);
        const int64_t quads = (left + columns - 1) / columns * (columns / 4);
        for (int r = 0; r < R; r++) starts[r] = x[r].starts[g];
        ivec sums[R][B];
        multiply<BITS, R, B>(w, per_block, values, quads, starts, sums);
        vec scales[B];
        if (BITS == 4)
            for (int b = 0; b < B; b++) scales[b] = load(m.group_scales + ((block + b) * groups + g) * TILE);
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) {
                const vec v = __builtin_convertvector(sums[r][b], vec);
                total[r][b] += BITS == 8 ? v * x[r].scales[g] : (v * x[r].scales[g]) * scales[b];
            }
        w += m.group / columns * 64;
        for (int r = 0; r < R; r++) values[r] += m.group * 2;
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            if (end < groups)
                store(carried + (r * B + b) * TILE, total[r][b]);
            else if (BITS == 8)
                out.store(row + r, (block + b) * TILE, total[r][b] * load(m.row_scales + (block + b) * TILE));
            else
                out.store(row + r, (block + b) * TILE, total[r][b]);
        }
}

template <int BITS, int B, typename Out>
inline void some_rows(int64_t R, const Matrix& m, const Row* x, int64_t block, int64_t begin, int64_t end, float* carried,
                      int64_t row, const Out& out) {
    switch (R) {
        case 1: return micro<BITS, 1, B>(m, x, block, begin, end, carried, row, out);
        case 2: return micro<BITS, 2, B>(m, x, block, begin, end, carried, row, out);
        case 3: return micro<BITS, 3, B>(m, x, block, begin, end, carried, row, out);
        case 4: return micro<BITS, 4, B>(m, x, block, begin, end, carried, row, out);
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        case 5: return micro<BITS, 5, B>(m, x, block, begin, end, carried, row, out);
        case 6: return micro<BITS, 6, B>(m, x, block, begin, end, carried, row, out);
#endif
    }
}

// Every row of x by the tiles [first, last) of N.
template <int BITS, typename Out>
void product(const Matrix& m, const Row* x, int64_t rows, int64_t first, int64_t last, const Out& out) {
    const int64_t groups = m.groups(), panel = rows <= ROWS ? groups : std::max<int64_t>(1, PANEL / m.group);
    std::vector<float> carried(panel < groups ? std::min(rows, MANY) * BLOCKS * TILE : 0);
    for (int64_t from = 0; from < rows; from += MANY) {
        const int64_t to = std::min(rows, from + MANY);
        int64_t block = first;
        if (rows == 1)
            for (; block + 4 <= last; block += 4) micro<BITS, 1, 4>(m, x, block, 0, groups, nullptr, 0, out);
        while (block < last) {
            const bool full = block + BLOCKS <= last;
            for (int64_t g = 0; g < groups; g += panel)
                for (int64_t r = from; r < to; r += ROWS) {
                    const int64_t R = std::min<int64_t>(ROWS, to - r), end = std::min(groups, g + panel);
                    float* c = carried.data() + (panel < groups ? (r - from) * BLOCKS * TILE : 0);
                    if (full)
                        some_rows<BITS, BLOCKS>(R, m, x + r, block, g, end, c, r, out);
                    else
                        some_rows<BITS, 1>(R, m, x + r, block, g, end, c, r, out);
                }
            block += full ? BLOCKS : 1;
        }
    }
}

// x [M, K] -> out [M, N].
template <int BITS>
void linear(const float* x, const Matrix& m, float* out, int64_t M) {
    const int64_t N = m.N, K = m.K, groups = m.groups(), size = row_size(K, groups), blocks = m.blocks();
    const std::unique_ptr<char[]> memory(new char[M * size]);  // not filled with zeros first, as a vector would be
    std::vector<Row> rows(M);
    for (int64_t i = 0; i < M; i++) rows[i] = row_at(&memory[i * size], K, groups);
    const auto round = [&](int64_t i) { round_row(x + i * K, K, m.group, BITS == 8 ? 128 : 8, &memory[i * size]); };
    if (M * K <= FEW)
        for (int64_t i = 0; i < M; i++) round(i);
#pragma omp parallel if (M * N * K > PARALLEL)
    {
        if (M * K > FEW) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M; i++) round(i);
        }
        // pieces of MANY rows by BLOCKS tiles, divided among the threads in one line
        const int64_t across = (blocks + BLOCKS - 1) / BLOCKS, pieces = (M + MANY - 1) / MANY * across;
        int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
        for (int64_t p = pieces * id / threads, end = pieces * (id + 1) / threads; p < end;) {
            const int64_t from = p / across * MANY, until = std::min(end, (p / across + 1) * across);
            const int64_t first = p % across * BLOCKS, last = std::min(blocks, first + (until - p) * BLOCKS);
            product<BITS>(m, &rows[from], std::min(M - from, MANY), first, last, Plain{out + from * N, N, N});
            p = until;
        }
    }
}

// As `experts` of compiled.cpp, for any number of tokens. w13 holds 2 * num_experts matrices [width, hidden] (gate, up of
// each expert), w2 num_experts matrices [hidden, width].
template <int BITS>
void experts(const float* x, const Matrix& w13, const Matrix& w2, const int64_t* ids, const float* weights, float* y,
             int64_t tokens, int64_t top_k, int64_t num_experts) {
    const int64_t hidden = w13.K, width = w13.N, columns = BITS == 8 ? 4 : 8;
    const auto part_of = [&](const Matrix& m, int64_t index) {  // one matrix of a stack
        Matrix one = m;
        one.tiles += index * m.blocks() * ((m.K + columns - 1) / columns * 64);
        if (BITS == 8) one.row_scales += index * m.blocks() * TILE;
        else one.group_scales += index * m.blocks() * m.groups() * TILE;
        return one;
    };
    std::vector<std::vector<int64_t>> chosen(num_experts);  // expert -> the flat (token, k) that chose it
    int64_t pairs = 0;
    for (int64_t i = 0; i < tokens * top_k; i++)
        if (weights[i] != 0) chosen[ids[i]].push_back(i), pairs++;
    std::memset(y, 0, sizeof(float) * tokens * hidden);

    // Pieces of one expert's rows in ascending order of experts; rounds of pieces whose activations stay below 64 MB.
    struct Piece { int64_t expert, from, count, place; };  // place: of its first row in the round
    const int64_t most = std::max<int64_t>(MANY, (int64_t(1) << 24) / (2 * width));
    std::vector<std::vector<Piece>> rounds;
    for (int64_t e = 0, filled = most; e < num_experts; e++)
        for (int64_t from = 0; from < int64_t(chosen[e].size());) {
            if (filled == most) rounds.emplace_back(), filled = 0;
            const int64_t count = std::min<int64_t>(chosen[e].size() - from, most - filled);
            rounds.back().push_back({e, from, count, filled});
            from += count;
            filled += count;
        }
    const int64_t space = std::min(most, pairs);
    const std::unique_ptr<float[]> h(new float[space * 2 * width]);
    const int64_t x_size = row_size(hidden, w13.groups()), h_size = row_size(width, w2.groups());
    const std::unique_ptr<char[]> x_memory(new char[tokens * x_size]), h_memory(new char[space * h_size]);
    const int32_t added = BITS == 8 ? 128 : 8;
    const auto round_x = [&](int64_t t) { round_row(x + t * hidden, hidden, w13.group, added, &x_memory[t * x_size]); };
    const bool few = pairs * width <= FEW;  // then every thread makes all of the second product's rows for itself
    if (tokens * hidden <= FEW)
        for (int64_t t = 0; t < tokens; t++) round_x(t);
#pragma omp parallel if (pairs * 3 * width * hidden > PARALLEL)
    {
        const int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
        std::vector<Row> rows(space);
        std::vector<float> gate(few ? width : 0);
        std::vector<char> own(few ? space * h_size : 0);
        const char* h_rows = few ? own.data() : h_memory.get();
        if (tokens * hidden > FEW) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t++) round_x(t);
        }
        for (const auto& round : rounds) {
            int64_t first = w13.blocks() * id / threads, last = w13.blocks() * (id + 1) / threads;
            for (const Piece& p : round) {
                const int64_t* flat = &chosen[p.expert][p.from];
                for (int64_t i = 0; i < p.count; i++)
                    rows[i] = row_at(&x_memory[flat[i] / top_k * x_size], hidden, w13.groups());
                for (int part = 0; part < 2; part++)  // gate, then up
                    product<BITS>(part_of(w13, p.expert * 2 + part), rows.data(), p.count, first, last,
                                  Plain{&h[(p.place * 2 + part) * width], width, 2 * width});
            }
#pragma omp barrier
            const int64_t filled = round.back().place + round.back().count;
            if (few) {
                for (int64_t i = 0; i < filled; i++) {
                    std::memcpy(gate.data(), &h[i * 2 * width], sizeof(float) * width);
                    silu_times(gate.data(), &h[(i * 2 + 1) * width], 0, width);
                    round_row(gate.data(), width, w2.group, added, &own[i * h_size]);
                }
            } else {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < filled; i++) {
                    silu_times(&h[i * 2 * width], &h[(i * 2 + 1) * width], 0, width);
                    round_row(&h[i * 2 * width], width, w2.group, added, &h_memory[i * h_size]);
                }
            }
            first = w2.blocks() * id / threads, last = w2.blocks() * (id + 1) / threads;
            for (const Piece& p : round) {
                const int64_t* flat = &chosen[p.expert][p.from];
                for (int64_t i = 0; i < p.count; i++) rows[i] = row_at(h_rows + (p.place + i) * h_size, width, w2.groups());
                product<BITS>(part_of(w2, p.expert), rows.data(), p.count, first, last,
                              Weighted{y, hidden, top_k, flat, weights});
            }
            if (&round != &rounds.back()) {  // the next round writes over these activations
#pragma omp barrier
            }
        }
    }
}

constexpr int64_t GROUP = 128;  // columns of x that share a scale where the weights have no groups of their own

}  // namespace

extern "C" {

void linear_int8(const float* x, const uint8_t* w, const float* scales, float* out, int64_t M, int64_t N, int64_t K) {
    linear<8>(x, {w, scales, nullptr, N, K, GROUP}, out, M);
}
void linear_int4(const float* x, const uint8_t* w, const bf16* scales, float* out, int64_t M, int64_t N, int64_t K,
                 int64_t group) {
    linear<4>(x, {w, nullptr, scales, N, K, group}, out, M);
}
void experts_int8(const float* x, const uint8_t* w13, const float* s13, const uint8_t* w2, const float* s2,
                  const int64_t* ids, const float* weights, float* y, int64_t tokens, int64_t top_k, int64_t num_experts,
                  int64_t width, int64_t hidden) {
    experts<8>(x, {w13, s13, nullptr, width, hidden, GROUP}, {w2, s2, nullptr, hidden, width, GROUP}, ids, weights, y,
               tokens, top_k, num_experts);
}
void experts_int4(const float* x, const uint8_t* w13, const bf16* s13, const uint8_t* w2, const bf16* s2, const int64_t* ids,
                  const float* weights, float* y, int64_t tokens, int64_t top_k, int64_t num_experts, int64_t width,
                  int64_t hidden, int64_t group) {
    experts<4>(x, {w13, nullptr, s13, width, hidden, group}, {w2, nullptr, s2, hidden, width, group}, ids, weights, y,
               tokens, top_k, num_experts);
}

}  // extern "C"
