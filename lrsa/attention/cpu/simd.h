// Vectors of a CPU, their exponential, and products of small matrices: all that kernel.cpp knows of the machine.
//
// REAL, float or double, is what is computed in.

#pragma once

#include <cstdint>
#include <type_traits>

using Real = REAL;

#if defined(__AVX512F__)
constexpr int BYTES = 64, WIDE = 4, TALL = 6;  // of a vector; vectors and rows of a product that stay in registers
#elif defined(__AVX__)
constexpr int BYTES = 32, WIDE = 2, TALL = 6;
#else
constexpr int BYTES = 16, WIDE = 4, TALL = 6;
#endif
constexpr int LANES = BYTES / sizeof(Real);

using Int = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
typedef Real Vec __attribute__((vector_size(BYTES), aligned(sizeof(Real)), may_alias));
typedef Int IntVec __attribute__((vector_size(BYTES), aligned(sizeof(Real)), may_alias));

static inline Vec splat(Real x) { return x - Vec{}; }
static inline Vec &vec(Real *x) { return *reinterpret_cast<Vec *>(x); }
static inline const Vec &vec(const Real *x) { return *reinterpret_cast<const Vec *>(x); }

constexpr int DEGREE = sizeof(Real) == 4 ? 7 : 13;

struct Taylor {  // of 2^x around 0
    Real terms[DEGREE + 1];

    constexpr Taylor() : terms{} {
        double term = 1;
        for (int n = 0; n <= DEGREE; n++) {
            terms[n] = Real(term);
            term *= 0.693147180559945309417232 / (n + 1);
        }
    }
};

// 2^x for x up to 127; 0 where it would be subnormal.
static inline Vec exp2(Vec x) {
    constexpr Taylor taylor;
    constexpr int mantissa = sizeof(Real) == 4 ? 23 : 52;
    constexpr Real low = sizeof(Real) == 4 ? -126 : -1022;
    constexpr Real round = 1.5 * (int64_t(1) << mantissa);  // adding it leaves whole numbers
    Vec shifted = x + round, rest = x - (shifted - round);
    Vec power = splat(taylor.terms[DEGREE]);
    for (int n = DEGREE - 1; n >= 0; n--) power = power * rest + taylor.terms[n];
    IntVec bits = (IntVec)power + ((IntVec)shifted << mantissa);
    return x >= low ? (Vec)bits : x < low ? Vec{} : x;  // NaN stays what it is
}

// C[i, n] (+)= sum over k of a(i, k) B[k, n] for MR rows and NV vectors; a(i, k) is A[i, k], or A[k, i] when TURNED.
template <int MR, int NV, bool TURNED>
static inline void corner(int depth, const Real *a, int64_t lda, const Real *b, int64_t ldb, Real *c, int64_t ldc,
                          bool add) {
    Vec sum[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) sum[i][j] = add ? vec(c + i * ldc + j * LANES) : Vec{};
    for (int k = 0; k < depth; k++) {
        Vec row[NV];
        for (int j = 0; j < NV; j++) row[j] = vec(b + k * ldb + j * LANES);
        for (int i = 0; i < MR; i++) {
            Vec factor = splat(TURNED ? a[k * lda + i] : a[i * lda + k]);
            for (int j = 0; j < NV; j++) sum[i][j] += factor * row[j];
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) vec(c + i * ldc + j * LANES) = sum[i][j];
}

template <int NV, bool TURNED>
static void strip(int rows, int depth, const Real *a, int64_t lda, const Real *b, int64_t ldb, Real *c, int64_t ldc,
                  bool add) {
    const int64_t step = TURNED ? 1 : lda;
    for (; rows >= TALL; rows -= TALL, a += TALL * step, c += TALL * ldc)
        corner<TALL, NV, TURNED>(depth, a, lda, b, ldb, c, ldc, add);
    for (; rows >= 2; rows -= 2, a += 2 * step, c += 2 * ldc) corner<2, NV, TURNED>(depth, a, lda, b, ldb, c, ldc, add);
    if (rows) corner<1, NV, TURNED>(depth, a, lda, b, ldb, c, ldc, add);
}

template <bool TURNED>
static void multiply(int rows, int columns, int depth, const Real *a, int64_t lda, const Real *b, int64_t ldb, Real *c,
                     int64_t ldc, bool add) {
    int j = 0;
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
        strip<WIDE, TURNED>(rows, depth, a, lda, b + j, ldb, c + j, ldc, add);
    for (; j < columns; j += LANES) strip<1, TURNED>(rows, depth, a, lda, b + j, ldb, c + j, ldc, add);
}
