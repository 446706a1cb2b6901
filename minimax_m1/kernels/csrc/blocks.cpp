// Half a layer in one call, for decoding: the kernels of the other files one after another, so that what Python does for
// a call is paid once instead of a dozen times. They compute nothing of their own; results are those of the single calls.

#include "rows.h"

#include <memory>

extern "C" {

void linear_f32(const float*, const float*, float*, int64_t, int64_t, int64_t);
void linear_bf16(const float*, const bf16*, float*, int64_t, int64_t, int64_t);
void linear_int8(const float*, const uint8_t*, const float*, float*, int64_t, int64_t, int64_t);
void linear_int4(const float*, const uint8_t*, const bf16*, float*, int64_t, int64_t, int64_t, int64_t);
void experts_f32(const float*, const float*, const float*, const int64_t*, const float*, float*, int64_t, int64_t, int64_t,
                 int64_t, int64_t);
void experts_bf16(const float*, const bf16*, const bf16*, const int64_t*, const float*, float*, int64_t, int64_t, int64_t,
                  int64_t, int64_t);
void experts_int8(const float*, const uint8_t*, const float*, const uint8_t*, const float*, const int64_t*, const float*,
                  float*, int64_t, int64_t, int64_t, int64_t, int64_t);
void experts_int4(const float*, const uint8_t*, const bf16*, const uint8_t*, const bf16*, const int64_t*, const float*,
                  float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
void silu_f32(float*, int64_t);
void rms_norm_f32(const float*, const float*, const float*, float*, int64_t, int64_t, float);
void rms_norm_bf16(const float*, const bf16*, const float*, float*, int64_t, int64_t, float);
void route_f32(const float*, float*, int64_t*, float*, int64_t, int64_t, int64_t);
void lightning_decode_f32(const float*, const float*, const float*, const float*, float*, const int64_t*, const int32_t*,
                          float*, int64_t, int64_t, int64_t, int64_t, int64_t);
}

namespace {

enum Kind : int64_t { F32, BF16, INT8, INT4 };

struct Weight {  // as kernels/blocks.py writes it: six numbers
    Kind kind;
    const void *values, *scales;
    int64_t group, size_out, size_in;
};
static_assert(sizeof(Weight) == 6 * sizeof(int64_t), "a weight is six numbers of 8 bytes");

void linear(const float* x, const Weight& w, float* out, int64_t rows) {
    const int64_t N = w.size_out, K = w.size_in;
    switch (w.kind) {
        case F32: return linear_f32(x, (const float*)w.values, out, rows, N, K);
        case BF16: return linear_bf16(x, (const bf16*)w.values, out, rows, N, K);
        case INT8: return linear_int8(x, (const uint8_t*)w.values, (const float*)w.scales, out, rows, N, K);
        case INT4: return linear_int4(x, (const uint8_t*)w.values, (const bf16*)w.scales, out, rows, N, K, w.group);
    }
}

}  // namespace

extern "C" {

struct LightningBlock {
    Weight qkv, gate, out, norm;
    const float *u, *slope;
    float* states;
    const int64_t* slots;
    const int32_t* starts;  // null: one row a sequence
    float* result;
    int64_t rows, count, heads, dim;
};

// result [rows][hidden] = out(norm(o) * sigmoid(gate(u))), o the lightning step of silu(qkv(u)).
void lightning_block(const LightningBlock* b, float eps) {
    const int64_t inner = b->heads * b->dim, rows = b->rows;
    const std::unique_ptr<float[]> memory(new float[rows * inner * 6]);
    float *qkv = memory.get(), *gate = qkv + rows * inner * 3, *o = gate + rows * inner, *normed = o + rows * inner;
    linear(b->u, b->qkv, qkv, rows);
    silu_f32(qkv, rows * inner * 3);
    lightning_decode_f32(qkv, qkv + b->dim, qkv + 2 * b->dim, b->slope, b->states, b->slots, b->starts, o, b->count,
                         b->heads, b->dim, 3 * inner, 3 * b->dim);
    linear(b->u, b->gate, gate, rows);
    if (b->norm.kind == F32)
        rms_norm_f32(o, (const float*)b->norm.values, gate, normed, rows, inner, eps);
    else
        rms_norm_bf16(o, (const bf16*)b->norm.values, gate, normed, rows, inner, eps);
    linear(normed, b->out, b->result, rows);
}

struct MoEBlock {
    Weight gate, w13, w2;
    const float* x;
    float *result, *probs, *weights;
    int64_t* ids;
    int64_t rows, top_k;
};

// The router's choice and the experts' results.
void moe_block(const MoEBlock* b) {
    const int64_t experts = b->gate.size_out, hidden = b->gate.size_in, width = b->w2.size_in;
    const std::unique_ptr<float[]> logits(new float[b->rows * experts]);
    linear(b->x, b->gate, logits.get(), b->rows);
    route_f32(logits.get(), b->probs, b->ids, b->weights, b->rows, experts, b->top_k);
    const Weight &w13 = b->w13, &w2 = b->w2;
    switch (w13.kind) {
        case F32:
            return experts_f32(b->x, (const float*)w13.values, (const float*)w2.values, b->ids, b->weights, b->result,
                               b->rows, b->top_k, experts, width, hidden);
        case BF16:
            return experts_bf16(b->x, (const bf16*)w13.values, (const bf16*)w2.values, b->ids, b->weights, b->result,
                                b->rows, b->top_k, experts, width, hidden);
        case INT8:
            return experts_int8(b->x, (const uint8_t*)w13.values, (const float*)w13.scales, (const uint8_t*)w2.values,
                                (const float*)w2.scales, b->ids, b->weights, b->result, b->rows, b->top_k, experts, width,
                                hidden);
        case INT4:
            return experts_int4(b->x, (const uint8_t*)w13.values, (const bf16*)w13.scales, (const uint8_t*)w2.values,
                                (const bf16*)w2.scales, b->ids, b->weights, b->result, b->rows, b->top_k, experts, width,
                                hidden, w13.group);
    }
}

}  // extern "C"
